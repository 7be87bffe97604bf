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
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import ray
from ray import exceptions as ray_errors

from lance_ray.errors import InvalidArgumentError, TaskFailedError, WorkerEnvironmentError, redact
from lance_ray.progress import Progress, Reporter, reporter_for
from lance_ray.retry import RetryPolicy, is_transient, log_retry

T = TypeVar("T")
R = TypeVar("R")
Worker = Callable[[Any, T], R]

_LOG = logging.getLogger(__name__)
_WORKER_LOST = (
    ray_errors.WorkerCrashedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.NodeDiedError,
    ray_errors.OutOfMemoryError,
    ray_errors.RayActorError,
    ray_errors.ObjectLostError,
)
# Ray must not retry by itself: it knows neither the types worth a retry nor the time limits, and would not count.
_OURS = frozenset(
    ("name", "num_returns", "max_retries", "retry_exceptions", "max_restarts", "max_task_retries", "max_concurrency")
)


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
        object.__setattr__(self, "ray_remote_args", _checked_ray_args(self.ray_remote_args))
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


def _checked_ray_args(args: Mapping[str, Any]) -> dict[str, Any]:
    if taken := sorted(_OURS.intersection(args)):
        raise InvalidArgumentError("ray_remote_args", taken, "set by lance_ray; retries are RunOptions.retry")
    return dict(args)


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


@dataclass(slots=True, eq=False)
class Work:
    """A task on its way through attempts; what a session is given and hands back."""

    index: int
    task: Any
    attempts: int = 0
    lost: int = 0
    failing_since: float | None = None
    started: float | None = None
    result: Any = None
    error: BaseException | None = None


class Session(Protocol):
    """The running side of an executor during one run. Used by one thread."""

    def capacity(self, asked: int | None) -> int:
        """How many tasks to have submitted at once, given what the caller asked for."""

    def submit(self, work: Work) -> None:
        """Start an attempt, or queue it; never blocks. Sets ``work.started`` when it begins to run."""

    def wait(self, seconds: float) -> list[Work]:
        """The attempts that ended, with ``result`` or ``error`` set.

        Returns as soon as there is news (an attempt ended or started), and empty-handed after ``seconds``.
        """

    def cancel(self, work: Work) -> None:
        """Stop an attempt now and forget it: ``wait`` does not return it any more."""

    def close(self, seconds: float) -> None:
        """Stop all attempts, give them ``seconds`` to end, then end them."""

    def describe(self) -> str:
        """What a task needs to start and what there is, for messages."""


class Executor(Protocol):
    """Where tasks run."""

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session that runs ``fn(shared, task)``."""


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

    An attempt is repeated after a transient error (:func:`lance_ray.retry.is_transient`) or when its worker was lost:
    ``fn`` may run more than once for a task.

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
    operation = operation or _name_of(fn)
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
        lost = isinstance(error, _WORKER_LOST)
        work.lost += lost
        if work.failing_since is None:
            work.failing_since = now
        if isinstance(error, _OverdueError) or work.lost >= self._options.max_worker_losses:
            return None
        if not lost and not is_transient(error):
            return None
        return self._options.retry.next_delay(work.attempts, now - work.failing_since)

    def _name(self, work: Work) -> str:
        # Only the number: the task itself may be long, or hold a secret.
        return f"{self._operation}[{work.index}]"


class _OverdueError(TimeoutError):
    """An attempt ran longer than ``task_timeout``; unlike a connection that timed out this is final."""


def _name_of(fn: Worker[Any, Any]) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


def _count(result: object, name: str) -> int:
    value = getattr(result, name, 0)
    return value if isinstance(value, int) else 0


def _call(fn: Worker[T, R], shared: object, task: T) -> R:
    try:
        return fn(shared, task)
    except (Exception, KeyboardInterrupt):  # the window decides by type; the interrupt is how Ray cancels
        raise
    except BaseException as error:  # noqa: BLE001  # panics and sys.exit() would end the worker, or do not pickle
        raise RuntimeError(redact(f"{type(error).__name__}: {error}")) from None


class LocalExecutor:
    """Runs tasks in threads of this process.

    A thread cannot be stopped from outside: a cancelled task that still runs is abandoned after ``cancel_seconds`` and
    its result dropped.

    Args:
        threads: tasks at once.
        make_state: as for :class:`ActorExecutor`; called once for each thread and run.
    """

    def __init__(self, threads: int = 4, make_state: Callable[[Any], object] | None = None) -> None:
        if threads < 1:
            raise InvalidArgumentError("threads", threads, "must be at least 1")
        self.threads = threads
        self.make_state = make_state

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session of up to ``threads`` threads."""
        return _LocalSession(self, fn, shared)


class _LocalSession:
    def __init__(self, executor: LocalExecutor, fn: Worker[Any, Any], shared: object) -> None:
        self._executor, self._fn, self._shared = executor, fn, shared
        self._states: list[object] = []  # those no thread is using
        self._running: set[Work] = set()
        self._ended: queue.SimpleQueue[tuple[Work, Any, BaseException | None]] = queue.SimpleQueue()

    def capacity(self, asked: int | None) -> int:
        return min(asked or self._executor.threads, self._executor.threads)

    def submit(self, work: Work) -> None:
        work.started = monotonic()
        self._running.add(work)
        threading.Thread(target=self._run, args=(work,), name=f"lance-ray-{work.index}", daemon=True).start()

    def _run(self, work: Work) -> None:
        try:
            state = self._take_state()
            result = _call(self._fn, state, work.task)
            self._states.append(state)
            self._ended.put((work, result, None))
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the task's: the window decides
            self._ended.put((work, None, error))

    def _take_state(self) -> object:
        make_state = self._executor.make_state
        if make_state is None:
            return self._shared
        try:
            return self._states.pop()
        except IndexError:
            return make_state(self._shared)

    def wait(self, seconds: float) -> list[Work]:
        ended = []
        try:
            ended.append(self._ended.get(timeout=seconds))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        return [self._finish(*end) for end in ended if end[0] in self._running]

    def _finish(self, work: Work, result: Any, error: BaseException | None) -> Work:
        self._running.remove(work)
        work.result, work.error = result, error
        return work

    def cancel(self, work: Work) -> None:
        self._running.discard(work)

    def close(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while self._running and (left := deadline - monotonic()) > 0:
            self.wait(left)

    def describe(self) -> str:
        return f"{self._executor.threads} local thread(s)"


class RayExecutor:
    """Runs each attempt as a Ray task.

    ``max_retries`` is 0: what Ray would repeat silently, the window repeats visibly.

    Args:
        ray_remote_args: what Ray is told about each task.
        name: the tasks' name in Ray's dashboard; by default the name of the worker function.
    """

    def __init__(self, ray_remote_args: Mapping[str, Any] | None = None, name: str | None = None) -> None:
        self.ray_remote_args = _checked_ray_args(ray_remote_args or {})
        self.name = name

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session; starts Ray, as its own libraries do, when it is not running."""
        return _RaySession(self, fn, shared)


def _stream_attempt(bundle: tuple[Worker[Any, Any], object], task: Any) -> Iterator[Any]:
    # The first item tells the driver that the task got its resources: only from then on is it running late.
    yield None
    yield _call(bundle[0], bundle[1], task)


class _RaySession:
    def __init__(self, executor: RayExecutor, fn: Worker[Any, Any], shared: object) -> None:
        _connect()
        name = executor.name or _name_of(fn)
        options = {**executor.ray_remote_args, "num_returns": "streaming", "max_retries": 0, "name": name}
        self._remote: Any = ray.remote(_stream_attempt).options(**options)
        self._bundle = ray.put((fn, shared))
        self._needs = _needs(executor.ray_remote_args)
        self._running: dict[Any, Work] = {}
        self._slots = (0.0, 0)

    def capacity(self, asked: int | None) -> int:
        if asked is not None:
            return asked
        counted_at, slots = self._slots
        if monotonic() - counted_at > 5:  # a cluster may grow during a run
            slots = _slots(self._needs)
            self._slots = (monotonic(), slots)
        return 2 * slots

    def submit(self, work: Work) -> None:
        self._running[self._remote.remote(self._bundle, work.task)] = work

    def wait(self, seconds: float) -> list[Work]:
        ended = []
        for stream in _ready(list(self._running), seconds):
            work = self._running[stream]
            result, error = _fetch(next(stream))
            if error is None and work.started is None:
                work.started = monotonic()
                continue
            work.result, work.error = result, error
            del self._running[stream]
            ended.append(work)
        return ended

    def cancel(self, work: Work) -> None:
        for stream in [stream for stream, other in self._running.items() if other is work]:
            ray.cancel(stream, force=True)
            del self._running[stream]

    def close(self, seconds: float) -> None:
        for stream in self._running:
            ray.cancel(stream)  # raises KeyboardInterrupt in the worker, so that it can tidy up
        deadline = monotonic() + seconds
        while self._running and (left := deadline - monotonic()) > 0:
            self.wait(left)
        for work in list(self._running.values()):
            self.cancel(work)

    def describe(self) -> str:
        return _describe(self._needs)


class ActorExecutor:
    """Runs tasks on a fixed number of Ray actors, which keep state between tasks (models, open indexes).

    Tasks go to actors that are free; an actor that died is replaced. Actors start with the first run that needs them
    and are kept for the next one, until ``close()`` or the end of the ``with`` block.

    Args:
        size: actors at most.
        make_state: called as ``make_state(shared)`` once in each actor; the worker function then receives what it
            returned in the place of ``shared``. Later runs with the very same ``shared`` object find the state.
        ray_remote_args: what Ray is told about each actor; ``num_cpus`` is 1 unless given.
    """

    def __init__(
        self,
        size: int,
        make_state: Callable[[Any], object] | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        if size < 1:
            raise InvalidArgumentError("size", size, "must be at least 1")
        self.size = size
        self.make_state = make_state
        self.ray_remote_args = {"num_cpus": 1, **_checked_ray_args(ray_remote_args or {})}
        self._idle: list[Any] = []
        self._shipped: tuple[object, Any] | None = None

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session with the actors that no other session of this executor is using."""
        _connect()
        if self._shipped is None or self._shipped[0] is not shared:
            self._shipped = (shared, ray.put((self.make_state, shared)))
        idle, self._idle = self._idle, []
        return _ActorSession(self, fn, self._shipped[1], idle)

    def keep(self, actors: Sequence[Any]) -> None:
        """Take back actors after a run; those beyond ``size`` end with their last reference."""
        self._idle = [*self._idle, *actors][: self.size]

    def close(self) -> None:
        """End the actors that no run is using."""
        while self._idle:
            ray.kill(self._idle.pop())
        self._shipped = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


class _Actor:
    """A worker process that keeps the state of the run it worked for last."""

    def __init__(self) -> None:
        self._made_from: Any = None
        self._state: object = None

    def run(self, fn: Worker[Any, Any], shipped: Sequence[Any], task: Any) -> Any:
        # The reference comes inside a list, or Ray would fetch what it refers to for every task.
        if self._made_from != shipped[0]:
            make_state, shared = ray.get(shipped[0])
            self._state = shared if make_state is None else make_state(shared)
            self._made_from = shipped[0]
        return _call(fn, self._state, task)


class _ActorSession:
    def __init__(self, executor: ActorExecutor, fn: Worker[Any, Any], shipped: Any, idle: list[Any]) -> None:
        options = {**executor.ray_remote_args, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
        self._remote: Any = ray.remote(_Actor).options(**options)
        self._executor, self._fn, self._shipped = executor, fn, shipped
        self._idle = idle
        self._starting: dict[Any, Any] = {}  # the reference that is ready when the actor is, and the actor
        self._queue: deque[Work] = deque()
        self._running: dict[Any, tuple[Work, Any]] = {}

    def capacity(self, asked: int | None) -> int:
        return min(asked or self._executor.size, self._executor.size)

    def submit(self, work: Work) -> None:
        self._queue.append(work)
        self._dispatch()

    def _dispatch(self) -> None:
        # Never to an actor that is not up: if the cluster has room for some only, these do all the work.
        while self._queue and self._idle:
            work, actor = self._queue.popleft(), self._idle.pop()
            work.started = monotonic()
            self._running[actor.run.remote(self._fn, [self._shipped], work.task)] = (work, actor)
        free = self._executor.size - len(self._running) - len(self._starting)
        for _ in range(min(free, len(self._queue) - len(self._starting))):
            actor = self._remote.remote()
            self._starting[actor.__ray_ready__.remote()] = actor

    def wait(self, seconds: float) -> list[Work]:
        ended = [self._collect(ref) for ref in _ready([*self._running, *self._starting], seconds)]
        self._dispatch()
        return [work for work in ended if work is not None]

    def _collect(self, ref: Any) -> Work | None:
        result, error = _fetch(ref)
        if (actor := self._starting.pop(ref, None)) is not None:
            if error is None:
                self._idle.append(actor)
            if error is None or not self._queue:
                return None
            work = self._queue.popleft()  # or actors that never come up would be started for it for ever
        else:
            work, actor = self._running.pop(ref)
            if not isinstance(error, _WORKER_LOST):
                self._idle.append(actor)
        work.result, work.error = result, error
        return work

    def cancel(self, work: Work) -> None:
        if work in self._queue:
            self._queue.remove(work)
        for ref, (other, actor) in list(self._running.items()):
            if other is work:
                ray.kill(actor)  # the only way to interrupt one; the next task gets a new one
                del self._running[ref]

    def close(self, seconds: float) -> None:
        self._queue.clear()
        deadline = monotonic() + seconds
        while self._running and (left := deadline - monotonic()) > 0:
            self.wait(left)
        for work, _ in list(self._running.values()):
            self.cancel(work)
        self._executor.keep(self._idle)

    def describe(self) -> str:
        return f"{len(self._starting)} actor(s) not yet up; {_describe(_needs(self._executor.ray_remote_args))}"


def _connect() -> None:
    if not ray.is_initialized():
        ray.init()


def _ready(waitables: list[Any], seconds: float) -> list[Any]:
    """All that is ready, waiting up to ``seconds`` for the first."""
    if not waitables:
        return []
    ready, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0)
    return ready or ray.wait(waitables, num_returns=1, timeout=seconds)[0]


def _fetch(ref: Any) -> tuple[Any, BaseException | None]:
    try:
        return ray.get(ref), None
    except Exception as error:  # noqa: BLE001  # whatever the worker raised arrives here: the window decides by type
        return None, _unwrap(error)


def _unwrap(error: BaseException) -> BaseException:
    """What the worker raised, with its own type and data; Ray's wrapper, which shows where, becomes its cause."""
    while isinstance(error, ray_errors.RayTaskError) and isinstance(error.cause, BaseException):
        error.cause.__cause__, error = error, error.cause
    return error


def _needs(args: Mapping[str, Any]) -> dict[str, float]:
    """The resources one task or actor holds, by Ray's names."""
    named = {"CPU": args.get("num_cpus"), "GPU": args.get("num_gpus"), "memory": args.get("memory")}
    needs = {**named, "CPU": 1 if named["CPU"] is None else named["CPU"], **(args.get("resources") or {})}
    return {name: amount for name, amount in needs.items() if amount}


def _slots(needs: Mapping[str, float]) -> int:
    have = ray.cluster_resources()
    fitting = [have.get(name, 0.0) / amount for name, amount in needs.items()]
    return max(1, int(min(fitting, default=have.get("CPU", 1.0))))


def _describe(needs: Mapping[str, float]) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    now_free = ray.available_resources()
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in needs}
    free = {name: now_free.get(name, 0.0) for name in needs}
    return f"each needs {dict(needs)}, one node has at most {largest}, free in the cluster now {free}"
