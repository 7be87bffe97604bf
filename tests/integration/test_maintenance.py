"""Old versions removed, a database compacted, a table's health told. Without Ray."""

from __future__ import annotations

import datetime as dt
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_ray import (
    CompactionReport,
    TableHealth,
    cleanup_database_old_versions,
    cleanup_old_versions,
    compact_database,
    compact_files,
    compaction,
    maintenance,
    table_health,
)
from lance_ray.errors import InvalidArgumentError, OperationFailedError, UnsupportedVersionError
from lance_ray.executors import LocalExecutor
from lance_ray.ledger import JobRef
from lance_ray.planning.compaction import Rewritten
from lance_ray.table import TableRef
from tests.blocks import ids_of, rows_per_file, versions

SMALL: dict[str, Any] = {"target_rows_per_fragment": 100}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in threads of this process."""
    for module in (compaction, maintenance):
        monkeypatch.setattr(module, "RayExecutor", lambda *args, **kwargs: LocalExecutor(1))


def table_at(path: Path, rows: int = 200) -> str:
    lance.write_dataset(pa.table({"id": np.arange(rows)}), str(path), max_rows_per_file=10)
    return str(path)


# Old versions


@pytest.fixture
def old(tmp_path: Path) -> str:
    """A table of four versions, compacted in the last ones."""
    uri = table_at(tmp_path / "t")
    lance.dataset(uri).delete("id = 3")
    compact_files(uri, compaction_options=SMALL, progress=False)
    return uri


def test_old_versions_and_their_files_go_and_the_newest_stays(old: str):
    report = cleanup_old_versions(old, older_than=dt.timedelta(0))
    assert (report.old_versions, report.data_files_removed, report.failed_deletes) == (3, 20, 0)
    assert report.bytes_removed > 0
    assert len(versions(old)) == 1
    assert sorted(ids_of(old)) == [item for item in range(200) if item != 3]


def test_a_dry_run_of_the_clean_up_tells_the_same_and_removes_nothing(old: str):
    told = cleanup_old_versions(old, retain_versions=1, dry_run=True)
    assert len(versions(old)) == 4
    done = cleanup_old_versions(old, retain_versions=1)
    names = ("old_versions", "data_files_removed", "deletion_files_removed", "bytes_removed")
    assert [getattr(told, name) for name in names] == [getattr(done, name) for name in names]
    assert (told.dry_run, done.dry_run) == (True, False)
    assert str(told).startswith(f"{old}: would remove 3 version(s)")


def test_by_default_versions_of_the_last_two_weeks_stay(old: str):
    assert cleanup_old_versions(old).old_versions == 0


def test_a_tagged_version_is_an_error_or_kept_as_asked(old: str):
    lance.dataset(old).tags.create("keep", 1)
    with pytest.raises((InvalidArgumentError, OSError)):
        cleanup_old_versions(old, retain_versions=1)
    cleanup_old_versions(old, retain_versions=1, error_if_tagged_old_versions=False)
    assert ids_of(old, 1) == list(range(200))


def test_files_of_a_running_job_are_not_put_at_risk(old: str):
    job = JobRef(TableRef.fold(old, {}).unpinned(), "job")
    with job.running("write"):
        with pytest.raises(InvalidArgumentError, match="writing to the table"):
            cleanup_old_versions(old, delete_unverified=True)
        cleanup_old_versions(old)
    job.discard()
    cleanup_old_versions(old, delete_unverified=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"older_than": 3},
        {"retain_versions": 0},
        {"delete_rate_limit": 0},
        {"versions": ["x"]},
        {"versions": 5},
        {"delete_unverified": "x"},
        {"dry_run": "x"},
    ],
    ids=str,
)
def test_a_bad_argument_of_the_clean_up_is_refused(old: str, arguments: dict[str, Any]):
    with pytest.raises(InvalidArgumentError, match=f"^{next(iter(arguments))}="):
        cleanup_old_versions(old, **arguments)


# A database


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory namespace with three tables, the last with nothing to do."""
    for name in ("a", "b"):
        table_at(tmp_path / f"{name}.lance")
    table_at(tmp_path / "idle.lance", rows=5)
    return tmp_path


def database(root: Path, **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"database": [], "compaction_options": SMALL, "progress": False} | options
    items = compact_database(namespace_impl="dir", namespace_properties={"root": str(root)}, **arguments)
    return {item["table_id"][-1]: item for item in items}


@pytest.mark.parametrize("workers", [None, 1, 3, 16])
def test_every_table_is_compacted_and_one_that_fails_does_not_stop_the_others(root: Path, workers: int | None):
    gone = lance.dataset(str(root / "b.lance")).get_fragments()[3].metadata.files[0].path
    (root / "b.lance" / "data" / str(gone)).unlink()
    items = database(root, num_workers=workers)
    assert isinstance(items["a"]["metrics"], CompactionReport)
    assert (items["a"].metrics.fragments_removed, items["a"].metrics.fragments_added) == (20, 2)
    assert items["b"].failed
    assert items["b"]["metrics"].done == 1
    assert items["idle"]["metrics"] is None
    assert not items["idle"].failed
    assert rows_per_file(root / "a.lance") == [100, 100]


def test_a_table_that_cannot_be_opened_is_an_item_with_its_error(root: Path, monkeypatch: pytest.MonkeyPatch):
    original = compaction.plan_table

    def plan_table(table: Any, engine: Any) -> Any:
        if "/a.lance" in table.uri:
            raise InvalidArgumentError("table", table.uri, "broken")
        return original(table, engine)

    monkeypatch.setattr(compaction, "plan_table", plan_table)
    items = database(root)
    assert isinstance(items["a"].error, InvalidArgumentError)
    assert items["b"].metrics.done == 2
    with pytest.raises(OperationFailedError, match="a: InvalidArgumentError"):
        database(root, on_failure="raise")


def cleaned(root: Path, **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"database": [], "retain_versions": 1, "progress": False} | options
    items = cleanup_database_old_versions(namespace_impl="dir", namespace_properties={"root": str(root)}, **arguments)
    return {item["table_id"][-1]: item for item in items}


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_old_versions_of_every_table_go(root: Path, workers: int | None):
    for name in ("a", "b"):
        lance.dataset(str(root / f"{name}.lance")).delete("id < 100")
    would = cleaned(root, dry_run=True)
    assert (would["a"]["stats"]["old_versions"], would["a"].stats.dry_run) == (1, True)
    assert versions(root / "a.lance") == [1, 2]
    items = cleaned(root, num_workers=workers)
    assert list(items) == ["a", "b", "idle"]
    assert [item["stats"]["old_versions"] for item in items.values()] == [1, 1, 0]
    assert items["a"]["stats"]["data_files_removed"] == 10
    assert [versions(root / f"{name}.lance") for name in items] == [[2], [2], [1]]
    with pytest.raises(KeyError):
        items["a"]["nothing"]


def test_a_table_that_cannot_be_cleaned_up_does_not_stop_the_others(root: Path):
    for name in ("a", "b"):
        lance.dataset(str(root / f"{name}.lance")).delete("id < 100")
    lance.dataset(str(root / "a.lance")).tags.create("kept", 1)
    with pytest.raises(OperationFailedError, match=r"1 of 3 table\(s\) failed") as caught:
        cleaned(root)
    assert [failure.task for failure in caught.value.failures] == ["a"]
    assert (versions(root / "a.lance"), versions(root / "b.lance")) == ([1, 2], [2])
    items = cleaned(root, on_failure="report")
    assert [name for name, item in items.items() if item.error is not None] == ["a"]
    assert cleaned(root, error_if_tagged_old_versions=False)["a"].error is None


def test_a_dry_run_of_a_database_plans_every_table(root: Path):
    items = database(root, dry_run=True)
    assert items["a"]["metrics"].fragments_after == 2
    assert versions(root / "a.lance") == [1]


def test_tables_that_time_does_not_allow_are_not_begun(root: Path):
    items = database(root, max_seconds=1e-9)
    assert {item.skipped for item in items.values()} == {True}


def test_the_workers_are_one_budget_for_all_tables(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(4))
    original, lock = compaction.rewrite, threading.Lock()
    now, peak = 0, 0

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        time.sleep(0.05)
        done = original(spec, task)
        with lock:
            now -= 1
        return done

    monkeypatch.setattr(compaction, "rewrite", rewrite)
    database(root, num_workers=2, compaction_options={"target_rows_per_fragment": 20})
    assert peak == 2


def test_a_bad_option_of_a_look_at_a_table_is_refused(old: str):
    options: Any = 5
    with pytest.raises(InvalidArgumentError, match=r"^compaction_options="):
        table_health(old, compaction_options=options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tables_at_once": 0},
        {"num_workers": 0},
        {"on_failure": "ignore"},
        {"database": None},
        {"database": [3]},
        {"max_seconds": "x"},
        {"compaction_options": 5},
        {"progress": 5},
        {"ray_remote_args": {"nope": 5}},
    ],
    ids=str,
)
def test_a_bad_argument_of_a_database_is_refused(root: Path, arguments: dict[str, Any]):
    with pytest.raises(InvalidArgumentError, match=f"^{next(iter(arguments))}="):
        database(root, **arguments)


# Health


@pytest.fixture
def worn(tmp_path: Path) -> str:
    """20 fragments of ten rows, some deleted, an index that does not cover the last ones."""
    uri = table_at(tmp_path / "t")
    lance.dataset(uri).create_scalar_index("id", "BTREE", name="by_id")
    lance.write_dataset(pa.table({"id": np.arange(200, 300)}), uri, mode="append", max_rows_per_file=50)
    lance.dataset(uri).delete("id % 10 < 2")
    return uri


def test_health_tells_fragments_deletions_bytes_versions_and_coverage(worn: str):
    health = table_health(worn, compaction_options=SMALL)
    assert (health.rows, health.deleted_rows, len(health.fragments), health.small_files) == (240, 60, 22, 22)
    assert (health.version, health.versions) == (4, 4)
    assert health.bytes == sum(fragment.bytes for fragment in health.fragments) > 0
    assert {(item.rows, item.deleted_rows) for item in health.fragments} == {(8, 2), (40, 10)}
    index = health.indices[0]
    assert (index.name, index.columns, index.indexed_rows, index.unindexed_rows) == ("by_id", ("id",), 160, 80)
    assert index.coverage == pytest.approx(2 / 3)


def test_health_says_what_compaction_would_do_and_then_does(worn: str):
    before = table_health(worn, compaction_options=SMALL)
    assert before.compaction is not None
    compact_files(worn, compaction_options=SMALL, progress=False)
    after = table_health(worn, compaction_options=SMALL)
    assert len(after.fragments) == before.compaction.fragments_after
    assert after.deleted_rows == 0


def test_health_prints_in_a_few_lines(worn: str):
    lines = str(table_health(worn, compaction_options=SMALL)).splitlines()
    assert lines[0] == f"{worn}, version 4 of 4"
    assert "60 deleted rows (20%)" in lines[1]
    assert "22 fragment(s), 22 with fewer than 100 rows" in lines[2]
    assert "covers 67% of the rows" in lines[3]
    assert "compaction: " in lines[4]
    compact_files(worn, compaction_options=SMALL, progress=False)
    assert str(table_health(worn, compaction_options=SMALL)).endswith("compaction: nothing to do")


def test_health_of_an_older_version(worn: str):
    assert table_health(worn, version=1).deleted_rows == 0


def test_health_draws_fragment_sizes_and_deletions(worn: str):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = table_health(worn, compaction_options=SMALL).plot()
    live, deleted = axes.containers
    assert [bar.get_height() for bar in live] == [8] * 20 + [40, 40]
    assert [bar.get_height() for bar in deleted] == [2] * 20 + [10, 10]
    assert axes.get_xlabel() == "fragment"


def test_an_empty_table_can_be_drawn_too(tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    lance.write_dataset(pa.table({"id": pa.array([], pa.int64())}), str(tmp_path / "t"))
    health = table_health(tmp_path / "t")
    assert (health.rows, health.compaction) == (0, None)
    assert health.plot() is not None


def test_without_matplotlib_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UnsupportedVersionError, match=r"matplotlib .* 3\.10\.8 or newer is needed"):
        TableHealth("t", 1, 1, 100, ()).plot()


def test_an_interrupt_ends_every_table_and_leaves_each_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    original, calls = compaction.rewrite, iter(range(10))

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return original(spec, task)

    monkeypatch.setattr(compaction, "rewrite", rewrite)
    with pytest.raises(KeyboardInterrupt):
        database(root, tables_at_once=1)
    for name in ("a", "b"):
        assert sorted(ids_of(root / f"{name}.lance")) == list(range(200))
        assert not (root / f"{name}.lance" / "_lance_ray").exists()
    assert versions(root / "b.lance") == [1]
