"""What planning costs as a table grows: seconds on the driver and bytes of a task, for 1,000 to 100,000 fragments.

The tables are made by committing the metadata of one small file again and again, so that only the manifest is large.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import ray
from lance.fragment import write_fragments

from benchmarks.harness import cached
from lance_ray.datasource import LanceDatasource, make_datasource
from lance_ray.options import PlanOptions, ScanOptions
from lance_ray.table import TableRef


@dataclass(frozen=True, slots=True)
class Planning:
    """One size measured. Seconds are of a fresh process cache."""

    fragments: int
    open_seconds: float
    outline_seconds: float
    plan_seconds: float
    tasks: int
    task_bytes: int


def repeated(uri: str, fragments: int) -> None:
    """A table of many fragments over one file."""
    data = pa.table({"id": np.arange(200), "value": np.random.default_rng(5).random(200)})
    written = write_fragments(data, uri, mode="create")
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(data.schema, written * fragments))


def measure(uri: str, fragments: int) -> Planning:
    """Open, outline (what ``count()`` and ``schema()`` need) and plan one table."""
    start = time.perf_counter()
    table = TableRef.fold(uri, {}).pin()
    opened = time.perf_counter()
    source: LanceDatasource = make_datasource([table], ScanOptions(), PlanOptions())
    source.get_read_tasks(1)
    outlined = time.perf_counter()
    tasks = source.get_read_tasks(1, data_context=ray.data.DataContext.get_current())
    planned = time.perf_counter()
    largest = max(len(pickle.dumps(task)) for task in tasks)
    return Planning(fragments, opened - start, outlined - opened, planned - outlined, len(tasks), largest)


def run(folder: Path, scale: float) -> Iterator[Planning]:
    """All sizes, at a scale of the published ones."""
    for size in (1_000, 10_000, 100_000):
        count = max(10, int(size * scale))
        uri = cached(folder, f"repeated-{count}", functools.partial(repeated, fragments=count))
        yield measure(uri, count)


def table(rows: list[Planning]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| fragments | open s | outline s | plan s | tasks | largest task bytes |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.fragments:,} | {row.open_seconds:.3f} | {row.outline_seconds:.3f} | {row.plan_seconds:.3f}"
        f" | {row.tasks} | {row.task_bytes:,} |"
        for row in rows
    ]
    return "\n".join(lines)
