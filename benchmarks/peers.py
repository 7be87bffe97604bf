"""This package, plain pylance and the peers in one run: ``make bench-peers``.

Every side is a process of its own (:mod:`benchmarks.sides`), with its own virtual environment and, where it uses Ray, a
Ray of its own that has done the same work before; the sides do each piece of work in turn (A B C D E A B C D E ...).
Wall seconds are of the call, CPU seconds of the side's process tree. A side that fails, takes too long or finds other
rows is told with what it did.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from benchmarks import chart, columns, compaction, indexing, reading, searching
from benchmarks.harness import cached, cpu_watched, emit, environment, memory_peak, restored
from benchmarks.sides import LACKS

SIDES = Path(__file__).with_name("sides.py")
TITLES = {
    "engine": "engine",
    "ours": "ours",
    "ray": "Ray's built-in",
    "lance-ray": "lance-ray 0.5.0",
    "daft-lance": "daft-lance 0.6.0",
}


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work, the same for all sides, with what is asked of this package."""

    name: str
    call: str
    arguments: dict[str, Any]
    required: float
    stretch: float
    absolute: bool = False
    """Whether the bounds are seconds, not multiples of the engine."""
    before: Callable[[], None] | None = None
    """Run before each timing, not timed."""
    prepare: dict[str, Any] | None = None
    """Data that each side makes first and keeps in memory."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What one side did: medians over its runs, or why there are none."""

    wall: float | None = None
    cpu: float | None = None
    memory_mb: float | None = None
    note: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One piece of work by every side."""

    name: str
    required: float
    stretch: float
    absolute: bool
    figures: dict[str, Figure] = field(default_factory=dict)

    def as_json(self) -> str:
        """One JSON line."""
        return json.dumps(asdict(self))


class Side:
    """The process of one side. It is started when first asked, and again after it was ended for taking too long."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        self.name, self._python, self._folder = name, python, folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def root(self) -> int:
        """The number of the running process."""
        return self._running().pid

    def ask(self, call: str, arguments: dict[str, Any], patience: float) -> dict[str, Any]:
        """The answer to one request, or an error when there is none in time."""
        process = self._running()
        assert process.stdin is not None  # noqa: S101 - a pipe, see Popen
        process.stdin.write(json.dumps({"work": call, "arguments": arguments}) + "\n")
        process.stdin.flush()
        return self._answer(process, patience)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            # Ray's workers look into the folder of the driver first, where no package may be.
            path = {"PYTHONPATH": str(SIDES.parents[1])} if self.name == "ours" else {}
            kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            with (self._folder / f"{self.name}.log").open("a") as log:
                self._process = subprocess.Popen(
                    [self._python, "-P", str(SIDES), self.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=kept | path | {"DAFT_PROGRESS_BAR": "0"},
                    cwd=self._folder,
                    text=True,
                )
            ready = self._answer(self._process, 120)
            if "error" in ready:
                told = (self._folder / f"{self.name}.log").read_text()[-1000:]
                raise RuntimeError(f"{self.name} does not start: {ready['error']}\n{told}")
        return self._process

    def _answer(self, process: subprocess.Popen[str], patience: float) -> dict[str, Any]:
        assert process.stdout is not None  # noqa: S101 - a pipe, see Popen
        if not select.select([process.stdout], [], [], patience)[0]:
            self.end()
            return {"error": f"over {patience:g} s"}
        line = process.stdout.readline()
        if not line:
            self.end()
            return {"error": f"the process ended with {process.returncode}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Ends the process and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            started = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            started = []
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(10)  # without requests it ends by itself, its Ray too
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for child in psutil.wait_procs(started, timeout=5)[1]:
            child.kill()


def compared(work: Work, sides: Sequence[Side], repeats: int, patience: float, *, memory: bool) -> Comparison:
    """One uncounted run of each side, then the counted ones in turn. Sides that fail are not asked again."""
    left, errors = list(sides), dict[str, str]()
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    if work.prepare is not None:
        for side in sides:
            _keep(side, side.ask("prepare", work.prepare, patience), left, errors)
    for _ in range(repeats + 1):
        for side in list(left):
            found = _once(work, side, patience)
            if _keep(side, found, left, errors):
                runs[side.name].append(found)
    peaks: dict[str, float] = {}
    for side in list(left) if memory else []:
        into: list[float] = []
        if _keep(side, _once(work, side, patience, memory_peak(into, side.root)), left, errors):
            peaks[side.name] = into[0]
    reference = runs["engine"][-1] if runs.get("engine") else None
    figures = {}
    for side in sides:
        if side.name in errors:
            figures[side.name] = Figure(error=errors[side.name])
            continue
        counted = runs[side.name][1:]
        wall, cpu = (statistics.median(run[name] for run in counted) for name in ("wall", "cpu"))
        note = _note(work, counted[-1], reference) if reference is not None else ""
        figures[side.name] = Figure(wall, cpu, peaks.get(side.name), note)
    return Comparison(work.name, work.required, work.stretch, work.absolute, figures)


def _keep(side: Side, found: dict[str, Any], left: list[Side], errors: dict[str, str]) -> bool:
    if "error" not in found:
        return True
    errors[side.name] = found["error"]
    left.remove(side)
    return False


def _once(
    work: Work, side: Side, patience: float, watched: AbstractContextManager[None] | None = None
) -> dict[str, Any]:
    if work.before is not None:
        work.before()
    used: list[float] = []
    with watched or cpu_watched(used, side.root):
        found = side.ask(work.call, work.arguments, patience)
    return found if "error" in found or not used else {**found, "cpu": used[0]}


def _note(work: Work, found: dict[str, Any], reference: dict[str, Any]) -> str:
    """In what an answer differs from the engine's."""
    notes = []
    if found["rows"] != reference["rows"]:
        notes.append(f"{found['rows']:,} rows instead of {reference['rows']:,}")
    if "ids" in found:
        same = len(set(found["ids"]) & set(reference["ids"])) / max(1, len(set(reference["ids"])))
        if same < 1:
            notes.append(f"{same:.0%} of the engine's rows")
        if not found["distance"]:
            notes.append("no distances")
    if work.call in {"write", "compact"} and found["files"] != 1:
        notes.append(f"{found['files']:,} files")
    return ", ".join(notes)


def works(folder: Path, scale: float) -> Iterator[Work]:
    """The rows of the table."""
    yield from _reads(folder, scale)
    yield from _writes(folder, scale)
    yield from _changes(folder, scale)
    yield from _searches(folder, scale)
    yield from _indexes(folder, scale)


def _reads(folder: Path, scale: float) -> Iterator[Work]:
    rows, wide = int(20_000_000 * scale), int(300_000 * scale)
    narrow = cached(folder, f"narrow-{rows}", functools.partial(reading.narrow, rows=rows, fragments=20))
    yield Work(f"scan {rows:,} x 4 narrow", "scan", {"uri": narrow}, 2.0, 1.4)
    uri = cached(folder, f"wide-{wide}", functools.partial(reading.vectors, rows=wide, width=768, fragments=12))
    yield Work(f"scan {wide:,} x 768 float32", "scan", {"uri": uri}, 2.0, 1.5)
    count = int(2_000_000 * scale)
    many = cached(folder, f"columns-{count}", functools.partial(reading.many_columns, rows=count, columns=50))
    for title, call in (("columns=", "scan"), ("select_columns", "select")):
        yield Work(f"1 of 50 columns, {title}", call, {"uri": many, "columns": ["c7"]}, 0.1, 0.05, True)
    few = max(1, rows // 10_000)
    indexed = cached(folder, f"indexed-{rows}", functools.partial(reading.indexed, rows=rows, fragments=20))
    for title, table, column, below, bounds in (
        ("0.01 % filter", narrow, "value", 0.0001, (0.45, 0.3)),
        ("0.01 % filter, BTREE", indexed, "id", few, (0.2, 0.12)),
    ):
        text = {"uri": table, "filter": f"{column} < {below}"}
        yield Work(f"{title}, string", "scan", text, *bounds, True)
        yield Work(f"{title}, expr=", "where", {"uri": table, "column": column, "below": below}, *bounds, True)
    for title, table in (("narrow", narrow), ("wide", uri)):
        yield Work(f"limit(10).take_all(), {title}", "limit", {"uri": table}, 0.15, 0.08, True)
    number = max(20, int(5000 * scale))
    parts = cached(folder, f"fragments-{number}", functools.partial(reading.many_fragments, fragments=number, rows=200))
    title = f"{number:,} fragments x 200"
    yield Work(f"{title}, scan", "scan", {"uri": parts}, 2.5, 1.8)
    yield Work(f"{title}, count()", "count", {"uri": parts}, 0.03, 0.02, True)
    yield Work(f"{title}, schema()", "schema", {"uri": parts}, 0.02, 0.02, True)
    yield Work(f"{title}, filtered", "scan", {"uri": parts, "filter": "value < 0.01"}, 2.0, 1.5)
    one, count = reading.one_fragment(folder, scale)
    yield Work(f"1 fragment of {count:,}, heavy map_batches", "heavy", {"uri": one}, 1.3, 0.9)


def _writes(folder: Path, scale: float) -> Iterator[Work]:
    uri = str(folder / "of-peers")
    again = functools.partial(_removed, uri)
    count = max(2, int(32 * scale))
    rows = int(2e9 / 768 / 4 / 32)
    given = {"kind": "vectors", "count": count, "rows": rows, "width": 768}
    size = rows * count * 768 * 4 / 1e9
    yield Work(f"write {size:.2g} GB of vectors", "write", {"uri": uri}, 1.2, 0.8, before=again, prepare=given)
    count = max(20, int(2000 * scale))
    given = {"kind": "small", "count": count, "rows": 500, "width": 1}
    name = f"write {count:,} blocks of 500 rows"
    yield Work(name, "write", {"uri": uri}, 1.0, 0.7, True, before=again, prepare=given)


def _removed(uri: str) -> None:
    shutil.rmtree(uri, ignore_errors=True)


def _changes(folder: Path, scale: float) -> Iterator[Work]:
    uri = str(folder / "of-peers")
    count = max(20, int(2000 * scale))
    for title, deleted in (("", False), (", 20 % deleted", True)):
        make = functools.partial(compaction.small_fragments, fragments=count, deleted=deleted)
        source = cached(folder, f"{'deleted' if deleted else 'small'}_{count}", make)
        again = functools.partial(restored, source, uri)
        yield Work(f"compact {count:,} fragments x 500 rows{title}", "compact", {"uri": uri}, 1.0, 0.6, before=again)
    rows = max(2000, int(20_000_000 * scale))
    source = cached(folder, f"numbers_{rows}", functools.partial(columns.numbers, rows=rows, fragments=20))
    again = functools.partial(restored, source, uri)
    for title, by, stretch in (("function", "function", 0.65), ("SQL", "sql", 1.0)):
        given = {"uri": uri, "by": by}
        yield Work(f"computed column over {rows:,} rows, {title}", "compute", given, 1.0, stretch, before=again)


def _searches(folder: Path, scale: float) -> Iterator[Work]:
    rows = max(4000, int(searching.ROWS * scale))
    make = functools.partial(searching.make_table, rows=rows)
    plain = cached(folder, f"vectors_{rows}", functools.partial(make, index=False))
    known = cached(folder, f"vectors_indexed_{rows}", functools.partial(make, index=True))
    file = folder / f"queries_{rows}.npy"
    np.save(file, searching.queries_of(plain, 100))
    for kind, uri, how, bounds in (
        ("flat", plain, {"use_index": False}, ((1.2, 1.2), (0.6, 0.35))),
        ("IVF_PQ", known, {"nprobes": 20, "refine_factor": 4}, ((1.5, 1.5), (1.0, 1.0))),
    ):
        for count, bound in zip((1, 100), bounds, strict=True):
            given = {"uri": uri, "file": str(file), "count": count, **how}
            plural = "query" if count == 1 else "queries"
            yield Work(f"{kind} {rows:,} x {searching.DIMENSION}, {count} {plural}", "search", given, *bound)


def _indexes(folder: Path, scale: float) -> Iterator[Work]:
    uri = str(folder / "of-peers")
    rows = max(4000, int(20_000_000 * scale))
    numbers = cached(folder, f"narrow-{rows}", functools.partial(reading.narrow, rows=rows, fragments=20))
    texts = max(800, int(indexing.DOCUMENTS * scale))
    text = cached(folder, f"documents_{texts}", functools.partial(indexing.documents, rows=texts))
    count = max(8000, int(1_000_000 * scale))
    make = functools.partial(searching.make_table, rows=count, index=False)
    vectors = cached(folder, f"vectors_{count}", make)
    given: dict[str, Any]
    for name, source, column, kind in (
        (f"BTREE over {rows:,} int64", numbers, "id", "BTREE"),
        (f"FTS over {texts:,} documents", text, "text", "INVERTED"),
    ):
        given = {"uri": uri, "column": column, "kind": kind}
        yield Work(name, "index", given, 1.0, 0.7, before=functools.partial(restored, source, uri))
    given = {"uri": uri, "partitions": max(2, int(count**0.5) // 4), "subs": searching.DIMENSION // 8}
    name = f"IVF_PQ over {count:,} x {searching.DIMENSION}"
    yield Work(name, "vector_index", given, 1.0, 0.7, before=functools.partial(restored, vectors, uri))


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table: wall seconds, CPU seconds in brackets, multiple of the engine's wall."""
    names = [name for name in TITLES if any(name in item.figures for item in comparisons)]
    lines = [
        "| work | " + " | ".join(f"{TITLES[name]}" for name in names) + " | required / stretch |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for item in comparisons:
        cells = [_cell(item, name) for name in names]
        unit = " s" if item.absolute else "x"
        bounds = f"{item.required:g} / {item.stretch:g}{unit}"
        lines.append(f"| {item.name} | " + " | ".join(cells) + f" | {bounds} |")
    return "\n".join(lines)


def _cell(item: Comparison, name: str) -> str:
    figure, engine = item.figures.get(name), item.figures.get("engine")
    if figure is None:
        return ""
    if figure.wall is None:
        if figure.error == LACKS:
            return "-"
        return figure.error if figure.error.startswith("over ") else f"fails: {figure.error[:70]}".replace("|", "/")
    cell = f"{figure.wall:.3f} ({figure.cpu:.2f})"
    if name != "engine" and engine is not None and engine.wall:
        cell += f" {figure.wall / engine.wall:.2f}x"
    if figure.memory_mb is not None:
        cell += f", {figure.memory_mb:,.0f} MB"
    return f"{cell}, {figure.note}" if figure.note else cell


def main(arguments: Sequence[str] | None = None) -> list[Comparison]:
    """Run the comparisons that were asked for, print JSON lines and a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--environments", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--sides", default=",".join(TITLES), help=f"of {', '.join(TITLES)} (default all)")
    parser.add_argument("--only", default="", help="only work whose name contains this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published sizes (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--patience", type=float, default=240, help="seconds for one run (default 240)")
    parser.add_argument("--memory", action="store_true", help="also the peak of private memory, in a run of its own")
    parser.add_argument("--data", type=Path, help="folder to keep the tables in (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file to append the JSON lines to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw the ratios to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lance-ray-bench-") as temporary:
        folder = (options.data or Path(temporary) / "tables").resolve()
        logs = Path(temporary) / "logs"
        for needed in (folder, logs):
            needed.mkdir(parents=True, exist_ok=True)
        comparisons = list(_compared(options, folder, logs))
    print(json.dumps({**environment(), "scale": options.scale}))
    print(table(comparisons))
    if options.chart is not None:
        chart.draw([json.loads(item.as_json()) for item in comparisons], options.chart)
    return comparisons


def _compared(options: argparse.Namespace, folder: Path, logs: Path) -> Iterator[Comparison]:
    with ExitStack() as stack:
        pythons = {name: _python(name, options.environments) for name in options.sides.split(",")}
        sides = [stack.enter_context(Side(name, python, logs)) for name, python in pythons.items()]
        for work in works(folder, options.scale):
            if options.only in work.name:
                found = compared(work, sides, options.repeats, options.patience, memory=options.memory)
                emit(found.as_json(), options.json)
                yield found


def _python(side: str, environments: Path | None) -> str:
    """The Python of a side: Ray's built-in support and the engine run with ours."""
    if side in {"engine", "ours", "ray"}:
        return sys.executable
    if environments is None:
        raise SystemExit(f"{side} needs --environments, the folder that `make bench-peers` makes")
    return str((environments / side / "bin" / "python").absolute())


if __name__ == "__main__":
    main()
