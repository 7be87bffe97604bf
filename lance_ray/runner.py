"""The one place that runs distributed work: a bounded window of tasks, retried by error type and cancelled together.

::

    with run_tasks(rewrite, plan.tasks, shared=table, options=RunOptions(on_failure="report")) as run:
        for outcome in run:             # completion order, while the others still run
            ...
    run.report                          # done, failed, retried, rows, bytes, seconds

The window decides *what* runs (order, retries, time limits, what a failure means) and knows nothing of Ray; an
:class:`Executor` decides *where*. All executors behave alike, so that whatever is built on them can be tested with
:class:`LocalExecutor` and no cluster.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from lance_ray.errors import InvalidArgumentError, TaskFailedError, WorkerEnvironmentError
from lance_ray.executors import WORKER_LOST, Executor, RayExecutor, Session, Work, Worker, checked_ray_args, name_of
from lance_ray.progress import Progress, Reporter, check_progress, reporter_for
from lance_ray.retry import RetryPolicy, is_interruption, log_retry

T = TypeVar("T")
R = TypeVar("R")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a set of tasks is run.

    Attributes:
        max_in_flight: tasks submitted and not yet handed to the caller, at most; ``None`` takes twice what the cluster
            runs at once (the second half waits in line, which hides start-up and tells an autoscaler what is wanted).
        ray_remote_args: what Ray is told about each task (``num_cpus``, ``memory``, ``scheduling_strategy``...).
        retry: the policy for transient errors of a task.
        max_worker_losses: a task that lost this many workers (killed, out of memory, node gone) has failed.
        progress: see :func:`lance_ray.progress.reporter_for`.
        on_failure: ``"raise"`` ends the run at the first task that failed for good, ``"report"`` yields its outcome.
        task_timeout: seconds one attempt may run, waiting for resources not included; too long is final.
        start_timeout: seconds to wait for resources while nothing runs, before the run is given up.
        stall_seconds: how often to log what is waited for while nothing completes.
        cancel_seconds: how long cancelled tasks may take to stop; then their workers are killed.

    Raises:
        InvalidArgumentError: a value is out of range, or ``ray_remote_args`` holds what this module decides.
    """

    max_in_flight: int | None = None
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_worker_losses: int = 3
    progress: bool | Reporter | None = None
    on_failure: Literal["raise", "report"] = "raise"
    task_timeout: float | None = None
    start_timeout: float = 300.0
    stall_seconds: float = 60.0
    cancel_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_progress(self.progress)
        object.__setattr__(self, "ray_remote_args", checked_ray_args(self.ray_remote_args))
        for name in ("max_in_flight", "max_worker_losses"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InvalidArgumentError(name, count, "must be at least 1")
        for name in ("task_timeout", "start_timeout", "stall_seconds", "cancel_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise InvalidArgumentError(name, seconds, "must be more than 0 seconds")
        if self.on_failure not in {"raise", "report"}:
            raise InvalidArgumentError("on_failure", self.on_failure, "must be 'raise' or 'report'")


@dataclass(frozen=True, slots=True)
class TaskOutcome(Generic[T, R]):
    """What became of one task.

    Attributes:
        task: the task as it was given.
        index: its place in the given order, from 0.
        result: what the worker function returned, ``None`` if it failed.
        error: why it failed for good, with the last attempt's error as ``__cause__``; ``None`` if it did not.
        attempts: how often it was started.
        seconds: how long the last attempt took.
    """

    task: T
    index: int
    result: R | None
    error: TaskFailedError | None
    attempts: int
    seconds: float

    def unwrap(self) -> R:
        """The result.

        Raises:
            TaskFailedError: the task failed.
        """
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # without an error it is what the function returned


def run_tasks(
    fn: Worker[T, R],
    tasks: Iterable[T],
    *,
    shared: object,
    options: RunOptions | None = None,
    executor: Executor | None = None,
    operation: str | None = None,
) -> TaskRun[T, R]:
    """An iterator over the outcomes of ``fn(shared, task)``, in completion order.

    Nothing starts before the first outcome is asked for, and tasks are taken from ``tasks`` only as there is room. When
    the iteration ends early (break, exception, Ctrl-C, ``close()``) the outstanding tasks are cancelled.

    An attempt is repeated after an interruption (:func:`lance_ray.retry.is_interruption`: whoever planned the tasks has
    reached the store) or when its worker was lost: ``fn`` may run more than once for a task.

    Args:
        fn: a module-level function; it runs in worker processes.
        tasks: small values. Results with integer attributes ``rows`` and ``bytes`` are summed up in the progress.
        shared: what all tasks need; shipped to the cluster once.
        options: see :class:`RunOptions`.
        executor: where to run; by default Ray tasks, for which Ray is started if it is not running.
        operation: names the run in logs, errors and Ray's dashboard; by default the name of ``fn``.

    Raises:
        InvalidArgumentError: both an executor and ``ray_remote_args`` were given (an executor has its own).
        TaskFailedError: while iterating with ``on_failure="raise"``: a task failed for good.
        WorkerEnvironmentError: while iterating: no task could be started within ``start_timeout``.
    """
    options = options or RunOptions()
    operation = operation or name_of(fn)
    if executor is not None and options.ray_remote_args:
        raise InvalidArgumentError("ray_remote_args", sorted(options.ray_remote_args), "give these to the executor")
    executor = executor or RayExecutor(options.ray_remote_args, name=operation)
    return TaskRun(_Window(fn, tasks, shared, options, executor, operation))


class TaskRun(Iterator[TaskOutcome[T, R]]):
    """A run of tasks: iterate to drive it, ``close()`` or leave its ``with`` block to end it early."""

    def __init__(self, window: _Window[T, R]) -> None:
        # The window does not refer back to this object: a run that is dropped is cancelled at once, not by some later
        # garbage collection.
        self._window = window
        self._outcomes = window.outcomes()

    def __next__(self) -> TaskOutcome[T, R]:
        return next(self._outcomes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is outstanding and wait, for a bounded time, until it has stopped."""
        self._outcomes.close()

    @property
    def report(self) -> Progress:
        """Counts and seconds so far; final once the iteration is over."""
        return self._window.report()


class _Window(Generic[T, R]):
    """The tasks submitted at a time, those waiting for their next attempt, and the rules for both."""

    def __init__(
        self,
        fn: Worker[T, R],
        tasks: Iterable[T],
        shared: object,
        options: RunOptions,
        executor: Executor,
        operation: str,
    ) -> None:
        self._open: Callable[[], Session] = partial(executor.open, fn, shared)
        self._options = options
        self._operation = operation
        self._progress = Progress(operation, total=len(tasks) if isinstance(tasks, Sized) else None)
        self._todo = enumerate(tasks)
        self._flight: set[Work] = set()
        self._later: list[tuple[float, int, Work]] = []  # a heap of (when, index, work) for attempts put off
        self._began = self._ended = self._quiet_since = self._idle_since = 0.0

    def report(self) -> Progress:
        return replace(self._progress, seconds=(self._ended or monotonic()) - self._began if self._began else 0.0)

    def _add(self, **counts: int) -> None:
        self._progress = replace(
            self._progress, **{name: getattr(self._progress, name) + count for name, count in counts.items()}
        )

    def outcomes(self) -> Generator[TaskOutcome[T, R], None, None]:
        self._began = self._quiet_since = self._idle_since = monotonic()
        reporter = reporter_for(self._operation, self._progress.total, self._options.progress)
        try:
            session = self._open()
            try:
                yield from self._drive(session, reporter)
            finally:
                session.close(self._options.cancel_seconds)
        finally:
            self._ended = monotonic()
            reporter.close()

    def _drive(self, session: Session, reporter: Reporter) -> Iterator[TaskOutcome[T, R]]:
        reporter.report(self.report())
        self._fill(session)
        while self._flight or self._later:
            now = monotonic()
            ended = deque(self._wait(session, now))
            ended.extend(self._overdue(session, now, ended))
            self._watch(session, now)
            while ended:
                outcome = self._settle(ended.popleft())
                reporter.report(self.report())
                if outcome is not None and self._options.on_failure == "raise":
                    outcome.unwrap()
                self._fill(session)
                if outcome is not None:
                    yield outcome
            self._fill(session)

    def _fill(self, session: Session) -> None:
        room = session.capacity(self._options.max_in_flight)
        while len(self._flight) < room and (work := self._next()) is not None:
            if not self._flight:
                self._quiet_since = self._idle_since = monotonic()
            work.attempts += 1
            self._flight.add(work)
            session.submit(work)

    def _next(self) -> Work | None:
        if self._later and self._later[0][0] <= monotonic():
            return heapq.heappop(self._later)[2]
        index, task = next(self._todo, (-1, None))
        return None if index < 0 else Work(index, task)

    def _wait(self, session: Session, now: float) -> list[Work]:
        options = self._options
        moments = [self._later[0][0]] if self._later and self._later[0][0] > now else []
        if not self._flight:
            time.sleep(max(0.0, moments[0] - now) if moments else 0.0)
            return []
        moments += [self._quiet_since + options.stall_seconds, self._idle_since + options.start_timeout]
        if options.task_timeout is not None:
            moments += [work.started + options.task_timeout for work in self._flight if work.started is not None]
        return session.wait(max(0.0, min(moments) - now))

    def _overdue(self, session: Session, now: float, ended: Iterable[Work]) -> list[Work]:
        """Stop and return what ran too long by ``now``, a moment before the session was asked what has ended."""
        limit = self._options.task_timeout
        if limit is None:
            return []
        running = self._flight.difference(ended)
        overdue = [work for work in running if work.started is not None and now - work.started >= limit]
        for work in overdue:
            session.cancel(work)
            work.error = _OverdueError(f"did not end within {limit:g} s")
        return overdue

    def _watch(self, session: Session, now: float) -> None:
        """Say so when nothing happens, and end the run when nothing can happen."""
        running = sorted(work.index for work in self._flight if work.started is not None)
        waiting = len(self._flight) - len(running)
        if running or not waiting:
            self._idle_since = now
        elif now - self._idle_since >= self._options.start_timeout:
            limit = self._options.start_timeout
            raise WorkerEnvironmentError(
                [f"{self._operation}: none of {waiting} task(s) could start within {limit:g} s: {session.describe()}"]
            )
        if self._flight and now - self._quiet_since >= self._options.stall_seconds:
            self._quiet_since = now
            text = "%s: nothing completed for %g s; running: %s; waiting for resources: %d; %s"
            shown = ", ".join(map(str, running[:10])) or "none"
            _LOG.warning(text, self._operation, self._options.stall_seconds, shown, waiting, session.describe())

    def _settle(self, work: Work) -> TaskOutcome[T, R] | None:
        """The outcome of an attempt that ended, or ``None`` when there will be another one."""
        now = self._quiet_since = monotonic()
        self._flight.remove(work)
        if work.error is not None and (delay := self._retry_delay(work, work.error, now)) is not None:
            log_retry(self._name(work), work.attempts, delay, work.error)
            self._add(retried=1)
            work.error = work.started = None
            heapq.heappush(self._later, (now + delay, work.index, work))
            return None
        seconds = 0.0 if work.started is None else now - work.started
        error = None
        if work.error is not None:
            self._add(failed=1)
            error = TaskFailedError(self._name(work), work.attempts, work.error)
            error.__cause__ = work.error
        else:
            self._add(done=1, rows=_count(work.result, "rows"), bytes=_count(work.result, "bytes"))
        return TaskOutcome(work.task, work.index, work.result, error, work.attempts, seconds)

    def _retry_delay(self, work: Work, error: BaseException, now: float) -> float | None:
        lost = isinstance(error, WORKER_LOST)
        work.lost += lost
        if work.failing_since is None:
            work.failing_since = now
        if isinstance(error, _OverdueError) or work.lost >= self._options.max_worker_losses:
            return None
        if not lost and not is_interruption(error):
            return None
        return self._options.retry.next_delay(work.attempts, now - work.failing_since)

    def _name(self, work: Work) -> str:
        # Only the number: the task itself may be long, or hold a secret.
        return f"{self._operation}[{work.index}]"


class _OverdueError(TimeoutError):
    """An attempt ran longer than ``task_timeout``; unlike a connection that timed out this is final."""


def _count(result: object, name: str) -> int:
    value = getattr(result, name, 0)
    return value if isinstance(value, int) else 0
