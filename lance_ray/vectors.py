"""Which rows may be among the k nearest of many queries: one matrix product for each block of vectors.

The engine computes the distance of each query to each row by itself, which for a hundred queries takes a hundred times
as long as for one. A matrix product gives all distances of a block at once, though rounded differently. So it only
chooses candidates, each with a bound for how far rounding may have moved it, and the engine decides between them: what
comes out is what the engine alone gives, ties included.

The bound is the usual one for floating-point dot products, ``|fl(x.y) - x.y| <= d u / (1 - d u) |x| |y|`` (N. J.
Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), for both computations, with ``2 |x| |y|
<= |x|^2 + |y|^2`` so that it is a number for each row plus one for each query.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

METRICS = frozenset({"l2", "cosine", "dot"})
"""Metrics that a matrix product can rank."""

_UNIT_ROUNDOFF = 2.0**-24
_TINY = 1e-30  # squared norms below this lose digits
_QUERY_BLOCK = 512
_MAX_HELD = 4_000_000


class TooManyCandidatesError(Exception):
    """So many rows are equally near that the engine had better look at all of them."""


def block_rows(queries: int) -> int:
    """Rows of a block, so that the distances of a block take some 32 MiB."""
    return max(1024, min(16384, 8 * 1024**2 // max(1, min(queries, _QUERY_BLOCK))))


class Candidates:
    """Rows of a stream of vectors that may be among the k nearest of some queries.

    Args:
        queries: float32 of shape (queries, dimension).
        k: rows wanted for each query.
        metric: one of :data:`METRICS`.
    """

    def __init__(self, queries: np.ndarray, k: int, metric: str) -> None:
        blocks = [queries[first : first + _QUERY_BLOCK] for first in range(0, len(queries), _QUERY_BLOCK)]
        self._blocks = [_Block(block, k, metric) for block in blocks]
        self._metric = metric
        self._always: list[np.ndarray] = []
        self._products: dict[int, np.ndarray] = {}

    @staticmethod
    def can_rank(queries: np.ndarray, metric: str) -> bool:
        """Whether all queries are of a size that rounding bounds hold for."""
        norms = _squares(queries.astype(np.float32))
        return metric in METRICS and bool(np.all(np.isfinite(norms) & (norms > _TINY)))

    def offer(self, vectors: np.ndarray, row_ids: np.ndarray) -> None:
        """Look at more rows: float32 of shape (rows, dimension), and their ids.

        Raises:
            TooManyCandidatesError: see there.
        """
        norms = _squares(vectors)
        odd = ~np.isfinite(norms) | (norms < _TINY)
        if odd.any():
            zero = odd.copy()
            zero[odd] = ~vectors[odd].any(axis=1)
            # Not a number, infinite, or too small for the bounds: the engine decides.
            self._always.append(row_ids[odd & ~zero])
            plain = ~odd if self._metric == "cosine" else ~odd | zero  # zeros have no direction, but a distance
            vectors, row_ids, norms = vectors[plain], row_ids[plain], norms[plain]
        if not len(vectors):
            return
        for block in self._blocks:
            block.offer(vectors, row_ids, norms, self._room(len(block.factors), len(vectors)))
        if sum(len(item) for item in self._always) > _MAX_HELD:
            raise TooManyCandidatesError

    def _room(self, queries: int, rows: int) -> np.ndarray:
        """Memory for a product, the same one as long as the shape stays: new pages cost as much as the product."""
        room = self._products.get(queries)
        if room is None or room.shape[1] != rows:
            room = self._products[queries] = np.empty((queries, rows), np.float32)
        return room

    def parts(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """For each ``size`` queries the number of the first one, and their candidates, each once, in order."""
        for number, block in enumerate(self._blocks):
            for first in range(0, len(block.factors), size):
                chosen = (block.query >= first) & (block.query < first + size)
                row_ids = np.unique(np.concatenate([block.row_ids[chosen], *self._always]))
                yield number * _QUERY_BLOCK + first, row_ids


class _Block:
    """The candidates of some queries. All numbers are lower bounds, short of a constant of the query."""

    def __init__(self, queries: np.ndarray, k: int, metric: str) -> None:
        dimension = queries.shape[1]
        # Twice, for this computation and for the engine's; with room for the few operations beside the products.
        self._slack = np.float32(8 * (dimension + 16) * _UNIT_ROUNDOFF)
        self._k = k
        self._metric = metric
        squares = _squares(queries)
        if metric == "cosine":
            queries = queries / np.sqrt(squares)[:, None]
            squares = np.ones_like(squares)
        self.factors = np.ascontiguousarray(queries * np.float32(-2 if metric == "l2" else -1))
        self._own_slack = self._slack * squares
        self._limit = np.full(len(queries), np.inf, np.float32)
        self.query = np.empty(0, np.int64)
        self._lower = np.empty(0, np.float32)
        self._upper = np.empty(0, np.float32)
        self.row_ids = np.empty(0, np.uint64)

    def offer(self, vectors: np.ndarray, row_ids: np.ndarray, norms: np.ndarray, room: np.ndarray) -> None:
        """Look at more rows."""
        lower = np.matmul(self.factors, vectors.T, out=room)
        slack = self._slack * norms
        if self._metric == "cosine":
            lower /= np.sqrt(norms)
            slack = np.full_like(norms, self._slack)
        lower += (norms if self._metric == "l2" else 0) - slack
        if np.isinf(self._limit).all() and lower.shape[1] > self._k:
            self._limit = self._first_limit(lower, slack)
        found = np.flatnonzero(lower <= self._limit[:, None])
        if not len(found):
            return
        query, place = np.divmod(found, lower.shape[1])
        values = lower.ravel()[found]
        upper = values + 2 * slack[place] + 2 * self._own_slack[query]
        self.query = np.concatenate([self.query, query])
        self._lower = np.concatenate([self._lower, values])
        self._upper = np.concatenate([self._upper, upper])
        self.row_ids = np.concatenate([self.row_ids, row_ids[place]])
        self._tighten()

    def _first_limit(self, lower: np.ndarray, slack: np.ndarray) -> np.ndarray:
        nearest = np.partition(lower, self._k - 1, axis=1)[:, self._k - 1]
        limit: np.ndarray = nearest + 2 * slack.max() + 2 * self._own_slack
        return limit

    def _tighten(self) -> None:
        """No row beyond the k-th smallest upper bound of its query can be one of the k nearest."""
        order = np.lexsort((self._upper, self.query))
        query = self.query[order]
        starts = np.searchsorted(query, np.arange(len(self._limit)))
        ends = np.append(starts[1:], len(query))
        full = ends - starts >= self._k
        kth = self._upper[order[(starts + self._k - 1)[full]]]
        self._limit[full] = np.minimum(self._limit[full], kth)
        keep = self._lower <= self._limit[self.query]
        self.query, self._lower, self._upper = self.query[keep], self._lower[keep], self._upper[keep]
        self.row_ids = self.row_ids[keep]
        if len(self.row_ids) > _MAX_HELD:
            raise TooManyCandidatesError


def _squares(vectors: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        squares: np.ndarray = np.einsum("ij,ij->i", vectors, vectors)
    return squares
