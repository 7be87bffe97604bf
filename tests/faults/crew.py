"""Many at once on one table: each repeats one thing until time is up, as a thread or as a process of its own.

``python -m tests.faults.crew JSON`` is one of them; see :class:`Member`. What each did is in a folder that all of them
read: what was acknowledged before a look at the table must be seen by it, whoever looks.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import lance_ray
from lance_ray.errors import CommitConflictError, CommitOutcomeUnknownError, SnapshotChangedError
from tests.faults.driver import wait_for
from tests.faults.model import local_tasks
from tests.faults.stores import Place
from tests.tables import read_here

BATCH = 20
APPENDERS = 8
OVERTAKEN = (CommitConflictError, SnapshotChangedError)
SMALL: dict[str, Any] = {"target_rows_per_fragment": 2000}
OTHERS = ("compact", "delete", "add_column", "read")


def batch(number: int) -> pa.Table:
    """The rows of one append: each knows its batch, and the sum of the batch's numbers, so that half of one shows."""
    ids = np.arange(number * BATCH, (number + 1) * BATCH)
    return pa.table({"id": ids, "batch": np.full(BATCH, number), "sum": np.full(BATCH, int(ids.sum()))})


def assert_whole(table: pa.Table) -> None:
    """Each batch is there with all its rows, once each."""
    ids, batches = np.asarray(table["id"]), np.asarray(table["batch"])
    assert len(np.unique(ids)) == len(ids)
    numbers, inverse, counts = np.unique(batches, return_inverse=True, return_counts=True)
    assert set(counts.tolist()) <= {BATCH}, [int(item) for item in numbers[counts != BATCH]][:5]
    sums = np.zeros(len(numbers), np.int64)
    np.add.at(sums, inverse, ids)
    assert (sums[inverse] == np.asarray(table["sum"])).all()


@dataclass(frozen=True)
class Journal:
    """What the members of a crew noted: lines in files, which one write adds as a whole."""

    folder: str

    def note(self, kind: str, what: object) -> None:
        """Add a line."""
        with (Path(self.folder) / kind).open("a") as file:
            file.write(f"{what}\n")

    def lines(self, kind: str) -> list[str]:
        """All of a kind."""
        path = Path(self.folder) / kind
        return path.read_text().splitlines() if path.exists() else []

    def batches(self, kind: str) -> set[int]:
        """Batches: ``acknowledged``, ``unknown``; ``doomed`` (about to be deleted), then ``deleted`` or ``spared``."""
        return set(map(int, self.lines(kind)))

    @property
    def counts(self) -> Counter[str]:
        """How often something was done."""
        return Counter(self.lines("done"))


@dataclass(frozen=True)
class Member:
    """One of the crew: what it does, on which table, and for how long."""

    role: str
    """``append``, or one of :data:`OTHERS`."""
    number: int
    uri: str
    journal: str
    seconds: float
    ray: str = ""
    """The Ray to work on; by default tasks run in this process."""

    @property
    def argument(self) -> str:
        """What the command line takes."""
        return json.dumps(asdict(self))

    @property
    def sign(self) -> Path:
        """Where it says that it is ready."""
        return Path(self.journal) / f"{self.role}-{self.number}.ready"

    def work(self) -> None:
        """Until time is up. Being overtaken is no failure; any other error is."""
        until = time.monotonic() + self.seconds
        action = Actions(Place(self.uri), Journal(self.journal), self.number, bool(self.ray))
        step: Callable[[], None] = getattr(action, self.role)
        while time.monotonic() < until:
            try:
                step()
            except OVERTAKEN:
                action.done(f"overtaken: {self.role}")


class Actions:
    """What members do; each call is one operation."""

    def __init__(self, place: Place, journal: Journal, number: int, on_ray: bool) -> None:
        self.place, self.journal, self.on_ray = place, journal, on_ray
        self.next = 1 + number * 1_000_000
        self.tasks: dict[str, Any] = {"ray_remote_args": {"num_cpus": 0.1}} if on_ray else {}

    def done(self, what: str) -> None:
        """Count it."""
        self.journal.note("done", what)

    def append(self) -> None:
        """Append a batch that nobody else appends."""
        number, self.next = self.next, self.next + 1
        try:
            self.write(batch(number))
        except CommitOutcomeUnknownError:
            self.journal.note("unknown", number)
        else:
            self.journal.note("acknowledged", number)

    def write(self, table: pa.Table) -> None:
        """As one file of a task, or from this process."""
        if not self.on_ray:
            lance_ray.create_table(**self.place.to, data=table, mode="append")
            return
        import ray.data

        lance_ray.write_lance(ray.data.from_arrow(table), **self.place.to, mode="append", **self.tasks)

    def compact(self) -> None:
        """Compact, over and over again."""
        options: dict[str, Any] = {"compaction_options": SMALL, "on_failure": "report", "max_replans": 20}
        lance_ray.compact_files(**self.place.to, **options, progress=False, **self.tasks)
        self.done("compactions")

    def delete(self) -> None:
        """Delete a batch that was acknowledged, as a whole."""
        left = sorted(self.journal.batches("acknowledged") - self.journal.batches("doomed"))
        if len(left) < 5:
            time.sleep(0.05)
            return
        chosen = left[len(left) // 2]
        self.journal.note("doomed", chosen)
        try:
            lance_ray.delete(**self.place.to, predicate=f"batch = {chosen}")
        except OVERTAKEN:
            self.journal.note("spared", chosen)
        else:
            self.journal.note("deleted", chosen)

    def add_column(self) -> None:
        """Add the column, once it lands, and then give it new values."""
        if "twice" not in self.place.open().schema.names:
            lance_ray.add_columns(
                **self.place.to, transform={"twice": "id * 2"}, progress=False, max_replans=50, **self.tasks
            )
            self.done("columns added")
            return
        keywords: dict[str, Any] = {"columns": ["twice"], "transform": {"twice": "id * 2"}, "where_null": True}
        lance_ray.update_columns(**self.place.to, **keywords, progress=False, **self.tasks)
        self.done("column updates")

    def read(self) -> None:
        """Read one version, of which each batch must be whole; and then the newest, which has all that was promised."""
        assert_whole(self.rows(version=self.place.open().version))
        before = self.journal.batches("acknowledged")
        newer = self.rows()
        assert_whole(newer)
        missing = before - set(newer["batch"].to_pylist())
        assert missing <= self.journal.batches("doomed"), sorted(missing)[:5]
        self.done("snapshots read")

    def rows(self, **which: Any) -> pa.Table:
        """A version of the table."""
        if not self.on_ray:
            return read_here(**self.place.to, **which)
        import ray

        found = lance_ray.read_lance(**self.place.to, **which, **self.tasks)
        return pa.concat_tables(ray.get(found.to_arrow_refs()), promote_options="default")


def main(member: Member) -> None:
    """One member, from the moment on that all are ready."""
    with nullcontext() if member.ray else local_tasks():
        if member.ray:
            import ray.data

            ray.init(address=member.ray, log_to_driver=False, logging_level=40)
            ray.data.DataContext.get_current().enable_progress_bars = False
        member.sign.touch()
        wait_for(Path(member.journal) / "go", 240)
        member.work()


if __name__ == "__main__":
    main(Member(**json.loads(sys.argv[1])))
