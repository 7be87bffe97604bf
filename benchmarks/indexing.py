"""Index builds: what each row of the table in README.md measures, against one process.

Both sides build the same kind over the same rows and commit it; what is compared is that it covers them all. The
searches of the vector indexes are compared by ``python -m benchmarks recall``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from benchmarks.harness import Case, cached, restored
from benchmarks.reading import narrow
from benchmarks.searching import DIMENSION, make_table
from lance_ray import create_index, create_scalar_index, list_indices

DOCUMENTS = 200_000
WORDS = 20_000


def documents(uri: str, rows: int) -> None:
    """Texts of 60 words, frequent ones as frequent as Zipf's law has it, in 8 fragments."""
    random = np.random.default_rng(0)
    share = -(-rows // 8)
    for first in range(0, rows, share):
        count = min(rows, first + share) - first
        words = np.minimum(random.zipf(1.2, size=(count, 60)), WORDS)
        texts = [" ".join(f"w{word}" for word in row) for row in words]
        table = pa.table({"id": np.arange(first, first + count), "text": texts})
        lance.write_dataset(table, uri, mode="append" if first else "create")


def _covered(uri: str, name: str) -> int:
    return next(item.rows for item in list_indices(uri) if item.name == name)


def _engine_scalar(uri: str, column: str, kind: Any) -> int:
    lance.dataset(uri).create_scalar_index(column, kind, name="bench")
    return _covered(uri, "bench")


def _ours_scalar(uri: str, column: str, kind: str) -> int:
    create_scalar_index(uri, column=column, index_type=kind, name="bench", progress=False)
    return _covered(uri, "bench")


def _engine_vector(uri: str, partitions: int) -> int:
    lance.dataset(uri).create_index(
        "vector", "IVF_PQ", name="bench", num_partitions=partitions, num_sub_vectors=DIMENSION // 8
    )
    return _covered(uri, "bench")


def _ours_vector(uri: str, partitions: int) -> int:
    create_index(
        uri,
        "vector",
        "IVF_PQ",
        name="bench",
        num_partitions=partitions,
        num_sub_vectors=DIMENSION // 8,
        progress=False,
    )
    return _covered(uri, "bench")


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """All cases of index building, at a scale of the published sizes."""
    rows = max(4000, int(20_000_000 * scale))
    numbers = cached(folder, f"narrow-{rows}", functools.partial(narrow, rows=rows, fragments=20))
    texts = max(800, int(DOCUMENTS * scale))
    text = cached(folder, f"documents_{texts}", functools.partial(documents, rows=texts))
    count = max(8000, int(1_000_000 * scale))
    vectors = cached(folder, f"vectors_{count}", functools.partial(make_table, rows=count, index=False))
    partitions = max(2, int(count**0.5) // 4)
    uri = str(folder / "to_index")
    for name, source, column, kind in (
        (f"BTREE over {rows:,} int64", numbers, "id", "BTREE"),
        (f"FTS over {texts:,} documents", text, "text", "INVERTED"),
    ):
        yield _case(
            name,
            source,
            uri,
            functools.partial(_engine_scalar, uri, column, kind),
            functools.partial(_ours_scalar, uri, column, kind),
        )
    name = f"IVF_PQ over {count:,} x {DIMENSION}, {partitions} partitions"
    yield _case(
        name,
        vectors,
        uri,
        functools.partial(_engine_vector, uri, partitions),
        functools.partial(_ours_vector, uri, partitions),
    )


def _case(name: str, source: str, uri: str, engine: Any, ours: Any) -> Case:
    # A copy each time: other areas share the tables, and must find no index there.
    return Case(name, engine, ours, 1.0, 0.7, before=functools.partial(restored, source, uri))
