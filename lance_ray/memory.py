"""What worker processes do with memory that they have freed."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

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
