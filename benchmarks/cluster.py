"""Four nodes of one core each, on this machine: ``python -m benchmarks.cluster`` (``--s3``: on an S3 server).

One table is written, read, compacted, indexed, searched and given a column. What is told is how long each took, whether
every row was there once, and the CPU seconds that the workers of each node spent on it. Each node has a home and a
folder for temporary files of its own, and with ``--s3`` only the driver's arguments say where the store is and who may
use it: what would be shared by accident is missing on the other nodes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from benchmarks.harness import cpu_watched
from lance_ray import (
    add_columns,
    compact_files,
    create_index,
    create_scalar_index,
    list_indices,
    read_lance,
    vector_search,
    write_lance,
)

NODES, DIMENSION, BLOCKS = 4, 64, 16


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of work on all nodes."""

    name: str
    seconds: float
    rows: int
    cpu_seconds: list[float]
    """Of the workers of each node, those of their raylet included."""


@ray.remote
def _hold() -> None:
    """Starts the worker process of a node."""
    time.sleep(1)


@contextmanager
def cluster(folder: Path) -> Iterator[list[int]]:
    """The nodes; the process numbers of their raylets, whose children are the workers."""
    nodes = Cluster()
    raylets = []
    for number in range(NODES):
        own = folder / f"node{number}"
        (own / "tmp").mkdir(parents=True)
        extra: dict[str, Any] = {"include_dashboard": False, "temp_dir": str(folder / "ray")} if number == 0 else {}
        store = 200 * 1024**2
        environment = {"HOME": str(own), "TMPDIR": str(own / "tmp")}
        node = nodes.add_node(num_cpus=1, object_store_memory=store, env_vars=environment, **extra)
        raylets.append(node.all_processes["raylet"][0].process.pid)
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.get([_hold.options(scheduling_strategy="SPREAD").remote() for _ in range(2 * NODES)])
        yield raylets
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextmanager
def store(folder: Path, *, s3: bool) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Where the table is, and the options that its users pass."""
    if not s3:
        yield str(folder / "table"), None
        return
    import boto3  # of the test extra
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark"}
    address = f"http://{host}:{port}"
    try:
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="benchmark")
        options = {**keys, "aws_region": "us-east-1", "aws_endpoint": address, "allow_http": "true"}
        yield "s3://benchmark/table", options
    finally:
        server.stop()


class Works:
    """The kinds of work; each returns the rows that it found or left."""

    def __init__(self, uri: str, options: dict[str, str] | None, rows: int) -> None:
        self.uri, self.options, self.rows = uri, options, rows
        self.nodes: dict[str, int] = {}
        """How many nodes made rows, and mapped those that were read."""
        self.common: dict[str, Any] = {"storage_options": options, "progress": False}

    def table(self) -> lance.LanceDataset:
        return lance.dataset(self.uri, storage_options=self.options)

    def write(self) -> int:
        share = self.rows // BLOCKS

        def make(batch: dict[str, np.ndarray]) -> pa.Table:
            time.sleep(0.25)  # so that no node does all of it before the others have begun
            number = int(batch["id"][0])
            values = np.random.default_rng(number).standard_normal(share * DIMENSION, dtype=np.float32)
            ids = np.arange(number * share, (number + 1) * share)
            node = pa.array([ray.get_runtime_context().get_node_id()] * share)
            return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values, DIMENSION), "node": node})

        made = ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(make, batch_size=None)
        size = max(1, self.rows // (4 * BLOCKS))
        write_lance(made, self.uri, storage_options=self.options, max_rows_per_file=size)
        self.nodes["write"] = len(set(self.table().to_table(["node"])["node"].to_pylist()))
        return int(self.table().count_rows())

    def read(self) -> int:
        def mapped(batch: pa.Table) -> pa.Table:
            time.sleep(0.25)
            values = batch.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, DIMENSION)
            norms = np.linalg.norm(values, axis=1)
            node = pa.array([ray.get_runtime_context().get_node_id()] * len(norms))
            return pa.table({"id": batch.column("id"), "norm": norms, "node": node})

        read = read_lance(self.uri, storage_options=self.options, override_num_blocks=BLOCKS)
        found = pa.concat_tables(
            read.map_batches(mapped, batch_format="pyarrow", batch_size=None).iter_batches(
                batch_size=None, batch_format="pyarrow"
            )
        )
        if sorted(found["id"].to_pylist()) != list(range(self.rows)):
            raise RuntimeError("not every row came once")
        self.nodes["read"] = len(set(found["node"].to_pylist()))
        return int(found.num_rows)

    def compact(self) -> int:
        target = self.rows // 8
        compact_files(self.uri, compaction_options={"target_rows_per_fragment": target}, **self.common)
        dataset = self.table()
        if not 8 <= len(dataset.get_fragments()) < 4 * BLOCKS:
            raise RuntimeError(f"{len(dataset.get_fragments())} fragments are left")
        return int(dataset.count_rows())

    def add(self) -> int:
        def norms(batch: pa.RecordBatch) -> pa.RecordBatch:
            values = batch.column("vector").flatten().to_numpy().reshape(-1, DIMENSION)
            return pa.record_batch([np.linalg.norm(values, axis=1)], ["norm"])

        add_columns(self.uri, transform=norms, read_columns=["vector"], **self.common)
        return int(self.table().count_rows("norm > 0"))

    def scalar_index(self) -> int:
        create_scalar_index(self.uri, column="id", index_type="BTREE", name="ids", **self.common)
        return self._covered("ids")

    def vector_index(self) -> int:
        create_index(self.uri, "vector", "IVF_PQ", name="vectors", num_partitions=4, num_sub_vectors=8, **self.common)
        return self._covered("vectors")

    def _covered(self, name: str) -> int:
        indices = list_indices(self.uri, storage_options=self.options)
        return next(item.rows for item in indices if item.name == name)

    def search(self) -> int:
        queries = np.random.default_rng(9).standard_normal((self.rows // 100, DIMENSION), dtype=np.float32)
        nearest = {"column": "vector", "q": queries, "k": 1, "use_index": False}
        found = vector_search(self.uri, nearest=nearest, columns=["id"], storage_options=self.options)
        return self.rows if found.num_rows == len(queries) else found.num_rows


def run(folder: Path, rows: int, *, s3: bool) -> tuple[list[Step], dict[str, int]]:
    """Every kind of work on one cluster; raises where rows are missing."""
    steps = []
    rows = rows // (4 * BLOCKS) * 4 * BLOCKS
    with store(folder, s3=s3) as (uri, options), cluster(folder) as raylets:
        works = Works(uri, options, rows)
        named: list[tuple[str, Callable[[], int]]] = [
            ("write", works.write),
            ("read", works.read),
            ("compact", works.compact),
            ("add a column", works.add),
            ("build BTREE", works.scalar_index),
            ("build IVF_PQ", works.vector_index),
            ("flat search", works.search),
        ]
        for name, work in named:
            steps.append(_step(name, work, raylets))
            if steps[-1].rows != rows:
                raise RuntimeError(f"{name}: {steps[-1].rows} rows instead of {rows}")
    left = [path.name for number in range(NODES) for path in (folder / f"node{number}").rglob("*.lance")]
    if left:
        raise RuntimeError(f"a node keeps files for itself: {left}")
    return steps, works.nodes


def _step(name: str, work: Callable[[], int], raylets: Sequence[int]) -> Step:
    used: list[list[float]] = [[] for _ in raylets]
    watches = [cpu_watched(into, raylet) for into, raylet in zip(used, raylets, strict=True)]
    start = time.perf_counter()
    for watch in watches:
        watch.__enter__()
    try:
        rows = work()
    finally:
        seconds = time.perf_counter() - start
        for watch in watches:
            watch.__exit__(None, None, None)
    return Step(name, seconds, rows, [item[0] for item in used])


def table(steps: Sequence[Step]) -> str:
    """The steps as a Markdown table."""
    lines = ["| work | rows | s | CPU s of the workers of each node |", "|---|---:|---:|---|"]
    for step in steps:
        each = ", ".join(f"{seconds:.2f}" for seconds in step.cpu_seconds)
        lines.append(f"| {step.name} | {step.rows:,} | {step.seconds:.2f} | {each} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print JSON lines and a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000, help="rows of 64 floats (default 400,000)")
    parser.add_argument("--s3", action="store_true", help="on an S3 server of this machine")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # Ray's sockets need paths of under 107 bytes
    try:
        steps, nodes = run(folder, options.rows, s3=options.s3)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(steps))
    print(json.dumps({"nodes": nodes, "steps": [asdict(step) for step in steps]}))


if __name__ == "__main__":
    main(sys.argv[1:])
