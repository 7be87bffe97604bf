"""Tables of vectors for the tests of searching, and what plain pylance finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_ray import search


def vector_array(values: Any, dimension: int | None = None) -> pa.FixedSizeListArray:
    """Vectors of 32-bit floats: a matrix, or a list with None for those that are missing."""
    if isinstance(values, np.ndarray):
        return pa.FixedSizeListArray.from_arrays(values.astype(np.float32).reshape(-1), values.shape[1])
    return pa.array(values, pa.list_(pa.float32(), dimension))


def random_vectors(rows: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def write_vectors(uri: Path | str, values: Any, *, fragments: int = 4, **options: Any) -> lance.LanceDataset:
    """``id``, ``group`` (id modulo 5), ``name`` and ``vector``, as version 1."""
    vectors = values if isinstance(values, pa.Array) else vector_array(values)
    ids = np.arange(len(vectors))
    table = pa.table({"id": ids, "group": ids % 5, "name": [f"row {item}" for item in ids], "vector": vectors})
    return lance.write_dataset(table, str(uri), max_rows_per_file=max(1, -(-len(ids) // fragments)), **options)


def append_vectors(dataset: lance.LanceDataset, values: np.ndarray, first: int = 10_000) -> None:
    ids = np.arange(first, first + len(values))
    names = [f"row {item}" for item in ids]
    dataset.insert(pa.table({"id": ids, "group": ids % 5, "name": names, "vector": vector_array(values)}))


def by_engine(uri: Path | str, nearest: dict[str, Any], columns: Sequence[str], **scanner: Any) -> pa.Table:
    """What one search of the engine finds."""
    dataset = lance.dataset(str(uri))
    scanner.setdefault("prefilter", True)
    options = {"disable_scoring_autoprojection": True, **scanner}
    return dataset.scanner(columns=[*columns, "_distance"], nearest=nearest, **options).to_table().combine_chunks()


def cut_small(patch: pytest.MonkeyPatch, *, cluster: bool = False) -> None:
    """From here on searches are cut into shards however small they are, and sent to the cluster if so told."""
    patch.setattr(search, "SHARD_BYTES", 64)
    if cluster:
        patch.setattr(search, "THREADS_BYTES", -1)
