"""Rows put in the place of those with the same key: which are replaced, which are added, and what others may do."""

from __future__ import annotations

import datetime as dt
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray

import lance_ray
from lance_ray import commit, upsert
from lance_ray.errors import (
    CommitConflictError,
    InvalidArgumentError,
    RowCoverageError,
    SchemaMismatchError,
    StorageError,
    TableNotFoundError,
)
from lance_ray.ledger import JobRef
from lance_ray.options import WriteOptions
from lance_ray.table import TableRef, WriteTarget
from lance_ray.write import WriteSpec
from tests.blocks import assert_nothing_left_over, data_files, versions

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(params=[False, True], ids=["addresses", "stable row ids"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Ids 0 to 39 in four fragments of ten, without those that end in 7."""
    return table_at(tmp_path / "t", stable=request.param)


def table_at(path: Path, *, stable: bool = False) -> str:
    dataset = lance.write_dataset(rows(range(40), "old"), str(path), max_rows_per_file=10, enable_stable_row_ids=stable)
    dataset.delete("id % 10 = 7")
    return str(path)


def rows(ids: Any, word: str) -> pa.Table:
    return pa.table({"id": list(ids), "text": [f"{word} {item}" for item in ids]})


def texts(uri: str) -> dict[int, str]:
    found = lance.dataset(uri).to_table()
    told = dict(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))
    assert len(told) == found.num_rows
    return told


def merge(uri: Any, *blocks: pa.Table, **options: Any) -> Any:
    return lance_ray.merge_into(ray.data.from_arrow(list(blocks)), uri, on="id", progress=False, **options)


OLD = {item: f"old {item}" for item in range(40) if item % 10 != 7}


def test_rows_with_a_known_key_are_replaced_and_the_others_added_in_one_commit(uri: str):
    before = lance.dataset(uri)
    ids = dict(zip(*before.to_table(columns=["id"], with_row_id=True).to_pydict().values(), strict=True))
    report = merge(uri, rows([15, 100, 3, 7], "new"), rows([99, 38], "new"), return_report=True)
    assert texts(uri) == {**OLD, **{item: f"new {item}" for item in (3, 7, 15, 38, 99, 100)}}
    assert (report.updated, report.inserted, report.version) == (3, 3, before.version + 1)
    assert versions(uri)[-1] == report.version
    if before.has_stable_row_ids:
        now = dict(
            zip(*lance.dataset(uri).to_table(columns=["id"], with_row_id=True).to_pydict().values(), strict=True)
        )
        assert {item: now[item] for item in ids} == ids
        assert len(set(now.values())) == len(now)
    assert_nothing_left_over(uri)


def test_the_dataset_of_the_new_version_comes_back(uri: str):
    found = lance_ray.merge_into(rows([1], "new"), uri, on="id", num_workers=1, num_partitions=2, progress=False)
    assert isinstance(found, lance.LanceDataset)
    assert found.version == lance.dataset(uri).version
    assert found.to_table(filter="id = 1")["text"].to_pylist() == ["new 1"]


@pytest.mark.parametrize("index", [False, True], ids=["scan", "index"])
def test_many_keys_are_found_with_and_without_an_index(tmp_path: Path, index: bool, monkeypatch: pytest.MonkeyPatch):
    """Here without a cluster, so that the parts are small."""
    monkeypatch.setattr(upsert, "_KEYS_AT_ONCE", 4)
    uri = table_at(tmp_path / "t")
    if index:
        lance.dataset(uri).create_scalar_index("id", "BTREE")
    spec = spec_of(uri)
    found = upsert._targets(spec, pa.array([39, 1, 7, 100, 20, 5, 6]))
    assert sorted(found["id"].to_pylist()) == [1, 5, 6, 20, 39]


def spec_of(uri: str) -> Any:
    target = WriteTarget.resolve(TableRef.fold(uri, {}), "append")
    return upsert.UpsertSpec(WriteSpec(target, WriteOptions("append"), target.schema), "id", 2)


def test_a_fragment_of_which_all_rows_are_replaced_goes(uri: str):
    merge(uri, rows([item for item in range(10) if item != 7], "new"))
    assert texts(uri) == {**OLD, **{item: f"new {item}" for item in range(10) if item != 7}}
    assert 0 not in lance.dataset(uri).fragment_ids()


def test_every_row_of_a_key_is_replaced(uri: str):
    lance.dataset(uri).insert(rows([3], "twin"))
    merge(uri, rows([3], "new"))
    found = lance.dataset(uri).to_table(filter="id = 3")["text"].to_pylist()
    assert found == ["new 3", "new 3"]


def test_a_key_that_comes_twice_is_refused_wherever_its_rows_are(uri: str):
    before, files = versions(uri), data_files(uri)
    with pytest.raises(RowCoverageError) as caught:
        merge(uri, rows([3, 50], "new"), rows([51, 50], "newer"))
    assert (caught.value.duplicate, caught.value.examples) == (1, {"duplicate": ["50"]})
    assert versions(uri) == before
    assert data_files(uri) == files
    assert_nothing_left_over(uri)


def test_an_opened_branch_is_merged_into_and_the_main_line_is_not(uri: str):
    before = (versions(uri), texts(uri))
    branch = lance.dataset(uri).create_branch("draft")
    report = merge(branch, rows([3, 60], "new"), return_report=True)
    found = lance.dataset(uri).checkout_version(("draft", None))
    assert found.version == report.version == branch.version + 1
    assert set(found.to_table(filter="id IN (3, 60)")["text"].to_pylist()) == {"new 3", "new 60"}
    assert (versions(uri), texts(uri)) == before


def test_no_rows_commit_nothing(uri: str):
    before = versions(uri)
    assert merge(uri, rows([], "new").cast(rows([1], "x").schema), return_report=True).skipped
    assert versions(uri) == before
    assert_nothing_left_over(uri)


def test_types_and_order_of_columns_are_the_tables(uri: str):
    given = pa.table({"extra": [1.0], "text": pa.array(["new"], pa.large_string()), "id": pa.array([4], pa.int8())})
    merge(uri, given)
    assert texts(uri)[4] == "new"
    assert lance.dataset(uri).schema.names == ["id", "text"]


def test_blobs_vectors_and_structs_are_replaced_as_they_are(tmp_path: Path):
    uri = str(tmp_path / "t")
    kinds = [
        pa.field("id", pa.int64()),
        pa.field("v", pa.list_(pa.float32(), 2)),
        pa.field("s", pa.struct([("x", pa.int8())])),
    ]
    schema = pa.schema([*kinds, lance.blob_field("data", inline_size_threshold=8)])

    def given(ids: list[int]) -> pa.Table:
        columns = [
            ids,
            [[item, 0.5] for item in ids],
            [{"x": item} for item in ids],
            [bytes([item]) * 20 for item in ids],
        ]
        plain = pa.schema([*kinds, pa.field("data", pa.large_binary())])
        return pa.table([pa.array(column, item.type) for column, item in zip(columns, plain, strict=True)], plain)

    lance_ray.write_lance(ray.data.from_arrow(given([1, 2, 3])), uri, schema=schema)
    changed = given([3, 4]).set_column(3, "data", pa.array([b"three" * 5, None], pa.large_binary()))
    merge(uri, changed)
    found = lance_ray.take(uri, keys=[4, 3, 1], on="id").to_pylist()
    assert found == [*changed.to_pylist()[::-1], *given([1]).to_pylist()]


KEYS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.string(), ["a", "b", "c"]),
    (pa.binary(), [b"a", b"b", b"c"]),
    (pa.float64(), [0.5, 1.0, -2.0]),
    (pa.bool_(), [True, False]),
    (pa.date32(), [dt.date(2020, 1, 1), dt.date(2020, 1, 2), dt.date(2020, 1, 3)]),
    (pa.timestamp("ns"), [1, 2, 3]),
    (pa.decimal128(10, 2), [Decimal("1.50"), Decimal("2.00"), Decimal("-3.00")]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "values"), KEYS, ids=lambda item: str(item) if isinstance(item, pa.DataType) else "")
def test_keys_of_every_type_are_matched(tmp_path: Path, kind: pa.DataType, values: list[Any]):
    uri = str(tmp_path / "t")
    keys = pa.array(values, kind)
    lance.write_dataset(pa.table({"id": keys.slice(0, 2), "text": ["old"] * 2}), uri)
    given = keys.slice(1)
    merge(uri, pa.table({"id": given, "text": ["new"] * len(given)}))
    found = lance.dataset(uri).to_table()
    told = dict(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))
    assert told == dict(zip(keys.to_pylist(), ["old", *["new"] * len(given)], strict=True))


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable row ids"])
def test_rows_that_an_index_covers_are_found_by_their_new_values(tmp_path: Path, stable: bool):
    uri = table_at(tmp_path / "t", stable=stable)
    lance.dataset(uri).create_scalar_index("text", "BTREE")
    merge(uri, rows([3, 60], "new"))
    dataset = lance.dataset(uri)
    for text, wanted in (("old 3", []), ("new 3", [3]), ("new 60", [60]), ("old 4", [4])):
        assert dataset.to_table(filter=f"text = '{text}'")["id"].to_pylist() == wanted


def test_a_job_that_committed_is_not_repeated(uri: str):
    first = merge(uri, rows([3], "new"), job_id="daily", commit_message="daily", return_report=True)
    again = merge(uri, rows([3], "newer"), job_id="daily", return_report=True)
    assert (again.skipped, again.version) == (True, first.version)
    assert texts(uri)[3] == "new 3"
    assert_nothing_left_over(uri)


# Others, and failures


def while_it_runs(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    marked = upsert._marked

    def also(*args: Any) -> Any:
        found = marked(*args)
        action()
        return found

    monkeypatch.setattr(upsert, "_marked", also)


def test_rows_that_others_append_meanwhile_stay(uri: str, monkeypatch: pytest.MonkeyPatch):
    while_it_runs(monkeypatch, lambda: lance.dataset(uri).insert(rows([500], "theirs")))
    merge(uri, rows([3, 60], "new"))
    assert texts(uri) == {**OLD, 3: "new 3", 60: "new 60", 500: "theirs 500"}


@pytest.mark.parametrize("action", ["delete", "compact"])
def test_a_change_of_the_same_rows_by_others_is_a_conflict(uri: str, action: str, monkeypatch: pytest.MonkeyPatch):
    def change() -> None:
        if action == "delete":
            lance.dataset(uri).delete("id = 4")
        else:
            lance.dataset(uri).optimize.compact_files()

    while_it_runs(monkeypatch, change)
    with pytest.raises(CommitConflictError):
        merge(uri, rows([3, 60], "new"))
    assert texts(uri) == {item: text for item, text in OLD.items() if action == "compact" or item != 4}
    assert_nothing_left_over(uri)


def test_a_failed_merge_leaves_the_table_as_it_was(uri: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise StorageError("no", kind="denied")

    before = data_files(uri)
    monkeypatch.setattr("lance_ray.commit._send", refuse)
    with pytest.raises(StorageError):
        merge(uri, rows([3, 60], "new"))
    assert texts(uri) == OLD
    assert data_files(uri) == before


def test_a_ledger_that_cannot_be_ended_makes_no_failure_of_a_merge_that_landed(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(JobRef, "close", refused)
    report = merge(uri, rows([3, 60], "new"), return_report=True)
    assert report.version == lance.dataset(uri).version
    assert texts(uri) == {**OLD, 3: "new 3", 60: "new 60"}
    assert "left for cleanup_orphans" in caplog.text


def test_a_ledger_that_cannot_be_ended_does_not_hide_why_the_merge_failed(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(JobRef, "discard", refused)
    with pytest.raises(RowCoverageError):
        merge(uri, rows([3], "new"), rows([3], "newer"))
    assert texts(uri) == OLD
    assert "left for cleanup_orphans" in caplog.text


def refused(*args: Any) -> None:
    raise StorageError("no", kind="denied")


def test_an_answer_of_the_commit_that_is_lost_is_found_in_the_table(uri: str, monkeypatch: pytest.MonkeyPatch):
    send = commit._send

    def lose(*args: Any) -> None:
        send(*args)
        raise StorageError("connection reset", kind="transient")

    monkeypatch.setattr(commit, "_send", lose)
    report = merge(uri, rows([3, 60], "new"), return_report=True)
    assert texts(uri) == {**OLD, 3: "new 3", 60: "new 60"}
    assert (report.updated, report.inserted, report.version) == (1, 1, lance.dataset(uri).version)
    assert_nothing_left_over(uri)


def test_an_interrupt_before_the_commit_leaves_the_table_as_it_was(uri: str, monkeypatch: pytest.MonkeyPatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    before = data_files(uri)
    while_it_runs(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(uri, rows([3, 60], "new"))
    assert texts(uri) == OLD
    assert data_files(uri) == before


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(tmp_path: Path):
    uri, marker = table_at(tmp_path / "t"), tmp_path / "killed"

    def kill_once(batch: pa.Table) -> pa.Table:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
        return batch

    source = ray.data.from_arrow([rows([3, 60], "new"), rows([15], "new")])
    lance_ray.merge_into(source.map_batches(kill_once, batch_format="pyarrow"), uri, on="id", progress=False)
    assert texts(uri) == {**OLD, **{item: f"new {item}" for item in (3, 15, 60)}}
    assert marker.exists()


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        (pa.table({"id": [1]}), InvalidArgumentError, "text"),
        (pa.table({"id": ["a"], "text": ["x"]}), SchemaMismatchError, "id"),
        (pa.table({"id": pa.array([None, 1]), "text": ["x", "y"]}), SchemaMismatchError, "no key"),
    ],
    ids=["a column is missing", "another type", "null"],
)
def test_rows_that_do_not_fit_are_refused(uri: str, given: pa.Table, error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        merge(uri, given)
    assert texts(uri) == OLD
    assert_nothing_left_over(uri)


def test_what_cannot_be_a_key_is_refused_before_anything_runs(tmp_path: Path):
    uri = str(tmp_path / "t")
    lance.write_dataset(pa.table({"id": [1], "tags": [["a"]], "v": np.zeros((1,)).tolist()}), uri)
    for on in ("tags", "nope", ""):
        with pytest.raises(InvalidArgumentError, match="on"):
            lance_ray.merge_into(pa.table({"id": [1]}), uri, on=on)
    with pytest.raises(TableNotFoundError):
        lance_ray.merge_into(pa.table({"id": [1]}), tmp_path / "none", on="id")
