"""Compaction under faults: what finished is kept, what was not committed leaves no trace, the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.optimize import Compaction

from lance_ray import CompactionReport, cleanup_orphans, commit, compact_files, compaction
from lance_ray.errors import CommitOutcomeUnknownError, LanceRayError, OperationFailedError, StorageError
from lance_ray.executors import LocalExecutor
from lance_ray.planning.compaction import Rewritten
from tests.blocks import assert_nothing_left_over, data_files, ids_of, rows_per_file, versions
from tests.faults.proxy import Rule
from tests.faults.stores import Place, rows

SMALL: dict[str, Any] = {"target_rows_per_fragment": 100}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run one after the other in a thread of this process."""
    monkeypatch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(1))
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """40 fragments of ten rows: four tasks for a target of 100 rows."""
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"id": np.arange(400)}), uri, max_rows_per_file=10)
    return uri


def compacted(uri: str, **options: Any) -> CompactionReport:
    arguments: dict[str, Any] = {"compaction_options": SMALL, "progress": False} | options
    report = compact_files(uri, **arguments)
    assert isinstance(report, CompactionReport)
    return report


def spoil(uri: str, fragment: int, how: str = "gone") -> str:
    """Remove the file of a fragment, cut it, or put noise into it; returns its name."""
    name = str(lance.dataset(uri).get_fragments()[fragment].metadata.files[0].path)
    path = Path(uri) / "data" / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes(255 - item for item in content))
    return name


# A task that fails


@pytest.mark.parametrize("how", ["gone", "cut", "garbled"])
def test_a_fragment_that_cannot_be_read_is_named_and_the_others_are_compacted(here: None, uri: str, how: str):
    spoilt = spoil(uri, 15, how)
    report = compacted(uri, on_failure="report")
    assert (report.done, report.failed) == (3, 1)
    assert 15 in report.failures[0].fragments
    assert isinstance(report.failures[0].error.__cause__, LanceRayError)
    if how == "gone":
        assert spoilt in str(report)
        assert isinstance(report.failures[0].error.__cause__, StorageError)
    assert sorted(rows_per_file_of_metadata(uri)) == [10] * 10 + [100] * 3
    assert not (Path(uri) / "_lance_ray").exists()


def rows_per_file_of_metadata(uri: str) -> list[int]:
    return [fragment.metadata.num_rows for fragment in lance.dataset(uri).get_fragments()]


def test_by_default_a_failed_task_is_an_error_after_the_others_are_committed(here: None, uri: str):
    spoil(uri, 15)
    with pytest.raises(OperationFailedError, match="1 task") as caught:
        compacted(uri)
    assert caught.value.completed == 3
    assert len(caught.value.failures) == 1
    assert sorted(rows_per_file_of_metadata(uri)) == [10] * 10 + [100] * 3


def test_a_task_that_fails_now_and_then_is_tried_again(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    original, calls = compaction.rewrite, iter(range(100))

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        done = original(spec, task)
        if next(calls) % 2 == 0:
            raise StorageError("503", kind="transient")  # after its files were written and noted
        return done

    monkeypatch.setattr(compaction, "rewrite", rewrite)
    report = compacted(uri)
    assert (report.done, report.failed, report.retried) == (4, 0, 4)
    assert_nothing_left_over(uri)


# A commit whose answer is lost, or that fails


@pytest.mark.parametrize("micro", [None, 2])
def test_a_commit_whose_answer_was_lost_is_found_by_the_names_of_its_files(
    monkeypatch: pytest.MonkeyPatch, here: None, uri: str, micro: int | None
):
    class Lossy:
        @staticmethod
        def commit(*args: Any) -> None:
            Compaction.commit(*args)
            raise OSError("LanceError(IO): connection reset by peer")

    monkeypatch.setattr(commit, "Compaction", Lossy)
    report = compacted(uri, micro_commit_batch_size=micro)
    assert (report.done, report.fragments_removed, report.fragments_added) == (4, 40, 4)
    assert report.versions[-1] == lance.dataset(uri).version
    assert ids_of(uri) == list(range(400))
    assert_nothing_left_over(uri)


class Refused:
    """In the place of the engine's Compaction: commits nothing."""

    error: BaseException = OSError("LanceError(IO): Generic S3 error: status code: 403 Forbidden")

    @classmethod
    def commit(cls, *_: Any) -> None:
        raise cls.error


def test_a_commit_that_certainly_failed_leaves_the_table_and_no_file(
    monkeypatch: pytest.MonkeyPatch, here: None, uri: str
):
    monkeypatch.setattr(commit, "Compaction", Refused)
    with pytest.raises(StorageError):
        compacted(uri)
    assert versions(uri) == [1]
    assert_nothing_left_over(uri)


def test_while_the_outcome_is_unknown_every_file_is_kept_for_the_clean_up(
    monkeypatch: pytest.MonkeyPatch, here: None, uri: str
):
    monkeypatch.setattr(commit, "is_local", lambda _: False)
    monkeypatch.setattr(Refused, "error", OSError("LanceError(IO): connection reset by peer"))
    monkeypatch.setattr(commit, "Compaction", Refused)
    with pytest.raises(CommitOutcomeUnknownError):
        compacted(uri)
    assert len(data_files(uri)) == 44
    assert len(cleanup_orphans(uri).files) == 4
    assert_nothing_left_over(uri)


# Interrupts and killed processes


def test_an_interrupt_between_two_commits_keeps_the_first_and_removes_the_rest(
    monkeypatch: pytest.MonkeyPatch, here: None, uri: str
):
    original = commit.commit_rewrites
    calls = iter(range(10))

    def commit_rewrites(*args: Any) -> commit.RewriteReceipt:
        receipt = original(*args)
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return receipt

    monkeypatch.setattr(commit, "commit_rewrites", commit_rewrites)
    with pytest.raises(KeyboardInterrupt):
        compacted(uri, micro_commit_batch_size=1)
    monkeypatch.setattr(commit, "commit_rewrites", original)
    assert sorted(rows_per_file(uri)) == [10] * 20 + [100] * 2
    cleanup_orphans(uri)
    assert_nothing_left_over(uri)
    assert compacted(uri).done == 2
    assert sorted(ids_of(uri)) == list(range(400))


def test_an_interrupt_while_tasks_run_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    original, calls = compaction.rewrite, iter(range(10))

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        done = original(spec, task)
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return done

    monkeypatch.setattr(compaction, "rewrite", rewrite)
    with pytest.raises(KeyboardInterrupt):
        compacted(uri)
    assert versions(uri) == [1]
    time.sleep(0.5)
    assert_nothing_left_over(uri)


DRIVER = """
import os, sys
from lance_ray import commit, compaction
from lance_ray.executors import LocalExecutor

compaction.RayExecutor = lambda *args, **kwargs: LocalExecutor(1)
original, calls = commit.commit_rewrites, iter(range(10))

def commit_rewrites(*args):
    if next(calls) == 1:
        os.kill(os.getpid(), 9)
    return original(*args)

commit.commit_rewrites = commit_rewrites
compaction.compact_files(
    sys.argv[1], compaction_options={"target_rows_per_fragment": 100}, micro_commit_batch_size=1, progress=False
)
"""


def test_a_driver_killed_between_two_commits_leaves_whole_commits_and_the_next_run_goes_on(here: None, uri: str):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", DRIVER, uri], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(rows_per_file(uri)) == [10] * 30 + [100]
    assert sorted(ids_of(uri)) == list(range(400))
    assert (Path(uri) / "_lance_ray").exists()
    assert compacted(uri).done == 3
    assert sorted(ids_of(uri)) == list(range(400))
    assert_nothing_left_over(uri)


@pytest.mark.ray
def test_a_worker_killed_after_it_wrote_its_files_is_replaced_and_they_are_removed(
    monkeypatch: pytest.MonkeyPatch, ray_session: Path, uri: str, tmp_path: Path
):
    monkeypatch.setattr(compaction, "rewrite", Killed(str(tmp_path / "killed")))
    report = compacted(uri)
    assert (report.done, report.failed, report.retried) == (4, 0, 1)
    assert ids_of(uri) == list(range(400))
    assert_nothing_left_over(uri)


class Killed:
    """The rewrite, whose first worker is killed at its end."""

    __name__ = "rewrite"

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.original = compaction.rewrite

    def __call__(self, spec: compaction.RewriteSpec, task: str) -> Rewritten:
        done = self.original(spec, task)
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return done
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


# On an object store


def test_on_an_object_store_nothing_is_left_over_either(here: None, on_s3: Place):
    on_s3.write(rows(0, 400), max_rows_per_file=10)
    report = compacted(on_s3.uri, storage_options=on_s3.options, micro_commit_batch_size=3)
    assert (report.done, len(report.versions)) == (4, 2)
    on_s3.assert_holds(range(400))


def test_a_store_that_refuses_for_a_while_costs_nothing(here: None, on_s3: Place):
    on_s3.write(rows(0, 400), max_rows_per_file=10)
    assert on_s3.s3 is not None
    place = on_s3.impatient
    with on_s3.s3.proxy.failing(Rule("PUT|POST", r"/data/", status=503, count=2)) as rule:
        report = compacted(place.uri, storage_options=place.options)
    assert rule.hits >= 2
    assert (report.done, report.failed) == (4, 0)
    on_s3.assert_holds(range(400))


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("skip", [0, 1], ids=["of the reservation", "of the rewrite"])
def test_a_lost_answer_of_the_store_doubles_and_loses_nothing(here: None, on_s3: Place, patient: bool, skip: int):
    on_s3.write(rows(0, 400), max_rows_per_file=10)
    assert on_s3.s3 is not None
    place = on_s3 if patient else on_s3.impatient
    with on_s3.s3.proxy.failing(Rule("PUT", r"/_versions/", count=1, skip=skip, lose_answer=True)) as rule:
        try:
            report = compacted(place.uri, storage_options=place.options)
        except CommitOutcomeUnknownError:
            assert skip == 0  # the answer to a reservation says nothing about a rewrite, and its files tell no version
        else:
            assert report.done == 4
    assert rule.hits > skip
    cleanup_orphans(**on_s3.to)
    on_s3.assert_holds(range(400))


# Two at once


def test_two_compactions_of_one_table_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch, here: None, uri: str):
    original, both = compaction.rewrite, threading.Barrier(2, timeout=20)
    first = set[str]()

    def rewrite(spec: compaction.RewriteSpec, task: str) -> Rewritten:
        done = original(spec, task)
        if spec.job.run not in first:
            first.add(spec.job.run)
            both.wait()  # neither has committed yet
        return done

    monkeypatch.setattr(compaction, "rewrite", rewrite)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(compacted, uri, on_failure="report") for _ in range(2)]
        reports = [run.result() for run in runs]
    assert [report.failed for report in reports] == [0, 0]
    assert sum(report.fragments_removed - report.fragments_added for report in reports) == 36
    assert sorted(ids_of(uri)) == list(range(400))
    assert rows_per_file(uri) == [100] * 4
    assert_nothing_left_over(uri)
