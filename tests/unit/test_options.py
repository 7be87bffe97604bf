"""Option values: what they accept, what they refuse before anything starts, and that they are values."""

from __future__ import annotations

import datetime as dt
import pickle
import threading
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from lance import DatasetBasePath
from lance.schema import LanceSchema
from ray.data import SaveMode

from lance_ray.errors import InvalidArgumentError
from lance_ray.options import (
    DEFAULT_BUNDLE_BYTES,
    MAX_BUNDLE_BYTES,
    CommitOptions,
    OpenOptions,
    PlanOptions,
    ScanOptions,
    WriteOptions,
    fold_version,
    nested_pairs,
    pairs,
)


def refused(make: Any, *args: Any, **kwargs: Any) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        make(*args, **kwargs)
    assert caught.value.parameter in str(caught.value)
    return caught.value


# Pairs


def test_options_become_sorted_pairs_of_strings_without_those_that_are_none():
    assert pairs({"b": 1, "a": True, "c": None}, "storage_options") == (("a", "True"), ("b", "1"))


@pytest.mark.parametrize("empty", [None, {}, {"a": None}])
def test_no_options_are_none_and_never_empty(empty: Any):
    assert pairs(empty, "storage_options") is None


@pytest.mark.parametrize("bad", [[("a", "b")], "a=b", {1: "x"}])
def test_what_is_no_mapping_of_strings_is_refused(bad: Any):
    assert refused(pairs, bad, "storage_options").parameter == "storage_options"


def test_refused_storage_options_show_no_value():
    assert "hunter2-hunter2" not in str(refused(pairs, {("key",): "hunter2-hunter2"}, "storage_options"))
    assert "hunter2-hunter2" not in str(refused(pairs, ["hunter2-hunter2"], "storage_options"))


def test_options_of_bases_keep_their_base():
    assert nested_pairs({"s3://b": {"k": 1}, "s3://a": {}}, "base_store_params") == (
        ("s3://a", ()),
        ("s3://b", (("k", "1"),)),
    )


@pytest.mark.parametrize("bad", ["s3://b", [("s3://b", {})], {"s3://b": "key"}, {3: {"k": "v"}}])
def test_base_store_params_of_another_form_are_refused(bad: Any):
    assert refused(nested_pairs, bad, "base_store_params").parameter == "base_store_params"


# Writing


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("create", "create"),
        ("APPEND", "append"),
        (SaveMode.CREATE, "create"),
        (SaveMode.ERROR, "create"),
        (SaveMode.APPEND, "append"),
        (SaveMode.OVERWRITE, "overwrite"),
        (SaveMode.IGNORE, "ignore"),
    ],
)
def test_modes_are_strings_or_rays(given: Any, mode: str):
    assert WriteOptions(given).mode == mode


@pytest.mark.parametrize("mode", [SaveMode.UPSERT, "upsert"])
def test_an_upsert_is_refused_with_the_reason(mode: Any):
    assert "key columns" in str(refused(WriteOptions, mode))


@pytest.mark.parametrize("mode", ["apend", "", None, 3])
def test_an_unknown_mode_is_refused_with_those_there_are(mode: Any):
    error = refused(WriteOptions, mode)
    assert error.parameter == "mode"
    assert all(known in str(error) for known in ("create", "append", "overwrite", "ignore"))


@pytest.mark.parametrize("name", ["min_rows_per_file", "max_rows_per_file", "max_bytes_per_file"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True])
def test_sizes_are_whole_numbers_above_zero(name: str, value: Any):
    assert refused(WriteOptions, **{name: value}).parameter == name


@pytest.mark.parametrize("name", ["min_rows_per_file", "max_rows_per_file"])
def test_a_row_size_is_not_optional(name: str):
    refused(WriteOptions, **{name: None})


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"min_rows_per_file": 11, "max_rows_per_file": 10}, "min_rows_per_file"),
        ({"external_blob_mode": "copy"}, "external_blob_mode"),
        (
            {"external_blob_mode": "ingest", "allow_external_blob_outside_bases": True},
            "allow_external_blob_outside_bases",
        ),
        ({"mode": "append", "initial_bases": [DatasetBasePath("s3://b")]}, "initial_bases"),
        ({"initial_bases": ["s3://b"]}, "initial_bases"),
        ({"initial_bases": "s3://b"}, "initial_bases"),
        ({"schema": {"id": "int64"}}, "schema"),
        ({"data_storage_version": 2}, "data_storage_version"),
        ({"target_bases": "hot"}, "target_bases"),
        ({"target_bases": [1]}, "target_bases"),
    ],
)
def test_contradictions_of_a_write_are_refused(options: dict[str, Any], parameter: str):
    assert refused(WriteOptions, **options).parameter == parameter


@pytest.mark.parametrize("version", [None, "2.0", "2.1", "stable", "next"])
def test_file_formats_that_the_engine_writes_are_accepted(version: str | None):
    assert WriteOptions(data_storage_version=version).data_storage_version == version


def test_a_lance_schema_is_taken_for_an_arrow_schema():
    schema = pa.schema([pa.field("id", pa.int64())])
    assert WriteOptions(schema=LanceSchema.from_pyarrow(schema)).schema == schema


def test_bytes_decide_by_default_and_rows_when_asked():
    assert not WriteOptions().rows_decide
    assert not WriteOptions(min_rows_per_file=1024 * 1024).rows_decide
    assert WriteOptions(min_rows_per_file=1000).rows_decide
    assert WriteOptions().bundle_bytes == DEFAULT_BUNDLE_BYTES
    assert WriteOptions(max_bytes_per_file=10).bundle_bytes == 10


def test_a_task_takes_no_more_than_a_bounded_bundle_whatever_a_file_may_hold():
    assert WriteOptions(max_bytes_per_file=1 << 40).bundle_bytes == MAX_BUNDLE_BYTES
    assert WriteOptions(max_bytes_per_file=1 << 40).file_bytes == 1 << 40


def test_write_options_travel():
    options = WriteOptions("append", pa.schema([("id", pa.int64())]), target_bases=("hot",))
    assert pickle.loads(pickle.dumps(options)) == options


# Committing


@pytest.mark.parametrize("job_id", ["nightly-2024_01.01", "a", "x" * 128])
def test_job_ids_that_are_names_are_accepted(job_id: str):
    assert CommitOptions(job_id=job_id).operation_id == job_id


@pytest.mark.parametrize("job_id", ["", "../up", "a/b", "-x", "x" * 129, "a b", 7])
def test_job_ids_that_could_not_be_a_folder_are_refused(job_id: Any):
    assert refused(CommitOptions, job_id=job_id).parameter == "job_id"


def test_without_a_job_id_every_operation_has_another_one():
    assert CommitOptions().operation_id != CommitOptions().operation_id


@pytest.mark.parametrize("message", [3, b"text"])
def test_a_message_is_text(message: Any):
    assert refused(CommitOptions, message).parameter == "commit_message"


# Reading


def test_flat_keywords_win_over_scanner_options_and_those_over_defaults():
    folded = ScanOptions.fold({"limit": 2, "batch_size": 10}, defaults={"limit": 3, "batch_size": 9}, limit=1)
    assert (folded.limit, dict(folded.scanner)) == (1, {"batch_size": 10})


def test_the_callers_dicts_stay_as_they_are():
    scanner, defaults = {"columns": ["a"], "limit": 1}, {"batch_size": 2}
    ScanOptions.fold(scanner, defaults=defaults, columns=["b"])
    assert (scanner, defaults) == ({"columns": ["a"], "limit": 1}, {"batch_size": 2})


@pytest.mark.parametrize(
    ("kwargs", "parameter"),
    [
        ({"scanner_options": {"colums": ["a"]}}, "scanner_options"),
        ({"scanner_options": None, "defaults": {"nope": 1}}, "default_scan_options"),
        ({"scanner_options": None, "limit": -1}, "limit"),
        ({"scanner_options": None, "offset": -1}, "offset"),
        ({"scanner_options": None, "columns": "id"}, "columns"),
        ({"scanner_options": None, "columns": ["a", "a"]}, "columns"),
        ({"scanner_options": None, "columns": [1]}, "columns"),
        ({"scanner_options": None, "columns": {"n": 1}}, "columns"),
        ({"scanner_options": None, "filter": 3}, "filter"),
        ({"scanner_options": None, "filter": "  "}, "filter"),
        ({"scanner_options": None, "fragment_ids": [-1]}, "fragment_ids"),
        ({"scanner_options": {"batch_size": 0}}, "batch_size"),
        ({"scanner_options": {"nearest": {"column": "v"}, "full_text_query": "x"}}, "nearest"),
    ],
)
def test_bad_scans_are_refused(kwargs: dict[str, Any], parameter: str):
    scanner = kwargs.pop("scanner_options")
    assert refused(ScanOptions.fold, scanner, **kwargs).parameter == parameter


@pytest.mark.parametrize(
    ("kwargs", "refuses"),
    [
        ({}, False),
        ({"filter": "a > 1"}, False),
        ({"filter": pc.field("a") > 1}, False),
        ({"limit": 0}, True),
        ({"offset": 1}, True),
        ({"nearest": {"column": "v", "q": [1.0]}}, True),
        ({"full_text_query": "x"}, True),
        ({"order_by": ["a"]}, True),
    ],
)
def test_a_later_filter_may_be_pushed_below_a_plain_scan_only(kwargs: dict[str, Any], refuses: bool):
    assert ScanOptions.fold(None, **kwargs).refuses_predicates is refuses


@pytest.mark.parametrize("name", ["fragment_group_size", "override_num_blocks"])
@pytest.mark.parametrize("value", [0, -3, 2.0])
def test_plan_sizes_are_whole_numbers_above_zero(name: str, value: Any):
    assert refused(PlanOptions, **{name: value}).parameter == name


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"block_size": 0}, "block_size"),
        ({"index_cache_size_bytes": -1}, "index_cache_size_bytes"),
        ({"metadata_cache_size_bytes": "1"}, "metadata_cache_size_bytes"),
        ({"commit_lock": "lock"}, "commit_lock"),
    ],
)
def test_bad_open_options_are_refused(options: dict[str, Any], parameter: str):
    assert refused(OpenOptions, **options).parameter == parameter


def test_open_options_travel_without_the_lock_that_only_the_driver_needs():
    options = OpenOptions(1, 2, 3, {"batch_size": 4}, commit_lock=lambda version: threading.Lock())
    came = pickle.loads(pickle.dumps(options))
    assert came == options
    assert (came.default_scan_options, came.commit_lock) == ({"batch_size": 4}, None)


# Versions and times

NOON = dt.datetime(2024, 5, 6, 12, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    "asof",
    [
        NOON,
        "2024-05-06T12:00:00+00:00",
        "2024-05-06T12:00:00Z",
        "2024-05-06T14:00:00+02:00",
        pd.Timestamp(NOON),
        NOON.astimezone().replace(tzinfo=None),
        NOON.astimezone().replace(tzinfo=None).isoformat(),
    ],
    ids=repr,
)
def test_times_are_understood_and_naive_ones_are_local(asof: Any):
    assert fold_version(None, asof, None)[1] == NOON


def test_a_date_is_its_first_moment():
    assert fold_version(None, dt.date(2024, 5, 6), None)[1] == dt.datetime(2024, 5, 6).astimezone()


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ((1, "2024-01-01", None), "asof"),
        ((None, "yesterday", None), "asof"),
        ((None, 1700000000, None), "asof"),
        ((0, None, None), "version"),
        ((-1, None, None), "version"),
        ((1.0, None, None), "version"),
        (("", None, None), "version"),
        ((None, None, ""), "branch"),
        ((None, None, 5), "branch"),
    ],
)
def test_bad_versions_are_refused(arguments: tuple[Any, ...], parameter: str):
    assert refused(fold_version, *arguments).parameter == parameter
