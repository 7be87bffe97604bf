"""Datasets that lie in the object store as very many small blocks, written without handing each block to Ray Data.

As an argument of a task of its own, a block costs Ray some 0.5 ms, more than writing its rows. Here a task gets
references to the blocks of its share and fetches them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.data import Dataset
from ray.data.dataset import MaterializedDataset
from ray.data.datasource import WriteResult

from lance_ray.datasink import TableSink
from lance_ray.errors import LanceRayError, TaskFailedError
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.write import WrittenFile

FEWEST_BLOCKS = 100
SMALL_BYTES = 256 * 1024
"""On average. Larger blocks are worth Ray's choice of the node that has them."""

FETCH_SECONDS = 600.0


def shares_of(ds: Dataset, share_bytes: int) -> list[tuple[Any, ...]]:
    """References to the Arrow blocks of a dataset, in order, ``share_bytes`` together; none where that is no gain."""
    if not isinstance(ds, MaterializedDataset) or (count := ds.num_blocks()) < FEWEST_BLOCKS:
        return []
    size = ds.size_bytes()
    if size > count * SMALL_BYTES:
        return []
    refs, each = ds.to_arrow_refs(), max(1, count * share_bytes // max(1, size))
    return [tuple(refs[start : start + each]) for start in range(0, len(refs), each)]


def write_shares(sink: TableSink, shares: Sequence[tuple[Any, ...]], options: RunOptions) -> None:
    """Have the sink write each share in a task, and commit what they wrote.

    Raises:
        LanceRayError: the worker's own error, or TaskFailedError where it has no type of this package.
    """
    written: list[list[WrittenFile]] = [[] for _ in shares]
    try:
        with run_tasks(write_share, shares, shared=sink, options=options, operation="write_lance") as run:
            for outcome in run:
                written[outcome.index] = outcome.unwrap()
    except TaskFailedError as failure:
        if isinstance(failure.__cause__, LanceRayError):
            raise failure.__cause__ from None
        raise
    sink.on_write_complete(WriteResult(0, 0, written))  # only Ray's own message counts rows by it


def write_share(sink: TableSink, refs: Sequence[Any]) -> list[WrittenFile]:
    """Runs on a worker: the blocks behind the references, to files."""
    return sink.write(ray.get(list(refs), timeout=FETCH_SECONDS), None)
