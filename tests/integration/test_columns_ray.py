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

import lance_ray
from lance_ray.errors import InvalidArgumentError, RowCoverageError, SnapshotChangedError
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


def test_a_model_is_loaded_once_in_each_of_the_workers_asked_for(tmp_path: Path):
    uri = table_at(tmp_path / "t")
    lance_ray.add_columns(uri, transform=Model, concurrency=1, read_columns=["id"], progress=False)
    assert len(set(ids_and(uri, "new").values())) == 1
    assert set(ids_and(uri, "loads").values()) == {1}


@pytest.mark.parametrize(
    "transform", [{"new": "id + 1"}, lambda batch: {"new": pc.add(batch["id"], 1)}], ids=["sql", "function"]
)
def test_columns_computed_by_ray_data_are_the_same(tmp_path: Path, transform: Any):
    uri = table_at(tmp_path / "t")
    lance_ray.add_columns_from(uri, transform=transform, progress=False)
    assert ids_and(uri, "new") == {item: item + 1 for item in ids_and(uri, "value")}


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
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=40, object_store_memory=10**8)
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
