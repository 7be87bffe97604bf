"""The plugins of catalogs, with their real client packages: what each answers becomes the same result or error."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import lance_namespace
import pyarrow as pa
import pytest
import ray

import lance_ray
from lance_ray import InvalidArgumentError, StorageError, TableExistsError, TableNotFoundError, UnsupportedCallError
from lance_ray.catalog import NamespaceRef
from tests import catalogs, leaks
from tests.behaviour import ids, numbers
from tests.catalog_servers import DLF_SECRET, PAGE, PLUGINS, TOKEN, Catalog, running
from tests.faults.stores import BUCKET, KEY_ID, S3, SECRET


@pytest.fixture(params=PLUGINS)
def catalog(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> Iterator[Catalog]:
    """A catalog of each kind, with an empty database."""
    with running(request.param, tmp_path, s3) as found:
        yield found


def rows(*values: int) -> pa.Table:
    return pa.table({"id": values})


def test_a_table_is_declared_once_and_written_described_and_listed(catalog: Catalog):
    at = catalog.table("t")
    with pytest.raises(TableNotFoundError):
        lance_ray.describe_table(**at)
    assert lance_ray.create_table(data=rows(1, 2), **at).version == 1
    with pytest.raises(TableExistsError):
        lance_ray.create_table(data=rows(9), **at)
    assert lance_ray.create_table(data=rows(3), mode="append", **at).version == 2
    found = lance_ray.describe_table(**at)
    assert (found.table_id, found.rows, found.version) == ((*catalog.database, "t"), 3, 2)
    if catalog.tables is not None:
        calls = [call for call in catalog.tables.asked if call.startswith("POST") and call.endswith("tables")]
        assert len(calls) == (0 if catalog.impl.startswith("hive") else 1)  # of metastores calls have other names


def test_every_table_is_listed_however_long_the_pages_are(catalog: Catalog):
    names = [f"t{number}" for number in range(2 * PAGE + 1)]
    client = lance_ray.connect(**catalog.namespace)
    for name in names:
        client.declare_table(lance_namespace.DeclareTableRequest(id=[*catalog.database, name]))
    listed = lance_ray.list_tables(catalog.database, **catalog.namespace)
    assert sorted(listed) == [(*catalog.database, name) for name in names]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("catalog", ["dlf", "unity"], indirect=True)
def test_a_database_is_compacted_to_its_last_table(ray_session: object, catalog: Catalog):
    names = [f"t{number}" for number in range(2 * PAGE + 1)]
    for name in names:
        for mode in ("create", "append"):
            lance_ray.create_table(data=rows(1, 2), mode=mode, **catalog.table(name))
    reports = lance_ray.compact_database(
        database=list(catalog.database), storage_options=catalog.storage_options, **catalog.namespace
    )
    assert len(reports) == len(names)
    assert [len(lance_ray.table_health(**catalog.table(name)).fragments) for name in names] == [1] * len(names)


def test_a_database_that_is_not_there_is_no_table_to_create(catalog: Catalog):
    elsewhere = [*catalog.database[:-1], "nowhere"]
    with pytest.raises(TableNotFoundError):
        lance_ray.describe_table(**catalog.table("t") | {"table_id": [*elsewhere, "t"]})
    with pytest.raises(StorageError) as caught:
        lance_ray.create_table(data=rows(1), **catalog.table("t") | {"table_id": [*elsewhere, "t"]})
    assert caught.value.kind == "missing"
    with pytest.raises(StorageError) as caught:
        lance_ray.list_tables(elsewhere, **catalog.namespace)
    assert caught.value.kind == ("unreachable" if catalog.impl.startswith("hive") else "missing")


@pytest.mark.parametrize("catalog", ["glue", "unity", "hive2", "hive3"], indirect=True)  # the others take any id
def test_an_id_of_too_many_levels_is_refused_by_name(catalog: Catalog):
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.create_table(data=rows(1), **catalog.table("t") | {"table_id": ["a", "b", "c", "d", "t"]})
    assert caught.value.parameter == "table_id"


@pytest.mark.parametrize("mode", ["create", "overwrite", "append"])
def test_a_table_of_another_format_is_never_replaced(catalog: Catalog, s3: S3, mode: str):
    lance_ray.create_table(data=rows(1), **catalog.table("t"))
    turn_into_csv(catalog, s3)
    with pytest.raises(InvalidArgumentError, match=r"(?i)not a lance table"):
        lance_ray.create_table(data=rows(2), mode=mode, **catalog.table("t"))


def turn_into_csv(catalog: Catalog, s3: S3) -> None:
    """Make the catalog say that the table is of another format."""
    if catalog.impl == "glue":
        keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        glue = boto3.client("glue", endpoint_url=s3.server, **keys)
        (database,) = catalog.database
        glue.update_table(DatabaseName=database, TableInput={"Name": "t", "Parameters": {"table_type": "CSV"}})
        return
    assert catalog.tables is not None
    (table,) = (table for tables in catalog.tables.namespaces.values() for table in tables.values())
    if catalog.impl == "dlf":
        table["type"] = "table"
    elif catalog.impl == "unity":
        table["properties"] = {}
    elif catalog.impl == "polaris":
        table["format"] = "csv"
    else:
        table.parameters = {"table_type": "csv"}


@pytest.mark.parametrize("catalog", ["dlf", "unity", "polaris"], indirect=True)  # which can be told to fail
def test_a_catalog_that_fails_creates_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    assert catalog.tables is not None
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    lance_ray.connect(**catalog.namespace)
    catalog.tables.fail = 500
    for call in (lance_ray.describe_table, lambda **at: lance_ray.create_table(data=rows(1), mode="overwrite", **at)):
        with pytest.raises(StorageError) as caught:
            call(**catalog.table("t"))
        assert caught.value.kind == "transient"
    assert not any(catalog.tables.namespaces.values())


@pytest.mark.parametrize(
    ("impl", "change"),
    [
        ("unity", {"unity.auth_token": "wrong"}),
        ("polaris", {"polaris.auth_token": "wrong"}),
        ("dlf", {"dlf.access-key-id": "wrong"}),
    ],
)
def test_a_catalog_that_refuses_says_denied(s3: S3, tmp_path: Path, impl: str, change: dict[str, str]):
    with running(impl, tmp_path, s3) as catalog:
        at = catalog.table("t") | {"namespace_properties": catalog.properties | change}
        with pytest.raises(StorageError) as caught:
            lance_ray.create_table(data=rows(1), **at)
        assert caught.value.kind == "denied"


@pytest.mark.parametrize(
    ("impl", "properties"),
    [
        ("hive2", {"uri": "thrift://127.0.0.1:9"}),
        ("unity", {"unity.endpoint": "http://127.0.0.1:9", "unity.max_retries": "0"}),
        ("polaris", {"polaris.endpoint": "http://127.0.0.1:9", "polaris.max_retries": "0"}),
        ("dlf", {"uri": "http://127.0.0.1:9", "warehouse": "w", "token.provider": "bear", "token": TOKEN}),
        ("glue", {"endpoint": "http://127.0.0.1:9", "region": "us-east-1", "max_retries": "1"}),
    ],
)
def test_a_catalog_that_is_not_there_is_unreachable(impl: str, properties: dict[str, str]):
    if impl == "glue":
        properties |= {"access_key_id": KEY_ID, "secret_access_key": SECRET}
    table_id = ["db", "t"] if impl in ("hive2", "glue", "dlf") else ["main", "db", "t"]
    with pytest.raises(StorageError) as caught:
        lance_ray.create_table(data=rows(1), namespace_impl=impl, namespace_properties=properties, table_id=table_id)
    assert caught.value.kind == "unreachable"
    assert leaks.names_in(f"{caught.value!r} {caught.value.__cause__!r}") == set()


def test_a_catalog_that_says_nothing_while_it_is_connected_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        properties = {"uri": f"http://127.0.0.1:{silent.getsockname()[1]}", "warehouse": "w"}
        pairs = tuple((properties | {"token.provider": "bear", "token": TOKEN}).items())
        started = time.monotonic()
        with pytest.raises(StorageError, match="no answer within"):
            NamespaceRef("dlf", pairs, timeout=0.3).client()
        assert time.monotonic() - started < 5


def test_properties_that_are_missing_are_an_argument_at_fault():
    with pytest.raises(InvalidArgumentError, match=r"unity\.endpoint"):
        lance_ray.connect("unity", {})
    with pytest.raises(InvalidArgumentError, match="Warehouse"):
        lance_ray.connect("dlf", {"uri": "http://127.0.0.1:9", "token.provider": "bear", "token": TOKEN})


def test_a_table_leaves_its_catalog_the_way_that_the_catalog_has(catalog: Catalog):
    lance_ray.create_table(data=rows(1), **catalog.table("t"))
    table_id = [*catalog.database, "t"]
    location = lance_ray.describe_table(**catalog.table("t")).location
    can_keep, can_drop = catalog.impl != "dlf", catalog.impl in ("dlf", "hive2", "hive3")
    for able, keep in ((can_keep, True), (can_drop, False)):
        if not able:
            with pytest.raises(UnsupportedCallError):
                lance_ray.drop_table(table_id, keep_files=keep, **catalog.namespace)
            continue
        lance_ray.drop_table(table_id, keep_files=keep, **catalog.namespace)
        with pytest.raises(TableNotFoundError):
            lance_ray.describe_table(**catalog.table("t"))
        with pytest.raises(TableNotFoundError):
            lance_ray.drop_table(table_id, keep_files=keep, **catalog.namespace)
        if catalog.impl != "dlf":
            registered = lance_ray.register_table(location, table_id=table_id, **catalog.namespace)
            assert registered.location == location


def test_calls_at_the_same_time_do_not_take_each_others_connection(s3: S3, tmp_path: Path):
    with running("hive2", tmp_path, s3) as catalog:
        names = [f"t{number}" for number in range(4)]
        for name in names:
            lance_ray.create_table(data=rows(*range(len(name) + int(name[1:]))), **catalog.table(name))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: lance_ray.describe_table(**catalog.table(name)), names * 8))
        assert [(item.table_id[-1], item.rows) for item in found] == [(name, 2 + int(name[1:])) for name in names * 8]


def test_dlf_needs_nothing_in_the_environment_and_shows_no_secret(s3: S3, tmp_path: Path):
    before = dict(os.environ)
    with running("dlf", tmp_path, s3) as catalog:
        lance_ray.create_table(data=rows(1, 2), **catalog.table("t"))
        described = lance_ray.describe_table(**catalog.table("t"))
        assert described.location.startswith(f"oss://{BUCKET}/")
        assert set(described.storage_option_names) >= {
            "oss_access_key_id",
            "oss_secret_access_key",
            "oss_security_token",
            "oss_endpoint",
            "expires_at_millis",
        }
        assert leaks.names_in(f"{described!r} {described}") == set()
        assert leaks.names_in(str(catalog.properties)) == {leaks.name_of(DLF_SECRET)}  # there was something to show
    assert dict(os.environ) == before


def slowly(table: pa.Table) -> pa.Table:
    time.sleep(0.4)
    return table


@pytest.mark.ray
@pytest.mark.slow
def test_what_dlf_vends_is_renewed_in_the_middle_of_a_write_a_read_and_a_compaction(
    ray_session: object, s3: S3, tmp_path: Path
):
    s3.proxy.admits = catalogs.is_alive
    with running("dlf", tmp_path, s3, life=2.0) as catalog:
        at = catalog.table("t")
        parts = [numbers(first, 50) for first in range(0, 500, 50)]
        slow = ray.data.from_arrow(parts).map_batches(slowly, batch_format="pyarrow", batch_size=None)
        assert lance_ray.write_lance(slow, mode="create", max_rows_per_file=50, **at).rows == 500
        ds = lance_ray.read_lance(**at, override_num_blocks=10, columns=["id"])
        assert ids(ds.map_batches(slowly, batch_format="pyarrow", batch_size=None)) == list(range(500))
        time.sleep(2.2)  # what the last call vended has ended by now
        assert lance_ray.compact_files(**at, micro_commit_batch_size=1, progress=False) is not None
        assert ids(lance_ray.read_lance(**at, columns=["id"])) == list(range(500))
        assert [request for request in s3.proxy.requests if request.status == 403] == []
        assert catalog.tables is not None
        assert sum(call.endswith("/token") for call in catalog.tables.asked) < 60
