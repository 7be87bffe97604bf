"""Bad input of a write: a clear error that names the argument and what is allowed, before any row is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray
from lance import DatasetBasePath
from ray.data import DataContext, Dataset, SaveMode

from lance_ray import (
    InvalidArgumentError,
    LanceFragmentWriter,
    LanceRayError,
    SchemaMismatchError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    write_lance,
)
from tests.blocks import SECRET, TYPED, files_below, rows


class Untouched(Dataset):
    """A dataset that may be asked for nothing: whoever makes rows of it has started too much."""

    def __init__(self) -> None:
        """Leaves out everything that would need Ray."""

    def __del__(self) -> None:
        """There is nothing to end."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        raise AssertionError(f"the dataset was asked for {name!r}")


@pytest.fixture(autouse=True)
def nothing_starts() -> Any:
    """Nothing of what is tested here needs a cluster, and nothing makes one."""
    running = ray.is_initialized()
    yield
    assert ray.is_initialized() == running


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table of three rows in the format 2.1."""
    uri = str(tmp_path / "table")
    lance.write_dataset(rows(0, 3), uri, data_storage_version="2.1")
    return uri


def refused(kind: type[LanceRayError], *args: Any, **kwargs: Any) -> Any:
    with pytest.raises(kind) as caught:
        write_lance(Untouched(), *args, **kwargs)
    return caught.value


NAMESPACE = {"namespace_impl": "dir", "namespace_properties": {"root": "/nowhere"}, "table_id": ["t"]}


@pytest.mark.parametrize(
    ("keywords", "parameter", "allowed"),
    [
        ({"mode": "apend"}, "mode", "'append'"),
        ({"mode": None}, "mode", "'create'"),
        ({"mode": 3}, "mode", "'overwrite'"),
        ({"mode": "upsert"}, "mode", "key columns"),
        ({"mode": SaveMode.UPSERT}, "mode", "key columns"),
        ({"schema": {"id": "int64"}}, "schema", "pyarrow.Schema"),
        ({"schema": "id int64"}, "schema", "pyarrow.Schema"),
        ({"min_rows_per_file": 0}, "min_rows_per_file", "at least 1"),
        ({"min_rows_per_file": None}, "min_rows_per_file", "at least 1"),
        ({"max_rows_per_file": -1}, "max_rows_per_file", "at least 1"),
        ({"max_rows_per_file": 1.5}, "max_rows_per_file", "at least 1"),
        ({"max_bytes_per_file": 0}, "max_bytes_per_file", "at least 1"),
        ({"max_bytes_per_file": "1GB"}, "max_bytes_per_file", "at least 1"),
        ({"min_rows_per_file": 20, "max_rows_per_file": 10}, "min_rows_per_file", "max_rows_per_file=10"),
        ({"data_storage_version": 2}, "data_storage_version", "text"),
        ({"data_storage_version": "9.9"}, "data_storage_version", "'2.1'"),
        ({"storage_options": ["key"]}, "storage_options", "mapping"),
        ({"storage_options": {1: "x"}}, "storage_options", "strings"),
        ({"base_store_params": "s3://b"}, "base_store_params", "base URIs"),
        ({"base_store_params": {"s3://b": "key"}}, "base_store_params", "mapping"),
        ({"initial_bases": ["s3://b"]}, "initial_bases", "DatasetBasePath"),
        ({"target_bases": "hot"}, "target_bases", "list"),
        ({"target_bases": ["hot"]}, "target_bases", "[]"),
        ({"target_bases": ["s3://b/hot"]}, "target_bases", "[]"),
        ({"target_bases": ["hot"], "target_all_bases": True}, "target_all_bases", "target_bases"),
        ({"target_all_bases": False}, "target_all_bases", "no base"),
        (
            {"initial_bases": [DatasetBasePath("/b", name="cold")], "target_bases": ["hot"]},
            "target_bases",
            "['/b', 'cold']",
        ),
        ({"external_blob_mode": "copy"}, "external_blob_mode", "'ingest'"),
        (
            {"external_blob_mode": "ingest", "allow_external_blob_outside_bases": True},
            "allow_external_blob_outside_bases",
            "'reference'",
        ),
        ({"namespace_properties": {"root": "x"}}, "uri", "namespace_properties"),
        ({"table_id": ["t"]}, "uri", "table_id"),
        ({"commit_message": 3}, "commit_message", "text"),
        ({"transaction_properties": "a=b"}, "transaction_properties", "mapping"),
        ({"transaction_properties": {"lance_ray.operation_id": "mine"}}, "transaction_properties", "lance_ray's own"),
        ({"commit_lock": "lock"}, "commit_lock", "callable"),
        ({"job_id": "../up"}, "job_id", "letters"),
        ({"job_id": ""}, "job_id", "1 to 128"),
        ({"concurrency": 0}, "concurrency", "at least 1"),
        ({"concurrency": "4"}, "concurrency", "at least 1"),
        ({"ray_remote_args": ["num_cpus"]}, "ray_remote_args", "dict"),
        ({"ray_remote_args": {"num_cpu": 1}}, "ray_remote_args", "num_cpus"),
        ({"batch_size": 0, "stream": True}, "batch_size", "at least 1"),
        ({"batch_size": 10}, "batch_size", "stream=True"),
        ({"resume_rows": -1, "stream": True}, "resume_rows", "at least 0"),
        ({"resume_rows": 10}, "resume_rows", "stream=True"),
        ({"concurrency": 2, "stream": True}, "concurrency", "driver"),
        ({"stream": 5}, "stream", "True or False"),
        ({"enable_stable_row_ids": "x"}, "enable_stable_row_ids", "True or False"),
        ({"allow_external_blob_outside_bases": 5}, "allow_external_blob_outside_bases", "True or False"),
        ({"ray_remote_args": {"num_cpus": 1}, "stream": True}, "ray_remote_args", "driver"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_with_what_is_allowed(
    tmp_path: Path, keywords: dict[str, Any], parameter: str, allowed: str
):
    error = refused(InvalidArgumentError, tmp_path / "new", **keywords)
    assert error.parameter == parameter
    assert str(error).startswith(f"{parameter}=")
    assert allowed in str(error)
    assert files_below(tmp_path) == set()


def test_ray_settings_of_writes_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DataContext.get_current().lance_config, "write_fragments_max_attempts", 0)
    assert refused(InvalidArgumentError, tmp_path / "new", schema=TYPED).parameter == "max_attempts"
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "keywords", "parameter"),
    [
        ((), {}, "uri"),
        ((None,), {}, "uri"),
        (("",), {}, "uri"),
        ((7,), {}, "uri"),
        (("t",), NAMESPACE, "uri"),
        ((), {"namespace_impl": "dir"}, "uri"),
        ((), {"table_id": ["t"]}, "uri"),
        ((), {**NAMESPACE, "table_id": []}, "table_id"),
        ((), {**NAMESPACE, "table_id": [1]}, "table_id"),
        ((), {**NAMESPACE, "namespace_impl": "no-such-catalog"}, "namespace_impl"),
    ],
    ids=str,
)
def test_exactly_one_address_is_needed(args: tuple[Any, ...], keywords: dict[str, Any], parameter: str):
    assert refused(InvalidArgumentError, *args, **keywords).parameter == parameter


@pytest.mark.parametrize("ds", [None, [{"id": 1}], rows(0, 1)], ids=lambda ds: type(ds).__name__)
def test_only_a_dataset_can_be_written(tmp_path: Path, ds: Any):
    with pytest.raises(InvalidArgumentError, match=r"ds=.*ray\.data\.Dataset"):
        write_lance(ds, tmp_path / "new")


def test_an_unknown_keyword_is_named(tmp_path: Path):
    unknown: dict[str, Any] = {"max_row_per_file": 3}
    with pytest.raises(TypeError, match="max_row_per_file"):
        write_lance(Untouched(), tmp_path / "new", **unknown)


@pytest.mark.parametrize(
    ("mode", "kind"), [("create", TableExistsError), (SaveMode.ERROR, TableExistsError)], ids=["create", "ERROR"]
)
def test_a_create_of_an_existing_table(table: str, mode: Any, kind: type[LanceRayError]):
    error = refused(kind, table, mode=mode)
    assert table in str(error)
    assert "mode='append'" in str(error)


def test_an_append_to_a_missing_table(tmp_path: Path):
    assert str(tmp_path / "none") in str(refused(TableNotFoundError, tmp_path / "none", mode="append"))
    assert files_below(tmp_path) == set()


def test_an_append_to_a_folder_that_is_no_table(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    refused(TableNotFoundError, tmp_path, mode="append")


def test_an_unknown_scheme(tmp_path: Path):
    assert refused(StorageError, "gopher://host/table").kind == "invalid"


@pytest.mark.parametrize("mode", ["append", "overwrite"])
@pytest.mark.parametrize(
    ("keywords", "parameter", "reason"),
    [
        ({"initial_bases": [DatasetBasePath("/b", name="b")]}, "initial_bases", "new|created"),
        ({"target_bases": ["hot"]}, "target_bases", "bases of the table"),
        ({"target_bases": ["/nowhere"]}, "target_bases", "bases of the table"),
        ({"target_all_bases": False}, "target_all_bases", "no base"),
        ({"data_storage_version": "2.2"}, "data_storage_version", r"2\.1"),
        ({"enable_stable_row_ids": True}, "enable_stable_row_ids", "without them"),
    ],
    ids=str,
)
def test_what_only_a_new_table_can_have(table: str, mode: str, keywords: dict[str, Any], parameter: str, reason: str):
    before = files_below(table)
    error = refused(InvalidArgumentError, table, mode=mode, **keywords)
    assert error.parameter == parameter
    with pytest.raises(InvalidArgumentError, match=reason):
        raise error
    assert files_below(table) == before


def test_a_schema_of_an_append_that_names_foreign_columns(table: str):
    error = refused(SchemaMismatchError, table, mode="append", schema=TYPED.append(pa.field("extra", pa.int8())))
    assert error.columns == ("extra",)


@pytest.mark.parametrize(
    "unstorable", [pa.month_day_nano_interval(), pa.dense_union([pa.field("a", pa.int8())])], ids=str
)
def test_a_declared_type_that_cannot_be_stored(tmp_path: Path, unstorable: pa.DataType):
    error = refused(SchemaMismatchError, tmp_path / "new", schema=pa.schema([pa.field("odd", unstorable)]))
    assert error.columns == ("odd",)
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("odd", "path"),
    [
        (pa.field("a.b", pa.int8()), "a.b"),
        (pa.field("_rowid", pa.int8()), "_rowid"),
        (pa.field("s", pa.struct([])), "s"),
    ],
    ids=str,
)
def test_a_declared_column_that_no_table_can_have(tmp_path: Path, odd: pa.Field, path: str):
    assert refused(SchemaMismatchError, tmp_path / "new", schema=pa.schema([odd])).columns == (path,)
    with pytest.raises(SchemaMismatchError):
        LanceFragmentWriter(tmp_path / "new", schema=pa.schema([odd]))
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (pa.string(), "id"),
        (pa.list_(pa.int64()), "id"),
        (pa.timestamp("us"), "id"),
    ],
    ids=str,
)
def test_a_schema_of_an_append_of_types_that_do_not_fit(table: str, given: pa.DataType, path: str):
    schema = TYPED.set(0, pa.field("id", given))
    assert refused(SchemaMismatchError, table, mode="append", schema=schema).columns == (path,)


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: refused(InvalidArgumentError, uri, storage_options={"aws_secret_access_key": SECRET}, mode="x"),
        lambda uri: refused(InvalidArgumentError, uri, storage_options=[SECRET]),
        lambda uri: refused(InvalidArgumentError, uri, storage_options={("aws_secret_access_key", SECRET): 1}),
        lambda uri: refused(InvalidArgumentError, uri, base_store_params={"s3://b": SECRET}),
        lambda uri: refused(InvalidArgumentError, uri, initial_bases=[{"aws_secret_access_key": SECRET}]),
        lambda uri: refused(InvalidArgumentError, f"s3://AKIA:{SECRET}@bucket/t", table_id=["t"]),
        lambda _: refused(StorageError, f"gopher://AKIA:{SECRET}@host/t"),
        lambda _: refused(StorageError, "gopher://host/t", storage_options={"aws_secret_access_key": SECRET}),
    ],
)
def test_no_secret_is_in_an_error(tmp_path: Path, call: Callable[[str], Any]):
    error = call(str(tmp_path / "new"))
    assert SECRET not in f"{error!s} {error!r} {error.__cause__!r} {vars(error)}"
