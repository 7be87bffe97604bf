"""Bad arguments of every public function: a typed error within a second that names the argument and what is wrong.

No task starts and no file is touched. What is particular to reads and writes is in the files of those names; here every
keyword that several functions share is refused by each of them alike, and every function has what is its own.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.data import Dataset

import lance_ray
from lance_ray import catalog, executors
from lance_ray.errors import InvalidArgumentError, LanceRayError, TableNotFoundError
from tests.tables import numbers, write

SECRET = "sEcReT-0123456789"
CLASSES = {"LanceFragmentCommitter", "LanceFragmentWriter", "WarmWorkers"}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: found
    for name in lance_ray.__all__
    if inspect.isfunction(found := getattr(lance_ray, name)) or name in CLASSES
}
"""Every public function, and the classes that do something. Values check themselves in the tests of their modules."""
WITHOUT_ARGUMENTS = {"get_global_pool", "patch_ray_data", "restore_ray_data"}


class Started(BaseException):
    """What must not have begun did. No error handler takes it for a failure of its own."""


class Untouched(Dataset):
    """A dataset that may be asked for nothing but its type: whoever makes rows of it has started too much."""

    def __init__(self) -> None:
        """Leaves out everything that would need Ray."""

    def __del__(self) -> None:
        """There is nothing to end."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        raise Started(f"the dataset was asked for {name!r}")


def one(batch: pa.Table) -> pa.Table:
    """A transform that would add a column."""
    return pa.table({"one": np.ones(batch.num_rows)})


NEAREST = {"column": "vector", "q": np.zeros(4, np.float32), "k": 3}
REST = lance_ray.LanceRestConfig(base_url="http://127.0.0.1:9")
# Calls that are right but for what a test changes. An operation that goes through is found by what it starts.
CALLS: dict[str, dict[str, Any]] = {
    "LanceFragmentCommitter": {"uri": "t", "mode": "append"},
    "LanceFragmentWriter": {"uri": "t"},
    "WarmWorkers": {},
    "add_columns": {"uri": "t", "transform": one, "output_schema": pa.schema([("one", pa.float64())])},
    "add_columns_from": {"uri": "t", "transform": {"one": "id + 1"}},
    "alter_columns": {"uri": "t"},
    "cleanup_database_old_versions": {
        "database": [],
        "retain_versions": 1,
        "namespace_impl": "dir",
        "namespace_properties": {"root": "."},
    },
    "cleanup_old_versions": {"uri": "t", "retain_versions": 1},
    "cleanup_orphans": {"uri": "t"},
    "clear_global_pool": {},
    "compact_database": {"database": [], "namespace_impl": "dir", "namespace_properties": {"root": "."}},
    "compact_files": {"uri": "t"},
    "connect": {"namespace_impl": "dir", "namespace_properties": {"root": "."}},
    "create_index": {"uri": "t", "column": "vector", "index_type": "IVF_FLAT"},
    "create_lance_table_rest": {
        "rest_config": REST,
        "namespace": [],
        "table_name": "n",
        "schema": pa.schema([("id", pa.int64())]),
    },
    "create_scalar_index": {"uri": "t", "column": "id", "index_type": "BTREE"},
    "create_table": {"uri": "new", "data": pa.table({"id": [1]})},
    "delete": {"uri": "t", "predicate": "id < 0"},
    "describe_table": {"uri": "t"},
    "drop_columns": {"uri": "t", "columns": ["x"]},
    "drop_index": {"uri": "t", "name": "id_idx"},
    "drop_table": {"table_id": ["gone"], "namespace_impl": "dir", "namespace_properties": {"root": "."}},
    "full_text_search": {"uri": "t", "query": "row", "text_columns": "text"},
    "get_global_pool": {},
    "hybrid_search": {"uri": "t", "nearest": NEAREST, "full_text_query": "row"},
    "ingest_blobs": {"ds": Untouched(), "column": "url"},
    "init_global_pool": {"processes": 2},
    "list_indices": {"uri": "t"},
    "list_tables": {"namespace_impl": "dir", "namespace_properties": {"root": "."}},
    "merge_columns": {"uri": "t", "transform": one, "output_schema": pa.schema([("one", pa.float64())])},
    "merge_columns_from": {"uri": "t", "ds": Untouched()},
    "merge_into": {"ds": Untouched(), "uri": "t", "on": "id"},
    "nearest_join": {"ds": Untouched(), "uri": "t", "on": "v"},
    "open_blobs": {"uri": "blobs", "column": "blob", "indices": [0]},
    "optimize_indices": {"uri": "t"},
    "patch_ray_data": {},
    "prewarm": {"uri": "t", "name": "id_idx"},
    "read_lance": {"uri": "t"},
    "refresh_index": {"uri": "t"},
    "register_lance_table_rest": {"rest_config": REST, "namespace": [], "table_name": "n", "table_uri": "t"},
    "register_table": {
        "location": "t",
        "table_id": ["n"],
        "namespace_impl": "dir",
        "namespace_properties": {"root": "."},
    },
    "restore": {"uri": "t", "version": 1},
    "restore_ray_data": {},
    "set_global_pool": {"pool": None},
    "table_health": {"uri": "t"},
    "take": {"uri": "t", "indices": [0]},
    "update_columns_from": {"uri": "t", "ds": Untouched(), "columns": ["x"]},
    "update_columns": {"uri": "t", "transform": {"x": "x + 1"}, "columns": ["x"]},
    "vector_search": {"uri": "t", "nearest": NEAREST},
    "write_lance": {"ds": Untouched(), "uri": "new"},
}

NO_NUMBER: tuple[Any, ...] = (0, -1, 1.5, "4", True)
NO_FLAG: tuple[Any, ...] = ("yes", 1, [])
DIR = {"namespace_impl": "dir", "namespace_properties": {"root": "."}}
# Keywords that functions share, and values that each function which has them refuses, naming the keyword.
SHARED: dict[str, tuple[Any, ...]] = {
    "uri": ("", 7, b"t", {"uri": "t"}),
    "table_id": (["t"], [], "t", 7, [1]),  # beside an address, or no name
    "storage_options": ("secret", 7, ["aws_region"], {1: "x"}),
    "base_store_params": ("s3://b", {"s3://b": "key"}, {1: {}}),
    "io_config": ("secret", 7),
    "rest_config": ("http://host", 7),
    "namespace_impl": ("no_such_kind", 7, ""),
    "namespace_properties": ("x", 7),
    "version": (0, -1, 1.5, True, [1]),
    "read_version": (0, -1, 1.5, True, [1]),
    "asof": ("yesterday", 7),
    "branch": ("", 7),
    "num_workers": NO_NUMBER,
    "num_segments": NO_NUMBER,
    "num_partitions": NO_NUMBER,
    "concurrency": NO_NUMBER,
    "processes": NO_NUMBER,
    "batch_size": NO_NUMBER,
    "block_size": NO_NUMBER,
    "micro_commit_batch_size": NO_NUMBER,
    "tables_at_once": NO_NUMBER,
    "max_bytes": NO_NUMBER,
    "max_tasks": NO_NUMBER,
    "max_rows_per_file": NO_NUMBER,
    "max_rows_per_group": NO_NUMBER,
    "min_rows_per_file": NO_NUMBER,
    "max_bytes_per_file": NO_NUMBER,
    "fragment_group_size": NO_NUMBER,
    "override_num_blocks": NO_NUMBER,
    "candidates": NO_NUMBER,
    "k": NO_NUMBER,
    "retain_versions": NO_NUMBER,
    "delete_rate_limit": NO_NUMBER,
    "num_sub_vectors": NO_NUMBER,
    "sample_rate": NO_NUMBER,
    "max_iters": NO_NUMBER,
    "target_partition_size": NO_NUMBER,
    "num_indices_to_merge": (-1, 1.5, "4", True),
    "index_cache_size": (-1, 1.5, "big", True),
    "index_cache_size_bytes": (-1, 1.5, "big", True),
    "metadata_cache_size_bytes": (-1, 1.5, "big", True),
    "max_replans": (-1, 1.5, "4", True),
    "limit": (-1, 1.5, "4", True),
    "offset": (-1, 1.5, "4", True),
    "resume_rows": (-1, 1.5, "4", True),
    "changed_since": (-1, 1.5, "4", True),
    "max_seconds": (0, -1, "4", True),
    "oversample_factor": (0, "4", float("nan")),
    "rrf_k": (-1, "4", float("nan")),
    "num_cpus": (-1, "x"),
    "num_gpus": (-1, "x"),
    "dry_run": NO_FLAG,
    "delete_unverified": NO_FLAG,
    "error_if_tagged_old_versions": NO_FLAG,
    "enable_stable_row_ids": NO_FLAG,
    "allow_external_blob_outside_bases": NO_FLAG,
    "stream": NO_FLAG,
    "use_legacy_format": NO_FLAG,
    "replace": NO_FLAG,
    "train": NO_FLAG,
    "retrain": NO_FLAG,
    "return_report": NO_FLAG,
    "keep_files": NO_FLAG,
    "require_full_coverage": NO_FLAG,
    "where_null": NO_FLAG,
    "with_row_id": NO_FLAG,
    "with_row_address": NO_FLAG,
    "with_metadata": NO_FLAG,
    "with_position": NO_FLAG,
    "fast_search": NO_FLAG,
    "include_unindexed": NO_FLAG,
    "analyze_plan": NO_FLAG,
    "explode": NO_FLAG,
    "prefilter": NO_FLAG,
    "close": NO_FLAG,
    "join": NO_FLAG,
    "ray_remote_args": (5, ["num_cpus"], {"num_cpu": 1}, {"num_cpus": "x"}),
    "transaction_properties": ("a=b", 7, {"lance_ray.operation_id": "mine"}),
    "commit_message": (3, b"x"),
    "job_id": ("../up", "", 7),
    "on_failure": ("ignore", 7, None),
    "progress": ("yes", 7),
    "compaction_options": (5, ["target_rows_per_fragment"], {"nope": 1}, {"target_rows_per_fragment": 0}),
    "scanner_options": (5, {"batchsize": 3}),
    "default_scan_options": (5, {"rows": 3}),
    "dataset_options": (5, {"nope": 1}),
    "pool": (5, "pool"),
    "retry_params": (5, {"nope": 1}),
    "columns": ({1: "x"}, 7, ["nope"]),
    "read_columns": ("x", 7, ["nope"]),
    "filter": ("id >", "nope = 3", 7, " "),
    "batch_format": ("polars", 7),
    "schema": ({"id": "int64"}, "id int64"),
    "output_schema": ({"id": "int64"}, "id int64"),
    "reader_schema": ({"id": "int64"}, "id int64"),
    "on": ("nope", 7, []),
    "fragment_ids": ([7], [-1], ["a"], 1),
    "index_type": ("NOPE", 7, ""),
    "column": ("nope", 7, ""),
    "name": ("nope", 7, ""),
    "mode": ("apend", 3, "upsert"),
    "data_storage_version": (2, "9.9"),
    "commit_lock": (3, "lock"),
    "nearest": ({"column": "nope", "q": [0.0] * 4}, {"q": [0.0] * 4}, {**NEAREST, "k": 0}, {**NEAREST, "nope": 1}),
    "transform": (None, 7, {}, {"one": 1}),
    "transform_version": (7,),
    "text_columns": ("nope", 7, ["nope"]),
    "metric": ("nope", 7),
    "index_name": ("nope", 7),
    "weights": ((1.0,), (1.0, -1.0), "ab", 7),
    "predicate": ("", "id >", "nope = 3", 7),
    "missing": ("drop", 7),
    "older_than": (7, "1 day"),
    "versions": (7, ["a"], [0]),
    "database": ("db", 7, [1]),
    "location": ("", 7),
    "table_uri": ("", 7),
    "table_name": ("", 7),
    "namespace": (7, [1]),
    "namespace_id": ("db", 7, [1]),
    "data": (7, "rows", Untouched),
    "ds": (7, "rows", None),
    "indices": (7, ["nope"]),
    "index_names": (7, ["nope"]),
    "query": (None, 7, ""),
    "alterations": ([], [7], [{}], [{"path": "x"}], [{"path": "x", "nope": 1}], [{"path": "nope", "name": "y"}]),
    "full_text_query": (None, 7, ""),
    "fn_constructor_args": (7, [1]),
    "fn_constructor_kwargs": (7, {"a": 1}),
    "row_ids": (["a"], 7),
    "keys": (7,),
    "output": (7, ""),
    "prefix": (7,),
    "index_uuid": ("x", 7),
    "external_blob_mode": ("copy", 7),
    "initial_bases": ("s3://b", [7]),
    "target_bases": ("hot", ["hot"], ["/hot"]),
    "target_all_bases": ("yes", 1),
    "memory": ("z",),
    "resources": (5,),
    "runtime_env": (5,),
    "max_calls": ("k",),
    "label_selector": (5,),
    "fallback_strategy": (5,),
    "accelerator_type": (5,),
    "shuffle": (-1, "yes"),
    "rabitq_model": ("nope",),
    "accelerator": ("tpu", 7),
    "blobs": ("x", 7),
    "blob_range": (7, "x", (1,), (0, -1)),
    "blob_batch_bytes": NO_NUMBER,
    "threads": NO_NUMBER,
    "into": ("", 7),
    "on_error": ("skip", 7),
    "fsspec_options": (7, "x"),
    "addresses": (["a"], 7, [-1]),
    "ivf_centroids": ("x", [1.0]),
    "pq_codebook": ("x",),
}


# What the table does not hold for: the values that are refused there, and why the others are not.
EXCEPTIONS: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("ingest_blobs", "column"): ((7, ""), "whether ds has the column shows when it is consumed"),
    ("open_blobs", "indices"): ((7, [-1], ["a"]), "beside the other ways to name rows"),
    ("compact_files", "num_partitions"): ((1.5, "4"), "up to 1 is as good as not given, as in other connectors"),
    ("compact_files", "micro_commit_batch_size"): ((1.5, "4", True), "up to 0 is as good as not given"),
    ("compact_database", "micro_commit_batch_size"): ((1.5, "4", True), "up to 0 is as good as not given"),
    ("create_index", "name"): ((7, ""), "the name of a new index"),
    ("create_scalar_index", "name"): ((7, ""), "the name of a new index"),
    ("nearest_join", "on"): ((7, []), "whether ds has the column is asked of its schema"),
    ("LanceFragmentWriter", "transform"): ((7, {}, {"one": 1}), "may be None: a batch is written as it is"),
    ("update_columns", "ds"): ((7, "rows"), "may be None beside a transform"),
    ("read_lance", "full_text_query"): ((7, ""), "may be None"),
    ("drop_table", "table_id"): (([], 7, [1]), "a name alone is an address"),
    ("register_table", "table_id"): (([], 7, [1]), "a name alone is an address"),
    ("list_tables", "namespace_id"): ((7, [1]), "may be one name"),
}


def keywords() -> set[tuple[str, str]]:
    """Every keyword of every public function."""
    kinds = (inspect.Parameter.VAR_KEYWORD,)
    return {
        (name, parameter.name)
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in kinds
    }


def rejected(name: str, keyword: str) -> tuple[Any, ...]:
    """The values of a keyword that a function must refuse."""
    return EXCEPTIONS[name, keyword][0] if (name, keyword) in EXCEPTIONS else SHARED.get(keyword, ())


def call(name: str, /, **changes: Any) -> Any:
    """A call that is right but for the changes."""
    arguments = {**CALLS[name], **changes}
    if name == "alter_columns":
        alterations = arguments.pop("alterations", [{"path": "x", "name": "y"}])
        alterations = alterations if isinstance(alterations, list) else [alterations]
        return lance_ray.alter_columns(arguments.pop("uri"), *alterations, **arguments)
    return FUNCTIONS[name](**arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    vectors = pa.FixedSizeListArray.from_arrays(np.arange(80, dtype=np.float32), 4)
    dataset = write(root / "t", numbers(20).append_column("vector", vectors), fragments=2)
    dataset.create_scalar_index("id", "BTREE")
    dataset.create_scalar_index("text", "INVERTED")
    blob = pa.field("blob", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    lance.write_dataset(pa.table([[b"1", b"2"]], schema=pa.schema([blob])), str(root / "blobs"))
    return root


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Started("the call went on to its work")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray.data, "read_datasource", refuse)
    for name in ("LocalExecutor", "RayExecutor", "ActorExecutor", "PoolExecutor"):
        monkeypatch.setattr(getattr(executors, name), "open", refuse)


def state(root: Path) -> set[tuple[str, int, int]]:
    """Every file below the folder, with its size and time."""
    found = [path for path in root.rglob("*") if path.is_file()]
    return {(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(autouse=True)
def no_pool() -> Iterator[None]:
    yield
    lance_ray.clear_global_pool()


CASES = [(name, keyword) for name, keyword in sorted(keywords()) if rejected(name, keyword)]


@pytest.mark.parametrize(("name", "keyword"), CASES, ids=[f"{name}({keyword}=)" for name, keyword in CASES])
def test_bad_values_of_a_keyword_are_refused_by_each_function_that_has_it(
    name: str, keyword: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = state(root)
    for value in rejected(name, keyword):
        started = time.perf_counter()
        with pytest.raises(LanceRayError) as raised:
            call(name, **{keyword: value})
        assert time.perf_counter() - started < 1, value
        message = str(raised.value)
        assert keyword in message, value
        assert ".rs:" not in message, value
    assert state(root) == before


# The table is complete


def test_every_public_function_and_each_of_its_keywords_is_in_the_table() -> None:
    assert set(CALLS) == set(FUNCTIONS)
    assert {item for item in keywords() if item[1] not in SHARED} == set()
    assert {name for name, _ in keywords()} | WITHOUT_ARGUMENTS == set(FUNCTIONS)
    assert set(EXCEPTIONS) <= keywords()
    assert set(SHARED) - {keyword for _, keyword in keywords()} <= {"k"}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_unknown_keyword_is_a_type_error_that_names_it(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = state(root)
    with pytest.raises((TypeError, InvalidArgumentError), match="no_such_keyword"):
        call(name, no_such_keyword=1)
    assert state(root) == before


ADDRESSED = sorted({name for name, keyword in keywords() if keyword == "uri"})


def addressed(name: str, /, **address: Any) -> Any:
    arguments = {key: value for key, value in CALLS[name].items() if key != "uri"}
    if name == "alter_columns":
        return lance_ray.alter_columns(address.pop("uri", None), {"path": "x", "name": "y"}, **address)
    return FUNCTIONS[name](**arguments, **address)


MISSING_ADDRESSES: tuple[dict[str, Any], ...] = (
    {},
    {"namespace_impl": "dir"},
    {"table_id": ["t"]},
    {"namespace_properties": {"root": "."}},
    {**DIR, "table_id": ["t"], "uri": "t"},
    {"uri": "rest://t"},
)


@pytest.mark.parametrize("name", ADDRESSED)
@pytest.mark.parametrize("address", MISSING_ADDRESSES, ids=str)
def test_exactly_one_address_is_needed(
    name: str, address: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = state(root)
    with pytest.raises(InvalidArgumentError, match=r"uri|rest_config"):
        addressed(name, **address)
    assert state(root) == before


CREATE = {"LanceFragmentWriter", "create_table", "write_lance"}


@pytest.mark.parametrize("name", sorted(set(ADDRESSED) - CREATE - {"cleanup_orphans"}))
@pytest.mark.parametrize("address", [{"uri": "nothing"}, {"uri": "."}, {**DIR, "table_id": ["nothing"]}], ids=str)
def test_a_table_that_is_not_there_is_told_as_such(
    name: str, address: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before, started = state(root), time.perf_counter()
    with pytest.raises(TableNotFoundError):
        addressed(name, **address)
    assert time.perf_counter() - started < 1
    assert state(root) == before


NOBODY = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": SECRET,
    "aws_region": "us-east-1",
    "aws_endpoint": "http://127.0.0.1:9",
    "allow_http": "true",
    "client_max_retries": "0",
}


NOWHERE: dict[str, dict[str, Any]] = {
    "store": {"uri": "s3://bucket/table", "storage_options": NOBODY},
    "catalog": {"uri": "rest://space/t", "rest_config": lance_ray.LanceRestConfig("http://127.0.0.1:9", SECRET)},
}


@pytest.mark.parametrize("where", NOWHERE)
def test_a_place_where_nobody_answers_is_told_within_ten_seconds_by_every_function(where: str) -> None:
    def outcome(name: str) -> tuple[str, float, BaseException | None]:
        started = time.perf_counter()
        try:
            addressed(name, **NOWHERE[where])
        except LanceRayError as error:
            return name, time.perf_counter() - started, error
        return name, time.perf_counter() - started, None

    with ThreadPoolExecutor(len(ADDRESSED)) as threads:
        outcomes = list(threads.map(outcome, ADDRESSED))
    assert {name: error for name, _, error in outcomes if getattr(error, "kind", None) != "unreachable"} == {}
    assert {name: seconds for name, seconds, _ in outcomes if seconds > 10} == {}
    assert [name for name, _, error in outcomes if error and SECRET in f"{error!r} {error.__cause__!r}"] == []


# Junk

Junk = Callable[..., Any]
_LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(["id", "x", "t", "vector", "id > 3", "true", "nope", "../t", "_rowid", "1", "BTREE", "pandas"]),
)
JUNK = st.one_of(
    _LEAF,
    st.lists(_LEAF, max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), _LEAF, max_size=2),
    st.just(object()),
    st.just(pa.table({"id": [1]})),
    st.just(np.zeros((2, 2))),
)
REPEATS = 12


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fresh")


def names_in(place: Path) -> set[str]:
    """Every file, but for what a catalog keeps of its own."""
    names = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("__manifest")}


def assert_answered_or_refused(name: str, keyword: str, value: Any, place: Path) -> None:
    """The call answers, goes on to its work, or is refused with an error of this package; then no file has changed."""
    catalog._client.cache_clear()  # a catalog of an earlier example has another folder
    before, started = names_in(place), time.perf_counter()
    refused: LanceRayError | None = None
    try:
        call(name, **{keyword: value})
    except LanceRayError as error:
        refused = error
    except Started:
        """The value is one that it takes."""
    assert time.perf_counter() - started < 5
    if refused is not None:
        assert ".rs:" not in str(refused)
        assert names_in(place) == before, f"refused, and yet done in part: {refused}"
    lance_ray.clear_global_pool()


WITH_KEYWORDS = sorted({name for name, _ in keywords()} - WITHOUT_ARGUMENTS)
JUNK_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def try_junk(name: str, source: Path, place: Path, data: st.DataObject) -> None:
    keyword = data.draw(st.sampled_from(sorted(item for function, item in keywords() if function == name)))
    value = data.draw(JUNK)
    shutil.copytree(source, place)
    with contextlib.chdir(place):
        assert_answered_or_refused(name, keyword, value, place)
    shutil.rmtree(place)


AWKWARD: tuple[Any, ...] = (
    *(np.zeros((2, 2)), pa.table({"id": [1]}), object()),
    *(2**70, -(2**70), float("nan"), float("inf"), b"\0", "", "\0", [], {}),
    *([None], [b"x"], [2**70], [float("nan")], {"a": None}, {1: 2}, {"": ""}, {"id": True}, ["id"], "id"),
)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(AWKWARD[:3], id="arrays and objects"),
        pytest.param(AWKWARD[3:], id="others", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", WITH_KEYWORDS)
def test_awkward_values_give_an_error_of_this_package_or_an_answer(
    name: str, values: Sequence[Any], root: Path, fresh: Path
) -> None:
    place = fresh / f"{time.monotonic_ns()}"
    for keyword in sorted(item for function, item in keywords() if function == name):
        shutil.copytree(root, place)
        with contextlib.chdir(place):
            for value in values:
                assert_answered_or_refused(name, keyword, value, place)
        shutil.rmtree(place)


@pytest.mark.parametrize("name", WITH_KEYWORDS)
@settings(max_examples=REPEATS, derandomize=True, **JUNK_SETTINGS)
@given(data=st.data())
def test_junk_gives_an_error_of_this_package_or_an_answer(
    name: str, root: Path, fresh: Path, data: st.DataObject
) -> None:
    try_junk(name, root, fresh / f"{time.monotonic_ns()}", data)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KEYWORDS)
@settings(max_examples=5 * REPEATS, **JUNK_SETTINGS)
@given(data=st.data())
def test_much_junk_gives_an_error_of_this_package_or_an_answer(
    name: str, root: Path, fresh: Path, data: st.DataObject
) -> None:
    try_junk(name, root, fresh / f"{time.monotonic_ns()}", data)
