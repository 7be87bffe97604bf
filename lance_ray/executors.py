"""Where tasks run: threads of this process, Ray tasks, or Ray actors that keep their state.

With :mod:`lance_ray.runner`, which decides what runs, the only place that starts distributed work of its own. All
executors behave alike: an attempt starts when there is room, ends with a result or with the worker's own error, and can
be stopped; retries are the window's business alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import ray
from ray import cloudpickle
from ray import exceptions as ray_errors
from ray.data import Dataset
from ray.util.annotations import RayDeprecationWarning

from lance_ray.errors import InvalidArgumentError, WorkerEnvironmentError, redact
from lance_ray.memory import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")
Worker = Callable[[Any, T], R]

_LOG = logging.getLogger(__name__)
WORKER_LOST = (
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


def check_ray_options(args: Any, parameter: str = "ray_remote_args") -> None:
    """Refuse what Ray would refuse as options of a task, but now and not when the first one starts.

    Raises:
        InvalidArgumentError: an unknown option, or a bad value of one.
    """
    if args is None:
        return
    if not isinstance(args, Mapping):
        raise InvalidArgumentError(parameter, type(args).__name__, "must be a dict of options of ray.remote")
    if not args:
        return
    try:
        ray.remote(**args)(check_ray_options)  # which checks them, and needs no cluster for it
    except (TypeError, ValueError, OverflowError) as error:
        shown = sorted(map(str, args)) if parameter == "ray_remote_args" else args[parameter]
        raise InvalidArgumentError(parameter, shown, str(error)) from None


@contextmanager
def unnamed_options() -> Iterator[None]:
    """For a step of Ray Data with the caller's ``ray_remote_args``: without Ray's advice to name them.

    Those that have names are given by name; the others, such as ``scheduling_strategy``, have none in Ray Data yet, so
    that the advice can be followed by nobody.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


def check_dataset(ds: Any) -> None:
    """Refuse what is no Ray Dataset."""
    if not isinstance(ds, Dataset):
        raise InvalidArgumentError("ds", type(ds).__name__, "must be a ray.data.Dataset")


def check_sendable(parameter: str, query: Any) -> None:
    """Refuse a query that cannot be sent to other processes, now and not when the first task starts.

    Raises:
        InvalidArgumentError: it holds a query object of ``lance.query``, which cannot be asked what it is made of.
    """
    try:
        cloudpickle.dumps(query)
    except Exception as error:  # whatever pickling raises, it would raise for the task, too
        ways = "give text, a dict, or what makes the query: functools.partial(MatchQuery, ...) or a function"
        raise InvalidArgumentError(parameter, type(query).__name__, f"cannot be sent to workers; {ways}") from error


def checked_ray_args(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``ray_remote_args``.

    Raises:
        InvalidArgumentError: an option is decided by this package, or is one that Ray refuses.
    """
    if args is None:
        return {}
    if not isinstance(args, Mapping):
        raise InvalidArgumentError("ray_remote_args", type(args).__name__, "must be a dict of options of ray.remote")
    if taken := sorted(_OURS.intersection(args)):
        raise InvalidArgumentError("ray_remote_args", taken, "set by lance_ray; retries are RunOptions.retry")
    check_ray_options(args)
    return dict(args)


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


def name_of(fn: Worker[Any, Any]) -> str:
    """What a run of a function is called when nobody named it."""
    return str(getattr(fn, "__name__", type(fn).__name__))


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
        self.ray_remote_args = checked_ray_args(ray_remote_args)
        self.name = name

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session; starts Ray, as its own libraries do, when it is not running."""
        return _RaySession(self, fn, shared)


def _stream_attempt(bundle: tuple[Worker[Any, Any], object], task: Any) -> Iterator[Any]:
    # The first item tells the driver that the task got its resources: only from then on is it running late.
    yield None
    keep_freed_memory()
    yield _call(bundle[0], bundle[1], task)


class _RaySession:
    def __init__(self, executor: RayExecutor, fn: Worker[Any, Any], shared: object) -> None:
        connect_ray()
        name = executor.name or name_of(fn)
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
            result, error = _fetch_next(stream)
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
        self.ray_remote_args = {"num_cpus": 1, **checked_ray_args(ray_remote_args)}
        self._idle: list[Any] = []
        self._shipped: tuple[object, Any] | None = None

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session with the actors that no other session of this executor is using."""
        connect_ray()
        if self._shipped is None or self._shipped[0] is not shared:
            self._shipped = (shared, ray.put((self.make_state, shared)))
        idle, self._idle = self._idle, []
        return _ActorSession(self, fn, self._shipped[1], idle)

    def fill(self, seconds: float) -> None:
        """Start the actors that are missing, as far as the cluster has room for them within so many seconds."""
        connect_ray()
        make: Any = ray.remote(_Actor).options(**self.actor_options)
        started = [make.remote() for _ in range(self.size - len(self._idle))]
        ready = {actor.__ray_ready__.remote(): actor for actor in started}
        deadline = monotonic() + seconds
        while ready and (done := _ready(list(ready), max(0.0, deadline - monotonic()))):
            for ref in done:
                actor = ready.pop(ref)
                if _fetch(ref)[1] is None:
                    self._idle.append(actor)

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray is told about each actor."""
        return {**self.ray_remote_args, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}

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
        self._remote: Any = ray.remote(_Actor).options(**executor.actor_options)
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
            if not isinstance(error, WORKER_LOST):
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


class PoolExecutor:
    """Runs tasks in a ``ray.util.multiprocessing.Pool`` of the caller, which stays open.

    A process that dies costs the task that it ran an attempt, and is replaced, which the pool itself does not do. A
    task in a pool cannot be stopped: one that is cancelled and still runs is abandoned, and its result dropped. Nor
    does a pool say whether a task has begun; one that gives no result at all for ``silent_seconds`` (it waits for room
    in the cluster, say) ends what it was given with a WorkerEnvironmentError.

    Args:
        pool: anything with ``apply_async`` whose results have ``ready`` and ``get``.
        silent_seconds: how long to wait for the next result of any task.

    Raises:
        InvalidArgumentError: the pool lets Ray repeat for ever what kills its process.
    """

    def __init__(self, pool: Any, silent_seconds: float = 3600.0) -> None:
        given = getattr(pool, "_ray_remote_args", None)
        if isinstance(given, Mapping) and given.get("max_task_retries", 0) < 0:
            raise InvalidArgumentError("pool", "max_task_retries=-1", "a task that ends its process would never end")
        self.pool = pool
        self.silent_seconds = silent_seconds

    def open(self, fn: Worker[Any, Any], shared: object) -> Session:
        """A session over the pool."""
        return _PoolSession(self, fn, shared)


def _run_in_pool(shipped: Sequence[Any], task: Any) -> Any:
    fn, shared = ray.get(shipped[0])
    keep_freed_memory()
    return _call(fn, shared, task)


def _replace_dead(pool: Any) -> None:
    """Give a pool of Ray's own new processes for those that died, to which it would go on giving tasks."""
    actors, start = getattr(pool, "_actor_pool", None), getattr(pool, "_new_actor_entry", None)
    if not isinstance(actors, list) or start is None:
        return
    pings = [actor.ping.remote() for actor, _ in actors]
    answered, _ = ray.wait(pings, num_returns=len(pings), timeout=1.0)  # those that are busy do not answer
    for place, ping in enumerate(pings):
        if ping in answered and isinstance(_fetch(ping)[1], ray_errors.ActorDiedError):
            actors[place] = start()


class _PoolSession:
    _POLL_SECONDS = 0.002

    def __init__(self, executor: PoolExecutor, fn: Worker[Any, Any], shared: object) -> None:
        connect_ray()
        self._pool, self._silent_seconds = executor.pool, executor.silent_seconds
        self._shipped = [ray.put((fn, shared))]
        self._running: dict[Work, Any] = {}
        self._heard = monotonic()

    def capacity(self, asked: int | None) -> int:
        size = next((count for name in _POOL_SIZES if isinstance(count := getattr(self._pool, name, None), int)), None)
        return asked or size or _slots({"CPU": 1.0})

    def submit(self, work: Work) -> None:
        work.started = monotonic()
        if not self._running:
            self._heard = work.started
        self._running[work] = self._pool.apply_async(_run_in_pool, (self._shipped, work.task))

    def wait(self, seconds: float) -> list[Work]:
        deadline = monotonic() + seconds
        while not (ready := [work for work, result in self._running.items() if result.ready()]):
            if self._running and monotonic() - self._heard >= self._silent_seconds:
                return self._give_up()
            if not self._running or monotonic() >= deadline:
                return []
            sleep(self._POLL_SECONDS)
        self._heard = monotonic()
        ended = [self._finish(work) for work in ready]
        if any(isinstance(work.error, ray_errors.ActorDiedError) for work in ended):
            _replace_dead(self._pool)
        return ended

    def _give_up(self) -> list[Work]:
        ended = list(self._running)
        self._running.clear()
        for work in ended:
            work.error = WorkerEnvironmentError(
                [f"the pool has given no result for {self._silent_seconds:g} s; WarmWorkers have no such limit"]
            )
        return ended

    def _finish(self, work: Work) -> Work:
        result = self._running.pop(work)
        try:
            work.result = result.get()
        except Exception as error:  # noqa: BLE001  # whatever the worker raised: the window decides by type
            work.error = _unwrap(error)
        return work

    def cancel(self, work: Work) -> None:
        self._running.pop(work, None)

    def close(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while self._running and (left := deadline - monotonic()) > 0:
            self.wait(left)

    def describe(self) -> str:
        return f"{len(self._running)} task(s) in the caller's pool"


_POOL_SIZES = ("_processes", "processes", "_num_processes")


def connect_ray() -> None:
    """Start Ray, as its own libraries do, when it is not running."""
    if not ray.is_initialized():
        ray.init()


def _ready(waitables: list[Any], seconds: float) -> list[Any]:
    """All that is ready, waiting up to ``seconds`` for the first."""
    if not waitables:
        return []
    ready, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0)
    return ready or ray.wait(waitables, num_returns=1, timeout=seconds)[0]


def _fetch_next(stream: Any) -> tuple[Any, BaseException | None]:
    """The next item of an attempt. One that was cancelled just before its result may end without any."""
    try:
        ref = next(stream)
    except StopIteration:
        return None, ray.exceptions.TaskCancelledError()
    return _fetch(ref)


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
