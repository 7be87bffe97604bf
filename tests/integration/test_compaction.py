"""Compaction: what it commits and when, what it keeps, and what it does beside others. Without Ray unless marked."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_ray import CompactionPreview, CompactionReport, commit, compact_files, compaction, runner
from lance_ray.errors import InvalidArgumentError, OperationFailedError, VersionNotFoundError
from lance_ray.executors import LocalExecutor
from lance_ray.planning.compaction import Rewritten
from tests.blocks import (
    assert_nothing_left_over,
    data_files,
    ids_of,
    referenced_files,
    rows_per_file,
    versions,
)

SMALL: dict[str, Any] = {"target_rows_per_fragment": 100}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run one after the other in a thread of this process."""
    monkeypatch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(1))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A table of 40 fragments of ten rows: four tasks for a target of 100 rows."""
    return str(table_at(tmp_path / "table").uri)


def numbers(first: int, count: int) -> pa.Table:
    ids = np.arange(first, first + count)
    return pa.table({"id": ids, "value": ids * 10})


def table_at(path: Path, *, rows: int = 400, per_fragment: int = 10, stable: bool = False) -> lance.LanceDataset:
    return lance.write_dataset(
        numbers(0, rows), str(path), max_rows_per_file=per_fragment, enable_stable_row_ids=stable
    )


def compacted(uri: Any, **options: Any) -> CompactionReport:
    """The report of a compaction that had something to do."""
    arguments: dict[str, Any] = {"compaction_options": SMALL, "progress": False} | options
    report = compact_files(uri, **arguments)
    assert isinstance(report, CompactionReport)
    return report


def planned(uri: Any, **options: Any) -> CompactionPreview:
    arguments: dict[str, Any] = {"compaction_options": SMALL, "dry_run": True} | options
    preview = compact_files(uri, **arguments)
    assert isinstance(preview, CompactionPreview)
    return preview


def after_rewrites(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Rewritten], object]) -> None:
    """Call ``act(number, what was done)`` in the worker after each rewrite, which is before its commit."""
    original, done = compaction.rewrite, iter(range(1000))

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        result = original(spec, task)
        act(next(done), result)
        return result

    monkeypatch.setattr(compaction, "rewrite", rewrite)


# What is returned


def test_rows_and_their_order_stay_and_fragments_are_merged(here: None, uri: str):
    report = compacted(uri)
    assert ids_of(uri) == list(range(400))
    assert rows_per_file(uri) == [100] * 4
    metrics = (report.fragments_removed, report.fragments_added, report.files_removed, report.files_added)
    assert metrics == (40, 4, 40, 4)
    assert (report.done, report.failed, report.retried, report.skipped, report.rows) == (4, 0, 0, 0, 400)
    assert report.bytes > 0
    assert report.seconds > 0
    assert_nothing_left_over(uri)


def test_nothing_to_do_is_none_and_starts_and_commits_nothing(here: None, uri: str):
    compacted(uri)
    before = versions(uri)
    assert compact_files(uri, compaction_options=SMALL) is None
    assert compact_files(uri, compaction_options=SMALL, dry_run=True) is None
    assert versions(uri) == before


@pytest.mark.parametrize(("size", "commits"), [(None, 1), (0, 1), (-1, 1), (1, 4), (3, 2), (4, 1), (9, 1)])
def test_the_batch_size_sets_the_commits_and_the_metrics_are_summed(
    here: None, uri: str, size: int | None, commits: int
):
    report = compacted(uri, micro_commit_batch_size=size)
    assert len(report.versions) == commits
    assert report.version == lance.dataset(uri).version
    assert (report.fragments_removed, report.fragments_added) == (40, 4)
    assert rows_per_file(uri) == [100] * 4


def test_the_metrics_are_those_that_the_engine_reports_for_the_same_table(here: None, tmp_path: Path):
    ours, engine = table_at(tmp_path / "ours"), table_at(tmp_path / "engine")
    for dataset in (ours, engine):
        dataset.delete("id % 3 = 0")
    report = compacted(ours.uri)
    metrics = lance.dataset(engine.uri).optimize.compact_files(**SMALL)
    for name in ("fragments_removed", "fragments_added", "files_removed", "files_added"):
        assert getattr(report, name) == getattr(metrics, name)
    assert rows_per_file(ours.uri) == rows_per_file(engine.uri)


def test_a_report_prints_what_was_done(here: None, uri: str):
    assert "40 fragment(s) became 4, 400 rows" in str(compacted(uri))


# Arguments


def test_the_misspelt_option_works_with_a_warning(here: None, uri: str):
    lance.dataset(uri).delete("id % 10 = 0")  # a tenth of each fragment
    options = {"target_rows_per_fragment": 10}
    with pytest.warns(UserWarning, match="materialize_deletions_threshold"):
        misspelt = planned(uri, compaction_options=options | {"materialize_deletions_threadhold": 0.05})
    assert misspelt.rows == 360


def test_both_spellings_at_once_are_refused(uri: str):
    options = {"materialize_deletions_threadhold": 0.5, "materialize_deletions_threshold": 0.5}
    with pytest.warns(UserWarning, match="is spelt"), pytest.raises(InvalidArgumentError, match="two spellings"):
        compact_files(uri, compaction_options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compaction_options": {"target_rows": 5}}, "compaction_options=['target_rows']"),
        ({"compaction_options": 5}, "compaction_options='int'"),
        (
            {"compaction_options": {"batch_size": 10, "target_rows_per_fragment": "many"}},
            "compaction_options={'target_rows_per_fragment': 'many'}",
        ),
        ({"compaction_options": {"compaction_mode": "magic"}}, "compaction_options={'compaction_mode': 'magic'}"),
        ({"default_scan_options": {"filter": "id > 3"}}, "default_scan_options=['filter']"),
        ({"default_scan_options": {"batch_size": "x"}}, "default_scan_options={'batch_size': 'x'}"),
        ({"default_scan_options": 5}, "default_scan_options='int'"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_partitions": "x"}, "num_partitions='x'"),
        ({"num_workers": 2, "num_partitions": 3}, "num_partitions=3"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"micro_commit_batch_size": "x"}, "micro_commit_batch_size='x'"),
        ({"max_seconds": 0}, "max_seconds=0"),
        ({"max_seconds": "5"}, "max_seconds='5'"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_tasks": 0}, "max_tasks=0"),
        ({"max_replans": -1}, "max_replans=-1"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"progress": 5}, "progress=5"),
        ({"dry_run": "yes"}, "dry_run='yes'"),
        ({"index_cache_size": -1}, "index_cache_size=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"ray_remote_args": {"max_retries": 3}}, "ray_remote_args=['max_retries']"),
        ({"ray_remote_args": {"nope": 5}}, "ray_remote_args=['nope']"),
        ({"ray_remote_args": 5}, "ray_remote_args='int'"),
        ({"table_id": ["t"]}, "uri="),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_argument_is_refused_by_name_before_anything_starts(uri: str, arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentError) as caught:
        compact_files(uri, **arguments)
    assert str(caught.value).startswith(message)
    assert ".rs:" not in str(caught.value)
    assert "num_threads" not in str(caught.value).partition("known keys")[0]
    assert versions(uri) == [1]


def test_a_version_that_does_not_exist_is_an_error(uri: str):
    with pytest.raises(VersionNotFoundError):
        compact_files(uri, version=9)


def test_the_engine_option_to_leave_fragments_out_is_kept(here: None, uri: str):
    compacted(uri, compaction_options=SMALL | {"excluded_fragment_ids": list(range(20))})
    assert rows_per_file(uri) == [10] * 20 + [100] * 2


def test_an_older_version_asked_for_limits_the_work_to_its_fragments_that_are_still_there(here: None, uri: str):
    lance.write_dataset(numbers(400, 100), uri, mode="append", max_rows_per_file=10)
    lance.dataset(uri).delete("id = 0")
    report = compacted(uri, version=1)
    assert report.done == 3  # the first task's fragments have changed
    assert rows_per_file(uri) == [9] + [10] * 19 + [100] * 3 or sorted(rows_per_file(uri))[-3:] == [100] * 3
    assert sorted(ids_of(uri)) == list(range(1, 500))


@pytest.mark.parametrize(
    ("given", "in_flight", "cpus"),
    [
        ({}, None, None),
        ({"num_workers": 3}, 3, None),
        ({"num_partitions": 3}, 3, None),
        ({"num_partitions": 1}, None, None),
        ({"num_workers": 3, "concurrency": 2}, 6, 0.5),
        ({"concurrency": 4}, None, 0.25),
        ({"concurrency": 4, "ray_remote_args": {"num_cpus": 2}}, None, 2),
    ],
)
def test_workers_and_concurrency_bound_the_tasks_at_once(
    monkeypatch: pytest.MonkeyPatch, uri: str, given: dict[str, Any], in_flight: int | None, cpus: float | None
):
    seen: list[tuple[Any, Any]] = []
    original = runner.run_tasks

    def run_tasks(*args: Any, **kwargs: Any) -> Any:
        seen[0] = (kwargs["options"].max_in_flight, seen[0][1])
        return original(*args, **kwargs)

    def executor(args: dict[str, Any], name: str) -> LocalExecutor:
        seen.append((None, args.get("num_cpus")))
        return LocalExecutor(1)

    monkeypatch.setattr(compaction, "RayExecutor", executor)
    monkeypatch.setattr(compaction, "run_tasks", run_tasks)
    compacted(uri, **given)
    assert seen == [(in_flight, cpus)]


def test_each_task_uses_one_thread_of_the_engine_unless_told_otherwise():
    assert compaction.fold_engine_options(None) == {"num_threads": 1}
    assert compaction.fold_engine_options({"num_threads": 3}, {"batch_size": 7}) == {"num_threads": 3, "batch_size": 7}


def test_options_reach_the_commit_so_that_a_deferred_remap_leaves_a_reuse_index(here: None, uri: str):
    lance.dataset(uri).create_scalar_index("id", "BTREE")
    compacted(uri, compaction_options=SMALL | {"defer_index_remap": True}, micro_commit_batch_size=1)
    dataset = lance.dataset(uri)
    assert "__lance_frag_reuse" in {index.name for index in dataset.describe_indices()}
    assert dataset.to_table(filter="id = 123")["value"].to_pylist() == [1230]


def test_a_deferred_remap_of_a_table_with_stable_row_ids_is_refused(tmp_path: Path):
    uri = table_at(tmp_path / "t", stable=True).uri
    with pytest.raises(InvalidArgumentError, match="stable row ids"):
        compact_files(uri, compaction_options={"defer_index_remap": True})


def test_an_opened_dataset_stands_for_its_table(here: None, uri: str):
    assert compacted(lance.dataset(uri)).done == 4
    assert rows_per_file(uri) == [100] * 4


# Budgets and plans


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(uri: str):
    preview = planned(uri)
    assert (len(preview.tasks), preview.rows, preview.fragments, preview.fragments_after) == (4, 400, 40, 4)
    assert sorted(item for task in preview.tasks for item in task.fragments) == list(range(40))
    assert preview.bytes == sum(task.bytes for task in preview.tasks) > 0
    assert "40 fragment(s) would become 4" in str(preview)
    assert versions(uri) == [1]


def test_what_the_dry_run_expects_is_what_happens(here: None, uri: str):
    lance.dataset(uri).delete("id % 7 < 3")
    preview = planned(uri)
    compacted(uri)
    assert len(rows_per_file(uri)) == preview.fragments_after


@pytest.mark.parametrize("by", ["tasks", "bytes"])
def test_a_budget_is_kept_and_the_next_runs_go_on_from_there(here: None, uri: str, by: str):
    budget: dict[str, Any] = {"max_tasks": 1} if by == "tasks" else {"max_bytes": planned(uri).tasks[0].bytes}
    assert len(planned(uri, **budget).tasks) == 1
    for left in (3, 2, 1, 0):
        report = compacted(uri, **budget)
        assert (report.done, report.skipped) == (1, left)
    assert compact_files(uri, compaction_options=SMALL, **budget) is None
    assert ids_of(uri) == list(range(400))


def test_a_budget_too_small_for_any_task_does_nothing_and_says_so(here: None, uri: str):
    report = compacted(uri, max_bytes=1)
    assert (report.done, report.skipped, report.versions) == (0, 4, ())
    assert_nothing_left_over(uri)


def test_out_of_time_what_has_finished_is_committed_and_the_rest_is_left(here: None, uri: str):
    report = compacted(uri, max_seconds=1e-9)
    assert (report.done, report.skipped) == (1, 3)
    assert_nothing_left_over(uri)
    assert compacted(uri).done == 3


# Beside others


def test_an_append_in_the_middle_disturbs_nothing(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    after_rewrites(monkeypatch, lambda n, _: lance.write_dataset(numbers(1000 + n, 1), uri, mode="append"))
    report = compacted(uri, micro_commit_batch_size=1)
    assert (report.done, report.replanned) == (4, 0)
    assert sorted(ids_of(uri)) == [*range(400), 1000, 1001, 1002, 1003]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("micro", [None, 1])
def test_a_delete_in_the_middle_costs_only_its_own_task_and_stays_deleted(
    monkeypatch: pytest.MonkeyPatch, here: None, tmp_path: Path, stable: bool, micro: int | None
):
    uri = table_at(tmp_path / "t", stable=stable).uri
    after_rewrites(monkeypatch, lambda number, _: lance.dataset(uri).delete("id = 5") if number == 0 else None)
    report = compacted(uri, micro_commit_batch_size=micro)
    assert (report.done, report.replanned, report.failed) == (4, 1, 0)
    assert sorted(ids_of(uri)) == [item for item in range(400) if item != 5]
    assert_nothing_left_over(uri)


def test_an_update_in_the_middle_is_kept(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    def update(number: int, _: Rewritten) -> None:
        if number == 2:
            lance.dataset(uri).update({"value": "-1"}, where="id = 250")

    after_rewrites(monkeypatch, update)
    report = compacted(uri)
    assert report.replanned == 1
    assert lance.dataset(uri).to_table(filter="id = 250")["value"].to_pylist() == [-1]
    assert sorted(ids_of(uri)) == list(range(400))


def test_rewrites_that_are_always_overtaken_are_given_up_after_the_limit(
    monkeypatch: pytest.MonkeyPatch, here: None, uri: str
):
    deleted = iter(range(100))
    after_rewrites(monkeypatch, lambda number, _: lance.dataset(uri).delete(f"id = {next(deleted)}"))
    report = compacted(uri, max_replans=2, on_failure="report")
    assert (report.done, report.failed, report.replanned) == (3, 1, 2)
    assert "kept changing" in str(report)
    assert sorted(ids_of(uri)) == list(range(next(deleted), 400))
    assert_nothing_left_over(uri)


def test_the_limit_is_an_error_unless_it_is_to_be_reported(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    after_rewrites(monkeypatch, lambda number, _: lance.dataset(uri).delete("id = 5") if number == 0 else None)
    with pytest.raises(OperationFailedError) as caught:
        compacted(uri, max_replans=0)
    assert caught.value.completed == 3
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("change", ["create", "replace", "optimize"])
@pytest.mark.parametrize("stable", [False, True])
def test_an_index_built_in_the_middle_covers_every_row_afterwards(
    monkeypatch: pytest.MonkeyPatch, here: None, tmp_path: Path, change: str, stable: bool
):
    uri = table_at(tmp_path / "t", stable=stable).uri
    lance.dataset(uri).create_scalar_index("value", "BTREE", name="old")

    def build(number: int, _: Rewritten) -> None:
        if number:
            return  # the first rewrite is not committed yet
        if change == "optimize":
            lance.write_dataset(numbers(400, 1), uri, mode="append")
            lance.dataset(uri).optimize.optimize_indices()
        else:
            lance.dataset(uri).create_scalar_index("value", "BTREE", name="old" if change == "replace" else "new")

    after_rewrites(monkeypatch, build)
    report = compacted(uri, micro_commit_batch_size=1)
    assert report.failed == 0
    assert len(rows_per_file(uri)) <= 5
    for index in lance.dataset(uri).describe_indices():
        stats = lance.dataset(uri).stats.index_stats(index.name)
        assert stats["num_unindexed_rows"] == 0, stats
    assert lance.dataset(uri).to_table(filter="value = 1230")["id"].to_pylist() == [123]


def test_a_whole_overwrite_in_the_middle_wins(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    def overwrite(number: int, _: Rewritten) -> None:
        if number == 3:
            lance.write_dataset(numbers(7000, 5), uri, mode="overwrite")

    after_rewrites(monkeypatch, overwrite)
    compacted(uri, on_failure="report")
    assert ids_of(uri) == list(range(7000, 7005))
    assert_nothing_left_over(uri)


class Writer:
    """Appends, deletes and updates beside the compaction, and keeps a model of the rows."""

    def __init__(self, uri: str, seed: int, rows: dict[int, int]) -> None:
        self.uri, self.random, self.model = uri, random.Random(seed), rows
        self.next = max(rows) + 1
        self.steps = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set() and self.steps < 40:
            self.random.choice((self.append, self.delete, self.update))()
            self.steps += 1
            self._stop.wait(self.random.random() * 0.02)

    def append(self) -> None:
        lance.write_dataset(numbers(self.next, 3), self.uri, mode="append")
        self.model |= {item: item * 10 for item in range(self.next, self.next + 3)}
        self.next += 3

    def delete(self) -> None:
        gone = self.random.sample(sorted(self.model), 3)
        lance.dataset(self.uri).delete(f"id in ({', '.join(map(str, gone))})", conflict_retries=50)
        for item in gone:
            del self.model[item]

    def update(self) -> None:
        item = self.random.choice(sorted(self.model))
        lance.dataset(self.uri).update({"value": "value + 1"}, where=f"id = {item}", conflict_retries=50)
        self.model[item] += 1

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def model_of(uri: str) -> Counter[tuple[int, int]]:
    table = lance.dataset(uri).to_table()
    return Counter(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True))


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
def test_beside_a_continuous_writer_no_row_is_lost_doubled_or_brought_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
):
    monkeypatch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(2))
    uri = table_at(tmp_path / "t", rows=300, stable=seed % 2 == 1).uri
    if seed % 4 > 1:
        lance.dataset(uri).create_scalar_index("id", "BTREE")
    made: set[str] = set()
    after_rewrites(monkeypatch, lambda _, done: made.update(done.files))
    with Writer(uri, seed, {item: item * 10 for item in range(300)}) as writer:
        while writer.steps < 10:
            micro = writer.random.choice((None, 1, 2))
            compact_files(
                uri, compaction_options={"target_rows_per_fragment": 50}, micro_commit_batch_size=micro,
                on_failure="report", progress=False,
            )  # fmt: skip
    assert model_of(uri) == Counter(writer.model.items())
    some = writer.random.choice(sorted(writer.model))
    assert lance.dataset(uri).to_table(filter=f"id = {some}")["value"].to_pylist() == [writer.model[some]]
    assert made & data_files(uri) == made & referenced_files(uri)  # the writer's own attempts may leave some
    assert not (Path(uri) / "_lance_ray").exists()


# Row ids and indexes


def documents(count: int) -> pa.Table:
    words = ["amber", "birch", "cedar", "dune", "ember"]
    return pa.table(
        {
            "id": range(count),
            "kind": [item % 5 for item in range(count)],
            "tags": [[words[item % 5], words[item % 3]] for item in range(count)],
            "text": [f"{words[item % 5]} number{item}" for item in range(count)],
            "vector": pa.FixedSizeListArray.from_arrays(
                np.random.default_rng(0).random(count * 8, dtype=np.float32), 8
            ),
        }
    )


KINDS: dict[Any, tuple[str, dict[str, Any]]] = {
    "BTREE": ("id", {"filter": "id between 100 and 120"}),
    "BITMAP": ("kind", {"filter": "kind = 3"}),
    "LABEL_LIST": ("tags", {"filter": "array_has_any(tags, ['dune'])"}),
    "INVERTED": ("text", {"full_text_query": "number123"}),
    "NGRAM": ("text", {"filter": "contains(text, 'ber number1')"}),
    "ZONEMAP": ("id", {"filter": "id between 100 and 120"}),
    "BLOOMFILTER": ("id", {"filter": "id = 110"}),
    "IVF_PQ": ("vector", {"nearest": {"column": "vector", "q": np.full(8, 0.5), "k": 5, "nprobes": 2}}),
}


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_still_answers_right_after_micro_commits(
    here: None, tmp_path: Path, kind: Any, stable: bool
):
    column, query = KINDS[kind]
    uri = str(tmp_path / "t")
    dataset = lance.write_dataset(documents(600), uri, max_rows_per_file=20, enable_stable_row_ids=stable)
    dataset.delete("id % 10 = 1")
    if kind == "IVF_PQ":
        dataset.create_index(column, kind, num_partitions=2, num_sub_vectors=2)
    else:
        dataset.create_scalar_index(column, kind)
    if not (kind == "IVF_PQ" and stable):  # there the engine ranks rows that are gone, whoever compacts
        lance.dataset(uri).delete("id % 10 = 2")
    before = sorted(lance.dataset(uri).scanner(columns=["id"], **query).to_table()["id"].to_pylist())
    report = compacted(uri, micro_commit_batch_size=2)
    assert report.fragments_added < report.fragments_removed
    after = lance.dataset(uri)
    assert sorted(after.scanner(columns=["id"], **query).to_table()["id"].to_pylist()) == before != []
    covered = kind not in ("ZONEMAP", "BLOOMFILTER")  # the engine cannot remap these: it scans what was rewritten
    assert (after.stats.index_stats(after.describe_indices()[0].name)["num_unindexed_rows"] == 0) == covered


def test_stable_row_ids_stay(here: None, tmp_path: Path):
    uri = table_at(tmp_path / "t", stable=True).uri
    lance.dataset(uri).delete("id % 4 = 0")
    before = lance.dataset(uri).scanner(columns=["id"], with_row_id=True).to_table()
    compacted(uri, micro_commit_batch_size=1)
    after = lance.dataset(uri).scanner(columns=["id"], with_row_id=True).to_table()
    assert after.sort_by("id").equals(before.sort_by("id"))


# On Ray


@pytest.fixture
def on_ray(ray_session: Path) -> None:
    """The shared Ray instance."""


@pytest.mark.ray
def test_on_a_cluster_with_default_arguments(on_ray: None, uri: str):
    report = compacted(uri)
    assert (report.done, rows_per_file(uri)) == (4, [100] * 4)
    assert ids_of(uri) == list(range(400))
    assert_nothing_left_over(uri)


@pytest.mark.ray
def test_more_workers_than_cpus_wait_for_each_other(on_ray: None, uri: str):
    assert compacted(uri, num_workers=16, micro_commit_batch_size=1).done == 4


@pytest.mark.ray
@pytest.mark.parametrize("seed", [100, 101])
def test_on_a_cluster_beside_a_continuous_writer(on_ray: None, tmp_path: Path, seed: int):
    uri = table_at(tmp_path / "t", rows=300).uri
    with Writer(uri, seed, {item: item * 10 for item in range(300)}) as writer:
        compact_files(uri, compaction_options=SMALL, micro_commit_batch_size=1, on_failure="report", progress=False)
    assert model_of(uri) == Counter(writer.model.items())
    assert not (Path(uri) / "_lance_ray").exists()


def test_index_names_leave_the_engines_own_out(here: None, uri: str):
    lance.dataset(uri).create_scalar_index("id", "BTREE", name="mine")
    compacted(uri, compaction_options=SMALL | {"defer_index_remap": True})
    assert commit.index_names(lance.dataset(uri)) == {"mine"}
