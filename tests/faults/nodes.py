"""A node is taken away in the middle of an operation: ``python -m tests.faults.nodes FOLDER``.

There are three, of which the head does no work. In a process of its own, since a process has one Ray only. The last
line that it prints is what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.cluster_utils import Cluster

import lance_ray
from lance_ray import LanceRayError, columns, compaction, index_build, search

BLOCKS, BLOCK = 12, 50
SLOW = 1.5


class Held:
    """A worker function that says on which node it runs, and takes its time there."""

    def __init__(self, function: Callable[..., Any], signs: str) -> None:
        self.function, self.signs = function, signs
        self.__name__ = getattr(function, "__name__", "held")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        node = ray.get_runtime_context().get_node_id()
        (Path(self.signs) / node).touch()
        time.sleep(SLOW)
        return self.function(*args, **kwargs)


def make(signs: str, batch: dict[str, Any]) -> pa.Table:
    """A block of rows, made slowly."""
    first = int(batch["id"][0]) * BLOCK
    return Held(lambda: pa.table({"id": pa.array(range(first, first + BLOCK), pa.int64())}), signs)()


def warm(cluster: Cluster, seconds: float = 90) -> None:
    """Return when each node but the head, which does no work, has a worker that has imported everything, or raise."""

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def where() -> str:
        import lance_ray.datasink  # noqa: F401 - for its own sake

        time.sleep(0.3)
        return str(ray.get_runtime_context().get_node_id())

    deadline, seen = time.monotonic() + seconds, set[str]()
    wanted = {item.node_id for item in cluster.worker_nodes}
    while not wanted <= seen:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no worker on {wanted - seen}")
        seen |= set(ray.get([where.remote() for _ in range(6)]))


def while_a_node_goes(cluster: Cluster, signs: Path, action: Callable[[], Any]) -> dict[str, Any]:
    """Run an action; once a node works for it, take that node away."""
    signs.mkdir()
    warm(cluster)
    nodes = {item.node_id: item for item in cluster.worker_nodes}
    gone: list[str] = []
    over = threading.Event()

    def reaper() -> None:
        while not over.is_set() and not gone:
            working = [name for name in nodes if (signs / name).exists()]
            if working:
                time.sleep(0.3)
                cluster.remove_node(nodes[working[0]], allow_graceful=False)
                gone.append(working[0])
            time.sleep(0.05)

    thread, started = threading.Thread(target=reaper), time.monotonic()
    thread.start()
    try:
        action()
        error = None
    except LanceRayError as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        over.set()
        thread.join(60)
    seconds = time.monotonic() - started
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes(60)
    return {"gone": len(gone), "error": error, "seconds": seconds}


def state(uri: str) -> dict[str, Any]:
    """What is in a table, and what lies beside it."""
    lance_ray.cleanup_orphans(uri)
    dataset = lance.dataset(uri)
    files = {path.name for path in (Path(uri) / "data").glob("*.lance")}
    versions = [dataset.checkout_version(item["version"]) for item in dataset.versions()]
    used = {file.path for version in versions for item in version.get_fragments() for file in item.metadata.files}
    return {
        "ids": sorted(dataset.to_table(columns=["id"])["id"].to_pylist()),
        "orphans": sorted(files - used),
        "ledger": (Path(uri) / "_lance_ray").exists(),
        "indexes": [item.name for item in dataset.describe_indices()],
        "fragments": len(dataset.get_fragments()),
        "columns": dataset.schema.names,
    }


class Operations:
    """The operations, and the table that most of them work on: 600 rows in 60 fragments."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.wide = str(folder / "wide")
        vectors = pa.FixedSizeListArray.from_arrays(np.repeat(np.arange(600, dtype=np.float32), 4), 4)
        lance.write_dataset(pa.table({"id": np.arange(600), "vector": vectors}), self.wide, max_rows_per_file=10)

    def write(self, name: str, **options: Any) -> dict[str, Any]:
        """A write whose blocks are made slowly; over or beside 600 rows, but for a create."""
        signs, uri = str(self.folder / name), str(self.folder / f"written {name}")
        first = 0
        if options["mode"] != "create":
            lance.write_dataset(pa.table({"id": np.arange(BLOCKS * BLOCK)}), uri)
            first = BLOCKS * BLOCK
        ds = ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(
            lambda batch: shifted(make(signs, batch), first), batch_size=None
        )
        action = partial(lance_ray.write_lance, ds, uri, min_rows_per_file=BLOCK, **options)
        return while_a_node_goes(self.cluster, Path(signs), action) | state(uri)

    def held(self, name: str, module: Any, function: str, action: Callable[[], Any]) -> dict[str, Any]:
        """An operation, with a worker function of it that takes its time; and what it returned, if that is a table."""
        signs, original = self.folder / name, getattr(module, function)
        setattr(module, function, Held(original, str(signs)))
        got: list[Any] = []
        try:
            found = while_a_node_goes(self.cluster, signs, lambda: got.append(action()))
        finally:
            setattr(module, function, original)
        rows = {"rows": got[0].to_pylist()} if got and isinstance(got[0], pa.Table) else {}
        return found | state(self.wide) | rows

    def read(self) -> dict[str, Any]:
        """A read whose blocks are looked at slowly, where they are."""
        signs = str(self.folder / "read")
        seen: list[int] = []

        def look() -> None:
            ds = lance_ray.read_lance(self.wide, columns=["id"], fragment_group_size=5, override_num_blocks=BLOCKS)
            slow = ds.map_batches(lambda batch: Held(lambda: batch, signs)(), batch_size=None)
            seen.extend(int(row["id"]) for row in slow.take_all())

        return while_a_node_goes(self.cluster, Path(signs), look) | state(self.wide) | {"seen": sorted(seen)}

    def all(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each with a node that goes away in it."""
        yield "create", self.write("create", mode="create")
        yield "append", self.write("append", mode="append")
        yield "overwrite", self.write("overwrite", mode="overwrite")
        yield "stream", self.write("stream", mode="append", stream=True)
        yield "read", self.read()
        queries = np.repeat(np.array([[7], [599]], np.float32), 4, axis=1)
        nearest = {"column": "vector", "q": queries, "k": 1, "use_index": False}
        find = partial(lance_ray.vector_search, self.wide, nearest=nearest, columns=["id"], num_workers=6)
        yield "search", self.held("search", search, "search_shard", find)
        fewer: dict[str, Any] = {"target_rows_per_fragment": 50}
        compact = partial(lance_ray.compact_files, self.wide, compaction_options=fewer, progress=False)
        yield "compact", self.held("compact", compaction, "rewrite", compact)
        add = partial(lance_ray.add_columns, self.wide, transform=doubled, output_schema=DOUBLED, progress=False)
        yield "columns", self.held("columns", columns, "compute", add)
        kind: dict[str, Any] = {"column": "id", "index_type": "BTREE", "num_segments": 6, "progress": False}
        yield (
            "index",
            self.held("index", index_build, "build_segment", partial(lance_ray.create_scalar_index, self.wide, **kind)),
        )


DOUBLED = pa.schema([("twice", pa.int64())])


def doubled(batch: pa.RecordBatch) -> pa.Table:
    """A new column."""
    return pa.table({"twice": pc.multiply(batch["id"], 2)})


def shifted(table: pa.Table, first: int) -> pa.Table:
    """The same rows with higher ids."""
    return pa.table({"id": pc.add(table["id"], first)})


def main(folder: Path) -> dict[str, Any]:
    """Every operation, a node lost in each."""
    directory = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # Ray's sockets need paths of under 107 bytes
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": directory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        return dict(Operations(cluster, folder).all())
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("LANCE_RAY_NO_BACKOFF", "1")
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
