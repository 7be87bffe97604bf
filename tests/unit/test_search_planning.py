"""How searches are cut, and how shards become one answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ray.planning.reads import FragmentStats
from lance_ray.planning.search import Found, Segment, Sharing, fused, nearest_of, plan_search

NO_ROWS = FragmentStats([], [], [])


def stats(*rows: int, row_bytes: int = 8) -> FragmentStats:
    return FragmentStats(list(range(len(rows))), list(rows), [row_bytes * count for count in rows])


@given(
    rows=st.lists(st.integers(0, 200), max_size=8),
    segments=st.lists(st.integers(0, 1000), max_size=6),
    queries=st.integers(1, 100),
    workers=st.integers(1, 9),
    shard_bytes=st.sampled_from([1, 64, 10**9]),
    splittable=st.booleans(),
)
def test_each_query_meets_each_segment_and_each_row_once(rows, segments, queries, workers, shard_bytes, splittable):
    known = [Segment(str(index), size) for index, size in enumerate(segments)]
    shards = plan_search(queries, known, stats(*rows), Sharing(workers, shard_bytes, splittable=splittable))
    met = [(query, item) for shard in shards for query in range(shard.first, shard.last) for item in shard.segments]
    assert sorted(met) == sorted((query, item.uuid) for query in range(queries) for item in known)
    seen = [
        (piece.first + step, row)
        for shard in shards
        for piece in shard.pieces
        for step in range(piece.last - piece.first + 1)
        for row in range(piece.start, rows[piece.first + step] if piece.stop is None else piece.stop)
    ]
    assert sorted(seen) == [(fragment, row) for fragment, count in enumerate(rows) for row in range(count)]
    if not splittable:
        assert all(piece.is_whole for shard in shards for piece in shard.pieces)


def test_one_query_shares_out_segments_and_many_queries_share_themselves_out():
    segments = [Segment(name, size) for name, size in (("a", 9), ("b", 5), ("c", 4))]
    few = plan_search(1, segments, NO_ROWS, Sharing(2))
    assert sorted(shard.segments for shard in few) == [("a",), ("b", "c")]
    many = plan_search(100, segments, NO_ROWS, Sharing(2))
    assert [(shard.first, shard.last, shard.segments) for shard in many] == [
        (0, 50, ("a", "b", "c")),
        (50, 100, ("a", "b", "c")),
    ]


def test_rows_without_an_index_are_not_cut_below_a_size_and_not_left_above_one():
    assert len(plan_search(1, [], stats(1000), Sharing(8))) == 1
    assert len(plan_search(1, [], stats(1000), Sharing(8, 1000))) == 8
    assert len(plan_search(1, [], stats(10**6, row_bytes=4096), Sharing(1))) == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), max_size=60), st.integers(1, 5))
def test_the_nearest_come_by_query_distance_and_row_and_each_row_once(rows, k):
    unique = {(query, row): distance for query, row, distance in rows}
    items = [(query, row, distance) for (query, row), distance in unique.items()]
    split = [Found.of(*zip(*part, strict=True)) for part in (items[::2], items[1::2], items[:3]) if part]
    found = nearest_of(split, k)
    wanted = []
    for query in range(4):
        mine = sorted((distance, row) for asked, row, distance in items if asked == query)[:k]
        wanted += [(query, row, distance) for distance, row in mine]
    assert list(zip(found.query.tolist(), found.row_id.tolist(), found.distance.tolist(), strict=True)) == wanted


def test_fusion_adds_the_weighted_reciprocals_of_ranks():
    row_ids, scores = fused([np.array([7, 3]), np.array([3, 9])], (1.0, 2.0), 60)
    assert row_ids.tolist() == [3, 9, 7]
    assert scores.tolist() == pytest.approx([1 / 62 + 2 / 61, 2 / 62, 1 / 61])


def test_equal_scores_come_in_the_order_of_row_ids():
    row_ids, _ = fused([np.array([9]), np.array([4])], (1.0, 1.0), 60)
    assert row_ids.tolist() == [4, 9]
