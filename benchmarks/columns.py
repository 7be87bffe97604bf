"""Column evolution: what each row of the table in README.md measures, against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.harness import Case, cached, restored
from lance_ray import add_columns

SQL = {"computed": "a * 2 + b"}
VECTOR = pa.list_(pa.float32(), 768)


def function(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same as the SQL expression."""
    return pa.record_batch([pc.add(pc.multiply(batch.column("a"), 2), batch.column("b"))], ["computed"])


def vectors(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A vector of 768 floats from a number."""
    seeds = np.asarray(batch.column("a")).astype(np.float32)
    values = (seeds[:, None] * np.linspace(0, 1, 768, dtype=np.float32)).reshape(-1)
    return pa.record_batch([pa.FixedSizeListArray.from_arrays(values, 768)], ["computed"])


def numbers(uri: str, rows: int, fragments: int) -> None:
    """Four narrow columns."""
    share = -(-rows // fragments)
    for first in range(0, rows, share):
        ids = np.arange(first, min(rows, first + share))
        table = pa.table({"id": ids, "a": ids * 3, "b": ids % 97, "x": ids / 2})
        lance.write_dataset(table, uri, mode="append" if first else "create")


def _checked(uri: str) -> int:
    dataset = lance.dataset(uri)
    assert "computed" in dataset.schema.names  # noqa: S101 - a benchmark of nothing is worth nothing
    return dataset.count_rows("computed IS NOT NULL") if dataset.count_rows() < 10**6 else dataset.count_rows()


def _engine(uri: str, transform: Any) -> int:
    read = None if isinstance(transform, dict) else ["a", "b"]
    lance.dataset(uri).add_columns(transform, read_columns=read)
    return _checked(uri)


def _ours(uri: str, transform: Any) -> int:
    read = None if isinstance(transform, dict) else ["a", "b"]
    add_columns(uri, transform=transform, read_columns=read, progress=False)
    return _checked(uri)


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """The rows of the table."""
    work = str(folder / "with_column")
    sizes: list[tuple[str, int, int, Any]] = [
        ("by function", 20_000_000, 20, function),
        ("by SQL", 20_000_000, 20, SQL),
        ("768 floats", 300_000, 12, vectors),
    ]
    for name, full, fragments, transform in sizes:
        rows = max(2000, int(full * scale))
        make: Callable[[str], None] = functools.partial(numbers, rows=rows, fragments=fragments)
        source = cached(folder, f"numbers_{rows}", make)
        yield Case(
            f"computed column over {rows:,} rows, {name}",
            functools.partial(_engine, work, transform),
            functools.partial(_ours, work, transform),
            required=1.0,
            stretch=0.65 if transform is not SQL else 1.0,
            before=functools.partial(restored, source, work),
        )
