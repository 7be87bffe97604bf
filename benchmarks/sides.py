"""One side of a comparison with peers: a process of its own, which does what it is asked for and answers in JSON.

:mod:`benchmarks.peers` starts ``python -P sides.py SIDE`` with the Python of that side's virtual environment. Nothing
of this project is imported here but by the side ``ours``: two of the packages bear the same name. A request is a line
``{"work": NAME, "arguments": {...}}``, its answer a line ``{"wall": SECONDS, "rows": N, ...}`` or ``{"error": TEXT}``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CPUS = 2
"""Workers that a peer is told to use where its own default does not start on this machine."""
OBJECT_STORE = int(os.environ.get("BENCHMARK_OBJECT_STORE", 3 * 1024**3))

LACKS = "has none"
"""The error of a side that has no call for some work."""

Found = dict[str, Any]


def heavy(table: pa.Table) -> pa.Table:
    """Work for the processor, some 0.2 microseconds a row."""
    values = np.asarray(table.column("value"))
    for _ in range(12):
        values = np.sin(values) + np.cos(values)
    return pa.table({"heavy": values})


def doubled(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A computed column by function."""
    return pa.record_batch([pc.add(pc.multiply(batch.column("a"), 2), batch.column("b"))], ["computed"])


SQL = {"computed": "a * 2 + b"}


def vector_block(number: int, rows: int, width: int) -> pa.Table:
    """A block of float32 vectors, the same for every side."""
    values = np.random.default_rng(number).random(rows * width, dtype=np.float32)
    ids = np.arange(number * rows, (number + 1) * rows)
    return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values, width)})


def small_block(number: int, rows: int) -> pa.Table:
    """A block of two narrow columns."""
    ids = np.arange(number * rows, (number + 1) * rows)
    return pa.table({"id": ids, "value": np.random.default_rng(number).random(rows)})


def blocks(kind: str, count: int, rows: int, width: int) -> Iterator[pa.Table]:
    """The blocks that a write is given."""
    for number in range(count):
        yield vector_block(number, rows, width) if kind == "vectors" else small_block(number, rows)


def queries(path: str, count: int) -> np.ndarray:
    """The first so many query vectors of a file, as ``q`` of ``nearest`` takes them."""
    found: np.ndarray = np.load(path)[:count]
    return found if count > 1 else found[0]


def left(uri: str) -> Found:
    """What a table consists of now."""
    dataset = lance.dataset(uri)
    return {"rows": dataset.count_rows(), "files": len(dataset.get_fragments())}


def covered(uri: str) -> Found:
    """Rows of the table, if an index covers them all."""
    dataset = lance.dataset(uri)
    (name,) = [item.name for item in dataset.describe_indices()]
    unindexed = dataset.stats.index_stats(name)["num_unindexed_rows"]
    return {"rows": dataset.count_rows() - unindexed}


class Engine:
    """Plain pylance, one process, all threads. The other sides replace what they do themselves."""

    lacks: frozenset[str] = frozenset()
    """Work that the side has no call for."""

    def __init__(self) -> None:
        self.given: Any = None

    def prepare(self, **which: Any) -> Found:
        """Makes the data of a write, which stays in memory."""
        self.given = list(blocks(**which))
        return {"rows": which["count"] * which["rows"]}

    def scan(self, uri: str, **options: Any) -> Found:
        batches = lance.dataset(uri).scanner(**options).to_batches()
        return {"rows": sum(batch.num_rows for batch in batches)}

    def select(self, uri: str, columns: list[str]) -> Found:
        return self.scan(uri, columns=columns)

    def where(self, uri: str, column: str, below: float) -> Found:
        return self.scan(uri, filter=f"{column} < {below}")

    def limit(self, uri: str) -> Found:
        return self.scan(uri, limit=10)

    def count(self, uri: str) -> Found:
        return {"rows": lance.dataset(uri).count_rows()}

    def schema(self, uri: str) -> Found:
        return {"rows": len(lance.dataset(uri).schema)}

    def heavy(self, uri: str) -> Found:
        batches = lance.dataset(uri).scanner(batch_size=65_536).to_batches()
        return {"rows": sum(heavy(pa.Table.from_batches([batch])).num_rows for batch in batches)}

    def write(self, uri: str) -> Found:
        parts = (batch for table in self.given for batch in table.to_batches())
        lance.write_dataset(pa.RecordBatchReader.from_batches(self.given[0].schema, parts), uri)
        return left(uri)

    def compact(self, uri: str) -> Found:
        lance.dataset(uri).optimize.compact_files()
        return left(uri)

    def compute(self, uri: str, by: str) -> Found:
        lance.dataset(uri).add_columns(
            SQL if by == "sql" else doubled, read_columns=None if by == "sql" else ["a", "b"]
        )
        return self.computed(uri)

    def computed(self, uri: str) -> Found:
        dataset = lance.dataset(uri)
        some = dataset.take([0, dataset.count_rows() - 1])
        if some["computed"].to_pylist() != pc.add(pc.multiply(some["a"], 2), some["b"]).to_pylist():
            raise ValueError("the computed column has other values")
        return {"rows": dataset.count_rows()}

    def search(self, uri: str, file: str, count: int, **nearest: Any) -> Found:
        query = {"column": "vector", "q": queries(file, count), "k": 10, **nearest}
        table = lance.dataset(uri).to_table(
            columns=["id", "_distance"], nearest=query, disable_scoring_autoprojection=True
        )
        return self.found(table)

    def found(self, table: pa.Table) -> Found:
        return {
            "rows": table.num_rows,
            "ids": sorted(table["id"].to_pylist()),
            "distance": "_distance" in table.schema.names,
        }

    def index(self, uri: str, column: str, kind: Any) -> Found:
        lance.dataset(uri).create_scalar_index(column, kind)
        return covered(uri)

    def vector_index(self, uri: str, partitions: int, subs: int) -> Found:
        lance.dataset(uri).create_index("vector", "IVF_PQ", num_partitions=partitions, num_sub_vectors=subs)
        return covered(uri)


class BuiltIn(Engine):
    """What Ray Data itself offers for Lance tables."""

    lacks = frozenset({"compact", "compute", "search", "index", "vector_index"})

    def __init__(self) -> None:
        super().__init__()
        self.ray = importlib.import_module("ray")
        self.load()
        self.ray.init(
            address="local",
            num_cpus=CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
            object_store_memory=OBJECT_STORE,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.ray.data.DataContext.get_current().enable_progress_bars = False
        self.read = self.reader()

    def load(self) -> None:
        """Imports the package that is compared."""
        self.ray.data  # noqa: B018 - it is a package of its own

    def reader(self) -> Any:
        return self.ray.data.read_lance

    def consume(self, dataset: Any) -> Found:
        return {"rows": sum(len(item) for item in dataset.iter_batches(batch_size=None, batch_format="pyarrow"))}

    def prepare(self, **which: Any) -> Found:
        self.given = None
        refs = [self.ray.put(table) for table in blocks(**which)]
        self.given = self.ray.data.from_arrow_refs(refs).materialize()
        return {"rows": which["count"] * which["rows"]}

    def scan(self, uri: str, **options: Any) -> Found:
        return self.consume(self.read(uri, **options))

    def select(self, uri: str, columns: list[str]) -> Found:
        return self.consume(self.read(uri).select_columns(columns))

    def where(self, uri: str, column: str, below: float) -> Found:
        expressions = importlib.import_module("ray.data.expressions")
        return self.consume(self.read(uri).filter(expr=expressions.col(column) < below))

    def limit(self, uri: str) -> Found:
        return {"rows": len(self.read(uri).limit(10).take_all())}

    def count(self, uri: str) -> Found:
        return {"rows": self.read(uri).count()}

    def schema(self, uri: str) -> Found:
        return {"rows": len(self.read(uri).schema().names)}

    def heavy(self, uri: str) -> Found:
        return self.consume(
            self.read(uri).map_batches(heavy, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
        )

    def write(self, uri: str) -> Found:
        self.given.write_lance(uri)
        return left(uri)


class LanceRay(BuiltIn):
    """lance-ray 0.5.0, told to use as many workers as there are cores: its default of 4 needs 4."""

    lacks: frozenset[str] = frozenset()

    workers: dict[str, Any] = {"num_workers": CPUS}  # noqa: RUF012 - never changed
    concurrency: dict[str, Any] = {"concurrency": CPUS}  # noqa: RUF012 - never changed

    def load(self) -> None:
        self.package = importlib.import_module("lance_ray")

    def reader(self) -> Any:
        return self.package.read_lance

    def write(self, uri: str) -> Found:
        self.package.write_lance(self.given, uri)
        return left(uri)

    def compact(self, uri: str) -> Found:
        self.package.compact_files(uri, **self.workers)
        return left(uri)

    def compute(self, uri: str, by: str) -> Found:
        read = None if by == "sql" else ["a", "b"]
        self.package.add_columns(uri, transform=SQL if by == "sql" else doubled, read_columns=read, **self.concurrency)
        return self.computed(uri)

    def search(self, uri: str, file: str, count: int, **nearest: Any) -> Found:
        query = {"column": "vector", "q": queries(file, count), "k": 10, **nearest}
        return self.found(self.package.vector_search(uri, nearest=query, columns=["id"], **self.workers))

    def index(self, uri: str, column: str, kind: str) -> Found:
        self.package.create_scalar_index(uri, column=column, index_type=kind, **self.workers)
        return covered(uri)

    def vector_index(self, uri: str, partitions: int, subs: int) -> Found:
        self.package.create_index(
            uri, "vector", "IVF_PQ", num_partitions=partitions, num_sub_vectors=subs, **self.workers
        )
        return covered(uri)


class Ours(LanceRay):
    """This package, with its own defaults: the calls are the same."""

    workers: dict[str, Any] = {}  # noqa: RUF012 - never changed
    concurrency: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Daft(Engine):
    """daft-lance 0.6.0 with Daft's own runner, which has no Ray: threads of one process."""

    lacks = frozenset({"vector_index"})

    def __init__(self) -> None:
        super().__init__()
        self.daft = importlib.import_module("daft")
        self.package = importlib.import_module("daft_lance")

    def consume(self, frame: Any) -> Found:
        return {"rows": sum(len(part) for part in frame.to_arrow_iter())}

    def frame(self, uri: str, columns: list[str] | None = None) -> Any:
        frame = self.package.read_lance(uri)
        return frame if columns is None else frame.select(*columns)

    def prepare(self, **which: Any) -> Found:
        self.given = self.daft.from_arrow(list(blocks(**which))).collect()
        return {"rows": which["count"] * which["rows"]}

    def scan(self, uri: str, columns: list[str] | None = None, filter: str | None = None) -> Found:  # type: ignore[override] # what it can do
        frame = self.frame(uri, columns)
        return self.consume(frame if filter is None else frame.where(filter))

    def where(self, uri: str, column: str, below: float) -> Found:
        return self.consume(self.frame(uri).where(self.daft.col(column) < below))

    def limit(self, uri: str) -> Found:
        return {"rows": len(self.frame(uri).limit(10).to_pylist())}

    def count(self, uri: str) -> Found:
        return {"rows": self.frame(uri).count_rows()}

    def schema(self, uri: str) -> Found:
        return {"rows": len(self.frame(uri).schema().column_names())}

    def heavy(self, uri: str) -> Found:
        def run(values: Any) -> Any:
            return heavy(pa.table({"value": values.to_arrow()}))["heavy"].combine_chunks()

        batched = self.daft.func.batch(return_dtype=self.daft.DataType.float64())(run)
        return self.consume(self.frame(uri).select(batched(self.daft.col("value"))))

    def write(self, uri: str) -> Found:
        self.package.write_lance(self.given, uri).collect()
        return left(uri)

    def compact(self, uri: str) -> Found:
        self.package.compact_files(uri)
        return left(uri)

    def compute(self, uri: str, by: str) -> Found:
        read = None if by == "sql" else ["a", "b"]
        self.package.merge_columns(uri, transform=SQL if by == "sql" else doubled, read_columns=read)
        return self.computed(uri)

    def search(self, uri: str, file: str, count: int, **nearest: Any) -> Found:
        query = {"column": "vector", "q": queries(file, count), "k": 10, **nearest}
        frame = self.package.read_lance(uri, default_scan_options={"nearest": query})
        return self.found(frame.to_arrow())

    def index(self, uri: str, column: str, kind: str) -> Found:
        self.package.create_scalar_index(uri, column=column, index_type=kind)
        return covered(uri)


SIDES = {"engine": Engine, "ours": Ours, "ray": BuiltIn, "lance-ray": LanceRay, "daft-lance": Daft}


def described(error: BaseException) -> str:
    """An error on one line. Of a task's error, whose text is a trace and advice, the line that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return causes[-1][:300] if causes else f"{type(error).__name__}: {(lines or [''])[0][:300]}"


def answer(side: Any, work: str, arguments: dict[str, Any]) -> Found:
    """One piece of work, timed; what goes wrong is an answer too."""
    if work in side.lacks:
        return {"error": LACKS}
    start = time.perf_counter()
    try:
        found: Found = getattr(side, work)(**arguments)
    except BaseException as error:  # reason: a peer may fail in any way, the engine's panics included
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return {"error": described(error)}
    return {"wall": time.perf_counter() - start, **found}


def main(name: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not look like an answer
    side = SIDES[name]()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(side, request["work"], request["arguments"])), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
