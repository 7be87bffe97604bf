"""When finished rewrites become a commit, what a budget lets run, and what voids a rewrite."""

from __future__ import annotations

import pytest

from lance_ray.planning.compaction import Budget, CommitCadence, RewriteTask


def task(*fragments: int, rows: int = 100, size: int = 10, target: int = 100) -> RewriteTask:
    return RewriteTask("{}", fragments, rows, size, target)


PLANNED = {1: "as planned 1", 2: "as planned 2"}


def batches(size: int | None, tasks: int) -> list[tuple[int, ...]]:
    cadence: CommitCadence[int] = CommitCadence(size, tasks)
    made = [cadence.offer(item) for item in range(tasks)]
    return [batch for batch in [*made, cadence.drain()] if batch]


@pytest.mark.parametrize("size", [None, 0, -3, 5, 6])
def test_no_size_none_that_counts_or_one_as_large_as_the_plan_makes_one_commit(size: int | None):
    assert batches(size, 5) == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [(0,), (1,), (2,)]), (2, [(0, 1), (2,)])], ids=["each alone", "rest in the last"]
)
def test_a_size_in_between_commits_every_so_many_in_the_order_they_finish(size: int, expected: list[tuple[int, ...]]):
    assert batches(size, 3) == expected


def test_what_was_drained_is_not_committed_again():
    cadence: CommitCadence[int] = CommitCadence(None, 2)
    cadence.offer(1)
    assert (cadence.drain(), cadence.drain()) == ((1,), ())


@pytest.mark.parametrize(
    ("budget", "taken"),
    [
        (Budget(), 4),
        (Budget(max_tasks=2), 2),
        (Budget(max_bytes=30), 3),
        (Budget(max_bytes=29), 2),
        (Budget(max_bytes=9), 0),
        (Budget(max_tasks=3, max_bytes=20), 2),
    ],
)
def test_a_budget_takes_the_first_tasks_that_fit(budget: Budget, taken: int):
    tasks = [task(item) for item in range(4)]
    assert budget.select(tasks) == tuple(tasks[:taken])


def test_a_task_too_large_for_the_budget_is_passed_over_and_those_after_it_are_not():
    large, small = task(0, size=1000), [task(item) for item in (1, 2, 3)]
    assert Budget(max_bytes=20).select([large, *small]) == tuple(small[:2])
    assert Budget(max_bytes=20, max_tasks=1).select([large, *small]) == (small[0],)


def test_a_rewrite_stands_while_each_of_its_fragments_is_as_it_was_planned():
    assert task(1, 2).stands(PLANNED, {**PLANNED, 3: "appended"})


@pytest.mark.parametrize(
    "newest", [{1: "as planned 1"}, {1: "as planned 1", 2: "with deletions"}, {}], ids=["gone", "changed", "empty"]
)
def test_a_rewrite_falls_when_one_of_its_fragments_is_changed_or_gone(newest: dict[int, str]):
    assert not task(1, 2).stands(PLANNED, newest)


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, 1), (100, 1), (199, 1), (200, 2)])
def test_fragments_afterwards_hold_at_least_the_target(rows: int, expected: int):
    assert task(1, 2, rows=rows).fragments_after == expected
