"""Columns on real Ray workers: state kept per worker, values from a Ray Dataset in any order, workers that die."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from ray.data.expressions import col

import lance_ray
from lance_ray.errors import (
    InvalidArgumentError,
    RowCoverageError,
    SchemaMismatchError,
    SnapshotChangedError,
    StorageError,
    TaskFailedError,
)
from lance_ray.ledger import JobRef
from tests.blocks import assert_nothing_left_over, versions

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(params=[False, True], ids=["addresses", "stable row ids"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Five fragments, with deletions; rows of the last one are those that an update moved."""
    return table_at(tmp_path / "table", stable=request.param)


def table_at(path: Path, *, stable: bool = False) -> str:
    ids = np.arange(400)
    table = pa.table({"id": ids, "key": [f"k{item}" for item in ids], "value": ids * 10})
    dataset = lance.write_dataset(table, str(path), max_rows_per_file=100, enable_stable_row_ids=stable)
    dataset.delete("id % 7 = 3")
    dataset.update({"value": "value + 0"}, where="id < 5")
    return str(path)


def source(uri: str, *on: str, values: Callable[[pa.Table], Any], seed: int = 0) -> pa.Table:
    """New values for all rows, named by ``on``, in another order than the table's."""
    rows = lance.dataset(uri).to_table(columns=["id", "key"], with_row_id=True, with_row_address=True)
    table = pa.table({**{name: rows.column(name) for name in on}, "new": values(rows)})
    return table.take(np.random.default_rng(seed).permutation(table.num_rows))


def int16s(rows: pa.Table) -> pa.Array:
    return pc.cast(pc.multiply(rows.column("id"), 2), pa.int16())


def ids_and(uri: str, name: str) -> dict[int, Any]:
    found = lance.dataset(uri).to_table(columns=["id", name])
    return dict(zip(found.column("id").to_pylist(), found.column(name).to_pylist(), strict=True))


def merge(uri: str, *blocks: pa.Table, **options: Any) -> lance_ray.ColumnsReport:
    return lance_ray.merge_columns_from(uri, ray.data.from_arrow(list(blocks)), progress=False, **options)


def test_a_ledger_that_cannot_be_ended_makes_no_failure_of_a_merge_that_landed(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refused(*args: Any) -> None:
        raise StorageError("no", kind="denied")

    monkeypatch.setattr(JobRef, "close", refused)
    report = merge(uri, source(uri, "id", values=int16s), on="id")
    assert report.version == lance.dataset(uri).version
    assert lance.dataset(uri).schema.names[-1] in report.columns
    assert "left for cleanup_orphans" in caplog.text


@pytest.mark.parametrize("on", [("_rowaddr",), ("_rowid",), ("id",), ("id", "key")], ids="+".join)
def test_values_in_any_order_go_to_the_rows_that_they_name_and_keep_their_type(uri: str, on: tuple[str, ...]):
    table = source(uri, *on, values=int16s)
    report = merge(uri, table.slice(0, 100), table.slice(100), on=on)
    assert ids_and(uri, "new") == {item: item * 2 for item in range(400) if item % 7 != 3}
    assert lance.dataset(uri).schema.field("new").type == pa.int16()
    assert (report.rows, report.files) == (lance.dataset(uri).count_rows(), 5)
    assert_nothing_left_over(uri)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32(), 3), pa.struct([("a", pa.int8()), ("b", pa.list_(pa.string()))]), pa.decimal128(9, 2)],
)
def test_vectors_structs_and_decimals_come_as_they_are(tmp_path: Path, kind: pa.DataType):
    uri = table_at(tmp_path / "t")
    cells = {
        "fixed_size_list": lambda item: [float(item), 1.0, 2.0],
        "struct": lambda item: {"a": item % 100, "b": [str(item)]},
        "decimal128": lambda item: item,
    }
    cell = next(make for name, make in cells.items() if str(kind).startswith(name))
    table = source(
        uri, "id", values=lambda rows: pa.array([cell(item) for item in rows.column("id").to_pylist()], kind)
    )
    merge(uri, table, on="id")
    wanted = dict(zip(table.column("id").to_pylist(), table.column("new").to_pylist(), strict=True))
    assert ids_and(uri, "new") == wanted
    assert lance.dataset(uri).schema.field("new").type == kind


@pytest.mark.parametrize(
    ("spoil", "counts"),
    [
        (lambda table: table.slice(3), (0, 0, 3)),
        (lambda table: pa.concat_tables([table, table.slice(0, 2)]), (2, 0, 0)),
        (lambda table: pa.concat_tables([table.slice(2), table.slice(5, 2)]), (2, 0, 2)),
        (lambda table: pa.concat_tables([table, pa.table({"id": [9999], "new": [1]}, schema=table.schema)]), (0, 1, 0)),
    ],
    ids=["missing", "duplicate", "both", "unknown"],
)
def test_rows_that_do_not_match_one_to_one_are_counted_and_nothing_is_written(
    tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], counts: tuple[int, int, int]
):
    uri = table_at(tmp_path / "t")
    before = versions(uri)
    with pytest.raises(RowCoverageError) as caught:
        merge(uri, spoil(source(uri, "id", values=int16s)), on="id")
    error = caught.value
    assert (error.duplicate, error.unknown, error.missing) == counts
    assert all(
        error.examples[name] for name, count in zip(("duplicate", "unknown", "missing"), counts, strict=True) if count
    )
    assert versions(uri) == before
    assert_nothing_left_over(uri)


def test_addresses_of_deleted_rows_are_unknown(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    with pytest.raises(RowCoverageError) as caught:
        merge(uri, pa.table({"_rowaddr": [5, 10], "new": [1, 2]}), require_full_coverage=False)
    assert (caught.value.unknown, caught.value.duplicate, caught.value.missing) == (1, 0, 0)


def test_missing_rows_get_null_when_that_is_allowed(uri: str):
    merge(uri, pa.table({"id": [0, 399], "new": ["first", "last"]}), on="id", require_full_coverage=False)
    assert ids_and(uri, "new") == {item: {0: "first", 399: "last"}.get(item) for item in ids_and(uri, "value")}


@pytest.mark.parametrize("full", [True, False])
def test_rows_appended_meanwhile_are_an_error_or_null(tmp_path: Path, full: bool):
    uri = table_at(tmp_path / "t")
    table = source(uri, "id", values=int16s)

    def append(batch: pa.Table) -> pa.Table:
        more = pa.table({"id": [1000], "key": ["k"], "value": [0]})
        if 0 in batch.column("id").to_pylist():
            lance.write_dataset(more, uri, mode="append")
        return batch

    ds = ray.data.from_arrow(table).materialize().map_batches(append, batch_format="pyarrow", batch_size=None)
    options: dict[str, Any] = {"on": "id", "output_schema": pa.schema([("new", pa.int16())]), "progress": False}
    if full:
        before = lance.dataset(uri).schema
        with pytest.raises(SnapshotChangedError):
            lance_ray.merge_columns_from(uri, ds, **options)
        assert lance.dataset(uri).schema == before
    else:
        lance_ray.merge_columns_from(uri, ds, require_full_coverage=False, **options)
        assert ids_and(uri, "new")[1000] is None
        assert ids_and(uri, "new")[399] == 798


def settings_of(ds: Any) -> dict[str, Any]:
    # Ray names the logger of a dataset when it first runs, whoever runs it.
    own = ("_", "dataset_logger_id")
    return {name: value for name, value in vars(ds.context).items() if not name.startswith(own)}


def test_the_settings_of_the_caller_s_dataset_are_as_before(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    ds = ray.data.from_arrow(source(uri, "id", values=int16s))
    before = settings_of(ds)
    lance_ray.merge_columns_from(uri, ds, on="id", progress=False)
    with pytest.raises(InvalidArgumentError):
        lance_ray.merge_columns_from(uri, ds, on="id", progress=False)
    assert settings_of(ds) == before


def test_an_update_from_a_dataset_changes_the_rows_that_it_names(uri: str):
    ds = ray.data.from_arrow(pa.table({"id": [8, 4, 399], "value": [-8, -4, -399]}))
    report = lance_ray.update_columns(uri, ds, columns=["value"], on="id", progress=False)
    assert ids_and(uri, "value") == {
        item: -item if item in (8, 4, 399) else item * 10 for item in range(400) if item % 7 != 3
    }
    assert report.rows == 3
    if lance.dataset(uri).has_stable_row_ids:
        changed = lance.dataset(uri).to_table(columns=["id"], filter=f"_row_last_updated_at_version = {report.version}")
        assert sorted(changed.column("id").to_pylist()) == [4, 8, 399]
    assert_nothing_left_over(uri)


def test_values_of_an_older_version_do_not_overwrite_what_others_changed_since(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    read = lance_ray.read_lance(uri, with_metadata=True)
    negative = read.map_batches(negated, batch_format="pyarrow")
    lance.dataset(uri).update({"value": "7"}, where="id = 200")
    before = lance.dataset(uri).version
    for call in (lance_ray.update_columns_from, lance_ray.update_columns):
        with pytest.raises(SnapshotChangedError):
            call(uri, negative, columns=["value"], progress=False)
    other = read.union(lance_ray.read_lance(uri, with_metadata=True))
    with pytest.raises(InvalidArgumentError, match="read_version"):
        lance_ray.update_columns_from(uri, other, columns=["value"], progress=False)
    assert lance.dataset(uri).version == before
    few = negative.filter(expr=col("id") < 100)  # of fragments that nobody changed
    assert lance_ray.update_columns_from(uri, few, columns=["value"], progress=False).rows_updated == 86
    assert (ids_and(uri, "value")[99], ids_and(uri, "value")[200]) == (-990, 7)


def negated(batch: pa.Table) -> pa.Table:
    return batch.set_column(batch.schema.get_field_index("value"), "value", pc.negate(batch["value"]))


@pytest.mark.parametrize("full", [True, False])
def test_blocks_without_rows_are_no_different(tmp_path: Path, full: bool):
    uri = table_at(tmp_path / "t")
    table = source(uri, "id", values=int16s)
    blocks = [table.slice(0, 100), table.slice(100, 100), table.slice(200)]
    marked = [
        block.append_column("keep", pa.nulls(len(block), pa.bool_()).fill_null(index > 0))
        for index, block in enumerate(blocks)
    ]
    kept = ray.data.from_arrow([table.slice(0, 0).append_column("keep", pa.array([], pa.bool_())), *marked])
    ds = kept.filter(expr=col("keep")).drop_columns(["keep"])
    options: dict[str, Any] = {"on": "id", "progress": False, "require_full_coverage": full}
    if full:
        with pytest.raises(RowCoverageError) as caught:
            lance_ray.merge_columns_from(uri, ds, **options)
        assert (caught.value.missing, caught.value.unknown, caught.value.duplicate) == (100, 0, 0)
    else:
        lance_ray.merge_columns_from(uri, ds, **options)
        skipped = set(blocks[0].column("id").to_pylist())
        assert ids_and(uri, "new") == {
            item: None if item in skipped else item * 2 for item in range(400) if item % 7 != 3
        }


NOTHING: dict[str, Callable[[], Any]] = {
    "filtered": lambda: ray.data.from_arrow(pa.table({"id": [1, 2], "new": [1, 2]})).filter(expr=col("id") > 5),
    "empty": lambda: ray.data.from_arrow(pa.table({"id": pa.array([], pa.int64()), "new": pa.array([], pa.int64())})),
}


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_a_dataset_without_rows_lacks_all_rows_or_gives_nulls(tmp_path: Path, nothing: Callable[[], Any]):
    uri = table_at(tmp_path / "t")
    options: dict[str, Any] = {"on": "id", "progress": False, "output_schema": pa.schema([("new", pa.int64())])}
    with pytest.raises(RowCoverageError) as caught:
        lance_ray.merge_columns_from(uri, nothing(), **options)
    assert caught.value.missing == lance.dataset(uri).count_rows()
    lance_ray.merge_columns_from(uri, nothing(), require_full_coverage=False, **options)
    assert set(ids_and(uri, "new").values()) == {None}
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_an_update_from_a_dataset_without_rows_does_nothing(tmp_path: Path, nothing: Callable[[], Any]):
    uri = table_at(tmp_path / "t")
    before = versions(uri)
    report = lance_ray.update_columns(
        uri, nothing().rename_columns({"new": "value"}), columns=["value"], on="id", progress=False
    )
    assert (report.skipped, versions(uri)) == (True, before)
    assert_nothing_left_over(uri)


def test_an_empty_table_gets_the_columns_of_an_empty_dataset(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    lance.dataset(uri).delete("true")
    lance_ray.merge_columns_from(uri, NOTHING["empty"](), on="id", progress=False)
    lance_ray.add_columns_from(
        uri, transform=lambda batch: {"more": batch["id"]}, batch_format="pyarrow", progress=False
    )
    assert lance.dataset(uri).schema.names == ["id", "key", "value", "new", "more"]
    assert lance.dataset(uri).schema.field("new").type == pa.int64()


def cells(kind: pa.DataType) -> pa.Array:
    """Three values of a type, and a null."""
    plain: Any = [1, 2, 3, None]
    if pa.types.is_dictionary(kind):
        return cells(kind.value_type).dictionary_encode()
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(1)):
        plain = pa.array(["a", "b", "c", None])
        return plain.cast(pa.binary()).cast(kind) if kind == pa.binary(1) else plain.cast(kind)
    return (
        pa.array(plain, pa.int64()).cast(pa.int32()).cast(kind) if kind.bit_width == 32 else pa.array(plain).cast(kind)
    )


KINDS = [
    *(pa.int8(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.float64(), pa.string(), pa.large_string()),
    *(pa.binary(), pa.large_binary(), pa.binary(1), pa.date32(), pa.time64("us"), pa.timestamp("us", "UTC")),
    *(pa.duration("s"), pa.dictionary(pa.int32(), pa.string())),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_are_found_by_keys_of_any_type_and_null_keys_match_nothing(tmp_path: Path, kind: pa.DataType):
    uri, keys = str(tmp_path / "t"), cells(kind)
    lance.write_dataset(pa.table({"id": [0, 1, 2, 3], "key": keys}), uri)
    given = keys.take(pa.array([2, 0]))
    report = merge(uri, pa.table({"key": given, "new": [20, 0]}), on="key", require_full_coverage=False)
    assert ids_and(uri, "new") == {0: 0, 1: None, 2: 20, 3: None}
    assert report.rows == 2
    with pytest.raises(RowCoverageError) as caught:
        merge(
            uri, pa.table({"key": keys.take(pa.array([1, 3])), "more": [1, 3]}), on="key", require_full_coverage=False
        )
    assert (caught.value.unknown, caught.value.examples) == (1, {"unknown": ["None"]})


WRONG: dict[str, tuple[dict[str, Any], Any, type[Exception]]] = {
    "unknown key column": ({"on": "nowhere"}, {"nowhere": [1], "new": [1]}, InvalidArgumentError),
    "address and key": ({"on": ["_rowaddr", "id"]}, {"_rowaddr": [1], "id": [1], "new": [1]}, InvalidArgumentError),
    "key of another type": ({"on": "id"}, {"id": ["a"], "new": [1]}, SchemaMismatchError),
    "address that is text": ({"on": "_rowaddr"}, {"_rowaddr": ["a"], "new": [1]}, SchemaMismatchError),
    "address beyond all": (
        {"on": "_rowaddr"},
        {"_rowaddr": pa.array([2**64 - 1], pa.uint64()), "new": [1]},
        RowCoverageError,
    ),
    "id beyond all": ({"on": "_rowid"}, {"_rowid": pa.array([2**64 - 1], pa.uint64()), "new": [1]}, RowCoverageError),
    "negative address": ({"on": "_rowaddr"}, {"_rowaddr": [-5], "new": [1]}, RowCoverageError),
    "key out of range": ({"on": "id"}, {"id": pa.array([2**63], pa.uint64()), "new": [1]}, SchemaMismatchError),
    "values of another type": (
        {"on": "id", "output_schema": pa.schema([("new", pa.int64())])},
        {"id": [1], "new": ["text"]},
        SchemaMismatchError,
    ),
    "value out of range": (
        {"on": "id", "output_schema": pa.schema([("new", pa.int8())])},
        {"id": [1], "new": [1000]},
        SchemaMismatchError,
    ),
}


@pytest.mark.parametrize(("options", "columns", "error"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told_by_its_own_error(
    tmp_path: Path, options: dict[str, Any], columns: dict[str, Any], error: type[Exception]
):
    uri = table_at(tmp_path / "t", stable=True)
    before = versions(uri)
    with pytest.raises(error) as caught:
        merge(uri, pa.table(columns), require_full_coverage=False, **options)
    assert "Failed to apply" not in str(caught.value)
    assert versions(uri) == before
    assert_nothing_left_over(uri)


def test_an_error_of_a_function_upstream_is_the_cause_of_the_merge_s(tmp_path: Path):
    uri = table_at(tmp_path / "t")

    def fail(batch: pa.Table) -> pa.Table:
        raise KeyError("no such luck")

    ds = ray.data.from_arrow(source(uri, "id", values=int16s)).map_batches(fail, batch_format="pyarrow")
    with pytest.raises(TaskFailedError, match="no such luck") as caught:
        lance_ray.merge_columns_from(uri, ds, on="id", output_schema=pa.schema([("new", pa.int16())]), progress=False)
    assert isinstance(caught.value.__cause__, KeyError)
    assert_nothing_left_over(uri)


RESUMABLE: dict[str, Callable[..., lance_ray.ColumnsReport]] = {
    "merge": lambda uri, **told: merge(uri, source(uri, "id", values=int16s), on="id", **told),
    "update": lambda uri, **told: lance_ray.update_columns(
        uri,
        ray.data.from_arrow(pa.table({"id": [8], "value": [-8]})),
        columns=["value"],
        on="id",
        progress=False,
        **told,
    ),
    "transform": lambda uri, **told: lance_ray.add_columns_from(uri, transform={"new": "id"}, progress=False, **told),
    "transform with a filter": lambda uri, **told: lance_ray.add_columns_from(
        uri, transform={"new": "id"}, filter="id < 0", progress=False, **told
    ),
}


@pytest.mark.parametrize("call", RESUMABLE.values(), ids=RESUMABLE)
def test_a_job_through_ray_data_carries_its_id_message_and_properties_and_is_not_done_again(
    tmp_path: Path, call: Callable[..., lance_ray.ColumnsReport]
):
    uri = table_at(tmp_path / "t")
    told = {"commit_message": "why", "transaction_properties": {"by": "me"}, "job_id": "once"}
    first = call(uri, **told)
    transaction: Any = lance.dataset(uri).read_transaction(first.version)
    assert {"why", "me", "once"} <= set(transaction.transaction_properties.values())
    again = call(uri, **told)
    assert (first.skipped, again.skipped, again.version) == (False, True, first.version)
    assert lance.dataset(uri).version == first.version
    assert_nothing_left_over(uri)


def test_an_update_refuses_two_values_for_a_row(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    ds = ray.data.from_arrow(pa.table({"id": [8, 8], "value": [1, 2]}))
    with pytest.raises(RowCoverageError):
        lance_ray.update_columns(uri, ds, columns=["value"], on="id", progress=False)
    assert ids_and(uri, "value")[8] == 80


class Model:
    """Says which process computed a row, and how often it was loaded there."""

    loads = 0

    def __init__(self) -> None:
        Model.loads += 1

    def __call__(self, batch: pa.RecordBatch) -> dict[str, Any]:
        return {"new": np.full(batch.num_rows, os.getpid()), "loads": np.full(batch.num_rows, Model.loads)}


@pytest.mark.slow
def test_a_model_is_loaded_once_in_each_of_the_workers_asked_for(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    lance_ray.add_columns(uri, transform=Model, concurrency=1, read_columns=["id"], progress=False)
    assert len(set(ids_and(uri, "new").values())) == 1
    assert set(ids_and(uri, "loads").values()) == {1}


@lance.batch_udf(output_schema=pa.schema([pa.field("new", pa.int16())]))
def declared(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch([pc.add(batch.column("id"), 1)], ["new"])


class Added:
    """Adds what it was made with."""

    def __init__(self, number: int, *, more: int = 0) -> None:
        self.number = number + more

    def __call__(self, batch: pa.RecordBatch) -> dict[str, Any]:
        return {"new": pc.add(batch["id"], self.number)}


TRANSFORMS: dict[str, tuple[Any, dict[str, Any], pa.DataType]] = {
    "sql": ({"new": "id + 1"}, {}, pa.int64()),
    "function": (lambda batch: {"new": pc.add(batch["id"], 1)}, {"read_columns": ["id"], "batch_size": 7}, pa.int64()),
    "numpy": (lambda batch: {"new": batch["id"] + 1}, {"batch_format": "numpy"}, pa.int64()),
    "udf of another type": (declared, {}, pa.int16()),
    "class": (Added, {"fn_constructor_args": [0], "fn_constructor_kwargs": {"more": 1}, "concurrency": 1}, pa.int64()),
}


@pytest.mark.parametrize(
    ("transform", "options", "kind"),
    [
        pytest.param(*how, id=name, marks=[pytest.mark.slow] if name == "class" else [])  # actors take seconds to start
        for name, how in TRANSFORMS.items()
    ],
)
@pytest.mark.parametrize("filter", [None, "id < 150"])
def test_columns_computed_by_ray_data_are_the_same(
    tmp_path: Path, transform: Any, options: dict[str, Any], kind: pa.DataType, filter: str | None
):
    uri = table_at(tmp_path / "t")
    told = {"batch_format": "pyarrow", **options}
    report = lance_ray.add_columns_from(uri, transform=transform, filter=filter, progress=False, **told)
    wanted = {item: item + 1 if filter is None or item < 150 else None for item in ids_and(uri, "value")}
    assert ids_and(uri, "new") == wanted
    assert lance.dataset(uri).schema.field("new").type == kind
    assert report.rows == len([value for value in wanted.values() if value is not None])
    assert_nothing_left_over(uri)


def test_a_function_takes_a_dict_of_lists_through_ray_data_as_in_lance_ray(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    lance_ray.add_columns_from(
        uri, transform=lambda batch: {"length": [len(key) for key in batch["key"]]}, progress=False
    )
    found = lance.dataset(uri).to_table(columns=["key", "length"]).to_pylist()
    assert all(row["length"] == len(row["key"]) for row in found)


def test_addresses_are_there_for_a_transform_through_ray_data_that_asks(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    lance_ray.add_columns_from(
        uri, transform=lambda batch: {"new": batch["_rowaddr"]}, read_columns=["_rowaddr"], progress=False
    )
    found = lance.dataset(uri).to_table(columns=["new"])
    wanted = lance.dataset(uri, version=lance.dataset(uri).version - 1).to_table(columns=[], with_row_address=True)
    assert found.column("new").to_pylist() == wanted.column("_rowaddr").to_pylist()


@pytest.mark.parametrize("filter", [None, "id > 350", "id > 400"], ids=["all", "some", "only what is appended"])
def test_rows_appended_while_ray_data_computes_are_computed_too(tmp_path: Path, filter: str | None):
    uri, marker = table_at(tmp_path / "t"), tmp_path / "appended"

    def append(batch: pa.RecordBatch) -> dict[str, Any]:
        if not marker.exists():
            marker.touch()
            lance.write_dataset(pa.table({"id": [1000], "key": ["k"], "value": [0]}), uri, mode="append")
        return {"new": pc.add(batch["id"], 1)}

    if filter == "id > 400":  # no row of the table gets to the function
        lance.write_dataset(pa.table({"id": [900], "key": ["k"], "value": [0]}), uri, mode="append")
    report = lance_ray.add_columns_from(
        uri,
        transform=append,
        filter=filter,
        output_schema=pa.schema([("new", pa.int64())]),
        batch_format="pyarrow",
        progress=False,
    )
    least = int(filter.rpartition(" ")[2]) if filter else -1
    assert ids_and(uri, "new") == {item: item + 1 if item > least else None for item in ids_and(uri, "value")}
    assert (ids_and(uri, "new")[1000], report.recomputed) == (1001, 1)
    assert_nothing_left_over(uri)


@pytest.mark.parametrize(
    ("transform", "error"),
    [
        (lambda batch: {"typo": batch["id"]}, SchemaMismatchError),
        (lambda batch: {"new": batch["id"], "typo": batch["id"]}, SchemaMismatchError),
        (lambda batch: {"new": ["x"] * len(batch["id"])}, SchemaMismatchError),
        (lambda batch: {"new": [1 // 0]}, TaskFailedError),
    ],
    ids=["misspelt", "surplus", "another type", "raises"],
)
def test_a_transform_that_fails_in_ray_data_tells_its_own_error(tmp_path: Path, transform: Any, error: type[Exception]):
    uri = table_at(tmp_path / "t")
    before = versions(uri)
    with pytest.raises(error) as caught:
        lance_ray.add_columns_from(
            uri, transform=transform, output_schema=pa.schema([("new", pa.int64())]), progress=False
        )
    assert error is SchemaMismatchError or isinstance(caught.value.__cause__, ZeroDivisionError)
    assert versions(uri) == before
    assert_nothing_left_over(uri)


@pytest.mark.parametrize(
    "call",
    [
        lambda branch: lance_ray.add_columns_from(branch, transform={"new": "id"}, progress=False),
        lambda branch: merge(branch, pa.table({"id": [1], "new": [1]}), on="id", require_full_coverage=False),
        lambda branch: lance_ray.update_columns(
            branch, ray.data.from_arrow(pa.table({"id": [1], "value": [1]})), columns=["value"], on="id", progress=False
        ),
    ],
    ids=["transform", "merge", "update"],
)
def test_an_opened_branch_is_changed_and_the_main_line_is_not(tmp_path: Path, call: Callable[[Any], Any]):
    uri = table_at(tmp_path / "t")
    main = (versions(uri), lance.dataset(uri).to_table())
    more = pa.table({"id": [1000], "key": ["k"], "value": [0]})
    lance.write_dataset(more, lance.dataset(uri).create_branch("draft"), mode="append")
    opened = lance.dataset(uri).checkout_version(("draft", None))
    report = call(opened)
    assert (versions(uri), lance.dataset(uri).to_table()) == main
    found = lance.dataset(uri).checkout_version(("draft", None))
    assert found.version == report.version == opened.version + 1
    assert {1, 1000} <= set(found.to_table(columns=["id"]).column("id").to_pylist())
    changed = found.to_table(columns=[report.columns[0]], filter="id = 1").column(0).to_pylist()
    assert changed == [1]


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_merge_costs_nothing_but_time(tmp_path: Path):
    uri, marker = table_at(tmp_path / "t"), str(tmp_path / "died")

    def kill_once(batch: pa.Table) -> pa.Table:
        if not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), 9)
        return batch

    table = source(uri, "id", values=int16s)
    blocks = ray.data.from_arrow([table.slice(0, 200), table.slice(200)]).materialize()
    ds = blocks.map_batches(kill_once, batch_format="pyarrow", batch_size=None)
    schema = pa.schema([("new", pa.int16())])
    lance_ray.merge_columns_from(uri, ds, on="id", output_schema=schema, progress=False)
    assert ids_and(uri, "new") == {item: item * 2 for item in range(400) if item % 7 != 3}
    assert os.path.exists(marker)
    assert_nothing_left_over(uri)


def test_a_worker_that_is_killed_costs_an_attempt(tmp_path: Path):
    uri, marker = table_at(tmp_path / "t"), str(tmp_path / "died")

    def kill_once(batch: pa.RecordBatch) -> dict[str, Any]:
        if 250 in batch["id"].to_pylist() and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), 9)
        return {"new": batch["id"]}

    report = lance_ray.add_columns(
        uri, transform=kill_once, output_schema=pa.schema([("new", pa.int64())]), progress=False
    )
    assert ids_and(uri, "new") == {item: item for item in ids_and(uri, "value")}
    assert report.retried >= 1
    assert_nothing_left_over(uri)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"on": "nowhere"}, "nowhere"),
        ({"on": []}, "on"),
        ({"on": "new"}, "columns of the table"),
        ({"on": "id"}, "columns of ds"),
        ({"on": ["_rowaddr", "id"]}, "alone"),
        ({"columns": ["id"], "on": "id"}, "id"),
        ({"columns": ["value"], "on": "id", "filter": "id > 3"}, "filter"),
        ({"columns": ["value"], "on": "id", "max_replans": 1}, "max_replans"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path: Path, arguments: dict[str, Any], named: str):
    uri = table_at(tmp_path / "t")
    ds = ray.data.from_arrow(pa.table({"new": [1]}))
    call: Any = lance_ray.update_columns if "columns" in arguments else lance_ray.merge_columns_from
    with pytest.raises(InvalidArgumentError, match=named):
        call(uri, ds, progress=False, **arguments)


DRIVER = """
    import os, sys, ray, lance_ray, pyarrow as pa
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": 40}
    ray.init("local", num_cpus=1, object_store_memory=10**8, **quiet)  # not a cluster that others started
    uri, marker = sys.argv[1:]

    def transform(batch):
        if 350 in batch["id"].to_pylist() and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(int(os.environ["DRIVER"]), 9)
            import time; time.sleep(60)
        open(marker + ".rows", "a").write("%d\\n" % batch.num_rows)
        return {"new": batch["id"]}

    os.environ["DRIVER"] = str(os.getpid())
    schema = pa.schema([("new", pa.int64())])
    runtime = {"runtime_env": {"env_vars": {"DRIVER": str(os.getpid())}}}
    print(lance_ray.add_columns(
        uri, transform=transform, output_schema=schema, job_id="backfill", concurrency=1, progress=False,
        ray_remote_args=runtime,
    ).resumed)
"""


@pytest.mark.slow
def test_a_killed_driver_s_finished_fragments_are_not_computed_again(tmp_path: Path):
    uri, marker = table_at(tmp_path / "t"), str(tmp_path / "died")
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), uri, marker]
    first = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert first.returncode == -9, first.stderr
    second = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert second.stdout.split() == ["3"], second.stderr
    assert ids_and(uri, "new") == {item: item for item in ids_and(uri, "value")}
    computed = sum(map(int, Path(marker + ".rows").read_text().split()))
    assert computed == lance.dataset(uri).count_rows()
    assert_nothing_left_over(uri)
