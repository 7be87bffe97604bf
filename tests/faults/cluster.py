"""A cluster of several nodes on this machine, in a process of its own, since a process has one Ray only.

``python -m tests.faults.cluster FOLDER`` tries what :mod:`tests.faults.test_cluster` asserts. The last line that it
prints is what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import ray
import ray.data
from ray.cluster_utils import Cluster

from lance_ray import LanceRayError, preflight, read_lance, write_lance

BLOCKS, BLOCK = 8, 50


def _with_node(batch: dict[str, Any]) -> pa.Table:
    time.sleep(0.3)  # so that no node does all of it before the other one wakes up
    first = int(batch["id"][0]) * BLOCK
    ids = pa.array(range(first, first + BLOCK), pa.int64())
    node = ray.get_runtime_context().get_node_id()
    return pa.table({"id": ids, "node": pa.array([node] * BLOCK)})


def write_and_read(uri: str, mode: str = "create") -> dict[str, Any]:
    """Write rows that know their node, and read them so that the readers' nodes are known."""
    made = ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(_with_node, batch_size=None)
    report = write_lance(made, uri, mode=mode, max_rows_per_file=BLOCK)

    def reader(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        return {"id": batch["id"], "node": [ray.get_runtime_context().get_node_id()] * len(batch["id"])}

    read = read_lance(uri, columns=["id"], fragment_group_size=1).map_batches(reader, batch_size=None).take_all()
    table = lance.dataset(uri).to_table()
    return {
        "rows": report.rows,
        "writers": len(set(table["node"].to_pylist())),
        "readers": len({row["node"] for row in read}),
        "ids": sorted(table["id"].to_pylist()),
        "read": sorted(int(row["id"]) for row in read),
    }


def error_of(action: Callable[[], Any]) -> dict[str, Any]:
    """The error of this package that an action ends with, as JSON can hold it."""
    preflight._checked.clear()
    started = time.monotonic()
    try:
        action()
    except LanceRayError as error:
        problems = list(getattr(error, "problems", ()))
        return {"type": type(error).__name__, "problems": problems, "seconds": time.monotonic() - started}
    return {"type": None}


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextmanager
def node(cluster: Cluster, python_path: str) -> Iterator[None]:
    """A second node whose workers look for packages there first."""
    added = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": python_path})
    try:
        yield
    finally:
        cluster.remove_node(added)


@contextmanager
def node_without(cluster: Cluster, hidden: Path) -> Iterator[bool]:
    """A second node that has an empty folder of its own in the place of one; False where that is not allowed."""
    script = f"mount -t tmpfs tmpfs {hidden} && exec {sys.executable} -m ray.scripts.scripts start --block" + (
        f" --address={cluster.gcs_address} --num-cpus=1 --object-store-memory={150 * 1024**2} --log-style=record"
    )
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        yield False
        return
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while sum(item["Alive"] for item in ray.nodes()) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            yield True
        finally:
            process.terminate()


def shadow(folder: Path, package: str, source: str) -> str:
    """A search path on which a package is another one."""
    place = folder / f"other-{package}"
    (place / package).mkdir(parents=True)
    (place / package / "__init__.py").write_text(source)
    return os.pathsep.join([str(place), os.environ["PYTHONPATH"]])


def main(folder: Path) -> dict[str, Any]:
    """Everything on one cluster; returns what came of it."""
    directory = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # Ray's sockets need paths of under 107 bytes
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": directory}
    )
    found: dict[str, Any] = {}
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        seen, hidden = folder / "seen", folder / "hidden"
        hidden.mkdir()
        with node(cluster, os.environ["PYTHONPATH"]):
            found["two nodes"] = write_and_read(str(seen))
        with node(cluster, shadow(folder, "lance_ray", "raise ImportError('not installed here')")):
            found["no package"] = error_of(lambda: read_lance(str(seen)))
            found["no package to write"] = error_of(lambda: write_and_read(str(folder / "new")))
        with node(cluster, shadow(folder, "lance", "__version__ = '0.0.1'")):
            found["another pylance"] = error_of(lambda: write_and_read(str(seen), "append"))
        lance.write_dataset(pa.table({"id": [1]}), str(hidden / "old"))
        with node_without(cluster, hidden) as possible:
            if possible:
                found["hidden table"] = error_of(lambda: read_lance(str(hidden / "old")))
                found["hidden append"] = error_of(lambda: write_and_read(str(hidden / "old"), "append"))
                found["hidden create"] = error_of(lambda: write_and_read(str(hidden / "new")))
        found["rows of seen"] = lance.dataset(str(seen)).count_rows()
        found["files of new"] = files_below(folder / "new") + files_below(hidden / "new")
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
