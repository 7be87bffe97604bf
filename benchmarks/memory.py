"""Data ten times larger than Ray's object store: ``python -m benchmarks.memory``.

Ray is started with a small object store, and each kind of work is done on a table of vectors ten times its size. What
is told is the peak of private memory of the driver (over what it had before) and of the largest worker process (all of
it: some 100 MB before any work, and what it keeps of earlier work), and what Ray spilled to disk; each has a bound.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow as pa
import ray

from benchmarks.harness import emit
from lance_ray import add_columns, compact_files, create_index, nearest_join, read_lance, vector_search, write_lance

DIMENSION = 128
TIMES = 10
"""How much larger the data is than the object store."""
BLOCK_BYTES = 8 * 1024**2
MB = 1e6


@dataclass(frozen=True, slots=True)
class Bound:
    """What one kind of work may use: private MB of the driver and of a task's process, spilled share of the data."""

    driver_mb: float
    worker_mb: float
    spilled: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kind of work used."""

    name: str
    data_mb: float
    seconds: float
    driver_mb: float
    worker_mb: float
    spilled_mb: float
    bound: Bound

    @property
    def kept(self) -> bool:
        """Whether every bound was kept."""
        spilled = self.spilled_mb <= self.bound.spilled * self.data_mb
        return spilled and self.driver_mb <= self.bound.driver_mb and self.worker_mb <= self.bound.worker_mb

    def as_json(self) -> str:
        """One JSON line."""
        return json.dumps({**asdict(self), "kept": self.kept})


class Watch:
    """Peaks of private memory over what there was before, and the bytes that Ray wrote to its spill folder."""

    def __init__(self, spill: Path) -> None:
        self.driver_mb = self.worker_mb = self.spilled_mb = 0.0
        self._spill, self._seen = spill, dict[str, int]()
        self._driver = psutil.Process()
        self._base = _private(self._driver)
        self._stop = threading.Event()

    def look(self) -> None:
        """Once around all processes."""
        self.driver_mb = max(self.driver_mb, (_private(self._driver) - self._base) / MB)
        for process in self._driver.children(recursive=True):
            try:
                if process.name().startswith("ray::"):
                    self.worker_mb = max(self.worker_mb, _private(process) / MB)
            except psutil.Error:
                continue
        for path in self._spill.rglob("*"):
            if path.is_file():
                self._seen[str(path)] = max(self._seen.get(str(path), 0), _size(path))
        self.spilled_mb = sum(self._seen.values()) / MB

    @contextmanager
    def running(self) -> Iterator[None]:
        """Looks every 50 ms until the end of the block."""
        thread = threading.Thread(target=self._look_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.look()

    def _look_on(self) -> None:
        while not self._stop.wait(0.05):
            self.look()


def _private(process: psutil.Process) -> float:
    info = process.memory_info()
    return float(max(0, info.rss - info.shared))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def vectors(rows: int, blocks: int) -> ray.data.Dataset:
    """Blocks that come into being as they are needed."""

    def make(batch: dict[str, np.ndarray]) -> pa.Table:
        number = int(batch["id"][0])
        values = np.random.default_rng(number).standard_normal(rows * DIMENSION, dtype=np.float32)
        ids = np.arange(number * rows, (number + 1) * rows)
        return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values, DIMENSION)})

    return ray.data.range(blocks, override_num_blocks=blocks).map_batches(make, batch_size=None)


def _doubled(batch: pa.Table) -> pa.Table:
    vector = batch.column("vector").combine_chunks()
    values = pa.FixedSizeListArray.from_arrays(vector.flatten().to_numpy() * 2, DIMENSION)
    return batch.set_column(batch.schema.get_field_index("vector"), "vector", values)


def _computed(batch: pa.RecordBatch) -> pa.RecordBatch:
    values = batch.column("vector").flatten().to_numpy().reshape(-1, DIMENSION)
    return pa.record_batch([pa.array(np.linalg.norm(values, axis=1))], ["norm"])


class Works:
    """The kinds of work, in an order in which each finds what it needs."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.uri, self.copy = str(folder / "vectors"), str(folder / "copy")
        self.rows = BLOCK_BYTES // (4 * DIMENSION)
        self.blocks = max(1, int(megabytes * MB / BLOCK_BYTES))
        self.total = self.rows * self.blocks

    def write(self) -> None:
        write_lance(vectors(self.rows, self.blocks), self.uri)
        self._check(self.uri)

    def read(self) -> None:
        batches = read_lance(self.uri).iter_batches(batch_size=None, batch_format="pyarrow")
        self._equal(sum(len(batch) for batch in batches))

    def rewrite(self) -> None:
        mapped = read_lance(self.uri).map_batches(_doubled, batch_format="pyarrow", batch_size=None)
        write_lance(mapped, self.copy, max_rows_per_file=4 * self.rows)
        self._check(self.copy)

    def compact(self) -> None:
        before = len(lance.dataset(self.copy).get_fragments())
        compact_files(self.copy, compaction_options={"target_rows_per_fragment": 16 * self.rows}, progress=False)
        self._check(self.copy)
        if before > 4 and len(lance.dataset(self.copy).get_fragments()) >= before:
            raise RuntimeError("nothing was compacted")

    def add_column(self) -> None:
        add_columns(self.copy, transform=_computed, read_columns=["vector"], progress=False)
        self._check(self.copy)

    def search(self) -> None:
        queries = np.random.default_rng(0).standard_normal((100, DIMENSION), dtype=np.float32)
        nearest = {"column": "vector", "q": queries, "k": 10, "use_index": False}
        found = vector_search(self.uri, nearest=nearest, columns=["id"])
        if found.num_rows != 1000:
            raise RuntimeError(f"{found.num_rows} rows instead of 1000")

    def join(self) -> None:
        sample = read_lance(self.uri, columns=["vector"], limit=200)
        joined = nearest_join(sample, self.uri, on="vector", k=3, columns=["id"], nearest={"use_index": False})
        if joined.count() != 200:
            raise RuntimeError("the join lost rows")

    def index(self) -> None:
        create_index(self.uri, "vector", "IVF_PQ", num_partitions=32, num_sub_vectors=16, progress=False)

    def _check(self, uri: str) -> None:
        self._equal(lance.dataset(uri).count_rows())

    def _equal(self, rows: int) -> None:
        if rows != self.total:
            raise RuntimeError(f"{rows} rows instead of {self.total}")

    def all(self) -> Iterator[tuple[str, Callable[[], None], Bound]]:
        """Each with its bound."""
        yield "write", self.write, Bound(150, 400)
        yield "read", self.read, Bound(150, 500)
        yield "read, map, write", self.rewrite, Bound(150, 600)
        yield "compact", self.compact, Bound(150, 800)
        yield "add a column", self.add_column, Bound(150, 1000)
        yield (
            "flat search, 100 queries",
            self.search,
            Bound(1200, 1200),
        )  # a small table is searched by the driver itself
        yield "nearest_join of 200", self.join, Bound(150, 1300)
        yield "build IVF_PQ", self.index, Bound(150, 1500)


def run(store_mb: float, folder: Path, only: Sequence[str] = (), file: Path | None = None) -> list[Usage]:
    """Every kind of work on its own Ray with an object store of this size."""
    spill = folder / "spilled"
    spill.mkdir(parents=True, exist_ok=True)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=int(store_mb * MB),
        object_spilling_directory=str(spill),
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = []
    try:
        for name, work, bound in Works(folder, TIMES * store_mb).all():
            if only and name not in only:
                continue
            watch, start = Watch(spill), time.perf_counter()
            with watch.running():
                work()
            seconds = time.perf_counter() - start
            usage = Usage(name, TIMES * store_mb, seconds, watch.driver_mb, watch.worker_mb, watch.spilled_mb, bound)
            emit(usage.as_json(), file)
            found.append(usage)
    finally:
        ray.shutdown()
    return found


def table(usages: Sequence[Usage], store_mb: float) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"| {TIMES * store_mb:,.0f} MB of vectors, object store of {store_mb:,.0f} MB | s | driver MB"
        " | largest worker MB | spilled MB | bounds | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for item in usages:
        bounds = f"{item.bound.driver_mb:g} / {item.bound.worker_mb:g} / {item.bound.spilled * item.data_mb:g}"
        verdict = "kept" if item.kept else "EXCEEDED"
        lines.append(
            f"| {item.name} | {item.seconds:.1f} | {item.driver_mb:.0f} | {item.worker_mb:.0f}"
            f" | {item.spilled_mb:.0f} | {bounds} | {verdict} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Usage]:
    """Run and print a table; ends with 1 when a bound was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--store", type=float, default=160, help="megabytes of the object store (default 160)")
    parser.add_argument("--only", nargs="*", default=(), help="only these kinds of work (some need those before)")
    parser.add_argument("--data", type=Path, help="where the tables are made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file to append the JSON lines to")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="lance-ray-bench-", dir=options.data))
    try:
        usages = run(options.store, folder, options.only, options.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(usages, options.store))
    return usages


if __name__ == "__main__":
    sys.exit(not all(usage.kept for usage in main()))
