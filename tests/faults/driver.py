"""A driver in a process of its own, on the Ray of the tests, for the tests that kill it, interrupt it or race it.

``python -m tests.faults.driver JSON`` writes blocks of rows; see :class:`Orders`. The last line that it prints is the
outcome as JSON: the fields of the report that matter, or the type and message of the error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
BLOCK = 50


@dataclass(frozen=True)
class Orders:
    """What a driver shall do, and what shall happen to it."""

    ray: str
    folder: str
    """Where drivers and tests leave each other signs (files)."""
    uri: str
    options: dict[str, str] | None = None
    mode: str = "append"
    stream: bool = False
    job_id: str | None = None
    first: int = 0
    blocks: int = 2
    repeat: int = 1
    """Writes one after the other, each of its own rows."""
    die: str = ""
    """``before`` or ``after`` the commit; of a stream, the first one."""
    hold: str = ""
    """``tasks``: the last block is held back until the sign ``go``. ``start``: the write begins with it."""

    @property
    def ids(self) -> range:
        """The rows of all writes."""
        return range(self.first, self.first + self.repeat * self.blocks * BLOCK)

    def sign(self, name: str) -> Path:
        """A sign of this driver."""
        return Path(self.folder) / f"{self.first}-{name}"

    @property
    def go(self) -> Path:
        """The sign that all drivers wait for."""
        return Path(self.folder) / "go"


@contextmanager
def driver(orders: Orders) -> Iterator[subprocess.Popen[str]]:
    """A running driver; killed at the end, if it still runs."""
    command = [sys.executable, "-m", "tests.faults.driver", json.dumps(asdict(orders))]
    environment = os.environ | {"PYTHONPATH": ROOT}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(process: subprocess.Popen[str], timeout: float = 90) -> dict[str, Any]:
    """What the driver reported, once it is over."""
    printed, _ = process.communicate(timeout=timeout)
    try:
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        raise AssertionError(f"the driver ended with {process.returncode} and said:\n{printed[-3000:]}") from None
    return found | {"printed": printed}


def wait_for(sign: Path, seconds: float = 60) -> None:
    """Return when the sign is there."""
    deadline = time.monotonic() + seconds
    while not sign.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {sign.name} after {seconds} s")
        time.sleep(0.02)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _set_trap(when: str) -> None:
    import lance

    real = lance.LanceDataset.commit

    def deadly(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            real(*args, **kwargs)
        _kill_self()

    setattr(lance.LanceDataset, "commit", staticmethod(deadly))  # noqa: B010 - typed as a method, which this is not


def write(orders: Orders, turn: int = 0) -> Any:
    """One write, in whatever process; returns its report."""
    import pyarrow as pa
    import ray.data

    from lance_ray import write_lance

    start = orders.first + turn * orders.blocks * BLOCK
    last = start + (orders.blocks - 1) * BLOCK

    def make(batch: dict[str, Any]) -> pa.Table:
        first = start + int(batch["id"][0]) * BLOCK
        if orders.hold == "tasks" and first == last:
            orders.sign("held").touch()
            wait_for(orders.go)
        return pa.table({"id": pa.array(range(first, first + BLOCK), pa.int64())})

    ds = ray.data.range(orders.blocks, override_num_blocks=orders.blocks)
    # Shares of a CPU of its own keep Ray from fusing this with the write, so that each block is written when it is
    # there; and they fit into what Ray grants while it still holds back what a killed driver had.
    ds = ds.map_batches(make, batch_size=None, num_cpus=0.05)
    return write_lance(
        ds,
        orders.uri,
        storage_options=orders.options,
        mode=orders.mode,
        stream=orders.stream,
        job_id=orders.job_id,
        min_rows_per_file=BLOCK,
        ray_remote_args=None if orders.stream else {"num_cpus": 0.5},
    )


def main(orders: Orders) -> dict[str, Any]:
    """Do as ordered; returns the outcome."""
    import ray

    from lance_ray import LanceRayError

    ray.init(address=orders.ray, log_to_driver=False, logging_level=40)
    if orders.die:
        _set_trap(orders.die)
    if orders.hold == "start":
        orders.sign("ready").touch()
        wait_for(orders.go)
    try:
        reports = [write(orders, turn) for turn in range(orders.repeat)]
    except LanceRayError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"version": reports[-1].version, "rows": sum(item.rows for item in reports), "skipped": reports[-1].skipped}


if __name__ == "__main__":
    print(json.dumps(main(Orders(**json.loads(sys.argv[1])))), flush=True)
