"""What a scan costs as a table grows: planning, first batch and driver memory, for 1,000 to 100,000 fragments and for
1 to 200 tasks.

The tables are made by committing the metadata of one small file again and again, so that only the manifest is large.
"""

from __future__ import annotations

import functools
import json
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow as pa
import ray
from lance.fragment import write_fragments

from benchmarks import chart
from benchmarks.harness import cached, memory_peak
from lance_ray.datasource import LanceDatasource, make_datasource
from lance_ray.options import PlanOptions, ScanOptions
from lance_ray.table import TableRef

SIZES = (1_000, 10_000, 100_000)
TASKS = (1, 2, 5, 10, 20, 50, 100, 200)
ROWS = 200
"""Rows of a fragment."""


@dataclass(frozen=True, slots=True)
class Planning:
    """One size measured. Seconds are of a fresh process cache; a scan's are of warm workers."""

    fragments: int
    asked_tasks: int | None
    """Blocks that were asked for; None leaves their number to the plan."""
    open_seconds: float
    outline_seconds: float
    plan_seconds: float
    tasks: int
    task_bytes: int
    """Of the largest task."""
    all_bytes: int
    """Of all tasks."""
    first_batch_seconds: float
    scan_seconds: float
    driver_mb: float
    """By how much the driver's private memory rose at most, from opening the table to the end of the scan."""


def repeated(uri: str, fragments: int) -> None:
    """A table of many fragments over one file."""
    data = pa.table({"id": np.arange(ROWS), "value": np.random.default_rng(5).random(ROWS)})
    written = write_fragments(data, uri, mode="create")
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(data.schema, written * fragments))


def measure(uri: str, fragments: int, asked: int | None = None) -> Planning:
    """Open, outline (what ``count()`` and ``schema()`` need), plan and scan one table."""
    peaks: list[float] = []
    with memory_peak(peaks, psutil.Process().pid, children=False):
        start = time.perf_counter()
        table = TableRef.fold(uri, {}).pin()
        opened = time.perf_counter()
        options = PlanOptions(override_num_blocks=asked)
        source: LanceDatasource = make_datasource([table], ScanOptions(), options)
        source.get_read_tasks(1)
        outlined = time.perf_counter()
        tasks = source.get_read_tasks(1, data_context=ray.data.DataContext.get_current())
        planned = time.perf_counter()
        sizes = [len(pickle.dumps(task)) for task in tasks]
        count = len(tasks)
        del source, tasks
        first, scanned = _scan(uri, fragments * ROWS, asked)
    return Planning(
        fragments,
        asked,
        opened - start,
        outlined - opened,
        planned - outlined,
        count,
        max(sizes),
        sum(sizes),
        first,
        scanned,
        peaks[0],
    )


def _scan(uri: str, rows: int, asked: int | None) -> tuple[float, float]:
    """Seconds to the first batch and to the last one."""
    start, first, seen = time.perf_counter(), 0.0, 0
    read = ray.data.read_lance(uri, override_num_blocks=asked)
    for batch in read.iter_batches(batch_size=None, batch_format="pyarrow"):
        first = first or time.perf_counter() - start
        seen += len(batch)
    if seen != rows:
        raise RuntimeError(f"{seen} rows instead of {rows}")
    return first, time.perf_counter() - start


def run(folder: Path, scale: float, sizes: Sequence[int] = SIZES) -> Iterator[Planning]:
    """All sizes with as many tasks as the plan wants, then all numbers of tasks over the middle size."""
    for size in sizes:
        count = max(10, int(size * scale))
        uri = cached(folder, f"repeated-{count}", functools.partial(repeated, fragments=count))
        if size == sizes[0]:
            _scan(uri, count * ROWS, None)  # starts the workers
        yield measure(uri, count)
    count = max(10, int(sizes[1] * scale))
    for asked in TASKS:
        if asked <= count / 50:
            yield measure(str(folder / f"repeated-{count}"), count, asked)


def as_json(row: Planning) -> str:
    """One JSON line."""
    return json.dumps(asdict(row))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """What one more costs: the slope of the straight line through the points."""
    places, values = (np.array(values) for values in zip(*points, strict=True))
    return float(np.polyfit(places, values, 1)[0])


def table(rows: Sequence[Planning]) -> str:
    """The results as a Markdown table, and what a fragment and a task cost."""
    lines = [
        "| fragments | open s | outline s | plan s | tasks | largest task bytes | first batch s | scan s | driver MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.fragments:,} | {row.open_seconds:.3f} | {row.outline_seconds:.3f} | {row.plan_seconds:.3f}"
        f" | {row.tasks} | {row.task_bytes:,} | {row.first_batch_seconds:.3f} | {row.scan_seconds:.3f}"
        f" | {row.driver_mb:.0f} |"
        for row in rows
    ]
    free = [row for row in rows if row.asked_tasks is None]
    asked = [row for row in rows if row.asked_tasks is not None]
    if len(free) > 1 and len(asked) > 1:
        plan = slope([(row.fragments, row.plan_seconds + row.open_seconds) for row in free])
        memory = slope([(row.fragments, row.driver_mb) for row in free])
        scan = slope([(row.tasks, row.scan_seconds) for row in asked])
        payload = slope([(row.tasks, row.all_bytes) for row in asked])
        lines += [
            "",
            f"One more fragment: {1e6 * plan:.1f} us to open and plan, {1e6 * memory:.0f} bytes of the driver's memory."
            f" One more task: {1e3 * scan:.1f} ms of a scan, {payload:,.0f} bytes sent.",
        ]
    return "\n".join(lines)


def draw(rows: Sequence[Planning], file: Path) -> None:
    """The curves as a picture."""
    free = [row for row in rows if row.asked_tasks is None]
    asked = [row for row in rows if row.asked_tasks is not None]
    seconds = {
        "open": [(row.fragments, row.open_seconds) for row in free],
        "plan": [(row.fragments, row.plan_seconds) for row in free],
        "first batch": [(row.fragments, row.first_batch_seconds) for row in free],
        "whole scan": [(row.fragments, row.scan_seconds) for row in free],
    }
    tasks = {
        "plan": [(row.tasks, row.plan_seconds) for row in asked],
        "first batch": [(row.tasks, row.first_batch_seconds) for row in asked],
        "whole scan": [(row.tasks, row.scan_seconds) for row in asked],
    }
    size = f"{asked[0].fragments:,} fragments" if asked else ""
    panels: dict[str, tuple[str, chart.Curves]] = {
        "seconds by fragments": ("fragments", seconds),
        "driver memory, MB": ("fragments", {"peak": [(row.fragments, max(0.1, row.driver_mb)) for row in free]}),
        f"seconds by tasks, {size}": ("tasks", tasks),
        "bytes sent to a task": ("tasks", {"largest": [(row.tasks, row.task_bytes) for row in asked]}),
    }
    chart.curves(panels, file)
