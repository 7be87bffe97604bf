"""Candidates by matrix product: every row that may be among the k nearest is there, whatever rounding does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ray import vectors
from lance_ray.vectors import Candidates, TooManyCandidatesError


def distances(rows: np.ndarray, query: np.ndarray, metric: str) -> Any:
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        return ((rows - query) ** 2).sum(axis=1)
    products = rows @ query
    if metric == "dot":
        return 1 - products
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - products / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)


def candidates_of(rows: np.ndarray, queries: np.ndarray, k: int, metric: str, block: int = 7) -> Candidates:
    found = Candidates(queries, k, metric)
    for first in range(0, len(rows), block):
        part = rows[first : first + block]
        found.offer(part, np.arange(first, first + len(part), dtype=np.uint64))
    return found


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 60),
    queries=st.integers(1, 9),
    k=st.integers(1, 12),
    metric=st.sampled_from(sorted(vectors.METRICS)),
    scale=st.sampled_from([1.0, 1e-6, 1e6]),
    offset=st.sampled_from([0.0, 1000.0]),
)
def test_the_k_nearest_by_exact_arithmetic_are_always_among_the_candidates(
    seed, rows, queries, k, metric, scale, offset
):
    random = np.random.default_rng(seed)
    table = (random.standard_normal((rows, 5)) * scale + offset).astype(np.float32)
    asked = (random.standard_normal((queries, 5)) * scale + offset).astype(np.float32)
    if seed % 3 == 0:
        table[random.integers(0, rows)] *= 1e12
    found = candidates_of(table, asked, k, metric)
    for first, row_ids in found.parts(4):
        for query in asked[first : first + 4]:
            exact = distances(table, query, metric)
            nearest = np.argsort(exact, kind="stable")[:k]
            assert set(nearest[np.isfinite(exact[nearest])].tolist()) <= set(row_ids.tolist())


def test_few_rows_beyond_the_k_nearest_are_candidates():
    rows = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    (_, row_ids), *_ = candidates_of(rows, rows[:1], 10, "l2", block=1000).parts(1)
    assert 10 <= len(row_ids) <= 12


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38, 1e-20])
def test_a_row_that_bounds_do_not_hold_for_is_left_to_the_engine(odd):
    rows = np.ones((10, 3), np.float32)
    rows[4, 1] = odd
    if odd == 1e-20:
        rows[4] = odd
    (_, row_ids), *_ = candidates_of(rows, np.full((1, 3), 5, np.float32), 1, "cosine").parts(1)
    assert 4 in row_ids


def test_zeros_have_a_distance_but_no_direction():
    rows = np.zeros((5, 3), np.float32)
    query = np.ones((1, 3), np.float32)
    assert [len(ids) for _, ids in candidates_of(rows, query, 9, "l2").parts(1)] == [5]
    assert [len(ids) for _, ids in candidates_of(rows, query, 9, "cosine").parts(1)] == [0]


@pytest.mark.parametrize("query", [[np.nan, 1], [np.inf, 1], [0, 0], [3e38, 3e38]])
def test_queries_that_bounds_do_not_hold_for_are_not_ranked(query):
    assert not Candidates.can_rank(np.array([[1, 1], query], np.float32), "l2")
    assert Candidates.can_rank(np.ones((2, 2), np.float32), "l2")
    assert not Candidates.can_rank(np.ones((2, 2), np.float32), "hamming")


def test_too_many_equal_distances_are_said_and_not_held(monkeypatch):
    monkeypatch.setattr(vectors, "_MAX_HELD", 100)
    with pytest.raises(TooManyCandidatesError):
        candidates_of(np.ones((500, 3), np.float32), np.ones((1, 3), np.float32), 1, "l2", block=50)


def test_a_block_is_bounded_by_bytes():
    assert all(4 * min(queries, 512) * vectors.block_rows(queries) <= 33 * 2**20 for queries in (1, 100, 512, 5000))
