"""Tables by every address: each operation works through each, credentials are renewed, secrets stay in."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import lance
import lance_namespace
import pyarrow as pa
import pytest
import ray
from lance.namespace import RestAdapter
from lance_namespace import errors as namespace_errors

import lance_ray
from lance_ray import (
    InvalidArgumentError,
    LanceRestConfig,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    catalog,
    plugins,
)
from lance_ray.catalog import CatalogClient, NamespaceRef
from lance_ray.errors import LanceRayError, UnsupportedCallError
from tests import azurite, behaviour, catalog_servers, catalogs
from tests.behaviour import ids, numbers
from tests.faults.stores import BUCKET, KEY_ID, S3, SECRET
from tests.leaks import secret

PASSWORD = secret("a catalog's password", "correct-horse-battery-staple")


@pytest.fixture
def rest(tmp_path: Path) -> Iterator[str]:
    """A REST server over a folder; its address."""
    adapter = RestAdapter("dir", {"root": str(tmp_path / "served")}, port=0)
    adapter.start()
    yield f"http://127.0.0.1:{adapter.port}"
    adapter.stop()


@pytest.fixture
def s3_rest(s3: S3) -> Iterator[str]:
    """A REST server over a bucket, which vends no credentials; its address."""
    options = {f"storage.{name}": value for name, value in s3.options().items()}
    adapter = RestAdapter("dir", {"root": f"s3://{BUCKET}/served{time.monotonic_ns()}", **options}, port=0)
    adapter.start()
    yield f"http://127.0.0.1:{adapter.port}"
    adapter.stop()


@pytest.fixture(params=[*behaviour.QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in behaviour.SLOW)])
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[behaviour.Address]:
    """The keywords that name a table which is not there yet."""
    name = request.param
    if name == "opened":
        yield behaviour.opened(str(tmp_path / "t"))
    elif name in catalog_servers.PLUGINS:
        with catalog_servers.running(name, tmp_path, request.getfixturevalue("s3")) as found:
            yield lambda: found.table("t")
    elif name == "azure":
        with azurite.running() as config:
            yield lambda: {"uri": f"az://{azurite.CONTAINER}/t", "io_config": lance_ray.IOConfig(azure=config)}
    else:
        monkeypatch.chdir(tmp_path)
        address = _address(name, request, tmp_path)
        yield lambda: dict(address)


def _address(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    root = str(tmp_path / "root")
    if name in ("rest", "rest uri"):
        server = request.getfixturevalue("rest")
        if name == "rest uri":
            return {"uri": "rest://space/t", "rest_config": LanceRestConfig(server, "key", 20.0, {"x-more": "1"})}
        return {"namespace_impl": "rest", "namespace_properties": {"uri": server}, "table_id": ["t"]}
    if name == "rest over s3":
        server = request.getfixturevalue("s3_rest")
        options = request.getfixturevalue("s3").options()
        return {"uri": "rest:///t", "rest_config": LanceRestConfig(server), "storage_options": options}
    if name.startswith("s3"):
        return _on_s3(name, request.getfixturevalue("s3"))
    own = {"root": root, "password": PASSWORD}
    in_root = {"namespace_impl": "dir", "namespace_properties": {"root": root}}
    found: dict[str, dict[str, Any]] = {
        "path": {"uri": f"{root}/t"},
        "relative": {"uri": "some/table"},
        "pathlib": {"uri": tmp_path / "t"},
        "file uri": {"uri": f"file://{root}/t"},
        "dir": {**in_root, "table_id": ["t"]},
        "multi-level dir": {**in_root, "table_id": ["a", "b", "t"]},
        "native object": {"namespace_impl": lance_namespace.connect("dir", {"root": root}), "table_id": ["t"]},
        "connected": {"namespace_impl": catalogs.Own(**own), "table_id": ["db", "t"]},
        "class path": {"namespace_impl": "tests.catalogs.Own", "namespace_properties": own, "table_id": ["t"]},
    }
    return found[name]


def _on_s3(name: str, s3: S3) -> dict[str, Any]:
    uri = f"s3://{BUCKET}/addressed{time.monotonic_ns()}"
    if name == "s3":
        return {"uri": uri, "storage_options": s3.options()}
    if name == "s3 io_config":
        config = lance_ray.S3Config(
            region_name="us-east-1",
            endpoint_url=s3.proxy.url,
            key_id=KEY_ID,
            access_key=SECRET,
            force_virtual_addressing=False,
        )
        return {"uri": uri.replace("s3:", "s3a:"), "io_config": lance_ray.IOConfig(s3=config)}
    client = {"endpoint_url": s3.proxy.url, "region_name": "us-east-1"}
    return {"uri": uri, "storage_options": {"key": KEY_ID, "secret": SECRET, "client_kwargs": client}}


@pytest.mark.ray
def test_every_operation_works_through_every_address(ray_session: object, at: behaviour.Address):
    for run in behaviour.OPERATIONS.values():
        run(at)


def test_the_suite_runs_every_function_that_takes_a_table():
    functions = {name: getattr(lance_ray, name) for name in lance_ray.__all__}
    takes = {name for name, found in functions.items() if callable(found) and "table_id" in parameters(found)}
    of_catalogs = {"drop_table", "register_table"}  # which have tests of their own
    assert takes - of_catalogs == takes & set(inspect.getsource(behaviour).replace("(", " ").replace(".", " ").split())


def parameters(function: Any) -> set[str]:
    try:
        names = set(inspect.signature(function).parameters)
        return names if "namespace_impl" in names else set()
    except ValueError:  # a class without its own
        return set()


def test_the_documentation_shows_the_suite_as_it_is():
    text = behaviour.DOCUMENT.read_text("utf-8")
    assert behaviour.documented(text) == text, "run: python -m tests.behaviour"


@pytest.mark.ray
def test_an_opened_dataset_names_its_table(ray_session: object, tmp_path: Path):
    dataset = lance.write_dataset(numbers(0, 10), str(tmp_path / "t.lance"))
    assert lance_ray.read_lance(dataset).count() == 10
    assert lance_ray.compact_database(namespace_impl="dir", namespace_properties={"root": str(tmp_path)}, database=[])


# What a catalog is for


def test_a_table_is_created_described_listed_and_dropped(rest: str):
    server = LanceRestConfig(rest)
    report = lance_ray.create_table("rest://space/t", numbers(0, 5), rest_config=server)
    assert (report.rows, report.version) == (5, 1)
    with pytest.raises(TableExistsError):
        lance_ray.create_table("rest://space/t", numbers(0, 5), rest_config=server)
    assert lance_ray.create_table("rest://space/t", numbers(5, 5), mode="append", rest_config=server).version == 2
    lance_ray.create_lance_table_rest(server, "space", "empty", numbers(0, 0).schema)
    lance_ray.create_lance_table_rest(rest_config=server, namespace="", table_name="top", schema=numbers(0, 0).schema)
    assert lance_ray.list_tables(["space"], rest_config=server) == [("space", "empty"), ("space", "t")]
    assert lance_ray.list_tables(rest_config=server) == [("top",)]
    empty = lance_ray.describe_table("rest://space/empty", rest_config=server)
    assert (empty.rows, empty.version, empty.schema) == (0, 1, numbers(0, 0).schema)
    assert "space.empty at " in str(empty)
    lance_ray.drop_table(["space", "t"], rest_config=server)
    with pytest.raises(TableNotFoundError):
        lance_ray.describe_table("rest://space/t", rest_config=server)
    with pytest.raises(TableNotFoundError):
        lance_ray.drop_table(["space", "t"], rest_config=server)


def test_a_table_that_exists_is_registered(tmp_path: Path, rest: str):
    server = LanceRestConfig(rest)
    lance.write_dataset(numbers(0, 3), str(tmp_path / "served" / "elsewhere"))
    lance_ray.connect(rest_config=server).create_namespace(lance_namespace.CreateNamespaceRequest(id=["space"]))
    found = lance_ray.register_lance_table_rest(server, namespace="space", table_name="t", table_uri="elsewhere")
    assert found.rows == 3
    with pytest.raises(TableExistsError):
        lance_ray.register_table("elsewhere", table_id=["space", "t"], rest_config=server)
    lance_ray.drop_table(["space", "t"], keep_files=True, rest_config=server)
    assert lance.dataset(str(tmp_path / "served" / "elsewhere")).count_rows() == 3


def test_a_catalog_without_a_call_for_it_registers_by_declaring(tmp_path: Path):
    own = catalogs.Own(str(tmp_path / "root"))
    lance.write_dataset(numbers(0, 3), str(tmp_path / "there"))
    found = lance_ray.register_table(str(tmp_path / "there"), table_id=["t"], namespace_impl=own)
    assert (found.rows, found.location) == (3, str(tmp_path / "there"))
    assert lance_ray.list_tables(namespace_impl=own) == [("t",)]
    with pytest.raises(UnsupportedCallError):
        lance_ray.drop_table(["t"], namespace_impl=own)


def test_a_declared_table_is_described_as_not_written(tmp_path: Path):
    own = catalogs.Own(str(tmp_path))
    own.declare_table(lance_namespace.DeclareTableRequest(id=["t"]))
    found = lance_ray.describe_table(namespace_impl=own, table_id=["t"])
    assert (found.version, found.rows) == (None, None)
    assert "declared, not written" in str(found)


@pytest.mark.parametrize(
    "data",
    [numbers(0, 4), numbers(0, 4).to_batches()[0], [numbers(0, 2), numbers(2, 2)], numbers(0, 4).to_reader()],
    ids=lambda item: type(item).__name__,
)
def test_arrow_data_of_any_form_becomes_a_table_without_ray(tmp_path: Path, data: Any):
    report = lance_ray.create_table(str(tmp_path / "t"), data, commit_message="made")
    assert report.rows == 4
    assert catalogs.tables_at(str(tmp_path / "t")) == numbers(0, 4).to_pylist()
    assert {path.name for path in (tmp_path / "t").iterdir()} >= {"data", "_versions"}


@pytest.mark.parametrize(("data", "schema"), [(None, None), (3, None), ([], None), ([3], None)])
def test_a_table_of_nothing_is_refused(tmp_path: Path, data: Any, schema: Any):
    with pytest.raises(InvalidArgumentError):
        lance_ray.create_table(str(tmp_path / "t"), data, schema=schema)
    assert not (tmp_path / "t" / "_versions").exists()


def test_versions_that_a_catalog_manages_are_committed_through_it(tmp_path: Path):
    properties = {"root": str(tmp_path), "table_version_tracking_enabled": "true", "ops_metrics_enabled": "true"}
    client = lance_ray.connect("dir", properties)
    lance_ray.create_table(None, numbers(0, 3), namespace_impl=client, table_id=["t"])
    lance_ray.create_table(None, numbers(3, 3), namespace_impl=client, table_id=["t"], mode="append")
    counts = client._inner.retrieve_ops_metrics()
    assert counts["create_table_version"] == 2
    assert lance_ray.describe_table(namespace_impl=client, table_id=["t"]).managed_versioning


# Addresses that cannot be

OWN = catalogs.Own("nowhere")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "uri"),
        ({"uri": "a", "namespace_impl": "dir"}, "uri"),
        ({"uri": "rest://space/t"}, "rest_config"),
        ({"uri": "rest://space/t", "rest_config": {"base_url": "http://x"}}, "rest_config"),
        ({"uri": "rest://", "rest_config": LanceRestConfig("http://x")}, "uri"),
        ({"uri": "rest://space/t", "rest_config": LanceRestConfig("http://x"), "table_id": ["t"]}, "uri"),
        ({"uri": "a", "rest_config": LanceRestConfig("http://x")}, "rest_config"),
        ({"namespace_impl": object(), "table_id": ["t"]}, "namespace_impl"),
        (
            {"namespace_impl": catalogs.Own("r"), "namespace_properties": {"a": "b"}, "table_id": ["t"]},
            "namespace_properties",
        ),
        ({"namespace_impl": "nope", "table_id": ["t"]}, "namespace_impl"),
        ({"namespace_impl": "no.such.Namespace", "table_id": ["t"]}, "namespace_impl"),
        ({"namespace_impl": "dir", "table_id": ["t"]}, "namespace_impl"),
        ({"namespace_impl": "dir", "table_id": []}, "table_id"),
        ({"uri": "a", "storage_options": {}, "io_config": lance_ray.IOConfig()}, "io_config"),
        ({"uri": "a", "storage_options": 3}, "storage_options"),
        ({"uri": "s3://b/t", "io_config": lance_ray.OSSConfig(endpoint="http://x")}, "io_config"),
    ],
    ids=str,
)
def test_an_address_that_cannot_be_is_refused_by_name(given: dict[str, Any], named: str):
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.read_lance(**given)
    assert caught.value.parameter == named


@pytest.mark.parametrize("impl", ["glue", "hive2", "unity", "polaris", "dlf"])
def test_a_catalog_whose_package_is_missing_says_what_to_install(impl: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(plugins.PACKAGES, impl, "no_such_package")
    catalog._client.cache_clear()
    package = "lance-dlf" if impl == "dlf" else rf"lance-namespace-impls\[{impl}\]"
    with pytest.raises(InvalidArgumentError, match=rf"pip install '{package}'"):
        lance_ray.connect(impl, {"uri": "http://x"})


@pytest.mark.parametrize("given", [{"base_url": ""}, {"base_url": "host"}, {"base_url": "http://x", "timeout": 0}])
def test_a_server_that_cannot_be_is_refused(given: dict[str, Any]):
    with pytest.raises(InvalidArgumentError):
        LanceRestConfig(**given)


# What catalogs raise


class TableNotFoundException(Exception):  # noqa: N818 - the name is what it is about
    """Named as one of the plugins names it."""


class EntityNotFoundException(Exception):  # noqa: N818 - as botocore names it
    """Of Glue."""


class InternalException(Exception):  # noqa: N818 - as the plugins name it
    """Of Unity and Polaris."""


CLIENT_ERROR = botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "GetTable")
ENDPOINT_ERROR = botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("raised", "error", "kind"),
    [
        (namespace_errors.TableNotFoundError("t"), TableNotFoundError, None),
        (RuntimeError("Table does not exist: db.t"), TableNotFoundError, None),
        (ValueError("Table ['db', 't'] does not exist"), TableNotFoundError, None),
        (TableNotFoundException("t"), TableNotFoundError, None),
        (
            namespace_errors.InternalError("Failed to parse error response: status=404 Not Found"),
            StorageError,
            "missing",
        ),
        (namespace_errors.InternalError("Failed to parse error response: status=503 Busy"), StorageError, "transient"),
        (namespace_errors.InternalError("Failed to parse error response: status=403 No"), StorageError, "denied"),
        (namespace_errors.ThrottlingError("slow"), StorageError, "transient"),
        (namespace_errors.NamespaceNotFoundError("db"), TableNotFoundError, None),
        (CLIENT_ERROR, StorageError, "denied"),
        (ENDPOINT_ERROR, StorageError, "unreachable"),
        (KeyError("StorageDescriptor"), StorageError, "unreachable"),
        (RuntimeError("Namespace does not exist: db"), StorageError, "missing"),
        (RuntimeError("Failed to describe table: Table does not exist"), StorageError, "unreachable"),
        (namespace_errors.TableNotFoundError("Table db.t is not a lance table (type=)"), InvalidArgumentError, None),
        (RuntimeError("Table is not a Lance table: db.t"), InvalidArgumentError, None),
        (EntityNotFoundException("Database db not found."), StorageError, "missing"),
        (InternalException("Failed to declare table: HTTP 503: busy"), StorageError, "transient"),
        (InternalException("Failed to declare table: HTTP 404: no schema"), StorageError, "missing"),
        (InternalException('HTTP 400: {"error_code":"TABLE_ALREADY_EXISTS"}'), TableExistsError, None),
    ],
    ids=lambda item: str(item)[:60],
)
def test_only_a_missing_table_is_a_missing_table(raised: Exception, error: type[Exception], kind: str | None):
    with pytest.raises(error) as caught:
        lance_ray.describe_table(namespace_impl=catalogs.Failing(raised), table_id=["db", "t"])
    assert getattr(caught.value, "kind", None) == kind
    if error is StorageError:  # and it is not taken for a table that may be created
        with pytest.raises(StorageError):
            lance_ray.create_table(None, numbers(0, 1), namespace_impl=catalogs.Failing(raised), table_id=["db", "t"])


def test_a_catalog_that_does_not_answer_is_not_waited_for_for_ever():
    ref = NamespaceRef("Hanging", timeout=0.3, token="hanging", connected=catalogs.Hanging())
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer within 0\.3 s"):
        lance_ray.describe_table(namespace_impl=ref, table_id=["t"])
    assert time.monotonic() - started < 5


def test_a_table_that_the_catalog_is_silent_on_holds_up_no_other():
    class Half(catalogs.Hanging):
        def describe_table(self, request: Any) -> Any:
            if request.id == ["slow"]:
                super().describe_table(request)
            return lance_namespace.DescribeTableResponse(location="somewhere")

    ref = NamespaceRef("Half", timeout=5.0, token="half", connected=Half())
    client = ref.client()
    assert client is not None

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            client.describe_table({"id": ["slow"]})

    waiting = threading.Thread(target=ask)
    waiting.start()
    started = time.monotonic()
    while ("slow", "") not in client._asking and time.monotonic() - started < 5:
        time.sleep(0.01)
    assert client.describe_table({"id": ["quick"]}).location == "somewhere"
    assert time.monotonic() - started < 4
    waiting.join()


# Credentials


@pytest.fixture
def vending(s3: S3, tmp_path: Path) -> dict[str, Any]:
    """A catalog that vends keys which last two seconds, of a store that refuses old ones."""
    s3.proxy.admits = catalogs.is_alive
    properties = {
        "root": str(tmp_path / "entries"),
        "bucket": BUCKET,
        "endpoint": s3.proxy.url,
        "life": "2",
        "log": str(tmp_path / "asked"),
    }
    return {"namespace_impl": "tests.catalogs.Vending", "namespace_properties": properties}


def asked(vending: dict[str, Any]) -> int:
    return len(Path(vending["namespace_properties"]["log"]).read_text().splitlines())


def slowly(table: pa.Table) -> pa.Table:
    time.sleep(0.4)
    return table


def refused(s3: S3) -> list[Any]:
    return [request for request in s3.proxy.requests if request.status == 403]


@pytest.mark.ray
def test_credentials_are_renewed_in_the_middle_of_a_write_a_read_and_a_compaction(
    ray_session: object, s3: S3, vending: dict[str, Any]
):
    table = {**vending, "table_id": [f"vended{time.monotonic_ns()}"]}
    parts = [numbers(first, 50) for first in range(0, 500, 50)]
    slow = ray.data.from_arrow(parts).map_batches(slowly, batch_format="pyarrow", batch_size=None)
    report = lance_ray.write_lance(slow, mode="create", max_rows_per_file=50, **table)
    assert report.rows == 500
    ds = lance_ray.read_lance(**table, override_num_blocks=10, columns=["id"])
    assert ids(ds.map_batches(slowly, batch_format="pyarrow", batch_size=None)) == list(range(500))
    time.sleep(2.2)  # what the last call vended has ended by now
    compacted = lance_ray.compact_files(**table, micro_commit_batch_size=1, progress=False)
    assert compacted is not None
    assert ids(lance_ray.read_lance(**table, columns=["id"])) == list(range(500))
    assert refused(s3) == []
    assert asked(vending) < 60


def test_a_process_asks_once_for_all_that_wait(s3: S3, vending: dict[str, Any]):
    table = {**vending, "table_id": [f"shared{time.monotonic_ns()}"]}
    lance_ray.create_table(None, numbers(0, 100), **table)
    before = asked(vending)
    client = lance_ray.connect(vending["namespace_impl"], vending["namespace_properties"])
    request = {"id": table["table_id"], "vend_credentials": True}
    for _ in range(20):
        assert client.describe_table(request).location
    assert asked(vending) <= before + 1


def test_a_namespace_object_that_cannot_be_sent_must_not_vend_what_expires(s3: S3, vending: dict[str, Any]):
    class Local(catalogs.Vending):
        def __reduce__(self) -> Any:
            raise TypeError("holds a connection")

    lance_ray.create_table(None, numbers(0, 3), **vending, table_id=["sent"])
    with pytest.raises(InvalidArgumentError, match="cannot be sent to workers"):
        lance_ray.describe_table(namespace_impl=Local(**vending["namespace_properties"]), table_id=["sent"])


def test_clients_with_other_credentials_are_told_apart_and_show_none():
    first, second = (
        NamespaceRef("rest", (("header.x-api-key", key), ("uri", "http://x"))) for key in ("k-one-1", "k-two-2")
    )
    ids = {client.namespace_id() for client in (first.client(), second.client()) if client is not None}
    assert len(ids) == 2
    assert not any("k-one-1" in text or "k-two-2" in text for text in ids)


@pytest.mark.parametrize("life", [0.5, 5.0, 100.0, 3600.0])
def test_credentials_are_renewed_before_they_end(life: float):
    assert 0 < catalog.refresh_margin(life) <= min(60, life / 5)


# Secrets


def test_no_secret_of_a_catalog_comes_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = LanceRestConfig("http://127.0.0.1:9", api_key=PASSWORD, headers={"x-token": PASSWORD})
    client = CatalogClient(NamespaceRef("tests.catalogs.Own", (("password", PASSWORD),)), catalogs.Own("r", PASSWORD))
    for value in (config, config.namespace(), client, client.ref):
        assert PASSWORD not in repr(value)
    given = {"root": str(tmp_path), "password": PASSWORD}
    own: dict[str, Any] = {"namespace_impl": "tests.catalogs.Own", "namespace_properties": given}
    for call in (
        lambda: lance_ray.describe_table("rest://a/t", rest_config=config),
        lambda: lance_ray.describe_table(**own, table_id=["t"]),
        lambda: client.describe_table({"id": ["t"]}),
    ):
        with pytest.raises((LanceRayError, RuntimeError)) as caught:
            call()
        assert PASSWORD not in f"{caught.value!r} {caught.value.__cause__!r} {caught.getrepr(style='short')}"
    assert PASSWORD not in "".join(capfd.readouterr())


def test_a_connected_namespace_travels_as_what_it_was_connected_with(tmp_path: Path):
    client = lance_ray.connect("dir", {"root": str(tmp_path)})
    assert pickle.loads(pickle.dumps(client)) is client
    own = NamespaceRef.fold(catalogs.Own(str(tmp_path)), None)
    here = own.client()
    assert here is not None
    assert pickle.loads(pickle.dumps(own)).client().namespace_id() == here.namespace_id()
    native = NamespaceRef.fold(lance_namespace.connect("dir", {"root": str(tmp_path)}), None)
    there = pickle.loads(pickle.dumps(native))
    assert (there, there.client()) == (native, None)
