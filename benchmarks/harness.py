"""Paired timings: engine and connector in turn (A B A B ...), wall and CPU seconds of the whole process tree."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import psutil
import pyarrow as pa
import ray

Run = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Case:
    """One question: the same work by the engine alone and by the connector; both return the number of rows."""

    name: str
    engine: Run
    ours: Run
    required: float
    stretch: float
    absolute: bool = False
    """Whether the bounds are seconds, not multiples of the engine."""
    before: Callable[[], None] | None = None
    """Run before each timing, not timed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Median wall and CPU seconds of a side, the spread of its walls, and the peak of private memory it added."""

    wall: float
    cpu: float
    low: float
    high: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Result:
    """A case measured."""

    name: str
    rows: int
    engine: Timing
    ours: Timing
    required: float
    stretch: float
    absolute: bool

    @property
    def figure(self) -> float:
        """What is compared with the bounds: seconds, or the ratio of median walls."""
        return self.ours.wall if self.absolute else self.ours.wall / self.engine.wall

    @property
    def verdict(self) -> str:
        """``stretch``, ``required`` or ``BEHIND``."""
        return "stretch" if self.figure <= self.stretch else "required" if self.figure <= self.required else "BEHIND"

    def as_json(self) -> str:
        """One JSON line."""
        return json.dumps({**asdict(self), "figure": self.figure, "verdict": self.verdict})


def tree(root: int | None = None) -> list[psutil.Process]:
    """A process (this one by default) and every process below it, Ray's included."""
    top = psutil.Process(root)
    return [top, *top.children(recursive=True)]


def cpu_seconds(root: int | None = None) -> float:
    """CPU seconds that a process tree has used, ended children of each process included."""
    total = 0.0
    for process in tree(root):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@contextmanager
def cpu_watched(into: list[float], root: int) -> Iterator[None]:
    """Appends the CPU seconds that a process tree used meanwhile, those of processes that ended included: Ray reaps
    its workers in a way that loses their times, so that the tree is looked at every 0.3 s.
    """
    first, last, stop = _cpu_of(root), {}, threading.Event()

    def sample() -> None:
        while not stop.wait(0.3):
            last.update(_cpu_of(root))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        last.update(_cpu_of(root))
        into.append(sum(used - first.get(process, 0.0) for process, used in last.items()))


def _cpu_of(root: int) -> dict[tuple[int, float], float]:
    found = {}
    for process in tree(root) if psutil.pid_exists(root) else []:
        try:
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue
    return found


def private_bytes(root: int | None = None, *, children: bool = True) -> int:
    """Memory of a process tree that is not shared (the object store is shared, so Ray's own copy does not count)."""
    total = 0
    for process in tree(root) if children else [psutil.Process(root)]:
        try:
            info = process.memory_info()
        except psutil.Error:
            continue
        total += max(0, info.rss - info.shared)
    return total


@contextmanager
def memory_peak(into: list[float], root: int | None = None, *, children: bool = True) -> Iterator[None]:
    """Appends the peak that private memory rose by, in MB, sampled every 20 ms."""
    base, peak, stop = private_bytes(root, children=children), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, private_bytes(root, children=children) - base)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        into.append(peak / 1e6)


WARM_UP_SECONDS, WARM_UP_RUNS = 4.0, 12
"""Both sides run uncounted for so long, or so often."""


@ray.remote
def _fill(size: int, until: float) -> int:
    block = np.zeros(64 * 1024**2, dtype=np.uint8)
    held = [ray.put(block) for _ in range(size // block.nbytes)]
    time.sleep(max(0.0, until - time.time()))  # so that each worker process fills its share
    return len(held)


def warm_object_store(rounds: int = 4) -> None:
    """Fills Ray's object store and empties it again. A process that writes to a page of it for the first time pays for
    that, which costs more than a scan itself, until the pages have been used; a Ray that has worked a while is timed.
    """
    store = ray.cluster_resources()["object_store_memory"]
    workers = int(ray.cluster_resources()["CPU"])
    for _ in range(rounds):
        share = int(0.9 * store / workers)
        ray.get([_fill.remote(share, time.time() + store / 1e9 / 2) for _ in range(workers)])


def measure(case: Case, repeats: int, *, memory: bool) -> Result:
    """Warm up, then time both sides in turn; memory in a run of its own, because sampling costs time."""
    rows = _warm_up(case, repeats)
    sides: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for _ in range(repeats):
        for side, run in zip(sides, (case.engine, case.ours), strict=True):
            _, wall, cpu = _once(case, run)
            side.append((wall, cpu))
    peaks: list[float] = []
    for run in (case.engine, case.ours):
        if memory:
            if case.before:
                case.before()
            with memory_peak(peaks):
                run()
        else:
            peaks.append(0.0)
    engine, ours = (_timing(side, peak) for side, peak in zip(sides, peaks, strict=True))
    return Result(case.name, rows, engine, ours, case.required, case.stretch, case.absolute)


def _warm_up(case: Case, repeats: int) -> int:
    """Runs both sides as often as warming up needs (once in a smoke test); the number of rows that both give."""
    started = time.perf_counter()
    for _ in range(WARM_UP_RUNS if repeats > 1 else 1):
        rows = _once(case, case.engine)[0]
        if _once(case, case.ours)[0] != rows:
            raise RuntimeError(f"{case.name}: the two sides disagree on the number of rows")
        if time.perf_counter() - started > WARM_UP_SECONDS:
            break
    return rows


def _once(case: Case, run: Run) -> tuple[int, float, float]:
    if case.before:
        case.before()
    cpu, start = cpu_seconds(), time.perf_counter()
    rows = run()
    wall = time.perf_counter() - start
    return rows, wall, cpu_seconds() - cpu


def _timing(side: list[tuple[float, float]], peak: float) -> Timing:
    walls = [wall for wall, _ in side]
    return Timing(statistics.median(walls), statistics.median(cpu for _, cpu in side), min(walls), max(walls), peak)


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| work | engine s (CPU) | ours s (CPU) | spread | memory MB | figure | required / stretch | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for result in results:
        unit = " s" if result.absolute else "x"
        lines.append(
            f"| {result.name} | {result.engine.wall:.3f} ({result.engine.cpu:.2f}) | {result.ours.wall:.3f}"
            f" ({result.ours.cpu:.2f}) | {result.ours.low:.3f}-{result.ours.high:.3f} | {result.ours.memory_mb:.0f}"
            f" | {result.figure:.3g}{unit} | {result.required:g} / {result.stretch:g} | {result.verdict} |"
        )
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "pylance": lance.__version__,
        "ray": ray.__version__,
        "pyarrow": pa.__version__,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def emit(line: str, file: Path | None) -> None:
    """Prints a JSON line, and appends it to a file if there is one."""
    print(line, flush=True)
    if file is not None:
        with file.open("a") as lines:
            lines.write(line + "\n")


def restored(source: str, uri: str) -> None:
    """A copy of a table that may be changed: data files are never written again, so that copies share them."""
    shutil.rmtree(uri, ignore_errors=True)
    shutil.copytree(source, uri, copy_function=_link)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def cached(folder: Path, name: str, make: Callable[[str], None]) -> str:
    """The table of this name, made once in the folder."""
    target = folder / name
    if not (target / "_versions").exists():
        print(f"making {name}", file=sys.stderr)
        make(str(target))
    return str(target)
