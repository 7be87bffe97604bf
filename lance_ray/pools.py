"""Warm workers: processes that stay between calls, with the tables, sessions and indexes that they have opened.

A caller may hold them (``with WarmWorkers(4) as workers: vector_search(..., pool=workers)``), or set them for the whole
process (:func:`init_global_pool`), where every search that names no pool of its own finds them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import ray

from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import ActorExecutor, Executor, PoolExecutor, checked_ray_args, connect_ray
from lance_ray.options import check_flag, check_positive

logger = logging.getLogger(__name__)

_lock = threading.RLock()
_global_pool: Any = None


class WarmWorkers:
    """Worker processes of one's own, for any number of searches. They start with the first one that needs them.

    Args:
        processes: workers at most; by default one for each CPU of the cluster at the time of the first use.
        ray_remote_args: options of ``ray.remote`` for each worker; ``num_cpus`` is 1 unless given.

    Raises:
        InvalidArgumentError: ``processes`` is not positive, or an option is decided by this package.
    """

    def __init__(self, processes: int | None = None, ray_remote_args: Mapping[str, Any] | None = None) -> None:
        check_positive("processes", processes)
        self._processes = processes
        self._args = checked_ray_args(ray_remote_args)
        self._executor: ActorExecutor | None = None
        self._closed = False

    @property
    def processes(self) -> int | None:
        """Workers at most, or None as long as that is not known."""
        return self._processes

    def executor(self) -> ActorExecutor:
        """Where the tasks of a call run.

        Raises:
            InvalidArgumentError: the workers were closed.
        """
        if self._closed:
            raise InvalidArgumentError("pool", self, "was closed")
        if self._executor is None:
            connect_ray()
            self._processes = self._processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
            self._executor = ActorExecutor(self._processes, None, self._args)
        return self._executor

    def close(self) -> None:
        """End the workers that no call is using; no further call can. Does nothing the second time."""
        self._closed = True
        if self._executor is not None and ray.is_initialized():
            self._executor.close()
        self._executor = None

    def join(self) -> None:
        """Nothing to wait for: each call has ended its own tasks. Here because ``multiprocessing`` pools have it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"WarmWorkers(processes={self._processes}{', closed' if self._closed else ''})"


def init_global_pool(processes: int, ray_remote_args: Mapping[str, Any] | None = None) -> Any:
    """Set warm workers for the whole process, if there are none; return those there are.

    Args:
        processes: workers at most.
        ray_remote_args: options of ``ray.remote`` for each worker.

    Returns:
        The pool of this process: new :class:`WarmWorkers`, or what was set before.

    Raises:
        InvalidArgumentError: ``processes`` is not positive.
    """
    global _global_pool
    check_positive("processes", processes, optional=False)
    with _lock:
        if _global_pool is None:
            _global_pool = WarmWorkers(processes, ray_remote_args)
        elif getattr(_global_pool, "processes", processes) not in (processes, None):
            logger.warning("there is a global pool already, of %s; %d workers are not started", _global_pool, processes)
        return _global_pool


def set_global_pool(pool: Any | None) -> None:
    """Use a pool for the whole process: :class:`WarmWorkers`, or a ``ray.util.multiprocessing.Pool``.

    Args:
        pool: the caller goes on owning it; processes that die are replaced. ``None`` forgets the present one without
            closing it.

    Raises:
        InvalidArgumentError: it is neither, or a pool whose ``max_task_retries`` are without limit.
    """
    global _global_pool
    if pool is not None:
        executor_of(pool, check=True)
    with _lock:
        _global_pool = pool


def get_global_pool() -> Any | None:
    """The pool of this process, or None."""
    with _lock:
        return _global_pool


def clear_global_pool(*, close: bool = False, join: bool = True) -> None:
    """Forget the pool of this process.

    Args:
        close: also close it.
        join: wait until its workers have ended, when it is closed.
    """
    global _global_pool
    check_flag("close", close)
    check_flag("join", join)
    with _lock:
        pool, _global_pool = _global_pool, None
    if close and pool is not None:
        pool.close()
        if join:
            pool.join()


def executor_of(pool: Any, *, check: bool = False) -> Executor:
    """Where tasks run that are for a pool.

    Args:
        pool: see :func:`set_global_pool`.
        check: only look whether it is one.

    Raises:
        InvalidArgumentError: it is none.
    """
    if isinstance(pool, WarmWorkers):
        return ActorExecutor(1) if check else pool.executor()
    if callable(getattr(pool, "apply_async", None)):
        return PoolExecutor(pool)
    raise InvalidArgumentError("pool", type(pool).__name__, "must be WarmWorkers or a ray.util.multiprocessing.Pool")
