"""How a scan is cut into tasks: every selected row in exactly one, in table order, balanced, and small to ship."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lance_ray.errors import InvalidArgumentError
from lance_ray.planning import reads
from lance_ray.planning.reads import (
    Cut,
    FragmentStats,
    ReadTaskPlan,
    batch_rows,
    number_of_tasks,
    plan_reads,
    positions_of,
    window,
)

MIB = 1024**2
some = settings(max_examples=60, deadline=None)
Row = tuple[int, int]


def stats_of(rows: list[int], row_bytes: float = 8.0, ids: list[int] | None = None) -> FragmentStats:
    return FragmentStats(ids or list(range(len(rows))), rows, [count * row_bytes for count in rows])


def table_rows(stats: FragmentStats, offset: int = 0, limit: int | None = None) -> list[Row]:
    """(fragment id, row of the fragment) of the rows selected, in table order."""
    everything = [(item, row) for item, count in zip(stats.ids, stats.rows, strict=True) for row in range(count)]
    return everything[offset:][:limit]


def task_rows(stats: FragmentStats, task: ReadTaskPlan) -> list[Row]:
    counts = dict(zip(stats.ids, stats.rows, strict=True))
    found: list[Row] = []
    for piece in task.pieces:
        if piece.is_whole:
            found += [(item, row) for item in range(piece.first, piece.last + 1) for row in range(counts[item])]
        else:
            assert piece.first == piece.last
            assert piece.stop is not None
            found += [(piece.first, row) for row in range(piece.start, piece.stop)]
    return found


def planned_rows(stats: FragmentStats, plans: list[ReadTaskPlan]) -> list[Row]:
    return [row for task in plans for row in task_rows(stats, task)]


@st.composite
def tables(draw: st.DrawFn) -> FragmentStats:
    rows = draw(st.lists(st.integers(0, 60) | st.just(0), max_size=12))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    return stats_of(rows, draw(st.sampled_from([0.0, 0.125, 8.0, 3000.0, MIB])), list(itertools.accumulate(gaps)))


cuts = st.builds(
    Cut,
    cpus=st.integers(1, 8),
    filtered=st.booleans(),
    group_size=st.none() | st.integers(1, 5),
    num_tasks=st.none() | st.integers(1, 40),
    shuffle_seed=st.none() | st.integers(0, 3),
    splittable=st.booleans(),
)
limits = st.none() | st.integers(0, 200)


@some
@given(tables(), cuts, st.integers(0, 200), limits)
def test_every_selected_row_is_in_exactly_one_task(
    stats: FragmentStats, cut: Cut, offset: int, limit: int | None
) -> None:
    found = planned_rows(stats, plan_reads(stats, cut, offset=offset, limit=limit))

    assert sorted(found) == table_rows(stats, offset, limit)


@some
@given(tables(), cuts.filter(lambda cut: cut.shuffle_seed is None), st.integers(0, 200), limits)
def test_tasks_follow_table_order(stats: FragmentStats, cut: Cut, offset: int, limit: int | None) -> None:
    found = planned_rows(stats, plan_reads(stats, cut, offset=offset, limit=limit))

    assert found == table_rows(stats, offset, limit)


@some
@given(tables(), cuts, st.integers(0, 200), limits)
def test_a_task_tells_how_many_rows_it_has_and_none_is_empty(
    stats: FragmentStats, cut: Cut, offset: int, limit: int | None
) -> None:
    for task in plan_reads(stats, cut, offset=offset, limit=limit):
        assert task.rows == len(task_rows(stats, task)) > 0


@some
@given(tables(), cuts.filter(lambda cut: not cut.splittable))
def test_a_fragment_that_may_not_be_split_is_whole_in_one_task(stats: FragmentStats, cut: Cut) -> None:
    assert all(piece.is_whole for task in plan_reads(stats, cut) for piece in task.pieces)


@some
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(2, 64), st.sampled_from([1.0, 8.0, 3072.0]))
@example([5000], 10, 8.0)
@example([100_000], 97, 8.0)
@example([1_000_000] * 3, 7, 8.0)
def test_no_task_has_more_than_one_and_a_half_times_its_share(rows: list[int], tasks: int, row_bytes: float) -> None:
    stats = stats_of(rows, row_bytes)

    plans = plan_reads(stats, Cut(num_tasks=tasks))

    assert max(task.rows for task in plans) <= 1.5 * sum(rows) / tasks + 2


@some
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(1, 64), st.none() | st.integers(0, 9))
@example([5000], 10, None)
def test_a_number_of_tasks_asked_for_is_kept_where_there_are_rows_for_it(
    rows: list[int], tasks: int, seed: int | None
) -> None:
    plans = plan_reads(stats_of(rows), Cut(num_tasks=tasks, shuffle_seed=seed))

    assert len(plans) == tasks or sum(rows) < 16 * tasks


def test_small_differences_in_size_do_not_split_fragments() -> None:
    plans = plan_reads(stats_of([1000, 1010, 990, 1005]), Cut(num_tasks=4))

    assert [task.pieces for task in plans] == [((item, item, 0, None),) for item in range(4)]


def test_one_big_fragment_is_split_into_aligned_row_ranges() -> None:
    plans = plan_reads(stats_of([20_000_000], 20.0), Cut(cpus=2, num_tasks=5))

    starts = [piece.start for task in plans for piece in task.pieces]
    assert [round(start / 1e6, 1) for start in starts] == [0, 4, 8, 12, 16]
    assert all(start % 1024 == 0 for start in starts)


def test_groups_of_fragments_win_over_a_number_of_tasks() -> None:
    plans = plan_reads(stats_of([10] * 7), Cut(num_tasks=2, group_size=3))

    assert [task.pieces for task in plans] == [((0, 2, 0, None),), ((3, 5, 0, None),), ((6, 6, 0, None),)]


def test_groups_count_only_fragments_that_hold_rows() -> None:
    plans = plan_reads(stats_of([10, 0, 10, 10]), Cut(group_size=2))

    assert [task.rows for task in plans] == [20, 10]


@pytest.mark.parametrize("filtered", [False, True])
def test_without_a_number_the_bytes_decide(filtered: bool) -> None:
    def tasks(size: float) -> int:
        return number_of_tasks(size, Cut(cpus=2, filtered=filtered))

    target = reads.FILTERED_TASK_BYTES if filtered else reads.TASK_BYTES
    assert tasks(0) == tasks(1) == tasks(reads.MIN_TASK_BYTES) == 1
    assert tasks(40 * MIB) == (2 if filtered else 4)
    assert tasks(100 * target) == 100
    assert tasks(1e15) == reads.MOST_TASKS


def test_tasks_are_smaller_where_the_object_store_has_little_room() -> None:
    plans = plan_reads(stats_of([1_000_000] * 100, 20.0), Cut(cpus=2, most_bytes=10 * MIB))

    assert max(task.size_bytes for task in plans) <= 1.5 * 10 * MIB


@pytest.mark.parametrize("filtered", [False, True])
def test_no_task_opens_many_small_fragments(filtered: bool) -> None:
    fragments = 20 * reads.TASK_FRAGMENTS
    plans = plan_reads(stats_of([10] * fragments), Cut(cpus=2, filtered=filtered))

    assert len(plans) == 20
    assert {task.rows for task in plans} == {10 * reads.TASK_FRAGMENTS}


def test_a_large_scan_begins_with_a_small_task_so_that_a_limit_is_quick() -> None:
    plans = plan_reads(stats_of([1_000_000] * 100, 20.0), Cut(cpus=2))

    assert plans[0].size_bytes <= 2 * reads.FIRST_TASK_BYTES
    assert max(task.size_bytes for task in plans) <= 1.5 * reads.TASK_BYTES


def test_a_table_without_rows_needs_no_task() -> None:
    assert plan_reads(stats_of([]), Cut()) == []
    assert plan_reads(stats_of([0, 0]), Cut(num_tasks=4)) == []


@some
@given(tables(), st.integers(0, 300), limits)
def test_the_window_is_the_rows_from_offset_on_up_to_limit(
    stats: FragmentStats, offset: int, limit: int | None
) -> None:
    parts = window(stats, offset, limit)

    found = [(stats.ids[position], row) for position, start, stop in parts for row in range(start, stop)]
    assert found == table_rows(stats, offset, limit)
    assert all(start < stop for _, start, stop in parts)


def test_a_limit_plans_nothing_beyond_it() -> None:
    plans = plan_reads(stats_of([1000] * 1000), Cut(num_tasks=1), offset=1500, limit=1000)

    assert [task.pieces for task in plans] == [((1, 1, 500, 1000), (2, 2, 0, 500))]


@some
@given(st.integers(0, 2**31), st.sampled_from([None, 3]))
def test_a_seed_determines_the_order(seed: int, group_size: int | None) -> None:
    stats = stats_of([500] * 20)
    cut = Cut(num_tasks=5, group_size=group_size, shuffle_seed=seed)

    assert plan_reads(stats, cut) == plan_reads(stats, cut)


@pytest.mark.parametrize("cut", [Cut(num_tasks=4), Cut(group_size=2)], ids=["ranges", "groups"])
def test_different_seeds_give_different_orders_and_none_gives_table_order(cut: Cut) -> None:
    stats = stats_of([500] * 20)

    orders = [planned_rows(stats, plan_reads(stats, replace(cut, shuffle_seed=seed))) for seed in (None, 0, 1, 2)]

    assert orders[0] == table_rows(stats)
    assert len({tuple(order) for order in orders}) == 4


def test_a_shuffled_task_mixes_ranges_from_all_over_the_table() -> None:
    plans = plan_reads(stats_of([80_000]), Cut(num_tasks=4, shuffle_seed=1))

    assert [len(task.pieces) for task in plans] == [8, 8, 8, 8]
    assert min(max(p.start for p in task.pieces) - min(p.start for p in task.pieces) for task in plans) > 40_000


@pytest.mark.parametrize("seed", [None, 1], ids=["in order", "shuffled"])
def test_what_is_shipped_does_not_grow_with_the_number_of_fragments(seed: int | None) -> None:
    def largest(fragments: int) -> int:
        plans = plan_reads(stats_of([200] * fragments, 20.0), Cut(num_tasks=8, shuffle_seed=seed))
        assert sum(task.rows for task in plans) == 200 * fragments
        return max(len(pickle.dumps(task)) for task in plans)

    assert largest(100_000) <= largest(1000) + 200 < 3000


def test_fragment_ids_are_found_in_table_order() -> None:
    assert positions_of([4, 7, 9], [9, 4]) == [0, 2]
    assert positions_of([4, 7, 9], []) == []


def test_unknown_fragment_ids_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"fragment_ids=\[3, 11\].*has 3 of them"):
        positions_of([4, 7, 9], [11, 4, 3])


@some
@given(st.floats(0, 1e9))
def test_batches_hold_about_four_mebibytes_within_bounds(row_bytes: float) -> None:
    rows = batch_rows(row_bytes)

    assert 1024 <= rows <= 131_072
    assert rows * row_bytes <= 4 * MIB or rows == 1024
