"""Searching: what each row of the table in README.md measures, against one process; and the recall of an index."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray

from benchmarks.harness import Case, cached
from lance_ray import nearest_join, vector_search

DIMENSION, FRAGMENTS, K = 128, 16, 10
ROWS = 1_000_000


def make_table(uri: str, rows: int, *, index: bool) -> None:
    """Vectors around 2,000 centres, so that an index has something to find."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2000, DIMENSION), dtype=np.float32)
    share = -(-rows // FRAGMENTS)
    for first in range(0, rows, share):
        count = min(rows, first + share) - first
        values = centres[random.integers(0, len(centres), count)]
        values = values + 0.5 * random.standard_normal((count, DIMENSION), dtype=np.float32)
        vectors = pa.FixedSizeListArray.from_arrays(values.reshape(-1), DIMENSION)
        table = pa.table({"id": np.arange(first, first + count), "vector": vectors})
        lance.write_dataset(table, uri, mode="append" if first else "create")
    if index:
        partitions = max(2, int(rows**0.5) // 4)
        lance.dataset(uri).create_index("vector", "IVF_PQ", num_partitions=partitions, num_sub_vectors=DIMENSION // 8)


def queries_of(uri: str, count: int) -> np.ndarray:
    """Vectors near rows of the table."""
    dataset = lance.dataset(uri)
    random = np.random.default_rng(1)
    rows = dataset.take(random.integers(0, dataset.count_rows(), count).tolist(), columns=["vector"])
    values = rows.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, DIMENSION)
    found: np.ndarray = values + 0.3 * random.standard_normal(values.shape, dtype=np.float32)
    return found


def _nearest(queries: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    return {"column": "vector", "q": queries if len(queries) > 1 else queries[0], "k": K, **options}


def _engine(uri: str, queries: np.ndarray, options: dict[str, Any]) -> int:
    scanner = lance.dataset(uri).scanner(
        columns=["id", "_distance"], nearest=_nearest(queries, options), disable_scoring_autoprojection=True
    )
    return int(scanner.to_table().num_rows)


def _opened(dataset: lance.LanceDataset, queries: np.ndarray, options: dict[str, Any]) -> int:
    """The engine with the table and its index open, which is how one process would serve queries."""
    scanner = dataset.scanner(
        columns=["id", "_distance"], nearest=_nearest(queries, options), disable_scoring_autoprojection=True
    )
    return int(scanner.to_table().num_rows)


def _loop(dataset: lance.LanceDataset, queries: np.ndarray, options: dict[str, Any]) -> int:
    return sum(_opened(dataset, queries[at : at + 1], options) for at in range(len(queries)))


def _ours(uri: str, queries: np.ndarray, options: dict[str, Any]) -> int:
    return int(vector_search(uri, nearest=_nearest(queries, options), columns=["id"]).num_rows)


def _join(uri: str, queries: np.ndarray, options: dict[str, Any]) -> int:
    vectors = pa.FixedSizeListArray.from_arrays(queries.reshape(-1), DIMENSION)
    blocks = [pa.table({"embedding": vectors.slice(at, 500)}) for at in range(0, len(queries), 500)]
    ds = nearest_join(
        ray.data.from_arrow(blocks), uri, on="embedding", k=K, columns=["id"], nearest=options, concurrency=len(blocks)
    )
    return sum(len(row["neighbors"]) for row in ds.take_all())


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """The rows of the table."""
    rows = max(4000, int(ROWS * scale))
    plain = cached(folder, f"vectors_{rows}", functools.partial(make_table, rows=rows, index=False))
    known = cached(folder, f"vectors_indexed_{rows}", functools.partial(make_table, rows=rows, index=True))
    few, many = queries_of(plain, 100), queries_of(plain, max(20, int(1000 * min(1.0, scale * 10))))
    flat: dict[str, Any] = {"use_index": False}
    probes: dict[str, Any] = {"nprobes": 20, "refine_factor": 4}
    bind = functools.partial
    opened = {uri: lance.dataset(uri) for uri in (plain, known)}
    size = f"{rows:,} x {DIMENSION}"
    yield Case(
        f"flat {size}, 1 query", bind(_engine, plain, few[:1], flat), bind(_ours, plain, few[:1], flat), 1.2, 0.35
    )
    yield Case(f"flat {size}, 100 queries", bind(_engine, plain, few, flat), bind(_ours, plain, few, flat), 0.6, 0.35)
    yield Case(
        f"flat {size}, 100 queries, engine in a loop",
        bind(_loop, opened[plain], few, flat),
        bind(_ours, plain, few, flat),
        0.6,
        0.35,
    )
    yield Case(
        f"flat {size}, nearest_join of {len(many)}",
        bind(_opened, opened[plain], many, flat),
        bind(_join, plain, many, flat),
        0.6,
        0.35,
    )
    yield Case(
        f"IVF_PQ {size}, 1 query",
        bind(_engine, known, few[:1], probes),
        bind(_ours, known, few[:1], probes),
        1.2,
        1.2,
    )
    yield Case(
        f"IVF_PQ {size}, 100 queries",
        bind(_opened, opened[known], few, probes),
        bind(_ours, known, few, probes),
        1.2,
        0.6,
    )
    yield Case(
        f"IVF_PQ {size}, nearest_join of {len(many)}",
        bind(_opened, opened[known], many, probes),
        bind(_join, known, many, probes),
        0.6,
        0.35,
    )


@dataclass(frozen=True, slots=True)
class Recall:
    """How many of the ten nearest rows an index finds."""

    nprobes: int
    refine_factor: int | None
    recall: float


def recall(folder: Path, scale: float) -> Iterator[Recall]:
    """Recall at 10 of IVF_PQ against exact search, for 100 queries."""
    rows = max(4000, int(ROWS * scale))
    uri = cached(folder, f"vectors_indexed_{rows}", functools.partial(make_table, rows=rows, index=True))
    queries = queries_of(uri, 100)
    exact = _ids(vector_search(uri, nearest=_nearest(queries, {"use_index": False}), columns=["id"]))
    for nprobes in (1, 5, 20):
        for refine in (None, 4, 20, 100):
            options = {"nprobes": nprobes} | ({} if refine is None else {"refine_factor": refine})
            found = _ids(vector_search(uri, nearest=_nearest(queries, options), columns=["id"]))
            yield Recall(nprobes, refine, sum(len(found[query] & exact[query]) for query in exact) / (K * len(exact)))


def _ids(table: pa.Table) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for query, item in zip(table.column("query_index").to_pylist(), table.column("id").to_pylist(), strict=True):
        found.setdefault(query, set()).add(item)
    return found


def table(figures: Sequence[Recall]) -> str:
    """The figures as a Markdown table."""
    lines = ["| nprobes | refine_factor | recall at 10 |", "|---:|---:|---:|"]
    lines += [f"| {item.nprobes} | {item.refine_factor or '-'} | {item.recall:.3f} |" for item in figures]
    return "\n".join(lines)
