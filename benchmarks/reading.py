"""Reading: what each row of the table in README.md measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
from lance.fragment import write_fragments
from ray.data import Dataset
from ray.data.expressions import Expr, col

from benchmarks.harness import Case, cached
from benchmarks.sides import heavy


def narrow(uri: str, rows: int, fragments: int) -> None:
    """Four narrow columns: id int64, key int32, value float64, flag bool."""
    schema = pa.schema({"id": pa.int64(), "key": pa.int32(), "value": pa.float64(), "flag": pa.bool_()})
    size = rows // fragments

    def batches() -> Iterator[pa.RecordBatch]:
        random = np.random.default_rng(1)
        for start in range(0, rows, size):
            ids = np.arange(start, start + size)
            yield pa.record_batch(
                [ids, random.permutation(ids % 1_000_000).astype("int32"), random.random(size), ids % 3 == 0],
                schema=schema,
            )

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    lance.write_dataset(reader, uri, max_rows_per_file=size)


def indexed(uri: str, rows: int, fragments: int) -> None:
    """The narrow table with a BTREE on ``id``."""
    narrow(uri, rows, fragments)
    lance.dataset(uri).create_scalar_index("id", "BTREE")


def vectors(uri: str, rows: int, width: int, fragments: int) -> None:
    """An id and a vector of float32."""
    schema = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), width)})

    def batches() -> Iterator[pa.RecordBatch]:
        random = np.random.default_rng(2)
        for start in range(0, rows, 5000):
            count = min(5000, rows - start)
            values = pa.FixedSizeListArray.from_arrays(random.random(count * width, dtype=np.float32), width)
            yield pa.record_batch([np.arange(start, start + count), values], schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    lance.write_dataset(reader, uri, max_rows_per_file=rows // fragments)


def many_columns(uri: str, rows: int, columns: int) -> None:
    """Columns c0, c1, ... of float64."""
    schema = pa.schema({f"c{i}": pa.float64() for i in range(columns)})

    def batches() -> Iterator[pa.RecordBatch]:
        random = np.random.default_rng(3)
        for start in range(0, rows, 50_000):
            count = min(50_000, rows - start)
            yield pa.record_batch([random.random(count) for _ in range(columns)], schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), uri, max_rows_per_file=rows // 4)


def many_fragments(uri: str, fragments: int, rows: int) -> None:
    """Small fragments, each its own file, in one version."""
    random = np.random.default_rng(4)
    schema = pa.schema({"id": pa.int64(), "value": pa.float64(), "text": pa.string()})
    ids = np.arange(fragments * rows)
    data = pa.table([ids, random.random(len(ids)), pa.array([f"row {i}" for i in ids])], schema=schema)
    written = write_fragments(data, uri, schema=schema, mode="create", max_rows_per_file=rows)
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, written))


def one_fragment(folder: Path, scale: float) -> tuple[str, int]:
    """The narrow table in a single fragment; its rows."""
    rows = max(1000, int(8_000_000 * scale))
    return cached(folder, f"one-{rows}", functools.partial(narrow, rows=rows, fragments=1)), rows


def consume(dataset: Dataset) -> int:
    """Every block, as Arrow; the number of rows."""
    return sum(len(batch) for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def scan_engine(uri: str, **options: object) -> int:
    """The engine's scan with all its threads; the number of rows."""
    return sum(batch.num_rows for batch in lance.dataset(uri).scanner(**options).to_batches())  # type: ignore[arg-type] # passed on


def _ours(uri: str, **options: Any) -> int:
    return consume(ray.data.read_lance(uri, **options))


def _filtered_by(uri: str, expression: Expr) -> int:
    return consume(ray.data.read_lance(uri).filter(expr=expression))


def _taken(uri: str) -> int:
    return len(ray.data.read_lance(uri).limit(10).take_all())


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """All cases of reading, at a scale of the published sizes."""
    rows = int(20_000_000 * scale)
    read = ray.data.read_lance
    table = cached(folder, f"narrow-{rows}", functools.partial(narrow, rows=rows, fragments=20))
    yield Case(f"scan {rows:,} x 4 narrow", lambda: scan_engine(table), lambda: consume(read(table)), 2.0, 1.4)
    count = int(300_000 * scale)
    wide = cached(folder, f"wide-{count}", functools.partial(vectors, rows=count, width=768, fragments=12))
    yield Case(f"scan {count:,} x 768 float32", lambda: scan_engine(wide), lambda: consume(read(wide)), 2.0, 1.5)
    count = int(2_000_000 * scale)
    columns = cached(folder, f"columns-{count}", functools.partial(many_columns, rows=count, columns=50))
    one = ["c7"]
    engine_one = functools.partial(scan_engine, columns, columns=one)
    yield Case("1 of 50 columns, columns=", engine_one, lambda: consume(read(columns, columns=one)), 0.10, 0.05, True)
    yield Case(
        "1 of 50 columns, select_columns",
        engine_one,
        lambda: consume(read(columns).select_columns(one)),
        0.10,
        0.05,
        True,
    )
    yield from _filtered(folder, table, rows)
    yield from _limits(table, wide)
    yield from _fragments(folder, max(20, int(5000 * scale)))
    yield from _heavy(folder, scale)


def _heavy(folder: Path, scale: float) -> Iterator[Case]:
    uri, rows = one_fragment(folder, scale)

    def engine() -> int:
        batches = lance.dataset(uri).scanner(batch_size=65_536).to_batches()
        return sum(heavy(pa.Table.from_batches([batch])).num_rows for batch in batches)

    def ours() -> int:
        mapped = ray.data.read_lance(uri).map_batches(
            heavy, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
        )
        return consume(mapped)

    yield Case(f"1 fragment of {rows:,}, heavy map_batches", engine, ours, 1.3, 0.9)


def _filtered(folder: Path, table: str, rows: int) -> Iterator[Case]:
    few = max(1, rows // 10_000)
    with_index = cached(folder, f"indexed-{rows}", functools.partial(indexed, rows=rows, fragments=20))
    for name, uri, text, expression, bounds in (
        ("0.01 % filter", table, "value < 0.0001", col("value") < 0.0001, (0.45, 0.3)),
        ("0.01 % filter, BTREE", with_index, f"id < {few}", col("id") < few, (0.2, 0.12)),
    ):
        engine = functools.partial(scan_engine, uri, filter=text)
        yield Case(f"{name}, string", engine, functools.partial(_ours, uri, filter=text), *bounds, True)
        yield Case(f"{name}, expr=", engine, functools.partial(_filtered_by, uri, expression), *bounds, True)


def _limits(table: str, wide: str) -> Iterator[Case]:
    for name, uri in (("narrow", table), ("wide", wide)):
        yield Case(
            f"limit(10).take_all(), {name}",
            functools.partial(scan_engine, uri, limit=10),
            functools.partial(_taken, uri),
            0.15,
            0.08,
            True,
        )


def _fragments(folder: Path, count: int) -> Iterator[Case]:
    read = ray.data.read_lance
    many = cached(folder, f"fragments-{count}", functools.partial(many_fragments, fragments=count, rows=200))
    yield Case(f"{count:,} fragments x 200, scan", lambda: scan_engine(many), lambda: consume(read(many)), 2.5, 1.8)
    yield Case(
        f"{count:,} fragments, count()",
        lambda: lance.dataset(many).count_rows(),
        lambda: read(many).count(),
        0.03,
        0.02,
        True,
    )
    yield Case(
        f"{count:,} fragments, schema()",
        lambda: len(lance.dataset(many).schema),
        lambda: len(read(many).schema().names),
        0.02,
        0.02,
        True,
    )
    yield Case(
        f"{count:,} fragments, filtered",
        lambda: scan_engine(many, filter="value < 0.01"),
        lambda: consume(read(many, filter="value < 0.01")),
        2.0,
        1.5,
    )
