"""A driver that is killed at a chosen step of an operation: ``python -m tests.faults.death OPERATION STEP URI``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import lance_ray
from lance_ray import commit
from lance_ray.ledger import JobRef
from tests.faults.model import SMALL, local_tasks
from tests.faults.stores import rows

MORE = pa.table({"id": list(range(1000, 1100))})
OPERATIONS: dict[str, Callable[..., Any]] = {
    "create": lambda **at: lance_ray.create_table(**at, data=MORE, mode="create"),
    "append": lambda **at: lance_ray.create_table(**at, data=MORE, mode="append"),
    "overwrite": lambda **at: lance_ray.create_table(**at, data=MORE, mode="overwrite"),
    "compact_files": lambda **at: lance_ray.compact_files(**at, compaction_options=SMALL, progress=False),
    "add_columns": lambda **at: lance_ray.add_columns(
        **at, transform=lambda batch: pa.table({"new": pc.multiply(batch["id"], 2)}), progress=False
    ),
    "update_columns": lambda **at: lance_ray.update_columns(
        **at, columns=["id"], transform={"id": "id"}, progress=False
    ),
    "create_scalar_index": lambda **at: lance_ray.create_scalar_index(
        **at, column="id", index_type="BTREE", progress=False
    ),
}
"""By the keywords of a table. Each changes no value of ``id`` that was there: the rows tell what became of it."""
STEPS = {
    "before its first note": (JobRef, "record", "before"),
    "after its first note": (JobRef, "record", "after"),
    "before the commit": (commit, "apply", "before"),
    "after the commit": (commit, "apply", "after"),
    "before the ledger ends": (JobRef, "close", "before"),
    "after the ledger ends": (JobRef, "close", "after"),
}


def die(*_: Any) -> None:
    """As kill -9 does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def trap(owner: Any, name: str, when: str) -> None:
    """Die at the first call."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            die()
        result = original(*args, **kwargs)
        die()
        return result

    setattr(owner, name, call)


def begin(uri: str) -> None:
    """The table before: ten fragments."""
    for first in range(0, 100, 10):
        lance_ray.create_table(uri, rows(first, 10), mode="append" if first else "create")


if __name__ == "__main__":
    operation, step, target = sys.argv[1:]
    for place in [STEPS[step], (commit, "commit_rewrites", STEPS[step][2])][: 1 + (STEPS[step][0] is commit)]:
        trap(*place)
    with local_tasks():
        OPERATIONS[operation](uri=target)
