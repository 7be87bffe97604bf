"""Many at once on one table for a while: what was acknowledged is there once, and no reader sees half of a commit."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_ray
from lance_ray.errors import CommitConflictError, CommitOutcomeUnknownError, LanceRayError, SnapshotChangedError
from tests.faults.model import local_tasks
from tests.faults.stores import Place
from tests.tables import read_here

BATCH = 20
DRIVERS = 8
OVERTAKEN = (CommitConflictError, SnapshotChangedError)
SMALL: dict[str, Any] = {"target_rows_per_fragment": 2000}


def batch(number: int) -> pa.Table:
    """The rows of one append: each knows its batch, and the sum of the batch's numbers, so that half of one shows."""
    ids = np.arange(number * BATCH, (number + 1) * BATCH)
    return pa.table({"id": ids, "batch": np.full(BATCH, number), "sum": np.full(BATCH, int(ids.sum()))})


@dataclass
class Crew:
    """Threads that work on one table until time is up, and what they saw."""

    place: Place
    until: float
    acknowledged: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def append(self, first: int) -> None:
        """Append the batches from ``first`` on, one after the other."""
        for number in range(first, first + 1_000_000):
            if time.monotonic() > self.until:
                return
            try:
                lance_ray.create_table(**self.place.to, data=batch(number), mode="append")
            except OVERTAKEN:
                self.counts["refused appends"] += 1
            except CommitOutcomeUnknownError:
                self.unknown.add(number)
            else:
                self.acknowledged.add(number)

    def compact(self) -> None:
        """Compact again and again."""
        lance_ray.compact_files(
            **self.place.to, compaction_options=SMALL, on_failure="report", progress=False, max_replans=20
        )
        self.counts["compactions"] += 1

    def delete(self) -> None:
        """Delete a batch that was acknowledged, as a whole."""
        with self.lock:
            left = sorted(self.acknowledged - self.deleted)
        if len(left) < 5:
            time.sleep(0.05)
            return
        chosen = left[len(left) // 2]
        lance_ray.delete(**self.place.to, predicate=f"batch = {chosen}")
        self.deleted.add(chosen)
        self.counts["deletions"] += 1

    def add_column(self) -> None:
        """Add the column, once it lands, and then give it new values."""
        if "twice" not in self.place.open().schema.names:
            self.extend()
            return
        lance_ray.update_columns(
            **self.place.to, columns=["twice"], transform={"twice": "id * 2"}, where_null=True, progress=False
        )
        self.counts["column updates"] += 1

    def extend(self) -> None:
        """Add the column."""
        lance_ray.add_columns(**self.place.to, transform={"twice": "id * 2"}, progress=False, max_replans=50)
        self.counts["columns added"] += 1

    def read(self) -> None:
        """Read one version; each of its batches must be whole."""
        version = self.place.open().version
        table = read_here(**self.place.to, version=version)
        assert_whole(table)
        with self.lock:
            before = set(self.acknowledged)
        newer = read_here(**self.place.to)
        assert before - self.deleted <= set(newer["batch"].to_pylist()) | self.deleted
        self.counts["snapshots read"] += 1

    def again(self, action: Callable[[], None]) -> None:
        """Repeat until time is up; being overtaken is no failure."""
        while time.monotonic() < self.until:
            try:
                action()
            except OVERTAKEN:
                self.counts[f"overtaken: {action.__name__}"] += 1

    def run(self) -> None:
        """All of them at once; any other error is kept."""

        def guarded(work: Callable[..., None], *args: Any) -> None:
            try:
                work(*args)
            except BaseException as error:  # noqa: BLE001 - whatever a thread ends with is what the test looks at
                self.errors.append(error)

        work: list[tuple[Any, ...]] = [(self.append, 1 + number * 1_000_000) for number in range(DRIVERS)]
        work += [(self.again, item) for item in (self.compact, self.delete, self.add_column, self.read)]
        threads = [threading.Thread(target=guarded, args=item) for item in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.until - time.monotonic() + 120)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def assert_whole(table: pa.Table) -> None:
    """Each batch is there with all its rows, once each."""
    ids, batches = np.asarray(table["id"]), np.asarray(table["batch"])
    assert len(np.unique(ids)) == len(ids)
    numbers, inverse, counts = np.unique(batches, return_inverse=True, return_counts=True)
    assert set(counts.tolist()) <= {BATCH}, [int(item) for item in numbers[counts != BATCH]][:5]
    sums = np.zeros(len(numbers), np.int64)
    np.add.at(sums, inverse, ids)
    assert (sums[inverse] == np.asarray(table["sum"])).all()


def fight(uri: Path, seconds: float) -> Crew:
    place = Place(str(uri))
    place.write(batch(0))
    crew = Crew(place, time.monotonic() + seconds)
    with local_tasks():
        crew.run()
    return crew


def assert_nothing_lost(crew: Crew) -> None:
    assert crew.errors == []
    dataset: lance.LanceDataset = crew.place.open()
    assert_whole(dataset.to_table(columns=["id", "batch", "sum"]))
    found = set(dataset.to_table(columns=["batch"])["batch"].to_pylist()) - {0}
    certain = crew.acknowledged - crew.deleted
    assert certain - found == set()
    assert found - certain <= crew.unknown
    assert crew.place.ledger() == set()
    for item in dataset.versions()[:: max(1, len(dataset.versions()) // 20)]:
        assert_whole(crew.place.open(item["version"]).to_table(columns=["id", "batch", "sum"]))
    if "twice" in dataset.schema.names:
        values = dataset.to_table(columns=["id", "twice"], filter="twice IS NOT NULL")
        assert [2 * item for item in values["id"].to_pylist()] == values["twice"].to_pylist()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def test_eight_appenders_and_four_others_for_some_seconds_lose_and_double_nothing(tmp_path: Path) -> None:
    crew = fight(tmp_path / "table", 6)
    assert_nothing_lost(crew)
    assert len(crew.acknowledged) >= DRIVERS
    assert crew.counts["snapshots read"]


@pytest.mark.slow
def test_eight_appenders_and_four_others_for_a_minute_lose_and_double_nothing(tmp_path: Path) -> None:
    crew = fight(tmp_path / "table", 60)
    print(f"{len(crew.acknowledged)} appends, {dict(crew.counts)}")
    assert_nothing_lost(crew)
    assert crew.counts["compactions"]
    assert crew.counts["deletions"]
    assert crew.counts["columns added"] == 1


def test_an_error_of_the_crew_would_be_seen(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "table"))
    place.write(batch(0))
    place.write(batch(1).slice(1), "append")
    with pytest.raises(AssertionError):
        assert_whole(place.open().to_table())
    crew = Crew(place, time.monotonic())
    crew.acknowledged.add(5)
    with pytest.raises(AssertionError):
        assert_nothing_lost(crew)
    assert issubclass(CommitConflictError, LanceRayError)
