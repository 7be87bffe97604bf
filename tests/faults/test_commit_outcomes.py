"""The three outcomes of a commit: committed, certainly not committed, unknown. What each leaves behind.

The faults happen around the one call that commits, or in the store while it is under way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray.data

import lance_ray
from lance_ray import WriteReport, cleanup_orphans, commit, write_lance
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    SchemaMismatchError,
    StorageError,
    TableExistsError,
)
from tests.faults.proxy import FaultProxy, Rule
from tests.faults.stores import Place, ends_within, failing_with, rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

REAL_COMMIT: Callable[..., lance.LanceDataset] = lance.LanceDataset.commit


def write(place: Place, first: int, count: int, mode: str = "append", **options: Any) -> WriteReport:
    """Rows with the ids ``first`` and up, in two blocks and so in two files."""
    half = count // 2
    ds = ray.data.from_arrow([rows(first, half), rows(first + half, count - half)])
    return write_lance(ds, **place.to, mode=mode, min_rows_per_file=max(1, half), **options)


def proxy_of(place: Place) -> FaultProxy:
    assert place.s3 is not None
    return place.s3.proxy


def manifest_put(**changes: Any) -> Rule:
    return Rule("PUT", r"_versions/.*manifest", count=1, **changes)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Replaces the engine's commit, once, by a function that gets the engine's own and its arguments."""

    def replace(function: Callable[..., Any], times: int = 1) -> None:
        calls = iter(range(times))

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return REAL_COMMIT(*args, **kwargs) if next(calls, None) is None else function(*args, **kwargs)

        monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(stand_in))

    yield replace
    monkeypatch.undo()


def then_raise(error: BaseException) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        REAL_COMMIT(*args, **kwargs)
        raise error

    return stand_in


def only_raise(error: BaseException) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        raise error

    return stand_in


# Committed, and the answer lost


@pytest.mark.parametrize(
    "error",
    [
        OSError("LanceError(IO): Generic S3 error: HTTP error: error sending request"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("the event loop went away"),
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_commit_whose_answer_is_lost_is_recognised_and_not_repeated(commits, everywhere: Place, error: Exception):
    everywhere.write(rows(0, 10))
    commits(then_raise(error))
    report = write(everywhere, 10, 10)
    assert (report.version, report.rows) == (2, 10)
    everywhere.assert_holds(range(20))


@pytest.mark.parametrize(("mode", "expected"), [("create", range(10, 20)), ("overwrite", range(10, 20))])
def test_a_lost_answer_is_recognised_in_every_mode(commits, place: Place, mode: str, expected: range):
    if mode == "overwrite":
        place.write(rows(0, 10))
    commits(then_raise(OSError("LanceError(IO): connection closed before message completed")))
    report = write(place, 10, 10, mode)
    assert report.versions == (2 if mode == "overwrite" else 1,)
    place.assert_holds(expected)


def test_the_store_commits_and_resets_the_connection(on_s3: Place):
    on_s3.write(rows(0, 10))
    with proxy_of(on_s3).failing(manifest_put(lose_answer=True)) as rule:
        write(on_s3, 10, 10)
    assert rule.hits == 1
    on_s3.assert_holds(range(20))


def test_the_lost_commit_of_one_bundle_is_not_taken_for_another_one(commits, place: Place):
    place.write(rows(0, 10))
    ds = ray.data.from_arrow([rows(10, 10), rows(20, 10), rows(30, 10)])
    commits(then_raise(OSError("LanceError(IO): connection reset by peer")), times=3)
    report = write_lance(ds, **place.to, mode="append", stream=True, batch_size=10, max_bytes_per_file=1)
    assert report.rows == 30
    place.assert_holds(range(40))


def test_a_bundle_that_was_not_committed_is_not_taken_for_the_one_before_it(commits, on_disk: Place, monkeypatch):
    on_disk.write(rows(0, 10))
    monkeypatch.setattr("lance_ray.options.WriteOptions.bundle_bytes", 1)
    sent = []

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        sent.append(args)
        if len(sent) == 2:
            raise OSError("LanceError(IO): No space left on device (os error 28)")
        return REAL_COMMIT(*args, **kwargs)

    commits(second_fails, times=3)
    ds = ray.data.from_arrow([rows(10, 10), rows(20, 10), rows(30, 10)])
    with failing_with(StorageError):
        write_lance(ds, **on_disk.to, mode="append", stream=True, batch_size=10)
    on_disk.assert_holds(range(20))


# Certainly not committed


@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_a_commit_that_the_store_refuses_leaves_no_file(place: Place, commits, mode: str):
    if mode != "create":
        place.write(rows(0, 10))
    commits(only_raise(OSError("LanceError(IO): status code: 403 Forbidden: <Code>AccessDenied</Code>")))
    with failing_with(StorageError) as caught:
        write(place, 10, 10, mode)
    assert caught.value.kind == "denied"
    if mode == "create":
        place.assert_empty()
    else:
        place.assert_holds(range(10))


def test_on_disk_a_commit_that_raised_and_is_not_in_the_table_did_not_happen(on_disk: Place, commits):
    on_disk.write(rows(0, 10))
    commits(only_raise(RuntimeError("the event loop went away")))
    with failing_with(RuntimeError, match="event loop"):
        write(on_disk, 10, 10)
    on_disk.assert_holds(range(10))


def test_a_name_with_the_word_conflict_in_it_does_not_make_a_lost_commit_a_conflict(on_s3: Place, commits):
    place = Place(f"{on_s3.uri}/conflict/commit-conflicts", on_s3.options, on_s3.s3)
    place.write(rows(0, 10))
    error = f"LanceError(IO): Generic S3 error: Error performing PUT {place.uri}: HTTP error: error sending request"
    commits(only_raise(OSError(error)))
    with failing_with(CommitOutcomeUnknownError):
        write(place, 10, 10)
    assert len(place.orphans()) == 2


def someone_else(place: Place, table: pa.Table, mode: str) -> Callable[..., Any]:
    """Somebody commits at the last moment, and then so do we."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        place.write(table, mode)
        return REAL_COMMIT(*args, **kwargs)

    return stand_in


def test_an_append_lands_beside_an_append_of_the_last_moment(everywhere: Place, commits):
    everywhere.write(rows(0, 10))
    commits(someone_else(everywhere, rows(100, 10), "append"))
    assert write(everywhere, 10, 10).version == 3
    everywhere.assert_holds([*range(20), *range(100, 110)])


def test_a_create_loses_against_a_table_of_the_last_moment(everywhere: Place, commits):
    commits(someone_else(everywhere, rows(100, 10), "create"))
    with failing_with(TableExistsError):
        write(everywhere, 10, 10, "create")
    everywhere.assert_holds(range(100, 110))


def test_an_overwrite_of_nothing_wins_over_a_table_of_the_last_moment(place: Place, commits):
    commits(someone_else(place, rows(100, 10), "create"))
    assert write(place, 10, 10, "overwrite").version == 2
    place.assert_holds(range(10, 20))


def test_an_overwrite_of_nothing_that_is_refused_is_not_told_that_the_table_exists(on_disk: Place, commits):
    sent = []

    def created_then_full(*args: Any, **kwargs: Any) -> Any:
        sent.append(args)
        if len(sent) == 1:
            on_disk.write(rows(100, 10))
            return REAL_COMMIT(*args, **kwargs)
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    commits(created_then_full, times=2)
    with failing_with(StorageError) as caught:
        write(on_disk, 10, 10, "overwrite")
    assert caught.value.kind == "full"
    on_disk.assert_holds(range(100, 110))


def retryable_conflict() -> Exception:
    return OSError("LanceError: Retryable commit conflict for version 2: please retry")


def test_retryable_conflicts_are_tried_again(on_disk: Place, commits):
    on_disk.write(rows(0, 10))
    commits(only_raise(retryable_conflict()), times=3)
    write(on_disk, 10, 10)
    on_disk.assert_holds(range(20))


def test_conflicts_without_end_end_in_an_error_and_no_file(on_disk: Place, commits, monkeypatch):
    on_disk.write(rows(0, 10))
    monkeypatch.setattr(commit, "_MAX_BACKOFF_SECONDS", 0.01)
    commits(only_raise(retryable_conflict()), times=1000)
    with failing_with(CommitConflictError) as caught, ends_within(30):
        write(on_disk, 10, 10)
    assert caught.value.retryable
    monkeypatch.undo()
    on_disk.assert_holds(range(10))


# The schema changes between the plan and the commit


def while_tasks_write(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """The change happens after the last task and before the commit."""
    apply = commit.apply

    def later(*args: Any, **kwargs: Any) -> Any:
        change()
        return apply(*args, **kwargs)

    monkeypatch.setattr(commit, "apply", later)


def two_columns(first: int, count: int) -> pa.Table:
    return rows(first, count).append_column("x", pa.array(range(count), pa.int64()))


def append_two_columns(place: Place) -> WriteReport:
    return write_lance(ray.data.from_arrow(two_columns(10, 10)), **place.to, mode="append")


def test_a_nullable_column_that_was_added_meanwhile_is_reported_and_null(place: Place, monkeypatch):
    place.write(two_columns(0, 10))
    while_tasks_write(monkeypatch, lambda: place.open().add_columns(pa.field("y", pa.string())))
    report = append_two_columns(place)
    assert report.schema_changes == ("y",)
    assert place.open().to_table(columns=["y"])["y"].null_count == 20
    place.assert_holds(range(20))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["x"]),
        lambda table: table.alter_columns({"path": "x", "name": "z"}),
        lambda table: table.alter_columns({"path": "x", "data_type": pa.int32()}),
    ],
    ids=["dropped", "renamed", "of another type"],
)
def test_a_written_column_that_changed_meanwhile_is_a_mismatch_and_nothing_is_committed(place, monkeypatch, change):
    place.write(two_columns(0, 10))
    while_tasks_write(monkeypatch, lambda: change(place.open()))
    with failing_with(SchemaMismatchError, match="'x'"):
        append_two_columns(place)
    place.assert_holds(range(10))


def test_a_column_that_changed_under_the_very_commit_is_told_and_no_committed_file_is_removed(on_disk: Place, commits):
    on_disk.write(two_columns(0, 10))

    def drop_and_commit(*args: Any, **kwargs: Any) -> Any:
        on_disk.open().drop_columns(["x"])
        return REAL_COMMIT(*args, **kwargs)

    commits(drop_and_commit)
    with failing_with(CommitOutcomeUnknownError, match=r"rows are in version 3 .* without the values .*'x'"):
        append_two_columns(on_disk)
    cleanup_orphans(**on_disk.to)
    on_disk.assert_holds(range(20))


# Unknown


@pytest.mark.parametrize(
    ("fault", "landed"),
    [({"lose_answer": True}, True), ({"reset": True}, False)],
    ids=["the commit landed", "the commit was lost"],
)
@pytest.mark.slow
def test_the_store_goes_down_with_the_commit(on_s3: Place, fault: dict[str, Any], landed: bool):
    on_s3.write(rows(0, 10))
    broken = proxy_of(on_s3).failing(manifest_put(then_down=True, **fault))
    with broken, failing_with(CommitOutcomeUnknownError) as caught, ends_within(40):
        write(on_s3.impatient, 10, 10, job_id="nightly")
    assert caught.value.operation_id == "nightly"
    assert len(on_s3.data_files()) == 3  # nothing was deleted
    assert on_s3.ids() == list(range(20 if landed else 10))

    report = write(on_s3, 10, 10, job_id="nightly")
    assert report.skipped is landed
    on_s3.assert_holds(range(20))


def test_after_an_unknown_outcome_a_clean_up_removes_what_did_not_land(on_s3: Place, commits):
    on_s3.write(rows(0, 10))
    commits(only_raise(ConnectionResetError(104, "Connection reset by peer")))
    with failing_with(CommitOutcomeUnknownError):
        write(on_s3, 10, 10)
    assert len(on_s3.orphans()) == 2
    assert cleanup_orphans(**on_s3.to, dry_run=True).files
    assert len(cleanup_orphans(**on_s3.to).files) == 2
    on_s3.assert_holds(range(10))


@pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}], ids=["answers 503", "resets"])
@pytest.mark.slow
def test_a_commit_is_not_called_lost_because_its_history_cannot_be_read_just_now(on_s3: Place, commits, fault):
    on_s3.write(rows(0, 10))
    broken = Rule("GET", r"_versions/\d+\.manifest|_transactions/", **fault)

    def commit_then_break(*args: Any, **kwargs: Any) -> Any:
        REAL_COMMIT(*args, **kwargs)
        proxy_of(on_s3).rules.append(broken)
        raise retryable_conflict()

    commits(commit_then_break)
    with failing_with(CommitOutcomeUnknownError), ends_within(40):
        write(on_s3.impatient, 10, 10)
    proxy_of(on_s3).reset()
    assert cleanup_orphans(**on_s3.to).files == ()
    on_s3.assert_holds(range(20))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("landed", [True, False])
def test_an_interrupt_of_the_commit_itself_removes_no_file(on_disk: Place, commits, interrupt, landed: bool):
    on_disk.write(rows(0, 10))
    commits(then_raise(interrupt()) if landed else only_raise(interrupt()))
    with failing_with(interrupt):
        write(on_disk, 10, 10)
    assert len(on_disk.data_files()) == 3
    cleanup_orphans(**on_disk.to)
    on_disk.assert_holds(range(20 if landed else 10))


# After the commit


@pytest.mark.slow
def test_a_store_that_fails_after_the_commit_does_not_make_the_write_a_failure(on_s3: Place, commits, caplog):
    on_s3.write(rows(0, 10))
    broken = Rule("GET|DELETE|HEAD", "_lance_ray|list-type", status=503)

    def commit_then_break(*args: Any, **kwargs: Any) -> Any:
        dataset = REAL_COMMIT(*args, **kwargs)
        proxy_of(on_s3).rules.append(broken)
        return dataset

    commits(commit_then_break)
    with caplog.at_level(logging.WARNING), ends_within(60):
        report = write(on_s3.impatient, 10, 10)
    assert (report.version, report.rows) == (2, 10)
    assert "left for cleanup_orphans" in caplog.text
    proxy_of(on_s3).reset()
    assert [job.state for job in cleanup_orphans(**on_s3.to).jobs] == ["committed"]
    on_s3.assert_holds(range(20))


# A job id


@pytest.mark.parametrize("mode", ["create", "append", "overwrite", "ignore"])
def test_a_job_that_committed_is_not_written_again(place: Place, mode: str):
    if mode in ("append", "overwrite"):
        place.write(rows(0, 10))
    first = write(place, 10, 10, mode, job_id="nightly")
    again = write(place, 10, 10, mode, job_id="nightly")
    assert again.skipped
    assert again.version == first.version
    place.assert_holds(range(0 if mode == "append" else 10, 20))


def test_a_create_under_another_job_id_is_still_refused(place: Place):
    write(place, 10, 10, "create", job_id="monday")
    with failing_with(TableExistsError):
        write(place, 10, 10, "create", job_id="tuesday")
    place.assert_holds(range(10, 20))


def test_a_streamed_append_that_failed_goes_on_where_its_job_stopped(on_disk: Place, monkeypatch):
    on_disk.write(rows(0, 10))
    monkeypatch.setattr("lance_ray.options.WriteOptions.bundle_bytes", 1)
    apply, sent = commit.apply, []

    def fail_third(*args: Any, **kwargs: Any) -> Any:
        sent.append(args)
        if len(sent) == 3:
            raise StorageError("disk full", kind="full")
        return apply(*args, **kwargs)

    ds = ray.data.from_arrow([rows(10, 10), rows(20, 10), rows(30, 10), rows(40, 10)])

    def stream() -> WriteReport:
        return write_lance(ds, **on_disk.to, mode="append", stream=True, batch_size=10, job_id="feed")

    monkeypatch.setattr(commit, "apply", fail_third)
    with failing_with(StorageError):
        stream()
    assert on_disk.ids() == list(range(30))
    assert stream().rows == 20
    assert stream().skipped
    on_disk.assert_holds(range(50))


def test_a_streamed_append_takes_its_rows_in_order(on_disk: Place):
    on_disk.write(rows(0, 0))

    def first_is_slow(batch: dict[str, Any]) -> dict[str, Any]:
        import time

        time.sleep(1.0 if batch["id"][0] == 0 else 0.0)
        return batch

    ds = ray.data.range(60, override_num_blocks=6).map_batches(first_is_slow, batch_size=None)
    write_lance(ds, **on_disk.to, mode="append", stream=True, resume_rows=10)
    on_disk.assert_holds(range(10, 60))
    assert not ds.context.execution_options.preserve_order


def test_the_id_of_a_job_is_in_the_table(on_disk: Place):
    write(on_disk, 0, 10, "create", job_id="nightly", transaction_properties={"by": "me"}, commit_message="hello")
    transaction: Any = on_disk.open().read_transaction(1)
    properties = transaction.transaction_properties
    assert properties[commit.OPERATION_ID] == "nightly"
    assert properties["by"] == "me"
    assert lance_ray.commit.find_operation(on_disk.open(), "nightly", 0) == 1
