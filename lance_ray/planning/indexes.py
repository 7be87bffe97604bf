"""What kinds of index there are, and how the building of one is cut into segments and samples. Values only.

An index is a set of *segments*, each of which knows some fragments. A build gives every fragment to one segment; a
refresh adds segments for the fragments that none knows yet; a merge makes fewer of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lance_ray.planning.reads import FragmentStats

SEGMENT_BYTES = 32 * 1024**2
"""Bytes of the column that a segment has at least: below this a task costs more to start than it saves."""

SAMPLE_BYTES = 256 * 1024**2
"""Vectors that one training task holds at most."""

SAMPLE_RATE = 256
"""Vectors that a centroid is trained from, as in the engine."""

MAX_SHARES = 16
"""Shares of a sample at most: what the driver holds of the models of shares does not grow with the table."""

_RUN = 32  # rows that lie together in a sample: a random row costs as much to read as its neighbours with it


@dataclass(frozen=True, slots=True)
class IndexKind:
    """A kind of index that the engine builds by segments.

    Attributes:
        name: as the engine is told it.
        parameters: names of the engine's further options; None where the engine refuses unknown ones itself.
        config: the kind's name where its options travel in an ``IndexConfig``; empty where they are keywords.
        target_rows: rows that a partition has by default (vector kinds), as in the engine.
        finished: whether a segment can be committed as it was built; else the engine's merge must finish it.
        named: whether the engine lets the caller choose the UUID of a segment.
        without_rows: whether the engine builds a segment of no fragments.
    """

    name: str
    parameters: frozenset[str] | None = frozenset()
    config: str = ""
    target_rows: int = 0
    finished: bool = True
    named: bool = True
    without_rows: bool = True

    @property
    def is_vector(self) -> bool:
        """Whether it answers searches for neighbours."""
        return self.name.startswith("IVF_")

    @property
    def is_product_quantized(self) -> bool:
        """Whether it has a codebook."""
        return self.name.endswith("_PQ")

    def needs_one_segment(self, metric: str | None) -> bool:
        """Whether its distances are right in one segment only.

        A scalar quantiser takes its bounds from its own segment, so that distances of two do not compare. Given a
        codebook for dot products, the engine encodes the rows of a part of the fragments with other codes than those
        of all of them (pylance 14), and the distances are wrong.
        """
        return self.name.endswith("_SQ") or (self.is_product_quantized and metric == "dot")


_VECTOR_OPTIONS = frozenset(
    {
        "num_bits",
        "index_file_version",
        "shuffle_partition_batches",
        "shuffle_partition_concurrency",
        "skip_transpose",
        "filter_nan",
    }
)
_GRAPH_OPTIONS = _VECTOR_OPTIONS | {"max_level", "m", "ef_construction"}

KINDS: Mapping[str, IndexKind] = {
    kind.name: kind
    for kind in (
        IndexKind("BTREE", frozenset({"zone_size"}), "btree", named=False),
        IndexKind("BITMAP", without_rows=False),
        IndexKind("LABEL_LIST", named=False),
        IndexKind("INVERTED", None, finished=False),
        IndexKind("NGRAM", named=False),
        IndexKind("ZONEMAP", frozenset({"rows_per_zone"}), "zonemap"),
        IndexKind("BLOOMFILTER", frozenset({"number_of_items", "probability"}), "bloomfilter"),
        IndexKind("RTREE", frozenset({"page_size"}), "rtree", named=False),
        IndexKind("MINHASHLSH", frozenset({"num_hashes", "num_bands", "shingle_size", "tokenizer"}), "minhashlsh"),
        IndexKind("IVF_FLAT", _VECTOR_OPTIONS, target_rows=4096),
        IndexKind("IVF_PQ", _VECTOR_OPTIONS, target_rows=8192),
        IndexKind("IVF_SQ", _VECTOR_OPTIONS, target_rows=8192),
        IndexKind("IVF_RQ", _VECTOR_OPTIONS, target_rows=4096),
        IndexKind("IVF_HNSW_FLAT", _GRAPH_OPTIONS, target_rows=1024 * 1024),
        IndexKind("IVF_HNSW_PQ", _GRAPH_OPTIONS, target_rows=1024 * 1024),
        IndexKind("IVF_HNSW_SQ", _GRAPH_OPTIONS, target_rows=1024 * 1024),
    )
}
"""By the engine's names."""

ALIASES = {"FTS": "INVERTED"}


@dataclass(frozen=True, slots=True)
class SegmentTask:
    """Fragments that become one segment."""

    fragments: tuple[int, ...]
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a sample: how many rows of which fragments (ids and live rows, in parallel), drawn by a seed."""

    fragments: tuple[int, ...]
    rows: tuple[int, ...]
    count: int
    seed: int

    def runs(self) -> list[tuple[int, int]]:
        """How many rows of each fragment, of those that give any."""
        total = sum(self.rows)
        edges = [0]
        for rows in self.rows:
            edges.append(edges[-1] + rows)
        wanted = min(self.count, total)
        marks = [wanted * edge // max(1, total) for edge in edges]
        return [
            (fragment, stop - start)
            for fragment, start, stop in zip(self.fragments, marks, marks[1:], strict=False)
            if stop > start
        ]


def plan_segments(
    stats: FragmentStats, slots: int, *, count: int | None = None, segment_bytes: int = SEGMENT_BYTES
) -> list[SegmentTask]:
    """Fragments grouped into segments of about the same bytes, in table order inside each.

    Args:
        stats: the fragments, weighed by the bytes of the column.
        slots: tasks at once.
        count: how many segments, where the caller decides.
        segment_bytes: what a segment has at least, otherwise.
    """
    if not len(stats):
        return []
    most = max(1, math.ceil(sum(stats.weights) / segment_bytes))
    wanted = min(slots, most) if count is None else count
    groups: list[list[int]] = [[] for _ in range(max(1, min(wanted, len(stats))))]
    loads = [(0.0, 0, number) for number in range(len(groups))]  # weight, fragments, group: the lightest first
    for place in sorted(range(len(stats)), key=lambda item: (-stats.weights[item], item)):
        weight, size, number = loads[0]
        groups[number].append(place)
        heapq.heapreplace(loads, (weight + stats.weights[place], size + 1, number))
    tasks = []
    for group in groups:
        chosen = stats.select(sorted(group))
        tasks.append(SegmentTask(tuple(chosen.ids), sum(chosen.rows), int(sum(chosen.weights))))
    return sorted(tasks, key=lambda task: task.fragments)


def plan_sample(stats: FragmentStats, count: int, row_bytes: float, seed: int) -> list[Share]:
    """Shares of a sample of so many rows over all fragments, each of about :data:`SAMPLE_BYTES` at most.

    A sample that would need more than :data:`MAX_SHARES` is smaller than was asked for.
    """
    total = sum(stats.rows)
    count = min(count, total, max(1, int(MAX_SHARES * SAMPLE_BYTES / max(row_bytes, 1))))
    parts = max(1, min(len(stats), math.ceil(count * row_bytes / SAMPLE_BYTES)))
    groups = plan_segments(stats, parts, count=parts)
    rows = dict(zip(stats.ids, stats.rows, strict=True))
    return [
        Share(
            group.fragments,
            tuple(rows[item] for item in group.fragments),
            math.ceil(count * group.rows / max(1, total)),
            seed + place,
        )
        for place, group in enumerate(groups)
    ]


def sample_offsets(rows: int, count: int, starts: Sequence[int]) -> list[int]:
    """Offsets of about ``count`` of so many rows, in short runs that begin at the given random places; sorted."""
    chosen: set[int] = set()
    for start in starts:
        if len(chosen) >= count:
            break
        chosen.update(range(start, min(start + _RUN, rows)))
    return sorted(chosen)[:count] if len(chosen) > count else sorted(chosen)


def runs_needed(count: int) -> int:
    """How many random places :func:`sample_offsets` is given: more than enough, as runs may overlap."""
    return 2 * math.ceil(count / _RUN) + 8


def default_partitions(kind: IndexKind, rows: int, target_rows: int | None = None) -> int:
    """How many partitions an IVF index has where the caller says nothing: rows by the kind's target, 1 to 4096."""
    return min(4096, max(1, rows // (target_rows or kind.target_rows)))


def standing(planned: Mapping[int, object], newest: Mapping[int, object]) -> frozenset[int]:
    """Fragments whose column is still stored as it was when the segments were built.

    Args:
        planned: what holds the column in each fragment of the version that was built on.
        newest: the same, of the newest version.
    """
    return frozenset(item for item, files in planned.items() if newest.get(item) == files)


def merge_groups(sizes: Mapping[str, int], count: int) -> list[tuple[str, ...]]:
    """Segments (ids and sizes) put together into so many groups of about the same size; only groups of two and more."""
    groups: list[list[str]] = [[] for _ in range(max(1, min(count, len(sizes))))]
    loads = [0] * len(groups)
    for item in sorted(sizes, key=lambda item: (-sizes[item], item)):
        lightest = loads.index(min(loads))
        groups[lightest].append(item)
        loads[lightest] += sizes[item]
    return [tuple(sorted(group)) for group in groups if len(group) > 1]


def latest(segments: Iterable[tuple[str, int]], count: int | None) -> tuple[str, ...]:
    """The ids of the last so many segments by the version that they were made at; all of them for None."""
    ordered = [item for item, _ in sorted(segments, key=lambda pair: (pair[1], pair[0]))]
    return tuple(ordered if count is None else ordered[len(ordered) - min(count, len(ordered)) :])
