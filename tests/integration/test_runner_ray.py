"""The executors on a real Ray: the same behaviour on threads, tasks and actors, and what only processes can show."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, WorkerCrashedError

from lance_ray.errors import SchemaMismatchError, StorageError, TaskFailedError, WorkerEnvironmentError
from lance_ray.executors import ActorExecutor, Executor, LocalExecutor, RayExecutor
from lance_ray.retry import RetryPolicy
from lance_ray.runner import RunOptions, run_tasks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
LONG = 20.0  # seconds after which a test is wrong, not slow


@pytest.fixture(scope="module")
def ray_executors(ray_session: None) -> Iterator[dict[str, Executor]]:
    # Without CPUs of their own, or two idle actors would hold the whole cluster while the other tests wait.
    with ActorExecutor(2, ray_remote_args={"num_cpus": 0}) as actors:
        yield {"tasks": RayExecutor(), "actors": actors}


ACTORS = pytest.param("actors", marks=pytest.mark.slow)  # each kind of state starts processes of its own


@pytest.fixture(params=["threads", "tasks", ACTORS])
def executor(request: pytest.FixtureRequest, ray_executors: dict[str, Executor]) -> Executor:
    return ray_executors.get(request.param) or LocalExecutor(2)


@pytest.fixture(params=["tasks", ACTORS])
def processes(request: pytest.FixtureRequest, ray_executors: dict[str, Executor]) -> Executor:
    return ray_executors[request.param]


def options(**changes: Any) -> RunOptions:
    defaults: dict[str, Any] = {"progress": False, "start_timeout": LONG, "cancel_seconds": 2}
    return RunOptions(retry=RetryPolicy(base_delay=0), **(defaults | changes))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LONG
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.01)


def first_time(directory: Path, name: str) -> bool:
    """Whether this is the first attempt; the file tells the next one, in whatever process."""
    marker = directory / name
    if marker.exists():
        return False
    marker.touch()
    return True


# The worker functions


def add(shared: int, task: int) -> int:
    return shared + task


def release_or_wait(shared: Path, task: str) -> None:
    if task == "release":
        (shared / "released").touch()
    wait_for(shared / "released")


@dataclass(frozen=True)
class Fault:
    name: str
    error: BaseException
    times: int = 1


def fail(shared: Path, task: Fault) -> str:
    for attempt in range(task.times):
        if first_time(shared, f"{task.name}-{attempt}"):
            raise task.error
    return "done"


def beat(shared: Path, task: str) -> None:
    """Write the time into a file for as long as it runs."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        if task == "quick":
            wait_for(shared / "slow")
            return
        if (shared / "stop").exists():  # threads cannot be stopped otherwise
            return
        (shared / task).write_text(str(time.monotonic()))
        time.sleep(0.01)


def beat_and_tidy(shared: Path, task: str) -> None:
    try:
        beat(shared, task)
    finally:
        (shared / f"tidied-{task}").touch()


def assert_stops(heart: Path) -> None:
    time.sleep(0.1)
    last = heart.read_text()
    time.sleep(0.3)
    assert heart.read_text() == last


def die(shared: Path, task: str) -> int:
    if task == "always" or (task == "once" and first_time(shared, task)):
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def state_and_process(state: list[int], task: int) -> tuple[int, ...]:
    return (*state, os.getpid())


def make_state(shared: Path) -> list[int]:
    with (shared / "made").open("a") as log:
        log.write(f"{os.getpid()}\n")
    return [os.getpid()]


# What all executors have in common


def test_every_task_yields_its_result_once(executor: Executor) -> None:
    outcomes = list(run_tasks(add, range(20), shared=100, options=options(), executor=executor))
    assert sorted((outcome.task, outcome.unwrap(), outcome.attempts) for outcome in outcomes) == [
        (task, 100 + task, 1) for task in range(20)
    ]


def test_outcomes_come_in_completion_order(executor: Executor, tmp_path: Path) -> None:
    run = run_tasks(release_or_wait, ["wait", "release"], shared=tmp_path, options=options(), executor=executor)
    list(run)
    assert run.report.done == 2  # the first task ended although it waits for the second


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_tasks_are_taken_than_may_be_in_flight(executor: Executor, limit: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        while taken < 10:
            taken += 1
            yield taken

    run = run_tasks(add, tasks(), shared=0, options=options(max_in_flight=limit), executor=executor)
    for handed_over, _ in enumerate(run, start=1):
        assert taken - handed_over <= limit
    assert taken == 10


def test_transient_errors_are_retried_and_others_are_not(executor: Executor, tmp_path: Path) -> None:
    tasks = [
        Fault("throttled", StorageError("SlowDown", kind="transient"), times=2),
        Fault("reset", ConnectionResetError()),
        Fault("denied", StorageError("403", kind="denied")),
        Fault("bug", ValueError("bad row")),
    ]
    run = run_tasks(fail, tasks, shared=tmp_path, options=options(on_failure="report"), executor=executor)
    found = {outcome.task.name: (outcome.result, outcome.attempts) for outcome in run}
    assert found == {"throttled": ("done", 3), "reset": ("done", 2), "denied": (None, 1), "bug": (None, 1)}
    assert (run.report.done, run.report.retried, run.report.failed) == (2, 3, 2)


def test_an_error_keeps_its_type_and_data_on_the_way(executor: Executor, tmp_path: Path) -> None:
    error = SchemaMismatchError("bad column", columns=["a", "b"], expected="int64", actual="string")
    with pytest.raises(TaskFailedError) as caught:
        list(run_tasks(fail, [Fault("x", error)], shared=tmp_path, options=options(), executor=executor))
    cause = caught.value.__cause__
    assert type(cause) is SchemaMismatchError
    assert (str(cause), cause.columns, cause.expected, cause.actual) == ("bad column", ("a", "b"), "int64", "string")


def test_an_error_that_is_not_an_exception_fails_its_task_only(executor: Executor, tmp_path: Path) -> None:
    tasks = [Fault("exit", SystemExit(3)), Fault("fine", ValueError(), times=0)]
    run = run_tasks(fail, tasks, shared=tmp_path, options=options(on_failure="report"), executor=executor)
    found = {outcome.task.name: outcome for outcome in run}
    assert found["fine"].result == "done"
    assert found["exit"].error is not None
    assert type(found["exit"].error.__cause__) is RuntimeError


def test_closing_stops_running_tasks(executor: Executor, tmp_path: Path) -> None:
    run = run_tasks(beat, ["slow", "quick"], shared=tmp_path, options=options(), executor=executor)
    assert next(run).task == "quick"
    if isinstance(executor, LocalExecutor):
        (tmp_path / "stop").touch()
    begin = time.monotonic()
    run.close()
    assert time.monotonic() - begin < LONG / 2
    assert_stops(tmp_path / "slow")


def test_a_cancelled_ray_task_can_tidy_up(tmp_path: Path) -> None:
    run = run_tasks(beat_and_tidy, ["slow", "quick"], shared=tmp_path, options=options(cancel_seconds=LONG))
    assert next(run).task == "quick"
    begin = time.monotonic()
    run.close()
    assert time.monotonic() - begin < LONG / 2
    assert (tmp_path / "tidied-slow").exists()


def test_an_attempt_that_takes_too_long_fails_and_the_next_task_runs(executor: Executor, tmp_path: Path) -> None:
    settings = options(on_failure="report", task_timeout=1.0, max_in_flight=1)
    run = run_tasks(beat, ["slow", "quick"], shared=tmp_path, options=settings, executor=executor)
    late, quick = run
    (tmp_path / "stop").touch()
    assert (late.task, late.attempts, quick.error) == ("slow", 1, None)
    assert late.error is not None
    assert isinstance(late.error.__cause__, TimeoutError)


# What only processes can show


@pytest.mark.slow
def test_a_killed_worker_s_task_runs_again_and_one_that_kills_each_of_its_workers_is_given_up(
    processes: Executor, tmp_path: Path
) -> None:
    settings = options(on_failure="report", max_worker_losses=2)
    run = run_tasks(die, ["always", "once", "no"], shared=tmp_path, options=settings, executor=processes)
    outcomes = {outcome.task: outcome for outcome in run}
    assert {task: outcome.attempts for task, outcome in outcomes.items()} == {"always": 2, "once": 2, "no": 1}
    assert (outcomes["once"].error, outcomes["no"].error) == (None, None)
    assert outcomes["always"].error is not None
    assert isinstance(outcomes["always"].error.__cause__, WorkerCrashedError | ActorDiedError)
    assert (run.report.done, run.report.failed, run.report.retried) == (2, 1, 2)


def test_ctrl_c_stops_the_tasks_on_the_cluster(processes: Executor, tmp_path: Path) -> None:
    run = run_tasks(beat, ["slow", "slow"], shared=tmp_path, options=options(max_in_flight=1), executor=processes)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_for(tmp_path / "slow")
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert_stops(tmp_path / "slow")


def test_the_worker_s_traceback_is_part_of_the_chain(processes: Executor, tmp_path: Path) -> None:
    with pytest.raises(TaskFailedError) as caught:
        list(run_tasks(fail, [Fault("x", ValueError("bad"))], shared=tmp_path, options=options(), executor=processes))
    cause = caught.value.__cause__
    assert type(cause) is ValueError
    assert "in fail" in str(cause.__cause__)


@pytest.mark.parametrize(
    "too_big",
    [RayExecutor({"num_cpus": 64}), ActorExecutor(1, ray_remote_args={"num_cpus": 64})],
    ids=["tasks", "actors"],
)
def test_a_request_that_no_node_can_serve_ends_with_what_was_asked_for_and_what_there_is(too_big: Executor) -> None:
    with pytest.raises(WorkerEnvironmentError) as caught:
        list(run_tasks(add, [1], shared=0, options=options(start_timeout=1), executor=too_big))
    assert "each needs {'CPU': 64}, one node has at most {'CPU': 2.0}" in str(caught.value)


def test_waiting_for_resources_does_not_count_as_running(tmp_path: Path) -> None:
    settings = options(task_timeout=1.5, max_in_flight=6, ray_remote_args={"num_cpus": 2})
    outcomes = list(run_tasks(nap, [0.5] * 6, shared=None, options=settings))  # one after the other: 3 s in all
    assert [outcome.error for outcome in outcomes] == [None] * 6


def nap(shared: None, task: float) -> None:
    time.sleep(task)


@pytest.mark.slow
def test_more_actors_than_the_cluster_can_hold_do_not_keep_tasks_waiting() -> None:
    with ActorExecutor(3) as actors:
        outcomes = list(run_tasks(add, range(20), shared=1, options=options(), executor=actors))
    assert len(outcomes) == 20


def test_an_actor_makes_its_state_once_and_keeps_it_for_the_next_run(tmp_path: Path) -> None:
    with ActorExecutor(1, make_state) as actors:
        for _ in range(2):
            run = run_tasks(state_and_process, range(5), shared=tmp_path, options=options(), executor=actors)
            for outcome in run:
                made_in, ran_in = outcome.unwrap()
                assert made_in == ran_in
    assert len((tmp_path / "made").read_text().split()) == 1


def test_actors_kept_from_another_run_work_with_the_data_of_this_one(ray_executors: dict[str, Executor]) -> None:
    for shared in (10, 20):
        outcomes = run_tasks(add, [1, 2], shared=shared, options=options(), executor=ray_executors["actors"])
        assert {outcome.unwrap() for outcome in outcomes} == {shared + 1, shared + 2}
