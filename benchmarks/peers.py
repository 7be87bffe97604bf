"""Searches by lance-ray 0.5.0 beside ours, in one run: ``python -m benchmarks.peers DIR``.

Both packages are imported as ``lance_ray``, so that each runs in processes of its own, with a Ray of its own: DIR is
where lance-ray is unpacked (``pip install --no-deps --target DIR lance-ray==0.5.0 more-itertools``). The sides run in
turn; what is timed is one call on a Ray that has run the same call before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness import cached
from benchmarks.searching import FRAGMENTS, ROWS, make_table

# What a side runs: the same text for both.
PROGRAM = """
import json, sys, time
import numpy as np, ray
import lance_ray
uri, options, workers, repeats = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
query = np.random.default_rng(1).standard_normal(128).astype(np.float32)
seconds = []
for _ in range(repeats + 1):
    start = time.perf_counter()
    found = lance_ray.vector_search(
        uri, nearest={"column": "vector", "q": query, "k": 10, **options}, columns=["id"], **workers
    )
    seconds.append(time.perf_counter() - start)
print("RESULT" + json.dumps([seconds[1:], sorted(found.column("id").to_pylist())]))
ray.shutdown()
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """Median seconds of a search by each side, and whether both found the same rows; a peer that fails has none."""

    name: str
    ours: float
    peer: float | None
    same: bool
    failure: str = ""


def _run(folder: str, uri: str, options: str, workers: str, repeats: int) -> tuple[list[float], list[int], str]:
    environment = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, "-P", "-c", PROGRAM, uri, options, workers, str(repeats)]
    # Ray's workers look into the folder of the driver first.
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            seconds, ids = json.loads(line.removeprefix("RESULT"))
            return seconds, ids, ""
    return [], [], done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"


def figures(peer: str, folder: Path, scale: float, repeats: int) -> Iterator[Figure]:
    """Flat and indexed search of one query."""
    rows = max(4000, int(ROWS * scale))
    here = str(Path(__file__).parents[1])
    for name, index, options in (("flat", False, {"use_index": False}), ("IVF_PQ", True, {"nprobes": 20})):
        kind = "_indexed" if index else ""
        uri = cached(folder, f"vectors{kind}_{rows}", partial(make_table, rows=rows, index=index))
        told = json.dumps(options)
        # lance-ray's default of 4 workers does not start on 2 CPUs.
        theirs, their_ids, failure = _run(peer, uri, told, '{"num_workers": 2}', repeats)
        ours, our_ids, own_failure = _run(here, uri, told, "{}", repeats)
        if own_failure:
            raise RuntimeError(own_failure)
        yield Figure(
            f"{name} {rows:,} x 128 in {FRAGMENTS} fragments, 1 query",
            statistics.median(ours),
            statistics.median(theirs) if theirs else None,
            our_ids == their_ids,
            failure,
        )


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("peer", help="folder where lance-ray 0.5.0 is unpacked")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published sizes (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--data", type=Path, help="folder to keep the tables in (default: a temporary one)")
    options = parser.parse_args()
    print("| search | ours s | lance-ray 0.5.0 s | same rows |\n|---|---:|---:|---|")
    with tempfile.TemporaryDirectory(prefix="lance-ray-bench-") as temporary:
        folder = options.data or Path(temporary)
        for item in figures(options.peer, folder, options.scale, options.repeats):
            peer = f"{item.peer:.3f}" if item.peer is not None else f"fails: {item.failure[:80]}"
            print(f"| {item.name} | {item.ours:.3f} | {peer} | {'yes' if item.same else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
