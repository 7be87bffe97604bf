"""How a search is cut into shards, and how what they find becomes one answer. Values only.

A shard is either some segments of a vector index, or rows of the table that no segment covers, or both of neither: it
searches for all queries or for some of them. Every row is in one shard for each query, so the nearest of all shards
together are the nearest of the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lance_ray.planning.reads import Cut, FragmentStats, Piece, plan_reads

SHARD_BYTES = 32 * 1024**2
"""Vectors that a flat shard has at least: below this it costs more to start than it saves."""

MAX_SHARD_BYTES = 1024**3
"""And at most, so that a shard that is lost costs little."""

SHARD_QUERIES = 8
"""Queries that a shard of an index has at least where it does not have them all."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of an index: its id, and about how much work it is."""

    uuid: str
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Queries ``first`` to ``last`` (exclusive) over index segments, or over pieces of the table."""

    first: int
    last: int
    segments: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    bytes: int = 0
    """Of the vectors to be read; 0 for segments."""

    @property
    def queries(self) -> int:
        """How many queries."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Found:
    """Rows found, as parallel arrays: for which query, which row, at what distance."""

    query: np.ndarray
    row_id: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, query: object, row_id: object, distance: object) -> Found:
        """From anything that NumPy takes."""
        return cls(np.asarray(query, np.int32), np.asarray(row_id, np.uint64), np.asarray(distance, np.float32))

    @classmethod
    def nothing(cls) -> Found:
        """No rows."""
        return cls.of([], [], [])

    def __len__(self) -> int:
        return len(self.query)

    @property
    def rows(self) -> int:
        """How many rows, for the progress of a run."""
        return len(self.query)

    def after(self, queries: int) -> Found:
        """The same for queries that come after so many others."""
        return Found(self.query + np.int32(queries), self.row_id, self.distance)

    def select(self, chosen: np.ndarray) -> Found:
        """Those rows, by place or by mask."""
        return Found(self.query[chosen], self.row_id[chosen], self.distance[chosen])


@dataclass(frozen=True, slots=True)
class Sharing:
    """How work is shared out: shards at once, the least bytes of a flat one, whether a fragment may be cut."""

    workers: int
    shard_bytes: int = SHARD_BYTES
    splittable: bool = True


def plan_search(queries: int, segments: Sequence[Segment], flat: FragmentStats, sharing: Sharing) -> list[Shard]:
    """The shards of a search.

    Args:
        queries: how many there are.
        segments: of the index, which together know some of the rows; empty without one.
        flat: the fragments with the other rows, weighed by the bytes of their vectors.
        sharing: how many shards, of which size.
    """
    return [*_index_shards(queries, segments, sharing.workers), *_flat_shards(queries, flat, sharing)]


def _index_shards(queries: int, segments: Sequence[Segment], workers: int) -> list[Shard]:
    if not segments:
        return []
    everything = tuple(segment.uuid for segment in segments)
    parts = max(1, min(workers, queries // SHARD_QUERIES))
    if parts > 1 or len(segments) == 1:
        return [Shard(first, last, everything) for first, last in _shares(queries, parts)]
    groups: list[list[Segment]] = [[] for _ in range(min(workers, len(segments)))]
    for segment in sorted(segments, key=lambda item: item.size, reverse=True):
        min(groups, key=lambda group: sum(item.size for item in group)).append(segment)
    return [Shard(0, queries, tuple(item.uuid for item in group)) for group in groups]


def _flat_shards(queries: int, flat: FragmentStats, sharing: Sharing) -> list[Shard]:
    total = sum(flat.weights)
    most = math.ceil(total / max(1, sharing.shard_bytes))
    count = max(1, min(most, max(sharing.workers, math.ceil(total / MAX_SHARD_BYTES))))
    cut = Cut(num_tasks=count, splittable=sharing.splittable)
    return [Shard(0, queries, (), plan.pieces, plan.size_bytes) for plan in plan_reads(flat, cut)]


def _shares(count: int, parts: int) -> list[tuple[int, int]]:
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def nearest_of(found: Iterable[Found], k: int) -> Found:
    """The k nearest of each query, in the order of queries, then distances, then row ids, as the engine orders them.

    A row that several shards found counts once.
    """
    parts = [item for item in found if len(item)]
    if not parts:
        return Found.nothing()
    together = Found(*(np.concatenate([getattr(item, name) for item in parts]) for name in _FIELDS))
    together = together.select(np.lexsort((together.row_id, together.distance, together.query)))
    _, first = np.unique(np.stack([together.query.astype(np.uint64), together.row_id]), axis=1, return_index=True)
    if len(first) != len(together):
        together = together.select(np.sort(first))
    return together.select(within(together.query, k))


def within(query: np.ndarray, k: int) -> np.ndarray:
    """Of rows sorted by query, whether each is one of the first k of its query."""
    return np.arange(len(query)) - np.searchsorted(query, query) < k


_FIELDS = ("query", "row_id", "distance")


def fused(rankings: Sequence[np.ndarray], weights: Sequence[float], constant: float) -> tuple[np.ndarray, np.ndarray]:
    """Row ids and their scores by reciprocal rank fusion, best first; equal ones in the order of row ids.

    Args:
        rankings: row ids, best first.
        weights: of each ranking.
        constant: what is added to each rank, which counts from 1.
    """
    row_ids = np.unique(np.concatenate([np.asarray(ranking, np.uint64) for ranking in rankings]))
    scores = np.zeros(len(row_ids))
    for ranking, weight in zip(rankings, weights, strict=True):
        places = np.searchsorted(row_ids, ranking)
        scores[places] += weight / (constant + np.arange(1, len(ranking) + 1))
    order = np.lexsort((row_ids, -scores))
    return row_ids[order], scores[order]
