"""Which rewrites of a compaction run, and when finished ones become a commit. Values in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

DEFAULT_TARGET_ROWS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class RewriteTask:
    """Fragments that become fewer fragments, in one task.

    Attributes:
        json: the engine's task, as a worker gets it.
        fragments: their ids.
        rows: live rows.
        bytes: size of the data files, where the manifest knows it.
        target_rows: rows that a fragment shall have afterwards.
    """

    json: str = field(repr=False)
    fragments: tuple[int, ...]
    rows: int
    bytes: int
    target_rows: int = DEFAULT_TARGET_ROWS

    @property
    def fragments_after(self) -> int:
        """How many fragments the rows will be in (the engine cuts evenly, at or above the target)."""
        return max(1, self.rows // self.target_rows) if self.rows else 0

    def stands(self, planned: Mapping[int, object], newest: Mapping[int, object]) -> bool:
        """Whether nobody has changed one of the fragments, by what the two manifests say of them: any change voids."""
        return all(newest.get(item) == planned[item] for item in self.fragments)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What a task hands back.

    Attributes:
        result: the engine's result as JSON: what to remove, what to add, how row addresses move.
        files: names of the data files that it wrote; nothing else refers to them, so they tell whether it landed.
        metrics: fragments removed and added, files removed and added.
        rows: rows written.
        bytes: size of the files.
    """

    result: str = field(repr=False)
    files: tuple[str, ...]
    metrics: tuple[int, int, int, int]
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A finished rewrite, not yet in the table."""

    task: RewriteTask
    done: Rewritten


@dataclass(frozen=True, slots=True)
class Budget:
    """What one run may take on. Fragments are taken in the order of the plan."""

    max_seconds: float | None = None
    max_bytes: int | None = None
    max_tasks: int | None = None

    def select(self, tasks: Sequence[RewriteTask]) -> tuple[RewriteTask, ...]:
        """As many of the first tasks as fit; one that is too large does not keep those after it from their turn."""
        chosen: list[RewriteTask] = []
        left = self.max_bytes
        for task in tasks:
            if len(chosen) == self.max_tasks:
                break
            if left is not None:
                if task.bytes > left:
                    continue
                left -= task.bytes
            chosen.append(task)
        return tuple(chosen)


class CommitCadence(Generic[T]):
    """Collects finished rewrites until they make a commit.

    Args:
        batch_size: rewrites in a commit; None, not positive, or as many as there are tasks: one commit at the end.
        tasks: how many tasks there are.
    """

    def __init__(self, batch_size: int | None, tasks: int) -> None:
        self._size = batch_size if batch_size is not None and 0 < batch_size < tasks else None
        self._held: list[T] = []

    def offer(self, item: T) -> tuple[T, ...]:
        """Add a finished rewrite; returns the batch to commit now, usually empty."""
        self._held.append(item)
        return self.drain() if len(self._held) == self._size else ()

    def drain(self) -> tuple[T, ...]:
        """What is left over."""
        held, self._held = self._held, []
        return tuple(held)
