"""Writing: what each row of the table in README.md measures."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from benchmarks.harness import Case
from lance_ray import write_lance
from lance_ray.ledger import JobRef, WrittenPath
from lance_ray.table import TableRef


def vector_blocks(rows: int, width: int, blocks: int) -> Dataset:
    """A materialized dataset of float32 vectors in the object store."""
    size = rows // blocks

    def make(batch: dict[str, np.ndarray]) -> pa.Table:
        random = np.random.default_rng(int(batch["id"][0]))
        values = random.random(size * width, dtype=np.float32)
        ids = np.arange(size) + int(batch["id"][0]) * size
        return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values, width)})

    made: Dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(make, batch_size=1).materialize()
    return made


def small_blocks(blocks: int, rows: int) -> Dataset:
    """A materialized dataset of many small blocks."""
    return ray.data.from_arrow(
        [pa.table({"id": np.arange(i * rows, (i + 1) * rows), "value": np.random.random(rows)}) for i in range(blocks)]
    )


def _engine(tables: list[pa.Table], uri: str) -> int:
    reader = pa.RecordBatchReader.from_batches(tables[0].schema, (b for table in tables for b in table.to_batches()))
    return int(lance.write_dataset(reader, uri).count_rows())


def _ours(dataset: Dataset, uri: str, files: int | None = None) -> int:
    report = write_lance(dataset, uri)
    if files is not None and report.files != files:
        raise RuntimeError(f"{report.files} files instead of {files}")
    return report.rows


def _case(dataset: Dataset, uri: str, name: str, bounds: tuple[float, float], files: int | None = None) -> Case:
    tables = ray.get(dataset.to_arrow_refs())
    return Case(
        name,
        functools.partial(_engine, tables, uri),
        functools.partial(_ours, dataset, uri, files),
        *bounds,
        absolute=files is not None,
        before=functools.partial(shutil.rmtree, uri, ignore_errors=True),
    )


def _ledger(uri: str, files: int, rows: int) -> int:
    """All that the ledger does for a write, one after the other (the notes are made by workers, side by side)."""
    job = JobRef(TableRef.fold(uri, {}).unpinned(), "bench")
    with job.running("write (create)"):
        for number in range(files):
            job.record([WrittenPath(f"{number:08}.lance")])
        if not job.is_open():
            raise RuntimeError("the ledger is closed")
    job.close(files)
    return rows


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """All cases of writing, at a scale of the published sizes."""
    uri = str(folder / "written")
    blocks = max(2, int(32 * scale))
    rows = int(2e9 / 768 / 4 / 32) * blocks
    size = rows * 768 * 4 / 1e9
    vectors = vector_blocks(rows, 768, blocks)
    written = _case(vectors, uri, f"write {size:.2g} GB of vectors", (1.2, 0.8))
    yield written
    report = write_lance(vectors, uri, mode="overwrite")
    ledger = functools.partial(_ledger, uri, report.files, report.rows)
    yield Case(
        f"the ledger's part in it ({report.files} files)", written.ours, ledger, 0.02, 0.01, before=written.before
    )
    count = max(20, int(2000 * scale))
    yield _case(small_blocks(count, 500), uri, f"write {count:,} blocks of 500 rows", (1.0, 0.7), files=1)
