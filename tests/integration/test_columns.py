"""Columns added and computed anew: which values, what others may do meanwhile, what a failure leaves. Local threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import lance_ray
from lance_ray import ColumnsReport, add_columns, column_jobs, column_values, commit, merge_columns, update_columns
from lance_ray.errors import (
    InvalidArgumentError,
    SchemaMismatchError,
    SnapshotChangedError,
    TaskFailedError,
    VersionNotFoundError,
)
from lance_ray.executors import LocalExecutor
from lance_ray.table import TableRef
from tests.blocks import assert_nothing_left_over, data_files, referenced_files, versions

Values = Callable[[int], Any]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run one after the other in a thread of this process."""

    def executor(workers: column_jobs.ColumnWorkers, operation: str, *, stateful: bool) -> LocalExecutor:
        return LocalExecutor(1, column_values.load if stateful else None)

    monkeypatch.setattr(column_jobs.ColumnWorkers, "executor", executor)


def numbers(first: int, count: int) -> pa.Table:
    ids = np.arange(first, first + count)
    return pa.table(
        {
            "id": ids,
            "text": [f"row {item}" for item in ids],
            "vector": pa.array([[item, 1.0] for item in ids], pa.list_(pa.float32(), 2)),
            "nested": [{"a": int(item), "b": [{"c": str(item)}]} for item in ids],
        }
    )


@pytest.fixture(params=[False, True], ids=["addresses", "stable row ids"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Four fragments of 100 rows, some of them deleted, in two files each, and a fifth one made by an update."""
    target = str(tmp_path / "table")
    dataset = lance.write_dataset(numbers(0, 400), target, max_rows_per_file=100, enable_stable_row_ids=request.param)
    dataset.add_columns({"second": "id + 1"})
    dataset.delete("id % 7 = 3")
    dataset.update({"text": "concat(text, '!')"}, where="id < 5")
    return target


def add(uri: Any, transform: Any, **options: Any) -> ColumnsReport:
    return add_columns(uri, transform=transform, **{"progress": False, **options})


def update(uri: Any, transform: Any, *names: str, **options: Any) -> ColumnsReport:
    return update_columns(uri, transform=transform, columns=names, **{"progress": False, **options})


def assert_column(uri: str, name: str, value: Values) -> None:
    """Every row has the value that belongs to its id, and the other columns are as they were."""
    found = lance.dataset(uri).to_table()
    assert found.column(name).to_pylist() == [value(item) for item in found.column("id").to_pylist()]
    assert found.column("nested").to_pylist() == [
        {"a": item, "b": [{"c": str(item)}]} for item in found.column("id").to_pylist()
    ]


def plus_one(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch({"new": pc.add(batch.column("id"), 1)})


class Scaled:
    """A transform with state."""

    made = 0

    def __init__(self, factor: int, offset: int = 0) -> None:
        Scaled.made += 1
        self.factor, self.offset = factor, offset

    def __call__(self, batch: pa.RecordBatch) -> pa.Table:
        return pa.table({"new": pc.add(pc.multiply(batch.column("id"), self.factor), self.offset)})


@lance.batch_udf(output_schema=pa.schema([pa.field("new", pa.int16())]))
def udf(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch([pc.cast(batch.column("id"), pa.int16())], ["new"])


# What a transform may be


@pytest.mark.parametrize(
    ("transform", "options", "value"),
    [
        ({"new": "id * 2"}, {}, lambda item: item * 2),
        ({"new": "nested.a + 1"}, {}, lambda item: item + 1),
        ({"new": "'constant'"}, {}, lambda item: "constant"),
        (plus_one, {}, lambda item: item + 1),
        (plus_one, {"read_columns": ["id"], "batch_size": 7}, lambda item: item + 1),
        (lambda frame: pd.DataFrame({"new": frame["id"] * 3}), {"batch_format": "pandas"}, lambda item: item * 3),
        (lambda arrays: {"new": arrays["id"] * 4}, {"batch_format": "numpy"}, lambda item: item * 4),
        (udf, {}, lambda item: item),
        (Scaled, {"fn_constructor_args": [5], "fn_constructor_kwargs": {"offset": 1}}, lambda item: 5 * item + 1),
        (pa.field("new", pa.list_(pa.float32(), 3)), {}, lambda item: None),
        (pa.schema([("new", pa.int64())]), {}, lambda item: None),
        (
            lambda batch: {"new": [[float(item), 0.5] for item in batch["id"]]},
            {"batch_format": "numpy", "output_schema": pa.schema([("new", pa.list_(pa.float32(), 2))])},
            lambda item: [float(item), 0.5],
        ),
        (
            lambda batch: pa.table({"new": [{"x": item, "y": [item]} for item in batch["id"].to_pylist()]}),
            {},
            lambda item: {"x": item, "y": [item]},
        ),
    ],
    ids=[
        "sql",
        "sql nested",
        "sql constant",
        "function",
        "columns",
        "pandas",
        "numpy",
        "udf",
        "class",
        "field",
        "schema",
        "vector",
        "struct",
    ],
)
def test_each_kind_of_transform_gives_every_row_its_value(
    uri: str, transform: Any, options: dict[str, Any], value: Values
):
    report = add(uri, transform, **options)
    assert_column(uri, "new", value)
    assert (report.columns, report.version) == (("new",), lance.dataset(uri).version)
    assert_nothing_left_over(uri)


def test_a_class_is_made_once_for_each_worker(uri: str):
    before = Scaled.made
    add(uri, Scaled, fn_constructor_args=[2], output_schema=pa.schema([("new", pa.int64())]))
    assert Scaled.made == before + 1


def test_several_columns_come_with_one_commit(uri: str):
    before = versions(uri)
    report = add(uri, {"p": "id", "q": "id + 1"})
    assert versions(uri) == [*before, report.version]
    assert_column(uri, "p", lambda item: item)
    assert_column(uri, "q", lambda item: item + 1)


@pytest.mark.parametrize("transform", [{"new": "id * 2"}, lambda batch: {"new": pc.multiply(batch["id"], 2)}])
@pytest.mark.parametrize(("condition", "holds"), [("id < 150", lambda i: i < 150), ("id < 0", lambda i: False)])
def test_rows_that_do_not_match_the_filter_get_null(
    uri: str, transform: Any, condition: str, holds: Callable[[int], bool]
):
    add(uri, transform, filter=condition, output_schema=pa.schema([("new", pa.int64())]))
    assert_column(uri, "new", lambda item: item * 2 if holds(item) else None)


def test_a_transform_is_not_given_rows_that_the_filter_leaves_out(uri: str):
    seen: list[int] = []

    def note(batch: pa.RecordBatch) -> pa.RecordBatch:
        seen.extend(batch.column("id").to_pylist())
        return plus_one(batch)

    add(uri, note, filter="id >= 390", output_schema=pa.schema([("new", pa.int64())]))
    assert sorted(seen) == [item for item in range(390, 400) if item % 7 != 3]


def test_merge_columns_takes_a_batch_with_the_new_column_appended(uri: str):
    merge_columns(
        uri,
        transform=lambda batch: batch.append_column("new", pc.negate(batch.column("id"))),
        read_columns=["id"],
        progress=False,
    )
    assert_column(uri, "new", lambda item: -item)


def test_row_ids_are_there_for_a_transform_that_asks(uri: str):
    wanted = lance.dataset(uri).to_table(columns=["id"], with_row_address=True)
    add(uri, lambda batch: {"new": batch.column("_rowaddr")}, read_columns=["_rowaddr"])
    found = lance.dataset(uri).to_table(columns=["id", "new"])
    assert found.column("new").to_pylist() == wanted.column("_rowaddr").to_pylist()


def test_a_part_of_a_nested_column_may_be_all_that_a_transform_reads(uri: str):
    add(uri, lambda batch: {"new": batch.column("nested.a")}, read_columns=["nested.a"])
    assert_column(uri, "new", lambda item: item)


@pytest.fixture
def empty(tmp_path: Path) -> str:
    """A table without rows, with an index."""
    target = str(tmp_path / "empty")
    lance.write_dataset(numbers(0, 10), target).create_scalar_index("id", "BTREE")
    lance.dataset(target).delete("true")
    return target


@pytest.mark.parametrize(
    ("transform", "kind"),
    [(plus_one, pa.int64()), ({"new": "id + 1"}, pa.int64()), ({"new": "'x'"}, pa.string())],
    ids=["function", "sql", "constant"],
)
def test_an_empty_table_gets_the_column(empty: str, transform: Any, kind: pa.DataType):
    assert add(empty, transform).rows == 0
    assert lance.dataset(empty).schema.field("new").type == kind
    rows = numbers(0, 20).append_column("new", pa.nulls(20, kind).fill_null("" if kind == pa.string() else 7))
    lance.write_dataset(rows, empty, mode="append")
    assert (
        lance.dataset(empty).to_table(filter="id = 11").column("new").to_pylist() == rows.column("new").to_pylist()[:1]
    )


# A column that is misspelt must not become nulls


MISSPELT: dict[str, Callable[[str], object]] = {
    "update by sql": lambda uri: update(uri, {"typo": "id"}, "second"),
    "update by function": lambda uri: update(uri, lambda batch: {"typo": batch["id"]}, "second"),
    "merge": lambda uri: merge_columns(
        uri,
        transform=lambda batch: batch.append_column("typo", batch.column("id")),
        output_schema=pa.schema([("new", pa.int64())]),
        progress=False,
    ),
    "sql": lambda uri: add(uri, {"typo": "id"}, output_schema=pa.schema([("new", pa.int64())])),
    "one of two": lambda uri: add(
        uri, lambda batch: {"new": batch["id"]}, output_schema=pa.schema([("new", pa.int64()), ("typo", pa.int64())])
    ),
    "surplus": lambda uri: add(
        uri,
        lambda batch: {"new": batch["id"], "typo": batch["id"]},
        output_schema=pa.schema([("new", pa.int64())]),
    ),
}


@pytest.mark.parametrize("call", MISSPELT.values(), ids=MISSPELT)
def test_a_column_that_is_missing_or_surplus_in_a_result_is_told_by_name(uri: str, call: Callable[[str], object]):
    before = lance.dataset(uri).to_table()
    with pytest.raises((SchemaMismatchError, TaskFailedError)) as caught:
        call(uri)
    error = caught.value if isinstance(caught.value, SchemaMismatchError) else caught.value.__cause__
    assert isinstance(error, SchemaMismatchError)
    assert "typo" in f"{error}"
    assert set(error.columns) & {"second", "new", "typo"}
    assert lance.dataset(uri).to_table() == before
    assert_nothing_left_over(uri)


def test_a_struct_may_lack_parts_that_are_null(uri: str):
    schema = pa.schema([("new", pa.struct([("x", pa.int64()), ("y", pa.int64())]))])
    add(uri, lambda batch: {"new": [{"x": item} for item in batch["id"].to_pylist()]}, output_schema=schema)
    assert_column(uri, "new", lambda item: {"x": item, "y": None})


# Values computed anew


@pytest.mark.parametrize("transform", [{"second": "id * 2"}, lambda batch: {"second": pc.multiply(batch["id"], 2)}])
def test_an_update_replaces_the_values_of_all_rows(uri: str, transform: Any):
    update(uri, transform, "second")
    assert_column(uri, "second", lambda item: item * 2)
    assert_nothing_left_over(uri)


def test_an_update_of_a_slice_leaves_the_other_rows_alone(uri: str):
    report = update(uri, lambda batch: {"vector": [[-1.0, 0.0]] * len(batch)}, "vector", filter="id BETWEEN 20 AND 30")
    assert_column(uri, "vector", lambda item: [-1.0, 0.0] if 20 <= item <= 30 else [item, 1.0])
    assert report.files == 1


def test_only_rows_without_a_value_are_computed(uri: str):
    add(uri, {"new": "id"}, filter="id < 200")
    report = update(uri, {"new": "cast(-1 as bigint)"}, "new", where_null=True)
    assert_column(uri, "new", lambda item: item if item < 200 else -1)
    assert report.rows == len([item for item in range(200, 400) if item % 7 != 3])


def test_a_filter_that_ends_in_a_comment_is_kept_whole(uri: str):
    report = update(uri, {"vector": "vector"}, "vector", filter="id < 20 -- the first ones", where_null=False)
    assert report.rows == len([item for item in range(20) if item % 7 != 3])


def test_only_rows_changed_since_a_version_are_computed_and_count_as_updated(tmp_path: Path):
    target = str(tmp_path / "stable")
    dataset = lance.write_dataset(numbers(0, 200), target, max_rows_per_file=50, enable_stable_row_ids=True)
    add(target, {"new": "id"})
    since = lance.dataset(target).version
    dataset = lance.dataset(target)
    dataset.update({"text": "'changed'"}, where="id = 60")
    report = update(target, {"new": "cast(-1 as bigint)"}, "new", changed_since=since)
    assert report.rows == 1
    assert_column(target, "new", lambda item: -1 if item == 60 else item)
    updated = lance.dataset(target).to_table(columns=["id"], filter=f"_row_last_updated_at_version = {report.version}")
    assert updated.column("id").to_pylist() == [60]


def test_an_index_stays_right_when_its_column_is_updated(uri: str):
    lance.dataset(uri).create_scalar_index("second", "BTREE")
    update(uri, {"second": "id + 1000"}, "second", filter="id < 50")
    found = {value: lance.dataset(uri).to_table(columns=["id"], filter=f"second = {value}") for value in (1011, 12, 61)}
    assert {value: rows.column("id").to_pylist() for value, rows in found.items()} == {1011: [11], 12: [], 61: [60]}


# Others change the table meanwhile


def during(act: Callable[[], object]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """``plus_one`` that does something else first, the first time."""
    done = threading.Event()

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        if not done.is_set():
            done.set()
            act()
        return plus_one(batch)

    return transform


OTHERS: dict[str, tuple[Callable[[str], object], int]] = {
    "append": (lambda uri: lance.write_dataset(numbers_of(uri, 1000), uri, mode="append"), 1),
    "delete": (lambda uri: lance.dataset(uri).delete("id < 50"), 0),
    "delete of a fragment": (lambda uri: lance.dataset(uri).delete("id >= 100 AND id < 200"), 0),
    "update": (lambda uri: lance.dataset(uri).update({"text": "'x'"}, where="id = 11"), 1),
    "compaction": (lambda uri: lance.dataset(uri).optimize.compact_files(), 1),
    "index": (lambda uri: lance.dataset(uri).create_scalar_index("id", "BTREE"), 0),
    "column": (lambda uri: lance.dataset(uri).add_columns({"other": "id"}), 5),
}


def numbers_of(uri: str, first: int) -> pa.Table:
    table = numbers(first, 10)
    return table.append_column("second", pc.add(table.column("id"), 1))


@pytest.mark.parametrize("other", OTHERS)
def test_what_others_commit_meanwhile_voids_only_the_fragments_concerned(uri: str, other: str):
    act, recomputed = OTHERS[other]
    report = add(uri, during(lambda: act(uri)), output_schema=pa.schema([("new", pa.int64())]))
    assert_column(uri, "new", lambda item: item + 1)
    assert report.recomputed == recomputed
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("other", ["append", "delete", "update", "compaction"])
def test_an_update_beside_others_loses_nothing(uri: str, other: str):
    def second(batch: pa.RecordBatch) -> Any:
        return {"second": plus_one(batch).column("new")}

    once = during(lambda: OTHERS[other][0](uri))
    update(uri, lambda batch: {"second": pc.add(once(batch).column("new"), 7)}, "second")
    assert_column(uri, "second", lambda item: item + 8)
    assert_nothing_left_over(uri)


@pytest.fixture
def before_the_commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something done by others after the computation and before the first commit."""

    def arrange(act: Callable[[], object]) -> None:
        apply, acts = commit.apply, [act]

        def late(*args: Any, **kwargs: Any) -> Any:
            if acts:
                acts.pop()()
            return apply(*args, **kwargs)

        monkeypatch.setattr(commit, "apply", late)

    return arrange


@pytest.mark.parametrize("transform", [{"new": "id + 1"}, plus_one], ids=["sql", "function"])
def test_matching_rows_appended_before_the_commit_of_a_job_that_matched_nothing_are_computed(
    uri: str, transform: Any, before_the_commit: Callable[[Callable[[], object]], None]
):
    before_the_commit(lambda: lance.write_dataset(numbers_of(uri, 1000), uri, mode="append"))
    report = add(uri, transform, filter="id >= 1000", output_schema=pa.schema([("new", pa.int64())]))
    assert (report.rows, report.recomputed) == (10, 1)
    assert_column(uri, "new", lambda item: item + 1 if item >= 1000 else None)
    assert_nothing_left_over(uri)


def test_rows_appended_to_an_empty_table_before_the_commit_are_computed(
    empty: str, before_the_commit: Callable[[Callable[[], object]], None]
):
    before_the_commit(lambda: lance.write_dataset(numbers(0, 10), empty, mode="append"))
    assert add(empty, plus_one).rows == 10
    assert_column(empty, "new", lambda item: item + 1)


def test_rows_appended_beside_a_column_of_nulls_have_null(
    uri: str, before_the_commit: Callable[[Callable[[], object]], None]
):
    before_the_commit(lambda: lance.write_dataset(numbers_of(uri, 1000), uri, mode="append"))
    add(uri, pa.field("new", pa.struct([("x", pa.int8())]), metadata={"unit": "m"}))
    assert_column(uri, "new", lambda item: None)
    assert lance.dataset(uri).schema.field("new").metadata == {b"unit": b"m"}


@pytest.mark.parametrize("filter", [None, "id < 0"], ids=["values", "nothing to compute"])
def test_metadata_that_others_change_meanwhile_stays(
    uri: str, filter: str | None, before_the_commit: Callable[[Callable[[], object]], None]
):
    def change() -> None:
        lance.dataset(uri).update_schema_metadata({"by": "others"})
        lance.dataset(uri).update_field_metadata({"id": {"unit": "m"}}, replace=True)

    before_the_commit(change)
    add(uri, plus_one, filter=filter, output_schema=pa.schema([("new", pa.int64())]))
    schema = lance.dataset(uri).schema
    assert (schema.metadata, schema.field("id").metadata) == ({b"by": b"others"}, {b"unit": b"m"})
    assert_column(uri, "new", lambda item: item + 1 if filter is None else None)


def cast_second(uri: str) -> None:
    lance_ray.alter_columns(uri, {"path": "second", "data_type": pa.int32()})


def add_new(uri: str, transform: Any) -> None:
    add(uri, transform, output_schema=pa.schema([("new", pa.int64())]))


def update_second(uri: str, transform: Any) -> None:
    update(uri, lambda batch: {"second": transform(batch).column("new")}, "second", read_columns=["id"])


@pytest.mark.parametrize(
    ("act", "call", "named"),
    [
        (lambda uri: lance.dataset(uri).add_columns({"new": "id"}), add_new, "new"),
        (lambda uri: lance.dataset(uri).add_columns(pa.field("new", pa.int8())), add_new, "new"),
        (lambda uri: lance.dataset(uri).drop_columns(["second"]), update_second, "second"),
        (cast_second, update_second, "second"),
    ],
    ids=["same column", "same column of nulls", "target dropped", "target cast"],
)
def test_a_column_that_others_take_or_spoil_ends_in_a_typed_error(
    uri: str, act: Callable[[str], object], call: Callable[[str, Any], None], named: str
):
    once = during(lambda: act(uri))
    with pytest.raises(SnapshotChangedError, match=named):
        call(uri, once)
    assert_nothing_left_over(uri)


def test_rows_that_a_restore_brings_back_get_their_value(uri: str):
    version = lance.dataset(uri).version
    lance.dataset(uri).delete("id < 20")
    act = lambda: lance.dataset(uri, version=version).restore()  # noqa: E731 - a name for the line below
    add(uri, during(act), output_schema=pa.schema([("new", pa.int64())]))
    assert_column(uri, "new", lambda item: item + 1)
    assert lance.dataset(uri).count_rows("id < 20") == len([item for item in range(20) if item % 7 != 3])


def test_a_table_that_never_rests_ends_in_a_typed_error_with_nothing_committed(uri: str):
    def restless(batch: pa.RecordBatch) -> pa.RecordBatch:
        lance.write_dataset(numbers_of(uri, 1000), uri, mode="append")
        return plus_one(batch)

    with pytest.raises(SnapshotChangedError):
        add(uri, restless, output_schema=pa.schema([("new", pa.int64())]), max_replans=1)
    assert "new" not in lance.dataset(uri).schema.names
    assert_nothing_left_over(uri)


# Failures, and going on after them


def failing_at(identity: int, error: Exception) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        if identity in batch.column("id").to_pylist():
            raise error
        return plus_one(batch)

    return transform


def test_a_failed_transform_leaves_the_table_as_it_was_and_tells_its_own_error(uri: str):
    before = (versions(uri), data_files(uri))
    with pytest.raises(TaskFailedError, match="no such luck") as caught:
        add(uri, failing_at(399, KeyError("no such luck")))
    assert isinstance(caught.value.__cause__, KeyError)
    assert (versions(uri), data_files(uri)) == before
    assert_nothing_left_over(uri)


class Counting:
    """Fails for one fragment while it is told to, and counts the rows that it is given."""

    broken = True
    rows = 0

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if Counting.broken and 399 in batch.column("id").to_pylist():
            raise ValueError("399")
        Counting.rows += batch.num_rows
        return plus_one(batch)


@pytest.fixture
def failed(uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The table after a job ``backfill`` that failed for its fourth fragment."""
    monkeypatch.setattr(Counting, "broken", True)
    with pytest.raises(TaskFailedError):
        backfill(uri)
    monkeypatch.setattr(Counting, "broken", False)
    monkeypatch.setattr(Counting, "rows", 0)
    return uri


def backfill(uri: str, **options: Any) -> ColumnsReport:
    known = {"job_id": "backfill", "transform_version": "1", "output_schema": pa.schema([("new", pa.int64())])}
    return add(uri, Counting, **{**known, **options})


def test_a_second_run_does_only_the_rest(failed: str):
    report = backfill(failed)
    assert_column(failed, "new", lambda item: item + 1)
    assert (report.resumed, Counting.rows) == (4, len([item for item in range(300, 400) if item % 7 != 3]))
    assert_nothing_left_over(failed)


def test_a_second_run_goes_on_beside_what_others_did_in_between(failed: str):
    lance.write_dataset(numbers_of(failed, 1000), failed, mode="append")
    lance.dataset(failed).delete("id < 10")
    backfill(failed)
    assert_column(failed, "new", lambda item: item + 1)
    assert Counting.rows == len([item for item in range(300, 400) if item % 7 != 3]) + 10


@pytest.mark.parametrize(
    "options",
    [
        {"filter": "id > 3"},
        {"read_columns": ["id"]},
        {"output_schema": pa.schema([("new", pa.int32())])},
        {"read_version": 1},
        {"transform_version": "2"},
    ],
    ids=["filter", "columns", "output", "version", "transform"],
)
def test_a_second_run_that_differs_is_refused_and_spoils_nothing(failed: str, options: dict[str, Any]):
    with pytest.raises(InvalidArgumentError, match="differs"):
        backfill(failed, **options)
    assert backfill(failed).resumed == 4


def test_a_second_run_with_another_transform_is_refused(failed: str):
    with pytest.raises(InvalidArgumentError, match="transform"):
        add(failed, plus_one, job_id="backfill", output_schema=pa.schema([("new", pa.int64())]))


def test_a_second_run_goes_on_after_the_version_that_the_first_one_read_was_cleaned_up(failed: str):
    version = lance.dataset(failed).version
    lance.write_dataset(numbers_of(failed, 1000), failed, mode="append")
    lance.dataset(failed).cleanup_old_versions(older_than=timedelta(0))
    assert version not in versions(failed)
    assert backfill(failed).resumed == 4
    assert_column(failed, "new", lambda item: item + 1)
    assert Counting.rows == len([item for item in range(300, 400) if item % 7 != 3]) + 10
    assert_nothing_left_over(failed)


def test_values_written_for_a_column_whose_number_others_took_are_computed_again(failed: str):
    lance.dataset(failed).add_columns(pa.field("other", pa.int64()))
    backfill(failed)
    assert_column(failed, "new", lambda item: item + 1)
    assert_column(failed, "other", lambda item: None)
    assert_nothing_left_over(failed)


def test_compaction_leaves_an_unfinished_job_its_files(failed: str, monkeypatch: pytest.MonkeyPatch):
    from lance_ray import compaction

    monkeypatch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(1))
    lance_ray.compact_files(failed, progress=False, compaction_options={"target_rows_per_fragment": 90})
    backfill(failed)
    assert_column(failed, "new", lambda item: item + 1)


def test_cleanup_gives_up_an_unfinished_job(failed: str):
    orphans = set(data_files(failed)) - set(referenced_files(failed))
    report = lance_ray.cleanup_orphans(failed)
    assert (len(orphans), len(report.files)) == (4, 4)
    assert backfill(failed).resumed == 0


@pytest.mark.parametrize(
    ("transform", "options"),
    [({"new": "id"}, {}), ({"new": "id"}, {"filter": "id < 0"}), (pa.field("new", pa.int64()), {})],
    ids=["values", "no row matches", "nulls"],
)
def test_a_job_carries_its_message_and_properties_and_is_not_done_again(
    uri: str, transform: Any, options: dict[str, Any]
):
    told = {"commit_message": "why", "transaction_properties": {"by": "me"}, "job_id": "once", **options}
    first = add(uri, transform, **told)
    dataset = lance.dataset(uri)
    transaction: Any = dataset.read_transaction(first.version)
    assert {"why", "me", "once"} <= set(transaction.transaction_properties.values())
    second = add(uri, transform, **told)
    assert (second.skipped, second.version, dataset.version) == (True, first.version, first.version)
    assert lance.dataset(uri).version == first.version


# Which table


@pytest.fixture
def branch(uri: str) -> lance.LanceDataset:
    """A branch with ten more rows than the table, opened."""
    lance.write_dataset(numbers_of(uri, 1000), lance.dataset(uri).create_branch("draft"), mode="append")
    return lance.dataset(uri).checkout_version(("draft", None))


def test_an_opened_branch_gets_the_column_and_the_main_line_does_not(uri: str, branch: lance.LanceDataset):
    before = versions(uri)
    report = add(branch, plus_one, job_id="once")
    found = lance.dataset(uri).checkout_version(("draft", None)).to_table()
    assert found.column("new").to_pylist() == [item + 1 for item in found.column("id").to_pylist()]
    assert 1000 in found.column("id").to_pylist()
    assert versions(uri) == before
    again = lance.dataset(uri).checkout_version(("draft", None))
    assert add(again, plus_one, job_id="once").skipped
    assert add(again, plus_one, job_id="once").version == report.version


def test_a_job_on_an_opened_branch_goes_on_where_it_failed(
    uri: str, branch: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Counting, "broken", True)
    with pytest.raises(TaskFailedError):
        backfill(branch)
    monkeypatch.setattr(Counting, "broken", False)
    assert backfill(lance.dataset(uri).checkout_version(("draft", None))).resumed == 5
    assert "new" not in lance.dataset(uri).schema.names


def test_a_table_in_a_namespace_gets_its_column(tmp_path: Path):
    lance.write_dataset(numbers(0, 100), str(tmp_path / "table.lance"))
    place: dict[str, Any] = {
        "namespace_impl": "dir",
        "namespace_properties": {"root": str(tmp_path)},
        "table_id": ["table"],
    }
    add(None, plus_one, **place)
    update(None, {"new": "id + 2"}, "new", filter="id < 50", **place)
    assert_column(str(tmp_path / "table.lance"), "new", lambda item: item + (2 if item < 50 else 1))
    assert lance_ray.drop_columns(**place, columns=["new"]).columns == tuple(numbers(0, 0).schema.names)


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: add(uri, plus_one),
        lambda uri: update(uri, {"second": "id"}, "second", where_null=True, changed_since=1),
    ],
    ids=["add", "update"],
)
def test_the_version_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]):
    target, pin = str(tmp_path / "table"), Mock(side_effect=TableRef.pin)
    lance.write_dataset(numbers(0, 10), target, enable_stable_row_ids=True).add_columns({"second": "id"})
    monkeypatch.setattr(TableRef, "pin", lambda ref: pin(ref))
    call(target)
    assert pin.call_count == 1


def test_a_tag_names_the_version_to_compute_on(uri: str):
    seen: list[int] = []

    def note(batch: pa.RecordBatch) -> pa.RecordBatch:
        seen.extend(batch.column("id").to_pylist())
        return plus_one(batch)

    lance.dataset(uri).tags.create("planned", lance.dataset(uri).version)
    lance.dataset(uri).delete("id = 200")
    add(uri, note, read_version="planned", output_schema=pa.schema([("new", pa.int64())]))
    assert 200 in seen
    assert_column(uri, "new", lambda item: item + 1)


@pytest.mark.parametrize(
    ("transform", "error"),
    [
        (lambda batch: pa.table({"new": [1]}), SchemaMismatchError),
        (lambda batch: pa.table({"new": pa.nulls(len(batch))}), SchemaMismatchError),
        (lambda batch: 7, InvalidArgumentError),
        (lambda batch: pa.table({"new": ["x" if 399 in batch["id"].to_pylist() else 1] * 0}), SchemaMismatchError),
    ],
    ids=["fewer rows", "unknown type", "no batch", "no rows"],
)
def test_what_no_column_holds_is_refused(uri: str, transform: Any, error: type[Exception]):
    before = versions(uri)
    with pytest.raises(TaskFailedError) as caught:
        add(uri, transform)
    assert isinstance(caught.value.__cause__, error)
    assert versions(uri) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"transform": {"id": "1"}}, "id"),
        ({"transform": {}}, "SQL"),
        ({"transform": 7}, "transform"),
        ({"transform": {"new": "nowhere + 1"}}, "nowhere"),
        ({"transform": plus_one, "filter": "nowhere = 1"}, "nowhere"),
        ({"transform": plus_one, "filter": " "}, "filter"),
        ({"transform": plus_one, "batch_format": "polars"}, "polars"),
        ({"transform": plus_one, "batch_size": 0}, "batch_size"),
        ({"transform": plus_one, "concurrency": 0}, "concurrency"),
        ({"transform": plus_one, "fn_constructor_args": [1]}, "fn_constructor_args"),
        ({"transform": {"new": "id"}, "read_columns": ["id"]}, "read_columns"),
        ({"transform": {"new": "id"}, "fn_constructor_kwargs": {"a": 1}}, "fn_constructor_kwargs"),
        ({"transform": pa.field("new", pa.int64()), "filter": "id > 3"}, "filter"),
        ({"transform": pa.field("new", pa.int64()), "read_version": 1}, "read_version"),
        ({"transform": plus_one, "ray_remote_args": {"max_retries": 3}}, "max_retries"),
        ({"transform": pa.field("new", pa.int64(), nullable=False)}, "nullable"),
    ],
)
def test_bad_input_is_refused_by_name(uri: str, arguments: dict[str, Any], named: str):
    with pytest.raises((InvalidArgumentError, TaskFailedError), match=named):
        add_columns(uri, progress=False, **arguments)


def test_an_update_of_unknown_columns_is_refused(uri: str):
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        update(uri, plus_one, "nowhere")


# Thin calls


def test_a_part_of_a_nested_column_is_dropped_and_renamed_by_its_path(uri: str):
    lance_ray.alter_columns(uri, {"path": "nested.a", "name": "c"})
    lance_ray.drop_columns(uri, ["nested.b"])
    assert lance.dataset(uri).to_table(columns=["nested"], limit=2).column("nested").to_pylist() == [{"c": 5}, {"c": 6}]


def test_columns_are_dropped_renamed_and_cast(uri: str):
    assert "second" not in lance_ray.drop_columns(uri, ["second"]).columns
    report = lance_ray.alter_columns(uri, {"path": "id", "name": "number", "data_type": pa.int32()})
    assert "number" in report.columns
    assert lance.dataset(uri).schema.field("number").type == pa.int32()


def test_rows_are_deleted_and_an_old_version_restored(uri: str):
    rows, version = lance.dataset(uri).count_rows(), lance.dataset(uri).version
    assert lance_ray.delete(uri, "id < 10").rows == 9
    assert lance_ray.restore(uri, version).version == version + 2
    assert lance.dataset(uri).count_rows() == rows


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda uri: lance_ray.drop_columns(uri, []), InvalidArgumentError),
        (lambda uri: lance_ray.drop_columns(uri, ["nowhere"]), InvalidArgumentError),
        (lambda uri: lance_ray.drop_columns(uri, ["nested.zz"]), InvalidArgumentError),
        (lambda uri: lance_ray.drop_columns(uri, lance.dataset(uri).schema.names), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri, {"path": "id", "name": "text"}), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri, {"path": "nested.a", "name": "b"}), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri, {"path": "nowhere", "name": "n"}), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri, {"path": "id"}), InvalidArgumentError),
        (lambda uri: lance_ray.alter_columns(uri, {"path": "id", "data_type": "int32"}), InvalidArgumentError),
        (lambda uri: lance_ray.delete(uri, ""), InvalidArgumentError),
        (lambda uri: lance_ray.delete(uri, "nowhere = 1"), InvalidArgumentError),
        (lambda uri: lance_ray.restore(uri), InvalidArgumentError),
        (lambda uri: lance_ray.restore(uri, 999), VersionNotFoundError),
    ],
)
def test_thin_calls_refuse_bad_input(uri: str, call: Callable[[str], object], error: type[Exception]):
    before = versions(uri)
    with pytest.raises(error):
        call(uri)
    assert versions(uri) == before
