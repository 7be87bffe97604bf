"""Put the Python source code of this machine into a Lance table, and ask it questions, all through Ray Data.

    python examples/quickstart.py                              # standard library, then site-packages
    python examples/quickstart.py --input day1.parquet day2.parquet
    python examples/quickstart.py --output ~/tables            # keep the table

Ray runs as part of this program and ends with it; so does the table, without ``--output``.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.aggregate import Count, Sum
from ray.data.context import ShuffleStrategy
from ray.data.expressions import Expr, col

import lance_ray  # from here on ray.data.read_lance and Dataset.write_lance are this package's

DIMENSIONS = 128
TOKEN = re.compile(rb"\w+")
READERS = {".parquet": ray.data.read_parquet, ".csv": ray.data.read_csv, ".jsonl": ray.data.read_json}


@dataclass(frozen=True)
class Questions:
    """What to ask a table: one filter, as SQL and as a Ray expression, and one aggregate."""

    columns: list[str]
    sql: str
    expr: Expr
    group: str | None
    measure: str | None  # summed for each group; None counts rows


SOURCE_QUESTIONS = Questions(
    columns=["path", "package", "lines"],
    sql="lines >= 1000 AND package <> 'test'",
    expr=(col("lines") >= 1000) & (col("package") != "test"),
    group="package",
    measure="lines",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write, append, read, filter and aggregate one table, and print what each step took."""
    args = parse_arguments(argv)
    print(f"Python {sys.version.split()[0]}, Ray {ray.__version__}, pylance {lance.__version__}\n", flush=True)
    with local_ray(), table_directory(args.output) as directory:
        uri = str(directory / "quickstart.lance")
        write_table(uri, own_files(args.input, args.limit) if args.input else python_sources(args.limit))
        questions = ask_about(uri) if args.input else SOURCE_QUESTIONS
        read_table(uri, questions)
        show_largest_groups(uri, questions)
        show_table(uri, kept=args.output is not None)


def write_table(uri: str, parts: dict[str, Dataset]) -> None:
    """Create the table from the first part and append the others: one commit, one version each."""
    for name, part in parts.items():
        mode = "append" if Path(uri).exists() else "create"
        with step(f"{mode} {name}", lambda: f"{stored_bytes(uri) / 1e6:,.1f} MB stored") as measured:
            report: Any = part.write_lance(uri, mode=mode)  # type: ignore[arg-type]  # checkers see Ray's signature
            measured.rows, measured.bytes = report.rows, report.bytes


def read_table(uri: str, questions: Questions) -> None:
    """Read everything, then a few columns of some rows, in the two ways to say which."""
    everything = ray.data.read_lance(uri)
    reads = {
        "read everything": everything,
        f"read where {questions.sql}": ray.data.read_lance(uri, columns=questions.columns, filter=questions.sql),
        "the same by ds.filter(expr=...)": everything.filter(expr=questions.expr).select_columns(questions.columns),
    }
    for name, dataset in reads.items():
        batches: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        with step(name) as measured:
            for batch in batches:
                measured.rows += batch.num_rows
                measured.bytes += batch.nbytes


def show_largest_groups(uri: str, questions: Questions) -> None:
    """Aggregate over one or two columns; the others are not read."""
    if questions.group is None:
        return
    columns = [questions.group, *([questions.measure] if questions.measure else [])]
    total = Sum(questions.measure, alias_name="total") if questions.measure else Count(alias_name="total")
    with step(f"aggregate by {questions.group}") as measured:
        rows = ray.data.read_lance(uri, columns=columns).groupby(questions.group).aggregate(total).take_all()
        measured.rows = len(rows)
    print(f"\n  {questions.group:<40} {questions.measure or 'rows':>12}")
    for row in sorted(rows, key=lambda row: -(row["total"] or 0))[:10]:
        print(f"  {str(row[questions.group])[:40]:<40} {row['total'] or 0:>12,}")


def show_table(uri: str, *, kept: bool) -> None:
    """Print what is in the table now."""
    table = lance.dataset(uri)
    rows, fragments, versions = table.count_rows(), len(table.get_fragments()), len(table.versions())
    print(f"\n{rows:,} rows, {fragments} fragments, {versions} versions, {stored_bytes(uri) / 1e6:,.1f} MB stored")
    if kept:
        print(f"kept at {uri}")


def python_sources(limit: int | None) -> dict[str, Dataset]:
    """The Python files of this interpreter as two datasets; nothing is read before they are used."""
    return {
        "the standard library": read_sources(Path(sysconfig.get_path("stdlib")), limit),
        "site-packages": read_sources(Path(sysconfig.get_path("purelib")), limit),
    }


def read_sources(root: Path, limit: int | None) -> Dataset:
    """One row for each Python file below ``root``; what is installed in a subfolder is not part of it."""
    relative = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    files = [path for path in relative if not {"site-packages", "dist-packages"} & set(path.parts)][:limit]
    items = [{"path": str(root / path), "package": path.parts[0].removesuffix(".py")} for path in files]
    return ray.data.from_items(items).map_batches(add_contents, batch_size=256)


def add_contents(files: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
    """Size, lines, text and vector of a batch of files. Runs on the workers."""
    contents = [Path(path).read_bytes() for path in files["path"]]
    vectors = np.concatenate([token_vector(content) for content in contents])
    return pa.table(
        {
            "path": files["path"],
            "package": files["package"],
            "size": [len(content) for content in contents],
            "lines": [content.count(b"\n") for content in contents],
            "source": [content.decode("utf-8", errors="replace") for content in contents],
            "vector": pa.FixedSizeListArray.from_arrays(vectors, DIMENSIONS),
        }
    )


def token_vector(content: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """How often tokens occur, hashed into ``DIMENSIONS`` buckets and scaled to length one."""
    counts = np.bincount([zlib.crc32(token) % DIMENSIONS for token in TOKEN.findall(content)], minlength=DIMENSIONS)
    return np.asarray(counts / (float(np.linalg.norm(counts)) or 1.0), dtype=np.float32)


def own_files(files: Sequence[Path], limit: int | None) -> dict[str, Dataset]:
    """The caller's files, one dataset each: the first makes the table, and its schema."""
    datasets = {path.name: READERS[path.suffix](str(path)) for path in files}
    return {name: dataset if limit is None else dataset.limit(limit) for name, dataset in datasets.items()}


def ask_about(uri: str) -> Questions:
    """Questions that any table can answer, from its schema."""
    schema = lance.dataset(uri).schema
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    first = schema.names[0]
    return Questions(
        columns=schema.names[:3],
        sql=f"`{first}` IS NOT NULL",
        expr=col(first).is_not_null(),
        group=texts[0] if texts else None,
        measure=None,
    )


@dataclass
class Measured:
    """What a step has moved so far."""

    rows: int = 0
    bytes: int = 0


@contextmanager
def step(name: str, progress: Callable[[], str] | None = None) -> Iterator[Measured]:
    """Show how far a step is while it runs, and one line about it at its end."""
    name = f"{name[:48]:<48}"
    measured, started, done = Measured(), time.perf_counter(), threading.Event()
    ticker = threading.Thread(target=tick, args=(name, progress or (lambda: f"{measured.rows:,} rows"), done))
    ticker.start()
    try:
        yield measured
    finally:
        done.set()
        ticker.join()
    seconds = time.perf_counter() - started
    megabytes = measured.bytes / 1e6
    speed = f"{megabytes:>8.1f} MB {megabytes / seconds:>8.1f} MB/s" if measured.bytes else ""
    print(f"{name} {measured.rows:>8,} rows {seconds:>6.2f} s {speed}")


def tick(name: str, progress: Callable[[], str], done: threading.Event) -> None:
    """Rewrite one line of a terminal until ``done``; a file or pipe gets only the lines that stay."""
    while sys.stdout.isatty() and not done.wait(0.2):
        print(f"\r\x1b[K{name} {progress()}", end="\r", flush=True)


def stored_bytes(uri: str) -> int:
    """Size of the files below a local path."""
    return sum(path.stat().st_size for path in Path(uri).rglob("*") if path.is_file())


@contextmanager
def local_ray() -> Iterator[None]:
    """A quiet Ray of our own, unless this process has one already."""
    logger, context = logging.getLogger("ray.data"), DataContext.get_current()
    level, bars, shuffle = logger.level, context.enable_progress_bars, context.shuffle_strategy
    started = not ray.is_initialized()
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars = False  # ours say more about a table
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED  # starts fastest on one machine
    with warnings.catch_warnings():
        # Ray starts its processes by fork and exec, which is safe.
        warnings.filterwarnings("ignore", message="lance is not fork-safe")
        if started:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        context.enable_progress_bars, context.shuffle_strategy = bars, shuffle
        if started:
            ray.shutdown()


@contextmanager
def table_directory(output: Path | None) -> Iterator[Path]:
    """The caller's folder, or one that is gone afterwards."""
    if output is not None:
        yield output.expanduser().resolve()
        return
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
        yield Path(folder)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot work before Ray starts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = ", ".join(READERS)
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help=f"your own data instead ({kinds})")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the table in this folder")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many rows of each part")
    args = parser.parse_args(argv)
    for path in args.input or ():
        if path.suffix not in READERS or not path.is_file():
            parser.error(f"--input {path}: no such file, or not one of {kinds}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be positive")
    return args


if __name__ == "__main__":
    try:
        main()
    except lance_ray.LanceRayError as error:
        sys.exit(f"quickstart: {error}")
