"""Which table: addresses fold to values that mean the same on every node, show no secret and stay small."""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import lance_namespace
import pyarrow as pa
import pytest
from lance.namespace import RestAdapter

from lance_ray import catalog, table
from lance_ray.errors import (
    InvalidArgumentError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    VersionNotFoundError,
)
from lance_ray.ledger import JobRef
from lance_ray.options import OpenOptions, WriteOptions, normalize_uri
from lance_ray.table import PinnedTable, TableRef, WriteTarget, session
from lance_ray.write import WriteSpec
from tests.blocks import SECRET, ids_of, rows, versions


def fold(uri: Any = None, **keywords: Any) -> TableRef:
    """The value for keywords, the address among them."""
    rest = {key: keywords.pop(key) for key in ("version", "asof", "branch", "open_options") if key in keywords}
    return TableRef.fold(uri, keywords, **rest)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A table of three versions: 2 rows, then 3, then 4."""
    path = str(tmp_path / "table")
    lance.write_dataset(rows(0, 2), path)
    for number in (2, 3):
        lance.write_dataset(rows(number, 1), path, mode="append")
    return path


# Addresses


def test_paths_of_every_kind_become_one_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spelled = ["~/a b/t", "a b/t", "./a b/t", Path("a b/t"), f"file://{tmp_path}/a%20b/t", str(tmp_path / "a b" / "t")]
    assert {normalize_uri(item) for item in spelled} == {f"{tmp_path}/a b/t"}


def test_the_root_of_a_catalog_of_folders_is_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for root in ("catalog", "./catalog", Path("catalog"), f"file://{tmp_path}/catalog"):
        found = fold(namespace_impl="dir", namespace_properties={"root": root, "other": "x"}, table_id=["t"])
        assert found.namespace is not None
        assert dict(found.namespace.properties) == {"root": f"{tmp_path}/catalog", "other": "x"}
    far = fold(namespace_impl="dir", namespace_properties={"root": "s3://bucket/catalog"}, table_id=["t"])
    assert far.namespace is not None
    assert dict(far.namespace.properties) == {"root": "s3://bucket/catalog"}


@pytest.mark.parametrize("address", ["s3://bucket/a%20b/t", "gs://bucket/t", "az://container/t", "memory://t"])
def test_addresses_of_stores_stay_as_they_are(address: str):
    assert normalize_uri(address) == address


@pytest.mark.parametrize("address", ["", "  ", 7, b"bytes", ["a"]])
def test_what_is_no_address_is_refused(address: Any):
    with pytest.raises(InvalidArgumentError) as caught:
        fold(address)
    assert caught.value.parameter == "uri"


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"uri": "t", "table_id": ["t"]},
        {"uri": "t", "namespace_impl": "dir"},
        {"uri": "t", "namespace_properties": {"root": "x"}},
        {"namespace_impl": "dir"},
        {"table_id": ["t"]},
        {"namespace_properties": {"root": "x"}},
    ],
)
def test_both_or_neither_of_uri_and_namespace_is_refused(keywords: dict[str, Any]):
    with pytest.raises(InvalidArgumentError) as caught:
        fold(**keywords)
    assert caught.value.parameter == "uri"


@pytest.mark.parametrize("table_id", [[], [""], [1], [["a"]], ""])
def test_a_table_id_is_a_list_of_names(table_id: Any):
    with pytest.raises(InvalidArgumentError) as caught:
        fold(namespace_impl="dir", table_id=table_id)
    assert caught.value.parameter == "table_id"


def test_an_opened_dataset_is_the_version_that_it_shows(uri: str):
    assert fold(lance.dataset(uri, 2)).pin().version == 2
    assert fold(lance.dataset(uri, 2), version=1).pin().version == 1
    assert fold(lance.dataset(uri, 2)).pin().uri == uri


# Pinning


@pytest.mark.parametrize(("asked", "found"), [(None, 3), (1, 1), ("release", 2)])
def test_a_number_a_tag_or_nothing_becomes_a_number(uri: str, asked: Any, found: int):
    lance.dataset(uri).tags.create("release", 2)
    pinned = fold(uri, version=asked).pin()
    assert pinned.version == found
    assert pinned.open().version == found


def test_a_pinned_table_stays_at_its_version_while_others_write(uri: str):
    pinned = fold(uri).pin()
    lance.write_dataset(rows(4, 5), uri, mode="append")
    assert pinned.open().count_rows() == 4
    assert pickle.loads(pickle.dumps(pinned)).open().count_rows() == 4
    assert pinned.open_latest().count_rows() == 9


def test_asof_is_inclusive(uri: str):
    made: list[dict[str, Any]] = [dict(item) for item in lance.dataset(uri).versions()]
    stamps = [item["timestamp"].astimezone() for item in made]
    assert [fold(uri, asof=stamp).pin().version for stamp in stamps] == [1, 2, 3]
    assert fold(uri, asof=stamps[1] - dt.timedelta(microseconds=1)).pin().version == 1
    assert fold(uri, asof=stamps[2] + dt.timedelta(days=1)).pin().version == 3
    assert fold(uri, asof=stamps[1].astimezone(dt.timezone(dt.timedelta(hours=7))).isoformat()).pin().version == 2


def test_a_time_before_the_first_version_has_none(uri: str):
    with pytest.raises(VersionNotFoundError):
        fold(uri, asof="1999-12-31").pin()


def test_a_branch_is_read_beside_the_main_line(uri: str):
    lance.write_dataset(rows(100, 1), lance.dataset(uri).create_branch("draft", 2), mode="append")
    assert fold(uri, branch="draft").pin().open().to_table()["id"].to_pylist() == [0, 1, 2, 100]
    assert fold(uri, branch="main").pin().open().count_rows() == 4
    with pytest.raises(VersionNotFoundError, match="no such branch"):
        fold(uri, branch="drift").pin()


@pytest.mark.parametrize("version", [9, "v9"])
def test_a_missing_version_is_told_from_a_missing_table(uri: str, tmp_path: Path, version: Any):
    with pytest.raises(VersionNotFoundError):
        fold(uri, version=version).pin()
    with pytest.raises(TableNotFoundError):
        fold(tmp_path / "none", version=version).pin()


# Values


SECRETIVE: dict[str, Any] = {
    "storage_options": {"aws_secret_access_key": SECRET, "timeout": "5s"},
    "base_store_params": {"s3://other": {"azure_storage_sas_token": SECRET}},
}


def secretive_values() -> list[Any]:
    ref = fold("s3://bucket/t", **SECRETIVE)
    named = fold(
        namespace_impl="rest", namespace_properties={"headers.Authorization": SECRET}, table_id=["t"], **SECRETIVE
    )
    pinned = PinnedTable(ref, "s3://bucket/t", 3, ref.storage_options)
    other = PinnedTable(named, "s3://bucket/t", 3, named.storage_options)
    target = WriteTarget(pinned, other, "append")
    spec = WriteSpec(target, WriteOptions("append"), None, JobRef(pinned, "job"))
    location = catalog.TableLocation("u", (("k", SECRET),))
    signed = fold(f"s3://AKIA:{SECRET}@bucket/t")
    return [
        *[ref, named, named.namespace, pinned, other, target, spec, spec.job, location],
        *[signed, PinnedTable(signed, f"s3://AKIA:{SECRET}@bucket/t", 3)],
    ]


@pytest.mark.parametrize("value", secretive_values(), ids=lambda value: type(value).__name__)
def test_no_secret_is_in_a_repr(value: Any):
    assert SECRET not in f"{value!r} {value!s} {[value]}"


@pytest.mark.parametrize("value", secretive_values(), ids=lambda value: type(value).__name__)
def test_values_travel_and_compare_and_hash(value: Any):
    came = pickle.loads(pickle.dumps(value))
    assert came == value
    assert hash(came) == hash(value)


def test_the_cache_key_tells_credentials_apart_and_shows_none():
    pinned = [
        PinnedTable(fold("s3://b/t"), "s3://b/t", 1, (("aws_secret_access_key", key),)) for key in (SECRET, "other-key")
    ]
    assert pinned[0].key != pinned[1].key
    assert SECRET not in pinned[0].key


def test_the_address_for_messages_shows_where_but_no_password():
    assert fold("s3://AKIA:some/secret@bucket/t").target == "s3://AKIA:***@bucket/t"
    assert fold("abfss://container@account.dfs.core.windows.net/t").target.startswith("abfss://container@account")


def test_every_place_of_a_secret_is_known_to_messages():
    ref = fold(
        namespace_impl="rest", namespace_properties={"headers.Authorization": "one-secret"}, table_id=["t"], **SECRETIVE
    )
    pinned = PinnedTable(ref, "s3://b/t", 1, (("aws_session_token", "two-secret"), ("timeout", "no-secret")))
    assert {"one-secret", "two-secret", SECRET} == set(pinned.secrets)


def test_what_is_shipped_does_not_grow_with_the_table(tmp_path: Path):
    sizes = []
    for count in (1, 400):
        path = str(tmp_path / f"{count:03}")
        lance.write_dataset(rows(0, count), path, max_rows_per_file=1)
        pinned = fold(path).pin()
        assert len(pinned.open().get_fragments()) == count
        sizes.append(len(pickle.dumps(pinned)))
    assert sizes[0] == sizes[1] < 1000


# What a process keeps


def same_session(first: lance.LanceDataset, second: lance.LanceDataset) -> bool:
    session: Any = first.session()
    return bool(session.is_same_as(second.session()))


def test_a_process_opens_a_version_once(uri: str):
    pinned = fold(uri).pin()
    assert pinned.open() is pinned.open() is pickle.loads(pickle.dumps(pinned)).open()


def test_all_tables_of_a_process_share_one_session(uri: str, tmp_path: Path):
    other = str(tmp_path / "other")
    lance.write_dataset(rows(0, 1), other)
    first, second = fold(uri).pin().open(), fold(other).pin().open_latest()
    assert same_session(first, second)
    assert session() is session()


def test_other_cache_sizes_have_another_session():
    assert session(1 << 20, 1 << 20) is session(1 << 20, 1 << 20)
    assert session(1 << 20, 1 << 20) is not session()


def test_the_caches_are_bounded(tmp_path: Path):
    for number in range(table._MAX_OPEN_DATASETS + 3):
        lance.write_dataset(rows(0, 1), str(tmp_path / f"{number}"))
        fold(tmp_path / f"{number}").pin().open()
        session(1000 + number)
    assert len(table._OPENED._items) == table._MAX_OPEN_DATASETS
    assert len(table._SESSIONS._items) == table._MAX_SESSIONS


def test_open_options_reach_the_engine_and_part_the_cache(uri: str):
    plain = fold(uri).pin()
    sized = fold(uri, open_options=OpenOptions(index_cache_size_bytes=1 << 20)).pin()
    assert plain.open() is not sized.open()
    assert not same_session(plain.open(), sized.open())


# Namespaces


@pytest.fixture(params=["dir", "rest"])
def namespace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Keywords that name a namespace whose tables lie below ``tmp_path``."""
    if request.param == "dir":
        yield {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}}
        return
    with RestAdapter("dir", {"root": str(tmp_path)}, port=0) as server:
        yield {"namespace_impl": "rest", "namespace_properties": {"uri": f"http://127.0.0.1:{server.port}"}}


def test_a_new_table_is_declared_and_found_again(namespace: dict[str, Any]):
    ref = fold(table_id=["t"], **namespace)
    with pytest.raises(TableNotFoundError):
        ref.pin()
    target = WriteTarget.resolve(ref, "create")
    assert (target.base, target.schema) == (None, None)
    lance.write_dataset(rows(0, 2), target.table.uri)
    pinned = ref.pin()
    assert (pinned.uri, pinned.version) == (target.table.uri, 1)
    assert pickle.loads(pickle.dumps(pinned)).open().count_rows() == 2
    assert WriteTarget.resolve(ref, "append").schema == rows(0, 1).schema
    with pytest.raises(TableExistsError):
        WriteTarget.resolve(ref, "create")


def test_versions_and_tags_work_in_a_namespace(namespace: dict[str, Any]):
    ref = fold(table_id=["t"], version=1, **namespace)
    made = WriteTarget.resolve(ref, "create").table.uri
    lance.write_dataset(rows(0, 2), made)
    lance.write_dataset(rows(2, 2), made, mode="append")
    lance.dataset(made).tags.create("first", 1)
    assert ref.pin().open().count_rows() == 2
    assert fold(table_id=["t"], version="first", **namespace).pin().version == 1
    with pytest.raises(VersionNotFoundError):
        fold(table_id=["t"], version=9, **namespace).pin()


def test_a_table_id_may_be_one_name():
    assert fold(namespace_impl="dir", table_id="t").table_id == ("t",)


def test_one_client_serves_a_process(namespace: dict[str, Any]):
    first, second = (fold(table_id=[name], **namespace).namespace for name in ("a", "b"))
    assert first is not None
    assert second is not None
    assert first.client() is second.client()


def test_an_unknown_namespace_is_an_argument_error():
    with pytest.raises(InvalidArgumentError) as caught:
        fold(namespace_impl="no-such-catalog", table_id=["t"]).pin()
    assert caught.value.parameter == "namespace_impl"


def test_a_namespace_that_does_not_answer_is_no_missing_table():
    ref = fold(
        namespace_impl="rest",
        namespace_properties={"uri": "http://127.0.0.1:9", "headers.Authorization": SECRET},
        table_id=["t"],
    )
    with pytest.raises(StorageError) as caught:
        ref.pin()
    assert caught.value.kind == "unreachable"
    assert SECRET not in repr(caught.value)


class Vending:
    """A namespace that answers with credentials of its own."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.asked: list[Any] = []

    def describe_table(self, request: Any) -> Any:
        self.asked.append(request)
        return lance_namespace.DescribeTableResponse(location=self.location, storage_options={"token": "vended"})


def test_vended_options_win_and_the_callers_stay(uri: str, monkeypatch: pytest.MonkeyPatch):
    client = Vending(uri)
    monkeypatch.setattr(catalog, "_client", lambda ref: catalog.CatalogClient(ref, client))
    ref = fold(namespace_impl="any", table_id=["t"], storage_options={"token": "own", "region": "r"})
    assert ref.locate().storage_options == (("region", "r"), ("token", "vended"))
    assert client.asked[0].vend_credentials


# Targets of a write


@pytest.mark.parametrize("mode", ["create", "overwrite", "ignore"])
def test_a_missing_table_may_be_made(tmp_path: Path, mode: str):
    target = WriteTarget.resolve(fold(tmp_path / "new"), mode)
    assert (target.base, target.schema, target.table.uri) == (None, None, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_append_needs_a_table(tmp_path: Path):
    with pytest.raises(TableNotFoundError):
        WriteTarget.resolve(fold(tmp_path / "new"), "append")


def test_a_create_refuses_one_whatever_its_version(uri: str):
    with pytest.raises(TableExistsError) as caught:
        WriteTarget.resolve(fold(uri), "create")
    assert caught.value.target == uri


@pytest.mark.parametrize("mode", ["append", "overwrite", "ignore"])
def test_a_write_builds_on_the_newest_version(uri: str, mode: str):
    target = WriteTarget.resolve(fold(uri), mode)
    assert target.base is not None
    assert target.base.version == versions(uri)[-1]
    assert target.schema == pa.schema([("id", pa.int64()), ("text", pa.string())])
    assert ids_of(uri) == [0, 1, 2, 3]


@pytest.mark.parametrize("address", [lambda uri: lance.dataset(uri, 1), lambda uri: lance.dataset(uri)])
def test_a_write_to_an_opened_dataset_builds_on_the_newest_version_too(uri: str, address: Callable[[str], Any]):
    dataset = address(uri)
    lance.write_dataset(rows(4, 1), uri, mode="append")
    target = WriteTarget.resolve(fold(dataset), "append")
    assert target.base is not None
    assert target.base.version == 4
