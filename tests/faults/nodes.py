"""A node of three is taken away in the middle of an operation: ``python -m tests.faults.nodes FOLDER``.

In a process of its own, since a process has one Ray only. The last line that it prints is what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.cluster_utils import Cluster

import lance_ray
from lance_ray import LanceRayError, compaction, index_build

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
    """Return when each node has a worker that has imported everything, or raise."""

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def where() -> str:
        import lance_ray.datasink  # noqa: F401 - for its own sake

        time.sleep(0.3)
        return str(ray.get_runtime_context().get_node_id())

    deadline, seen = time.monotonic() + seconds, set[str]()
    wanted = {item.node_id for item in cluster.list_all_nodes()}
    while not wanted <= seen:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no worker on {wanted - seen}")
        seen |= set(ray.get([where.remote() for _ in range(6)]))


def while_a_node_goes(cluster: Cluster, signs: Path, action: Callable[[], Any]) -> dict[str, Any]:
    """Run an action; once another node than the head works for it, take that node away."""
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
    }


def main(folder: Path) -> dict[str, Any]:
    """Three operations, a node lost in each."""
    directory = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # Ray's sockets need paths of under 107 bytes
    head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": directory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    found: dict[str, Any] = {}
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        written, wide = str(folder / "written"), str(folder / "wide")
        signs = str(folder / "write")
        ds = ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(
            lambda batch: make(signs, batch), batch_size=None
        )
        found["write"] = while_a_node_goes(
            cluster, Path(signs), lambda: lance_ray.write_lance(ds, written, min_rows_per_file=BLOCK)
        )
        found["write"] |= state(written)
        lance.write_dataset(pa.table({"id": np.arange(600)}), wide, max_rows_per_file=10)
        rewrite, build = compaction.rewrite, index_build.build_segment
        compaction.rewrite = Held(rewrite, str(folder / "compact"))
        found["compact"] = while_a_node_goes(
            cluster,
            folder / "compact",
            lambda: lance_ray.compact_files(wide, compaction_options={"target_rows_per_fragment": 50}, progress=False),
        )
        found["compact"] |= state(wide)
        compaction.rewrite = rewrite
        index_build.build_segment = Held(build, str(folder / "index"))
        found["index"] = while_a_node_goes(
            cluster,
            folder / "index",
            lambda: lance_ray.create_scalar_index(
                wide, column="id", index_type="BTREE", num_segments=6, progress=False
            ),
        )
        found["index"] |= state(wide)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
    return found


if __name__ == "__main__":
    os.environ.setdefault("LANCE_RAY_NO_BACKOFF", "1")
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
