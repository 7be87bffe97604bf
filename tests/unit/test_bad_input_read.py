"""Bad arguments of ``read_lance``: an error on the driver that names argument and value, before any task starts."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from lance.query import MatchQuery

import lance_ray
from lance_ray.errors import InvalidArgumentError, LanceRayError, StorageError, TableNotFoundError, VersionNotFoundError
from tests.leaks import secret, shown
from tests.tables import numbers, write

SECRET = secret("a secret of bad input", "sEcReT-0123456789")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    vectors = pa.FixedSizeListArray.from_arrays(np.arange(80, dtype=np.float32), 4)
    write(root / "t.lance", numbers(20).append_column("vector", vectors), fragments=2)
    write(root / "other", pa.table({"id": ["text"]}))
    (root / "directory").mkdir()
    (root / "file").write_text("no table")
    return root


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the read went on to Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray.data, "read_datasource", refuse)


T = "t.lance"
DIR: dict[str, Any] = {"namespace_impl": "dir", "namespace_properties": {"root": "."}}
QUERY = {"column": "vector", "q": np.zeros(4, np.float32), "k": 3}

# The address (under the root), further arguments, the error, and what its message must name.
BAD: list[tuple[Any, dict[str, Any], type[LanceRayError], list[str]]] = [
    # where
    ("missing", {}, TableNotFoundError, ["missing"]),
    ("directory", {}, TableNotFoundError, ["directory"]),
    ("file", {}, LanceRayError, ["file"]),
    ("file/below", {}, LanceRayError, ["file/below"]),
    (None, {}, InvalidArgumentError, ["uri", "namespace_impl"]),
    (None, {"namespace_impl": "dir"}, InvalidArgumentError, ["table_id"]),
    (None, {"table_id": ["t"]}, InvalidArgumentError, ["namespace_impl"]),
    (T, DIR, InvalidArgumentError, ["uri", "namespace_impl"]),
    (T, {"table_id": ["t"]}, InvalidArgumentError, ["uri", "table_id"]),
    (None, {**DIR, "table_id": ["nope"]}, TableNotFoundError, ["nope"]),
    (None, {**DIR, "table_id": []}, InvalidArgumentError, ["table_id"]),
    (None, {**DIR, "table_id": [1]}, InvalidArgumentError, ["table_id", "1"]),
    (None, {"namespace_impl": "no_such_kind", "table_id": ["t"]}, InvalidArgumentError, ["no_such_kind"]),
    (None, {**DIR, "table_id": ["t"], "namespace_properties": "x"}, InvalidArgumentError, ["namespace_properties"]),
    (["list"], {}, TableNotFoundError, ["list"]),
    ([], {}, InvalidArgumentError, ["uri", "[]"]),
    ([T, "other"], {}, LanceRayError, ["id", "int64", "string"]),
    ([T, "t.lance"], {"scanner_options": {"order_by": ["id"]}}, InvalidArgumentError, ["uri", "order_by"]),
    ([T, "t.lance"], {"fragment_ids": [0]}, InvalidArgumentError, ["uri", "fragment_ids"]),
    (42, {}, InvalidArgumentError, ["uri", "int"]),
    ("", {}, InvalidArgumentError, ["uri"]),
    ("s4://bucket/table", {}, LanceRayError, ["s4"]),
    (T, {"storage_options": "secret"}, InvalidArgumentError, ["storage_options"]),
    (T, {"storage_options": {1: "x"}}, InvalidArgumentError, ["storage_options", "int"]),
    # which version
    (T, {"version": 99}, VersionNotFoundError, ["99"]),
    (T, {"version": "no-tag"}, VersionNotFoundError, ["no-tag"]),
    (T, {"version": "no tag"}, VersionNotFoundError, ["no tag"]),
    (T, {"version": 0}, InvalidArgumentError, ["version", "0"]),
    (T, {"version": -1}, InvalidArgumentError, ["version", "-1"]),
    (T, {"version": 1.5}, InvalidArgumentError, ["version", "1.5"]),
    (T, {"version": True}, InvalidArgumentError, ["version", "True"]),
    (T, {"branch": "no branch"}, VersionNotFoundError, ["no branch"]),
    (T, {"branch": 3}, InvalidArgumentError, ["branch", "3"]),
    (T, {"asof": "yesterday"}, InvalidArgumentError, ["asof", "yesterday"]),
    (T, {"asof": 1_700_000_000}, InvalidArgumentError, ["asof", "1700000000"]),
    (T, {"asof": dt.datetime(1999, 1, 1)}, VersionNotFoundError, ["1999"]),
    (T, {"asof": "2020-01-01T00:00:00Z"}, VersionNotFoundError, ["2020"]),
    (T, {"asof": dt.datetime(2030, 1, 1), "version": 1}, InvalidArgumentError, ["asof", "version"]),
    # which rows and columns
    (T, {"columns": ["id", "nope"]}, InvalidArgumentError, ["columns", "nope", "text"]),
    (T, {"columns": ["id.deep"]}, InvalidArgumentError, ["columns", "id.deep"]),
    (T, {"columns": "id"}, InvalidArgumentError, ["columns", "id"]),
    (T, {"columns": [1]}, InvalidArgumentError, ["columns", "1"]),
    (T, {"columns": ["id", "id"]}, InvalidArgumentError, ["columns", "id"]),
    (T, {"columns": {}}, InvalidArgumentError, ["columns"]),
    (T, {"columns": {"a": 1}}, InvalidArgumentError, ["columns", "a"]),
    (T, {"columns": {"a": "nope + 1"}}, InvalidArgumentError, ["columns", "nope"]),
    (T, {"columns": {"a": "id +"}}, InvalidArgumentError, ["columns", "id +"]),
    (T, {"filter": "id >"}, InvalidArgumentError, ["filter", "id >"]),
    (T, {"filter": "nope = 3"}, InvalidArgumentError, ["filter", "nope"]),
    (T, {"filter": "id = 'x'"}, InvalidArgumentError, ["filter", "id = 'x'"]),
    (T, {"filter": "id + 1"}, InvalidArgumentError, ["filter", "boolean"]),
    (T, {"filter": " "}, InvalidArgumentError, ["filter"]),
    (T, {"filter": 3}, InvalidArgumentError, ["filter", "int"]),
    (T, {"filter": pc.field("nope") > 3}, InvalidArgumentError, ["filter", "nope"]),
    (T, {"filter": pc.field("id") > "x"}, InvalidArgumentError, ["filter", "id"]),
    (T, {"limit": -1}, InvalidArgumentError, ["limit", "-1"]),
    (T, {"limit": 2.5}, InvalidArgumentError, ["limit", "2.5"]),
    (T, {"limit": "10"}, InvalidArgumentError, ["limit", "'10'"]),
    (T, {"offset": -1}, InvalidArgumentError, ["offset", "-1"]),
    (T, {"fragment_ids": [0, 7]}, InvalidArgumentError, ["fragment_ids", "7", "2 of them"]),
    (T, {"fragment_ids": [7], "filter": "id > 3"}, InvalidArgumentError, ["fragment_ids", "7"]),
    (T, {"fragment_ids": [-1]}, InvalidArgumentError, ["fragment_ids", "-1"]),
    (T, {"fragment_ids": ["a"]}, InvalidArgumentError, ["fragment_ids", "a"]),
    (T, {"fragment_ids": 1}, InvalidArgumentError, ["fragment_ids", "1"]),
    # scanner and dataset options
    (T, {"scanner_options": {"batchsize": 3}}, InvalidArgumentError, ["scanner_options", "batchsize", "batch_size"]),
    (T, {"scanner_options": {"batch_size": 0}}, InvalidArgumentError, ["batch_size", "0"]),
    (T, {"scanner_options": {"limit": -3}}, InvalidArgumentError, ["limit", "-3"]),
    (T, {"scanner_options": {"columns": ["nope"]}}, InvalidArgumentError, ["columns", "nope"]),
    (T, {"scanner_options": ["batch_size"]}, InvalidArgumentError, ["scanner_options"]),
    (T, {"default_scan_options": {"rows": 3}}, InvalidArgumentError, ["default_scan_options", "rows"]),
    (T, {"dataset_options": {"nope": 1}}, InvalidArgumentError, ["dataset_options", "nope", "block_size"]),
    (T, {"dataset_options": {"version": 99}}, VersionNotFoundError, ["99"]),
    (T, {"dataset_options": {"index_cache_size": "big"}}, InvalidArgumentError, ["index_cache_size", "big"]),
    (T, {"block_size": 0}, InvalidArgumentError, ["block_size", "0"]),
    (T, {"index_cache_size_bytes": -1}, InvalidArgumentError, ["index_cache_size_bytes", "-1"]),
    (T, {"metadata_cache_size_bytes": "1 GB"}, InvalidArgumentError, ["metadata_cache_size_bytes", "1 GB"]),
    (T, {"commit_lock": 3}, InvalidArgumentError, ["commit_lock", "3"]),
    (T, {"default_scan_options": 5}, InvalidArgumentError, ["default_scan_options", "int"]),
    (T, {"dataset_options": 5}, InvalidArgumentError, ["dataset_options", "int"]),
    (T, {"dataset_options": {"default_scan_options": 5}}, InvalidArgumentError, ["default_scan_options", "int"]),
    (T, {"dataset_options": {"session": "mine"}}, InvalidArgumentError, ["session", "str"]),
    (T, {"dataset_options": {"read_params": {"nope": True}}}, InvalidArgumentError, ["read_params", "nope"]),
    (T, {"dataset_options": {"read_params": {"validate_on_decode": 1}}}, InvalidArgumentError, ["validate_on_decode"]),
    (T, {"dataset_options": {"base_store_params": 5}}, InvalidArgumentError, ["base_store_params", "int"]),
    (
        T,
        {"dataset_options": {"base_store_params": {"s3://b": {}}}, "base_store_params": {"s3://c": {}}},
        InvalidArgumentError,
        ["base_store_params", "dataset_options"],
    ),
    (T, {"scanner_options": {"blob_handling": "zz"}}, InvalidArgumentError, ["blob_handling='zz'", "all_binary"]),
    (T, {"scanner_options": {"late_materialization": 5}}, InvalidArgumentError, ["late_materialization=5"]),
    (T, {"scanner_options": {"late_materialization": ["no"]}}, InvalidArgumentError, ["late_materialization=['no']"]),
    (T, {"scanner_options": {"prefilter": "x"}}, InvalidArgumentError, ["prefilter='x'"]),
    (T, {"scanner_options": {"row_addr_allowlist": b"junk"}}, InvalidArgumentError, ["row_addr_allowlist=b'junk'"]),
    (T, {"scanner_options": {"with_row_id": "x"}}, InvalidArgumentError, ["with_row_id='x'"]),
    (T, {"scanner_options": {"io_buffer_size": 2**70}}, InvalidArgumentError, ["io_buffer_size=", "too big"]),
    (T, {"with_row_address": "x"}, InvalidArgumentError, ["with_row_address='x'"]),
    (T, {"with_metadata": "x"}, InvalidArgumentError, ["with_metadata='x'"]),
    # searches
    (T, {"scanner_options": {"nearest": {**QUERY, "column": "nope"}}}, InvalidArgumentError, ["nearest", "nope"]),
    (T, {"scanner_options": {"nearest": {**QUERY, "column": "x"}}}, InvalidArgumentError, ["nearest", "x"]),
    (T, {"scanner_options": {"nearest": {**QUERY, "q": [1.0]}}}, InvalidArgumentError, ["nearest"]),
    (T, {"scanner_options": {"nearest": {**QUERY, "k": -1}}}, InvalidArgumentError, ["nearest", "-1"]),
    (T, {"scanner_options": {"nearest": QUERY}, "filter": "nope > 3"}, InvalidArgumentError, ["filter", "nope"]),
    (T, {"scanner_options": {"nearest": QUERY, "full_text_query": "a"}}, InvalidArgumentError, ["full_text_query"]),
    (T, {"scanner_options": {"full_text_query": "a"}}, InvalidArgumentError, ["full_text_query", "INVERTED"]),
    (
        T,
        {"full_text_query": MatchQuery("a", "text")},
        InvalidArgumentError,
        ["full_text_query='MatchQuery'", "partial"],
    ),
    (T, {"full_text_query": {"query": MatchQuery("a", "text")}}, InvalidArgumentError, ["full_text_query", "partial"]),
    (T, {"scanner_options": {"full_text_query": MatchQuery("a", "text")}}, InvalidArgumentError, ["full_text_query"]),
    (
        T,
        {"nearest": QUERY, "filter": MatchQuery("a", "text")},
        InvalidArgumentError,
        ["filter='MatchQuery'", "partial"],
    ),
    (T, {"scanner_options": {"order_by": ["nope"]}}, InvalidArgumentError, ["order_by", "nope"]),
    # how it is cut
    (T, {"fragment_group_size": 0}, InvalidArgumentError, ["fragment_group_size", "0"]),
    (T, {"override_num_blocks": 0}, InvalidArgumentError, ["override_num_blocks", "0"]),
    (T, {"override_num_blocks": 1.5}, InvalidArgumentError, ["override_num_blocks", "1.5"]),
    (T, {"concurrency": 0}, InvalidArgumentError, ["concurrency", "0"]),
    # where it runs
    (T, {"ray_remote_args": {"nope": 1}}, InvalidArgumentError, ["ray_remote_args", "nope", "num_cpus"]),
    (T, {"ray_remote_args": {"num_cpus": "x"}}, InvalidArgumentError, ["ray_remote_args", "num_cpus"]),
    (T, {"ray_remote_args": 5}, InvalidArgumentError, ["ray_remote_args", "int", "dict"]),
    (T, {"ray_remote_args": ["num_cpus"]}, InvalidArgumentError, ["ray_remote_args", "list", "dict"]),
    (T, {"num_cpus": "x"}, InvalidArgumentError, ["num_cpus='x'"]),
    (T, {"num_gpus": -1}, InvalidArgumentError, ["num_gpus=-1"]),
    (T, {"memory": "z"}, InvalidArgumentError, ["memory='z'"]),
    (T, {"resources": 5}, InvalidArgumentError, ["resources=5"]),
    (T, {"runtime_env": 5}, InvalidArgumentError, ["runtime_env=5"]),
    (T, {"max_calls": "k"}, InvalidArgumentError, ["max_calls='k'"]),
    (T, {"label_selector": 5}, InvalidArgumentError, ["label_selector=5"]),
    (T, {"fallback_strategy": 5}, InvalidArgumentError, ["fallback_strategy=5"]),
    (T, {"accelerator_type": 5}, InvalidArgumentError, ["accelerator_type=5"]),
    (T, {"shuffle": -1}, InvalidArgumentError, ["shuffle", "-1"]),
    (T, {"shuffle": "yes"}, InvalidArgumentError, ["shuffle", "yes"]),
    (T, {"shuffle": 1, "scanner_options": {"order_by": ["id"]}}, InvalidArgumentError, ["shuffle", "order_by"]),
]


IDS = [f"{uri} {str(options)[:70]}" for uri, options, *_ in BAD]


@pytest.mark.parametrize(("uri", "options", "error", "named"), BAD, ids=IDS)
def test_a_bad_argument_is_refused_within_a_second(
    uri: Any, options: dict[str, Any], error: type[LanceRayError], named: list[str], root: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(root)
    started = time.perf_counter()

    with pytest.raises(error) as raised:
        lance_ray.read_lance(uri, **options)

    assert time.perf_counter() - started < (5 if "file" in str(uri) else 1)  # the engine asks again below a file
    message = str(raised.value)
    assert [word for word in named if word not in message] == []
    assert ".rs:" not in message


def test_an_unknown_keyword_is_refused(root: Path) -> None:
    with pytest.raises(TypeError, match="colums"):
        lance_ray.read_lance(root / T, colums=["id"])  # type: ignore[call-arg] # the typing mistake is the test


def test_an_unreachable_store_is_not_a_missing_table() -> None:
    options = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
        "aws_endpoint": "http://127.0.0.1:9",
        "allow_http": "true",
    }
    started = time.perf_counter()

    with pytest.raises(StorageError) as raised:
        lance_ray.read_lance("s3://bucket/table", storage_options={**options, "client_max_retries": "0"})

    assert time.perf_counter() - started < 10
    assert raised.value.kind == "unreachable"
    assert SECRET not in f"{raised.value!r} {raised.value.__cause__!r}"


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        (f"s4://AKIA:{SECRET}@bucket/t", {}),
        (f"s4://bucket/t?sig={SECRET}", {}),
        (T, {"scanner_options": [{"aws_secret_access_key": SECRET}]}),
        (T, {"dataset_options": [{"aws_secret_access_key": SECRET}]}),
        (T, {"filter": f"url = 'https://user:{SECRET}@host/x' nonsense"}),
    ],
    ids=shown,
)
def test_no_credential_is_in_an_error(root: Path, monkeypatch: Any, uri: str, options: dict[str, Any]) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(LanceRayError) as raised:
        lance_ray.read_lance(uri, **options)
    assert SECRET not in f"{raised.value!s} {raised.value!r} {raised.value.__cause__!r} {vars(raised.value)}"


def test_an_unreachable_namespace_is_not_a_missing_table() -> None:
    with pytest.raises(StorageError) as raised:
        lance_ray.read_lance(
            namespace_impl="rest",
            namespace_properties={"uri": "http://127.0.0.1:9", "headers.authorization": SECRET},
            table_id=["t"],
        )

    assert raised.value.kind == "unreachable"
    assert SECRET not in repr(raised.value)


def test_an_opened_dataset_refuses_an_address_beside_it(root: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="namespace_impl"):
        lance_ray.read_lance(lance.dataset(str(root / T)), **DIR, table_id=["t"])
