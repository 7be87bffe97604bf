"""Whether every node of the cluster can do the work, found out before any task starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import lance
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lance_ray.errors import WorkerEnvironmentError
from lance_ray.table import PinnedTable, is_local

logger = logging.getLogger(__name__)

PROBE_SECONDS = 60.0
_FRESH_SECONDS = 300.0
_checked: dict[tuple[str, tuple[str, ...]], float] = {}


def check_cluster(tables: Sequence[PinnedTable], *, witness: str = "") -> None:
    """Ask each other node once whether it has this package, the same pylance, and sees the local tables.

    A cluster of one node needs no answer; answers are kept for five minutes. A node that is too busy to answer within
    a minute is passed over with a log line, since its tasks may well run later.

    Args:
        tables: the tables of the operation.
        witness: a file below the tables that this process has just made. A node that has another file system at the
            same path does not see it, which a path alone would not tell.

    Raises:
        WorkerEnvironmentError: with a line for each node that cannot do the work.
    """
    if not ray.is_initialized():
        return
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU")]
    paths = tuple(sorted({table.uri for table in tables if is_local(table.uri)}))
    now = time.monotonic()
    pending = [node for node in nodes if now - _checked.get((node["NodeID"], paths), -_FRESH_SECONDS) >= _FRESH_SECONDS]
    if not pending:
        return
    probe = ray.remote(num_cpus=0, max_retries=0)(_make_probe())
    refs = {
        probe.options(
            name="lance_ray.preflight",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(lance.__version__, paths, witness): node
        for node in pending
    }
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_SECONDS)
    for ref in late:
        logger.warning("node %s did not answer within %d s", refs[ref]["NodeManagerAddress"], PROBE_SECONDS)
        ray.cancel(ref, force=True)
    problems = [f"node {refs[ref]['NodeManagerAddress']}: {problem}" for ref in done for problem in _answer(ref)]
    if problems:
        raise WorkerEnvironmentError(problems)
    _checked.update({(refs[ref]["NodeID"], paths): now for ref in done})


def _answer(ref: Any) -> list[str]:
    try:
        return [str(problem) for problem in ray.get(ref, timeout=PROBE_SECONDS)]
    except ray.exceptions.RayError as error:
        return [f"the probe failed: {type(error).__name__}: {str(error).splitlines()[-1]}"]


def _make_probe() -> Callable[[str, tuple[str, ...], str], list[str]]:
    # A function defined in here travels by value, so that it runs where this package is missing.
    def probe(version: str, paths: tuple[str, ...], witness: str) -> list[str]:
        import importlib
        import os
        import time

        problems = []
        for module in ("lance", "lance_ray"):
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                package = "pylance" if module == "lance" else "lance-ray"
                problems.append(f"{package} cannot be imported: {error}")
                continue
            if module == "lance" and found.__version__ != version:
                problems.append(f"pylance {found.__version__} is installed, the driver has {version}")
        deadline = time.monotonic() + 2.0  # a network file system may be late to show a new file
        missing = [path for path in paths if not os.path.exists(os.path.join(path, witness))]
        while missing and time.monotonic() < deadline:
            time.sleep(0.2)
            missing = [path for path in missing if not os.path.exists(os.path.join(path, witness))]
        return problems + [f"does not see {path}" for path in missing]

    return probe
