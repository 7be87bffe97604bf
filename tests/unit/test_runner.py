"""The window of tasks, on threads: order, bounds, retries, failures, cancelling, progress."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from lance_ray import progress
from lance_ray.errors import (
    CommitConflictError,
    InvalidArgumentError,
    SchemaMismatchError,
    StorageError,
    TaskFailedError,
    WorkerEnvironmentError,
)
from lance_ray.executors import ActorExecutor, LocalExecutor, RayExecutor, Work
from lance_ray.progress import BarReporter, LogReporter, Progress, SilentReporter, reporter_for
from lance_ray.retry import RetryPolicy
from lance_ray.runner import RunOptions, TaskRun, run_tasks

THROTTLED = StorageError("SlowDown", kind="transient")
LONG = 20.0  # seconds after which a test is wrong, not slow


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def add(shared: int, task: int) -> int:
    return shared + task


def call(shared: object, task: Callable[[], Any]) -> Any:
    """The worker function of most tests: a task is what it does."""
    return task()


def options(**changes: Any) -> RunOptions:
    return RunOptions(progress=False, **changes)


def run(*tasks: Callable[[], Any], threads: int = 4, **changes: Any) -> TaskRun[Callable[[], Any], Any]:
    return run_tasks(call, tasks, shared=None, options=options(**changes), executor=LocalExecutor(threads))


def raising(error: BaseException) -> Callable[[], Any]:
    def task() -> Any:
        raise error

    return task


@dataclass
class Flaky:
    """A task that raises the given errors, one for each attempt, and then returns "done"."""

    errors: list[BaseException]
    calls: int = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@dataclass
class Recorder:
    """A reporter that keeps what it was told."""

    events: list[Progress] = field(default_factory=list)
    closed: int = 0

    def report(self, event: Progress) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


# Results and order


def test_every_task_yields_one_outcome_with_its_task_index_and_result() -> None:
    outcomes = list(run_tasks(add, [5, 6, 7], shared=10, options=options(), executor=LocalExecutor()))
    found = sorted((outcome.index, outcome.task, outcome.unwrap(), outcome.attempts) for outcome in outcomes)
    assert found == [(0, 5, 15, 1), (1, 6, 16, 1), (2, 7, 17, 1)]
    assert all(0 <= outcome.seconds < LONG for outcome in outcomes)


def test_no_tasks_yield_no_outcomes() -> None:
    assert list(run()) == []


def test_outcomes_come_in_completion_order() -> None:
    second_is_done = threading.Event()
    outcomes = run(lambda: second_is_done.wait(LONG), lambda: None)
    assert next(outcomes).index == 1
    second_is_done.set()
    assert next(outcomes).index == 0


def test_nothing_starts_before_the_first_outcome_is_asked_for() -> None:
    task = Flaky([])
    outcomes = run(task)
    assert (task.calls, outcomes.report) == (0, Progress("call", total=1))
    outcomes.close()
    assert task.calls == 0


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_tasks_are_taken_than_may_be_in_flight(limit: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken

    outcomes = run_tasks(add, tasks(), shared=0, options=options(max_in_flight=limit), executor=LocalExecutor(8))
    for handed_over, _ in enumerate(outcomes, start=1):
        assert taken - handed_over <= limit
    assert taken == 20


def test_no_more_tasks_run_at_once_than_there_are_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    list(run(*[task] * 20, threads=3, max_in_flight=10))
    assert most == 3


def test_the_window_is_refilled_before_an_outcome_is_handed_over() -> None:
    third_started = threading.Event()
    outcomes = run(lambda: None, lambda: None, third_started.set, threads=1)
    next(outcomes)
    next(outcomes)
    assert third_started.wait(LONG)
    outcomes.close()


# Retries


@pytest.mark.parametrize(
    "error", [THROTTLED, ConnectionResetError(), StorageError("nobody answers just now", kind="unreachable")]
)
def test_a_transient_error_is_retried_and_the_attempts_are_counted(error: BaseException) -> None:
    task = Flaky([error, error])
    outcomes = run(task)
    assert (next(outcomes).attempts, task.calls, outcomes.report.retried) == (3, 3, 2)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad row"),
        SchemaMismatchError("int64 is not string"),
        StorageError("403", kind="denied"),
        CommitConflictError("lost the race", retryable=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_stays_is_not_retried(error: BaseException) -> None:
    task = Flaky([error])
    (outcome,) = run(task, on_failure="report")
    assert (task.calls, outcome.attempts) == (1, 1)
    assert outcome.error is not None
    assert outcome.error.__cause__ is error


def test_transient_errors_are_retried_as_often_as_the_policy_says() -> None:
    task = Flaky([THROTTLED] * 9)
    (outcome,) = run(task, on_failure="report", retry=RetryPolicy(max_attempts=4))
    assert (task.calls, outcome.attempts) == (4, 4)


@pytest.mark.parametrize(
    "lost", [WorkerCrashedError(), NodeDiedError("gone"), OutOfMemoryError("too much")], ids=lambda e: type(e).__name__
)
def test_a_lost_worker_is_retried_but_less_often_than_a_transient_error(lost: BaseException) -> None:
    patient = Flaky([lost, THROTTLED, lost, THROTTLED])
    poisonous = Flaky([lost] * 9)
    outcomes = sorted(run(patient, poisonous, on_failure="report", max_worker_losses=3), key=lambda done: done.index)
    assert (outcomes[0].unwrap(), outcomes[0].attempts) == ("done", 5)
    assert (outcomes[1].error is not None, outcomes[1].attempts) == (True, 3)


def test_other_tasks_go_on_while_one_waits_for_its_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANCE_RAY_NO_BACKOFF")
    slow_retry = RetryPolicy(base_delay=1, jitter=0)
    order = [outcome.index for outcome in run(Flaky([THROTTLED]), *[Flaky([])] * 5, threads=1, retry=slow_retry)]
    assert order == [1, 2, 3, 4, 5, 0]


def test_retries_are_logged_with_the_number_of_the_task_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lance_ray.retry"):
        list(run_tasks(add_flaky, ["secret-key"], shared=[THROTTLED], options=options(), executor=LocalExecutor()))
    assert caplog.messages[0].startswith("add_flaky[0]: attempt 1 failed")
    assert "secret-key" not in caplog.text


def add_flaky(shared: list[BaseException], task: str) -> None:
    if shared:
        raise shared.pop()


# Failures


def test_raise_ends_the_run_at_the_first_failure_and_keeps_the_cause() -> None:
    cause = SchemaMismatchError("int64 is not string", columns=["a"])
    late = Flaky([])
    outcomes = run(raising(cause), *[late] * 50, threads=1)
    with pytest.raises(TaskFailedError) as caught:
        list(outcomes)
    assert caught.value.__cause__ is cause
    assert (caught.value.task, caught.value.attempts) == ("call[0]", 1)
    assert late.calls == 0
    assert (outcomes.report.failed, outcomes.report.done) == (1, 0)


def test_report_yields_failures_among_the_others_and_goes_on() -> None:
    outcomes = run(lambda: 1, raising(ValueError("bad row")), lambda: 3, on_failure="report")
    found = {outcome.index: (outcome.result, outcome.error is None) for outcome in outcomes}
    assert found == {0: (1, True), 1: (None, False), 2: (3, True)}
    assert (outcomes.report.done, outcomes.report.failed) == (2, 1)


def test_unwrapping_a_failed_outcome_raises_its_error() -> None:
    (outcome,) = run(raising(ValueError("bad row")), on_failure="report")
    with pytest.raises(TaskFailedError, match="bad row"):
        outcome.unwrap()


@pytest.mark.parametrize("error", [SystemExit(3), type("PanicException", (BaseException,), {})("index out of bounds")])
def test_what_would_end_a_worker_fails_its_task_only(error: BaseException) -> None:
    (outcome,) = run(raising(error), on_failure="report")
    assert outcome.error is not None
    assert isinstance(outcome.error.__cause__, RuntimeError)
    assert type(error).__name__ in str(outcome.error)


def test_an_attempt_that_takes_too_long_fails_its_task_and_is_not_retried() -> None:
    release = threading.Event()
    stuck = Flaky([])
    begin = time.monotonic()
    outcomes = run(
        lambda: (stuck(), release.wait(LONG)), lambda: "quick", threads=2, task_timeout=0.5, on_failure="report"
    )
    quick, late = outcomes
    release.set()
    assert (quick.result, stuck.calls) == ("quick", 1)
    assert late.error is not None
    assert isinstance(late.error.__cause__, TimeoutError)
    assert 0.5 <= late.seconds < time.monotonic() - begin < LONG / 2


def test_a_thread_stuck_in_a_task_does_not_keep_others_from_running() -> None:
    release = threading.Event()
    stuck = [lambda: release.wait(LONG)] * 2
    outcomes = list(run(*stuck, lambda: "ran", threads=1, task_timeout=0.1, on_failure="report"))
    release.set()
    assert [outcome.result for outcome in outcomes] == [None, None, "ran"]


def test_an_error_of_the_iterable_of_tasks_ends_the_run_as_it_is() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise LookupError("no more plan")

    with pytest.raises(LookupError, match="no more plan"):
        list(run_tasks(add, tasks(), shared=0, options=options(), executor=LocalExecutor()))


# Ending early


class Cancellable:
    """A task that runs until it is let go, on an executor that tells which of its attempts were cancelled."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.closed: list[float] = []

    def open(self, fn: Any, shared: object) -> Any:
        session = LocalExecutor(4).open(fn, shared)
        close = session.close

        def closing(seconds: float) -> None:
            self.closed.append(seconds)
            self.let_go.set()  # what a cancelled Ray task does by itself
            close(seconds)

        session.close = closing  # type: ignore[method-assign]  # spied upon
        return session

    def start(self) -> TaskRun[Callable[[], Any], Any]:
        tasks = [lambda: None, lambda: self.let_go.wait(LONG)]
        return run_tasks(call, tasks, shared=None, options=options(cancel_seconds=7), executor=self)


def test_close_cancels_what_is_outstanding() -> None:
    executor = Cancellable()
    outcomes = executor.start()
    next(outcomes)
    outcomes.close()
    assert executor.closed == [7]
    assert next(outcomes, "over") == "over"


def test_leaving_the_with_block_cancels_what_is_outstanding() -> None:
    executor = Cancellable()
    with executor.start() as outcomes:
        next(outcomes)
    assert executor.closed == [7]


def test_breaking_out_of_a_loop_cancels_at_once_without_a_with_block() -> None:
    executor = Cancellable()
    for _ in executor.start():
        break
    assert executor.closed == [7]


def test_ctrl_c_cancels_what_is_outstanding() -> None:
    executor = Cancellable()
    outcomes = executor.start()
    next(outcomes)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert executor.closed == [7]


def test_a_task_that_ignores_cancelling_is_waited_for_only_as_long_as_allowed() -> None:
    release = threading.Event()
    outcomes = run(lambda: None, lambda: release.wait(LONG), cancel_seconds=0.2)
    next(outcomes)
    begin = time.monotonic()
    outcomes.close()
    waited = time.monotonic() - begin
    release.set()
    assert 0.2 <= waited < LONG / 2


# Waiting


class Full:
    """An executor, and its own session, where no task ever starts."""

    def open(self, fn: object, shared: object) -> Full:
        return self

    def capacity(self, asked: int | None) -> int:
        return 2

    def submit(self, work: Work) -> None:
        pass

    def wait(self, seconds: float) -> list[Work]:
        time.sleep(min(seconds, 0.05))
        return []

    def cancel(self, work: Work) -> None:
        pass

    def close(self, seconds: float) -> None:
        pass

    def describe(self) -> str:
        return "each needs 64 CPUs, one node has 2"


def test_tasks_that_get_no_resources_end_the_run_with_what_was_asked_for_and_what_there_is() -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerEnvironmentError) as caught:
        list(run_tasks(add, [1, 2, 3], shared=0, options=options(start_timeout=0.3), executor=Full()))
    assert 0.3 <= time.monotonic() - begin < LONG / 2
    assert "add: none of 2 task(s) could start within 0.3 s: each needs 64 CPUs, one node has 2" in str(caught.value)


class OneAtATime(Full):
    """Takes two tasks and has room for one, which takes 0.4 s."""

    def __init__(self) -> None:
        self.submitted: list[Work] = []

    def submit(self, work: Work) -> None:
        self.submitted.append(work)

    def wait(self, seconds: float) -> list[Work]:
        first = self.submitted[0]
        first.started = first.started or time.monotonic()
        time.sleep(0.05)
        return [self.submitted.pop(0)] if time.monotonic() - first.started > 0.4 else []


def test_standing_in_line_behind_a_running_task_is_not_taken_for_a_lack_of_resources() -> None:
    outcomes = run_tasks(add, [1, 2], shared=0, options=options(start_timeout=0.2), executor=OneAtATime())
    assert [outcome.task for outcome in outcomes] == [1, 2]


def test_a_standstill_is_logged_with_what_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lance_ray.runner"):
        list(run(lambda: time.sleep(0.5), threads=2, stall_seconds=0.2))
    assert caplog.messages[0].startswith("call: nothing completed for 0.2 s; running: 0; waiting for resources: 0; 2 ")


# State


def test_state_is_made_once_for_each_thread_and_takes_the_place_of_shared() -> None:
    made = []

    def make_state(shared: str) -> list[str]:
        made.append(shared)
        return [shared, "state"]

    executor = LocalExecutor(2, make_state)
    outcomes = list(run_tasks(keep_state, range(10), shared="table", options=options(), executor=executor))
    assert all(outcome.unwrap() == ["table", "state"] for outcome in outcomes)
    assert 1 <= len(made) <= 2


def keep_state(state: list[str], task: int) -> list[str]:
    return state


def test_a_state_that_cannot_be_made_fails_the_task() -> None:
    executor = LocalExecutor(1, lambda shared: 1 / 0)
    with pytest.raises(TaskFailedError) as caught:
        list(run_tasks(add, [1], shared=0, options=options(), executor=executor))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# Progress


@dataclass(frozen=True)
class Written:
    rows: int
    bytes: int


def test_progress_is_one_event_for_each_change_of_state_and_the_report_is_the_last() -> None:
    recorder = Recorder()
    tasks: list[Callable[[], Any]] = [Flaky([THROTTLED]), raising(ValueError())]
    tasks += [lambda: Written(5, 100), lambda: Written(7, 200)]
    settings = RunOptions(progress=recorder, on_failure="report")
    outcomes = run_tasks(call, tasks, shared=None, options=settings, executor=LocalExecutor(1), operation="write")
    list(outcomes)
    assert len(recorder.events) == 1 + 5
    assert recorder.events[0] == Progress("write", total=4, seconds=recorder.events[0].seconds)
    last = recorder.events[-1]
    assert (last.done, last.failed, last.retried, last.rows, last.bytes) == (3, 1, 1, 12, 300)
    assert outcomes.report == Progress("write", 3, 4, "tasks", 12, 300, outcomes.report.seconds, 1, 1)
    assert outcomes.report.seconds >= last.seconds
    assert recorder.closed == 1


def test_the_reporter_is_closed_once_when_the_run_fails() -> None:
    recorder = Recorder()
    outcomes = run_tasks(
        call, [raising(ValueError())], shared=None, options=RunOptions(progress=recorder), executor=LocalExecutor()
    )
    with pytest.raises(TaskFailedError):
        list(outcomes)
    assert (recorder.closed, recorder.events[-1].failed) == (1, 1)


def test_the_total_of_tasks_made_on_the_way_is_unknown() -> None:
    outcomes = run_tasks(add, iter([1, 2]), shared=0, options=options(), executor=LocalExecutor())
    list(outcomes)
    assert (outcomes.report.total, outcomes.report.done) == (None, 2)


def test_a_bar_needs_a_terminal_and_silence_needs_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Recorder()
    assert reporter_for("x", 1, mine) is mine
    assert isinstance(reporter_for("x", 1, False), SilentReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(reporter_for("x", 1, None), LogReporter)
    assert isinstance(reporter_for("x", 1, True), LogReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = reporter_for("x", 1, None)
    bar.close()
    assert isinstance(bar, BarReporter)


def test_a_bar_counts_failed_tasks_as_worked_off_and_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    bar = BarReporter("compact", 4)
    bar.report(Progress("compact", done=2, failed=1))
    bar.close()
    shown = capsys.readouterr().err
    assert "compact" in shown
    assert "3/4" in shown
    assert "failed=1" in shown


def test_log_lines_are_sparse_and_one_comes_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, logger="lance_ray.progress"):
        reporter = LogReporter(every=10)
        for now in range(25):
            reporter.report(Progress("compact", done=now, total=30, seconds=now))
        reporter.report(Progress("compact", 30, 30, rows=1234, bytes=5_600_000, failed=1, retried=2, seconds=24.5))
        reporter.close()
    assert caplog.messages == [
        "compact: 10 of 30 tasks, 10.0 s",
        "compact: 20 of 30 tasks, 20.0 s",
        "compact: 30 of 30 tasks, 1,234 rows, 5.6 MB, 2 retried, 1 failed, 24.5 s (end)",
    ]


# Arguments


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("max_in_flight", 0),
        ("max_worker_losses", 0),
        ("task_timeout", 0.0),
        ("start_timeout", -1.0),
        ("stall_seconds", 0.0),
        ("cancel_seconds", float("nan")),
        ("on_failure", "stop"),
        ("ray_remote_args", {"max_retries": 3}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RunOptions(**{parameter: value})
    assert caught.value.parameter == parameter


def test_ray_arguments_are_copied_and_never_shown() -> None:
    args = {"runtime_env": {"env_vars": {"KEY": "secret"}}}
    settings = RunOptions(ray_remote_args=args)
    args.clear()
    assert settings.ray_remote_args == {"runtime_env": {"env_vars": {"KEY": "secret"}}}
    assert "secret" not in repr(settings)


def test_ray_arguments_beside_an_executor_are_refused_not_ignored() -> None:
    with pytest.raises(InvalidArgumentError, match="give these to the executor"):
        run_tasks(add, [1], shared=0, options=RunOptions(ray_remote_args={"num_cpus": 2}), executor=LocalExecutor())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalExecutor(0),
        lambda: ActorExecutor(0),
        lambda: RayExecutor({"num_returns": 2}),
        lambda: ActorExecutor(1, ray_remote_args={"max_restarts": 5}),
    ],
)
def test_an_executor_that_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError):
        make()


def test_importing_and_making_executors_does_not_start_ray() -> None:
    code = (
        "import ray, lance_ray.executors as e, lance_ray.runner as r; e.RayExecutor(); e.ActorExecutor(2); "
        "r.run_tasks(len, [1], shared=0); assert not ray.is_initialized()"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
