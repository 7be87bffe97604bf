"""The functions of lance-ray's module of this name: code that imports them from there goes on working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lance_ray.pools import WarmWorkers, clear_global_pool, get_global_pool, init_global_pool, set_global_pool

__all__ = ["clear_global_pool", "get_global_pool", "get_or_create_pool", "init_global_pool", "set_global_pool"]


@contextmanager
def get_or_create_pool(*, processes: int, ray_remote_args: Mapping[str, Any] | None) -> Iterator[Any]:
    """The pool of this process, or warm workers that end with the block.

    Args:
        processes: workers at most, where they have to be made.
        ray_remote_args: options of ``ray.remote`` for each of them.

    Raises:
        InvalidArgumentError: ``processes`` is not positive.
    """
    pool = get_global_pool()
    if pool is not None:
        yield pool
        return
    with WarmWorkers(processes, ray_remote_args) as workers:
        yield workers
