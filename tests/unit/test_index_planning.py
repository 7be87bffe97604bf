"""How the building of an index is cut: every fragment in one segment, about the same bytes in each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lance_ray.planning.indexes import (
    KINDS,
    MAX_SHARES,
    SAMPLE_BYTES,
    default_partitions,
    latest,
    merge_groups,
    plan_sample,
    plan_segments,
    runs_needed,
    sample_offsets,
    standing,
)
from lance_ray.planning.reads import FragmentStats

fragments = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1e6)), max_size=40).map(
    lambda items: FragmentStats(list(range(len(items))), [rows for rows, _ in items], [weight for _, weight in items])
)


@given(fragments, st.integers(1, 16), st.one_of(st.none(), st.integers(1, 50)))
def test_every_fragment_is_in_one_segment(stats, slots, count):
    tasks = plan_segments(stats, slots, count=count, segment_bytes=1000)
    assert sorted(item for task in tasks for item in task.fragments) == list(stats.ids)
    assert sum(task.rows for task in tasks) == sum(stats.rows)
    assert all(list(task.fragments) == sorted(task.fragments) and task.fragments for task in tasks)


@given(fragments, st.integers(1, 16))
def test_there_are_no_more_segments_than_tasks_at_once_or_than_are_worth_it(stats, slots):
    tasks = plan_segments(stats, slots, segment_bytes=100_000)
    assert len(tasks) <= max(1, min(slots, len(stats), 1 + int(sum(stats.weights) // 100_000)))


@given(fragments.filter(len), st.integers(1, 8))
def test_the_heaviest_segment_is_at_most_one_fragment_heavier_than_the_lightest(stats, count):
    tasks = plan_segments(stats, 1, count=count)
    weights = dict(zip(stats.ids, stats.weights, strict=True))
    loads = [sum(weights[item] for item in task.fragments) for task in tasks]
    assert max(loads) - min(loads) <= max(stats.weights) + 1e-6


@given(fragments.filter(lambda stats: sum(stats.rows) > 0), st.integers(1, 5000), st.floats(1, 1e6))
def test_a_sample_is_shared_out_by_rows_and_bounded_by_bytes(stats, count, row_bytes):
    shares = plan_sample(stats, count, row_bytes, seed=1)
    wanted = min(count, sum(stats.rows), max(1, int(MAX_SHARES * SAMPLE_BYTES / row_bytes)))
    drawn = sum(rows for share in shares for _, rows in share.runs())
    assert wanted <= drawn <= wanted + len(shares)
    assert len({share.seed for share in shares}) == len(shares)
    if len(shares) < len(stats):
        assert all(share.count * row_bytes <= 2 * SAMPLE_BYTES + max(stats.rows) * row_bytes for share in shares)


@given(st.integers(1, 3000), st.data())
def test_sampled_offsets_are_rows_of_the_fragment_each_once(rows, data):
    count = data.draw(st.integers(0, rows))
    starts = data.draw(st.lists(st.integers(0, rows - 1), min_size=runs_needed(count), max_size=runs_needed(count)))
    offsets = sample_offsets(rows, count, starts)
    assert offsets == sorted(set(offsets))
    assert len(offsets) <= count
    assert all(0 <= item < rows for item in offsets)


def test_a_fragment_stands_while_the_files_of_its_column_are_the_same():
    planned = {0: ("a",), 1: ("b",), 2: ("c",), 3: ("d",)}
    newest = {0: ("a",), 1: ("b2",), 3: ("d",), 7: ("x",)}
    assert standing(planned, newest) == {0, 3}


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 100), max_size=20), st.integers(1, 6))
def test_merging_leaves_the_number_of_segments_that_was_asked_for(sizes, count):
    groups = merge_groups(sizes, count)
    merged = [item for group in groups for item in group]
    assert len(merged) == len(set(merged))
    assert len(sizes) - len(merged) + len(groups) == min(count, len(sizes))


def test_the_newest_segments_are_those_of_the_latest_versions():
    segments = [("a", 5), ("b", 2), ("c", 9)]
    assert latest(segments, 2) == ("a", "c")
    assert latest(segments, 0) == ()
    assert latest(segments, None) == ("b", "a", "c")
    assert latest(segments, 10) == ("b", "a", "c")


def test_partitions_by_default_are_those_of_the_engine():
    assert default_partitions(KINDS["IVF_PQ"], 40_000) == 4
    assert default_partitions(KINDS["IVF_FLAT"], 40_000) == 9
    assert default_partitions(KINDS["IVF_HNSW_SQ"], 40_000) == 1
    assert default_partitions(KINDS["IVF_PQ"], 10**12) == 4096
    assert default_partitions(KINDS["IVF_PQ"], 40_000, target_rows=1000) == 40


def test_kinds_whose_distances_would_not_compare_are_one_segment():
    alone = {
        (kind, metric) for kind in KINDS for metric in ("l2", "cosine", "dot") if KINDS[kind].needs_one_segment(metric)
    }
    assert alone == {
        *((kind, metric) for kind in ("IVF_SQ", "IVF_HNSW_SQ") for metric in ("l2", "cosine", "dot")),
        ("IVF_PQ", "dot"),
        ("IVF_HNSW_PQ", "dot"),
    }
