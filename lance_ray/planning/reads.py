"""How a table scan is cut into tasks: by bytes of the projected columns, in table order, inside fragments where needed.

A table is a sequence of fragments; a :class:`Piece` is a run of whole fragments with consecutive ids, or a row range of
one. A task is a tuple of pieces, so what is shipped to a worker does not grow with the number of fragments.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lance_ray.errors import InvalidArgumentError

TASK_BYTES = 120 * 1024**2
"""Projected bytes that one task of a full scan should read: one block of Ray's default size of 128 MiB at most."""

MOST_TASKS = 20_000
"""Above so many the tasks grow instead: each costs the driver some milliseconds and kilobytes."""

FILTERED_TASK_BYTES = 512 * 1024**2
"""The same for a scan with a filter, whose tasks mostly return little."""

MIN_TASK_BYTES = 8 * 1024**2
"""Below this a task costs more to start than it saves."""

TASK_FRAGMENTS = 2_500
"""Fragments that one task should open at most: of small ones that takes longer than reading them."""

FIRST_TASK_BYTES = 256 * 1024
"""The first task of a large scan, so that ``ds.limit(n)`` and ``take`` answer quickly."""

_SNAP = 0.25
_ROW_ALIGNMENT = 1024
_SHUFFLED_RANGES = 8  # of each task


class Piece(NamedTuple):
    """Rows of a table: whole fragments ``first`` to ``last`` (``stop`` None), or rows [start, stop) of ``first``.

    Rows are counted as a scan returns them, without deleted ones.
    """

    first: int
    last: int
    start: int = 0
    stop: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the piece is one or more fragments, not a range of one."""
        return self.stop is None


@dataclass(frozen=True, slots=True)
class FragmentStats:
    """What the manifest says of the fragments, in table order: parallel sequences."""

    ids: Sequence[int]
    rows: Sequence[int]
    weights: Sequence[float]
    """Estimated bytes of the projected columns in memory."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, positions: Sequence[int]) -> FragmentStats:
        """The fragments at these positions."""
        return FragmentStats(
            [self.ids[i] for i in positions], [self.rows[i] for i in positions], [self.weights[i] for i in positions]
        )


class _Part(NamedTuple):
    """Rows [start, stop) of the fragment at a position of the stats."""

    position: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ReadTaskPlan:
    """One task: which rows, how many at most (exact without a filter), about how many bytes."""

    pieces: tuple[Piece, ...]
    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How to cut: the number of tasks, or None to decide from bytes and CPUs; and the special shapes."""

    cpus: int = 1
    filtered: bool = False
    group_size: int | None = None
    num_tasks: int | None = None
    shuffle_seed: int | None = None
    splittable: bool = True
    most_bytes: int | None = None
    """Of a task's rows, where the object store has no room for more."""


def number_of_tasks(total_bytes: float, cut: Cut, fragments: int = 1) -> int:
    """Tasks for a scan of this size: enough to use every CPU, none too small to pay, none too large to balance."""
    if cut.num_tasks is not None:
        return cut.num_tasks
    task_bytes = FILTERED_TASK_BYTES if cut.filtered else min(TASK_BYTES, cut.most_bytes or TASK_BYTES)
    sized = min(math.ceil(total_bytes / task_bytes), MOST_TASKS)
    wanted = max(cut.cpus if cut.filtered else 2 * cut.cpus, sized)
    return max(1, min(wanted, math.ceil(total_bytes / MIN_TASK_BYTES)), math.ceil(fragments / TASK_FRAGMENTS))


def window(stats: FragmentStats, offset: int, limit: int | None) -> list[tuple[int, int, int]]:
    """Rows [offset, offset + limit) of the table as (position, start, stop) of the stats; empty fragments left out."""
    parts: list[tuple[int, int, int]] = []
    skip, left = offset, math.inf if limit is None else limit
    for position, rows in enumerate(stats.rows):
        start = min(skip, rows)
        stop = int(min(rows, start + left))
        skip -= start
        if stop > start:
            parts.append((position, start, stop))
            left -= stop - start
        if left <= 0:
            break
    return parts


def plan_reads(stats: FragmentStats, cut: Cut, *, offset: int = 0, limit: int | None = None) -> list[ReadTaskPlan]:
    """The tasks of a scan, in table order (or permuted by the seed), every selected row in exactly one of them.

    Args:
        stats: the fragments of the pinned version that are to be read.
        cut: how many tasks, of which shape.
        offset: rows to skip, over the whole table.
        limit: rows to read after those, over the whole table.
    """
    parts = [_Part(*part) for part in window(stats, offset, limit)]
    if not parts:
        return []
    if cut.group_size is not None:
        if cut.shuffle_seed is not None:
            random.Random(cut.shuffle_seed).shuffle(parts)
        groups: Iterable[Sequence[_Part]] = _batched(parts, cut.group_size)
    elif cut.shuffle_seed is not None:
        groups = _shuffled(stats, parts, cut)
    else:
        groups = _cut(stats, parts, _targets(stats, parts, cut), splittable=cut.splittable)
    return [_task(stats, group) for group in groups]


def _batched(parts: Sequence[_Part], size: int) -> Iterable[Sequence[_Part]]:
    return (parts[i : i + size] for i in range(0, len(parts), size))


def _weight(stats: FragmentStats, part: _Part) -> float:
    return max(1.0, stats.weights[part.position]) * (part.stop - part.start) / stats.rows[part.position]


def _targets(stats: FragmentStats, parts: Sequence[_Part], cut: Cut) -> list[float]:
    """Where to cut, as cumulative weights: equal shares, after one small task where the planner decides alone."""
    total = sum(_weight(stats, part) for part in parts)
    tasks = number_of_tasks(total, cut, len(parts))
    alone = cut.num_tasks is None and not cut.filtered and cut.splittable
    head = [float(FIRST_TASK_BYTES)] if alone and total / tasks > 64 * FIRST_TASK_BYTES else []
    rest = sum(head)
    return head + [rest + (total - rest) * k / tasks for k in range(1, tasks)]


def _cut(
    stats: FragmentStats, parts: Sequence[_Part], targets: Sequence[float], *, splittable: bool
) -> list[list[_Part]]:
    """Parts cut at the cumulative weights, at a fragment's edge where one is near enough."""
    edges = [0.0, *itertools.accumulate(_weight(stats, part) for part in parts)]
    cuts: list[tuple[int, int]] = []
    previous = 0.0
    for target in targets:
        index = min(bisect.bisect_right(edges, target) - 1, len(parts) - 1)
        low, high = target - edges[index], edges[index + 1] - target
        snap = _SNAP * (target - previous)
        cuts.append(_cut_point(parts[index], index, low, high, snap=snap, splittable=splittable))
        previous = target
    return _split_at(parts, sorted(set(cuts)))


def _cut_point(part: _Part, index: int, low: float, high: float, *, snap: float, splittable: bool) -> tuple[int, int]:
    """Where to cut at a distance from a part's ends: (index of the part, row of its fragment), or an edge in reach."""
    if not splittable or min(low, high) <= snap:
        return (index, part.start) if low <= high else (index + 1, -1)
    rows = part.stop - part.start
    exact = rows * low / (low + high)
    row = round(exact / _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    if not 0 < row < rows or abs(row - exact) * (low + high) > snap * rows:
        row = max(1, min(rows - 1, round(exact))) if rows > 1 else 0
    return (index, part.start + row)


def _split_at(parts: Sequence[_Part], cuts: Sequence[tuple[int, int]]) -> list[list[_Part]]:
    groups: list[list[_Part]] = [[]]
    pending = list(cuts)
    for index, part in enumerate(parts):
        start = part.start
        while pending and pending[0][0] == index:
            row = max(pending.pop(0)[1], part.start)
            if row > start:
                groups[-1].append(_Part(part.position, start, row))
            groups.append([])
            start = row
        if part.stop > start:
            groups[-1].append(_Part(part.position, start, part.stop))
    return [group for group in groups if group]


def _shuffled(stats: FragmentStats, parts: Sequence[_Part], cut: Cut) -> list[list[_Part]]:
    """Row ranges of about an eighth of a task in an order that depends on the seed alone."""
    total = sum(_weight(stats, part) for part in parts)
    tasks = number_of_tasks(total, cut, len(parts))
    count = tasks * _SHUFFLED_RANGES
    ranges = _cut(stats, parts, [total * k / count for k in range(1, count)], splittable=cut.splittable)
    random.Random(cut.shuffle_seed).shuffle(ranges)
    tasks = min(tasks, len(ranges))
    shares = (ranges[len(ranges) * k // tasks : len(ranges) * (k + 1) // tasks] for k in range(tasks))
    return [[part for group in share for part in group] for share in shares]


def _task(stats: FragmentStats, parts: Sequence[_Part]) -> ReadTaskPlan:
    pieces: list[Piece] = []
    for part in parts:
        fragment, rows = stats.ids[part.position], stats.rows[part.position]
        if (part.start, part.stop) != (0, rows):
            pieces.append(Piece(fragment, fragment, part.start, part.stop))
        elif pieces and pieces[-1].is_whole and pieces[-1].last == fragment - 1:
            pieces[-1] = Piece(pieces[-1].first, fragment)
        else:
            pieces.append(Piece(fragment, fragment))
    return ReadTaskPlan(
        tuple(pieces),
        sum(part.stop - part.start for part in parts),
        int(sum(_weight(stats, part) for part in parts)),
    )


def positions_of(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The positions of the wanted fragment ids, in table order. Raises InvalidArgumentError naming unknown ones."""
    known = set(wanted)
    unknown = sorted(known.difference(ids))
    if unknown:
        raise InvalidArgumentError(
            "fragment_ids", unknown[:20], f"are not fragments of this version, which has {len(ids)} of them"
        )
    return [position for position, item in enumerate(ids) if item in known]


def batch_rows(row_bytes: float, *, wide_bytes: int = 4 * 1024**2) -> int:
    """Rows of a scan batch: about 4 MiB, between 1,024 and 131,072 rows (measured; see benchmarks/README.md)."""
    rows = int(wide_bytes / max(row_bytes, 1.0))
    return max(1024, min(131_072, 1 << max(rows, 1).bit_length() - 1))
