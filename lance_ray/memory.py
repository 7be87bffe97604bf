"""What worker processes do with memory that they have freed, and how much of the object store a task may fill."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import ray

_STORE_PARTS = 4
"""Of the object store for each CPU: what a task reads, what it makes, and as much for those before and after it."""

_KEPT_BYTES = int(os.environ.get("LANCE_RAY_KEEP_FREED_BYTES", str(256 * 1024**2)))
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * 1024**2


@functools.cache
def keep_freed_memory() -> bool:
    """Makes this process keep freed memory for its next task; whether the C library can.

    A scan holds a whole block, copies it into Ray's object store and frees it. glibc then hands the pages back to the
    kernel, and the next block faults in every one again: of 50 ms for 100 MB, 35 ms went there. Up to 256 MiB for each
    of the allocator's arenas are kept; the environment variable ``LANCE_RAY_KEEP_FREED_BYTES`` sets another bound, 0
    leaves the allocator alone.

    Source: mallopt(3), ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD``.
    """
    if _KEPT_BYTES <= 0 or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is None:
        return False
    larger = min(_KEPT_BYTES, _LARGEST_MMAP_THRESHOLD)
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_MMAP_THRESHOLD, larger))


def object_store_share() -> int:
    """Bytes of the object store that the blocks of one task may take, on the node that has the least of it for a CPU.

    Ray holds the input of a task in the object store of its node until the task has read it. Where the inputs of the
    tasks that run at once do not fit in, Ray spills and restores them for ever and no task starts.
    """
    if not ray.is_initialized():
        return sys.maxsize
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    shares = [node["object_store_memory"] / max(1, node["CPU"]) for node in nodes if node.get("object_store_memory")]
    return int(min(shares, default=sys.maxsize)) // _STORE_PARTS
