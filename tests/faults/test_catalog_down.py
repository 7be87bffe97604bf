"""A catalog that goes down after the plan of an operation: for a moment, or until somebody starts it again.

A real REST server over a folder, which is stopped at a step of the operation. Where the catalog only says where a table
lies, nobody asks it after the plan; where it also keeps the versions, each commit goes through it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
import lance_namespace
import pyarrow as pa
import pytest
import ray.data
from lance.namespace import RestAdapter

import lance_ray
from lance_ray import cleanup_orphans, commit, compaction
from lance_ray.catalog import CatalogClient
from lance_ray.errors import CommitOutcomeUnknownError, LanceRayError, OperationFailedError, StorageError
from lance_ray.ledger import JobRef
from tests import catalogs
from tests.faults.death import MORE, OPERATIONS
from tests.faults.model import local_tasks
from tests.faults.stores import BUCKET, S3, Place, ends_within, rows

BEFORE, MORE_IDS = list(range(100)), MORE["id"].to_pylist()
AFTER = {"create": MORE_IDS, "append": BEFORE + MORE_IDS, "overwrite": MORE_IDS}
BOUND = 60.0
"""Seconds within which an operation must end whose catalog does not come back."""


class Server:
    """A REST catalog over a folder, at one address whenever it runs."""

    def __init__(self, root: Path, *, keeps_versions: bool) -> None:
        self.properties = {"root": str(root)}
        if keeps_versions:
            self.properties["table_version_tracking_enabled"] = "true"
        self.root, self.keeps_versions = root, keeps_versions
        self._adapter: RestAdapter | None = None
        self._port = 0
        self._timers: list[threading.Timer] = []

    def start(self) -> None:
        """Listen, where it listened before."""
        self._adapter = RestAdapter("dir", self.properties, port=self._port)
        self._adapter.start()
        self._port = self._adapter.port

    def stop(self) -> None:
        """Go away, without a word to those who are connected."""
        adapter, self._adapter = self._adapter, None
        if adapter is not None:
            adapter.stop()

    def restart_after(self, seconds: float) -> None:
        """Go away, and come back."""
        self.stop()
        timer = threading.Timer(seconds, self.start)
        self._timers.append(timer)
        timer.start()

    def end(self) -> None:
        """At the end of a test."""
        for timer in self._timers:
            timer.cancel()
            timer.join()
        self.stop()

    @property
    def at(self) -> dict[str, Any]:
        """The keywords of its one table."""
        properties = {"uri": f"http://127.0.0.1:{self._port}"}
        return {"namespace_impl": "rest", "namespace_properties": properties, "table_id": ["t"]}

    def open(self) -> lance.LanceDataset:
        """The table by plain pylance and a catalog of its own over the same folder."""
        return lance.dataset(namespace_client=lance_namespace.connect("dir", self.properties), table_id=["t"])

    def ids(self) -> list[int] | None:
        """The oracle; None where there is no table."""
        try:
            return sorted(self.open().to_table(columns=["id"])["id"].to_pylist())
        except (ValueError, RuntimeError, OSError, lance_namespace.errors.LanceNamespaceError):
            assert self.keeps_versions or not self._files("_versions"), "there is one, and it cannot be read"
            return None

    def _files(self, folder: str) -> list[Path]:
        # What the catalog keeps of its own is a table beside it.
        found = (path for path in self.root.glob(f"*/{folder}/**/*") if path.is_file())
        return [path for path in found if "__manifest" not in path.parts]

    def data_files(self) -> set[str]:
        """The data files of the table, committed or not."""
        return {path.name for path in self._files("data")}

    def segments(self) -> list[Path]:
        """The files of indexes."""
        return self._files("_indices")

    def ledger(self) -> list[Path]:
        """What is left of ledgers."""
        return self._files("_lance_ray")

    def orphans(self) -> set[str]:
        """Data files that no version refers to."""
        if self.ids() is None:
            return self.data_files()
        dataset = self.open()
        versions = [dataset.checkout_version(item["version"]) for item in dataset.versions()]
        used = {str(file.path) for item in versions for found in item.get_fragments() for file in found.metadata.files}
        return self.data_files() - used


@pytest.fixture(params=[False, True], ids=["which names tables", "which keeps versions"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("LANCE_RAY_NO_BACKOFF", raising=False)  # what is to be seen is that it waits, and how long
    found = Server(tmp_path / "served", keeps_versions=request.param)
    found.start()
    yield found
    found.end()


@pytest.fixture
def server(served: Server) -> Iterator[Server]:
    """The same for operations whose tasks run in this process."""
    with local_tasks():
        yield served


STEPS: dict[str, list[tuple[Any, str, bool]]] = {
    "while tasks run": [(JobRef, "record", False)],
    "before the commit": [(commit, "apply", False), (commit, "commit_rewrites", False)],
    "with the commit": [(CatalogClient, "create_table_version", False)],
    "after the commit": [(CatalogClient, "create_table_version", True)],
}
"""What is called there, and whether the catalog has done it before it goes down."""
OF_VERSIONS = {"with the commit", "after the commit"}


def at_step(patch: pytest.MonkeyPatch, step: str, operation: str, action: Callable[[], None]) -> list[str]:
    """Do something, once, when an operation comes to a step; returns what was called."""
    seen: list[str] = []
    # A compaction makes two versions, of which the first only reserves numbers of fragments.
    turn = 1 if operation == "compact_files" and step in OF_VERSIONS else 0

    def trap(original: Callable[..., Any], name: str, done: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = len(seen) == turn
            seen.append(name)
            result = original(*args, **kwargs) if done or not first else None
            if first:
                action()
            if first and done:
                raise ConnectionResetError(104, "Connection reset by peer")
            return result if done or not first else original(*args, **kwargs)

        return call

    for owner, name, done in STEPS[step]:
        patch.setattr(owner, name, trap(getattr(owner, name), name, done))
    return seen


def table_before(server: Server, operation: str) -> None:
    if operation != "create":
        lance_ray.create_table(**server.at, data=rows(0, 10), mode="create")
        for first in range(10, 100, 10):
            lance_ray.create_table(**server.at, data=rows(first, 10), mode="append")


def after(operation: str) -> list[int]:
    found: list[int] = AFTER.get(operation, BEFORE)
    return found


def before(operation: str) -> list[int] | None:
    return None if operation == "create" else BEFORE


def assert_usable(server: Server, operation: str) -> None:
    """It can be run again, and then all of it is there and nothing else."""
    with suppress(lance_ray.TableExistsError, lance_ray.InvalidArgumentError):  # it was done all the same
        OPERATIONS[operation](**server.at)
    wanted = set(after(operation))
    assert set(server.ids() or ()) == wanted
    cleanup_orphans(**server.at)
    assert server.orphans() == set()
    assert server.ledger() == []


def cases(quick: set[tuple[str, str]]) -> list[Any]:
    """Every operation at every step; those that are not quick are left to the long run."""
    return [
        pytest.param(name, step, marks=[] if (name, step) in quick else [pytest.mark.slow], id=f"{name} {step}")
        for name in OPERATIONS
        for step in STEPS
    ]


@pytest.mark.parametrize(("operation", "step"), cases({("append", "before the commit")}))
def test_a_catalog_that_is_away_for_a_moment_costs_nothing_but_time(
    server: Server, operation: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step in OF_VERSIONS and not server.keeps_versions:
        pytest.skip("no commit goes through this catalog")
    table_before(server, operation)
    with monkeypatch.context() as patch, ends_within(BOUND):
        seen = at_step(patch, step, operation, lambda: server.restart_after(1.5))
        try:
            OPERATIONS[operation](**server.at)
        except CommitOutcomeUnknownError:
            assert step in OF_VERSIONS  # it was on its way to the catalog
            assert server.ids() in (before(operation), after(operation))
            cleanup_orphans(**server.at)
        else:
            assert server.ids() == after(operation)
    assert seen
    assert server.orphans() == set()
    assert server.ledger() == []
    assert_usable(server, operation)


@pytest.mark.parametrize(("operation", "step"), cases({("compact_files", "before the commit")}))
def test_a_catalog_that_stays_away_ends_the_operation_in_time_with_all_or_nothing(
    server: Server, operation: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step in OF_VERSIONS and not server.keeps_versions:
        pytest.skip("no commit goes through this catalog")
    if operation != "append":  # which shows how long the waits are
        monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    table_before(server, operation)
    ended: LanceRayError | None = None
    with monkeypatch.context() as patch, ends_within(BOUND):
        seen = at_step(patch, step, operation, server.stop)
        try:
            OPERATIONS[operation](**server.at)
        except LanceRayError as error:
            ended = error
    assert seen
    if not server.keeps_versions:
        assert ended is None  # nobody asks it any more
        assert server.ids() == after(operation)
    else:
        assert isinstance(ended, (StorageError, CommitOutcomeUnknownError, OperationFailedError)), repr(ended)
        assert server.ids() == (after(operation) if step == "after the commit" else before(operation))
    server.start()
    if isinstance(ended, CommitOutcomeUnknownError):
        assert server.ledger()
        assert server.orphans() or server.segments() or step == "after the commit"  # nothing was deleted
    cleanup_orphans(**server.at)
    assert server.orphans() == set()
    assert server.ledger() == []
    assert_usable(server, operation)


# On Ray

PATIENT_WORKERS = pytest.mark.skipif(
    "LANCE_RAY_NO_BACKOFF" in os.environ, reason="workers do not wait where this is set"
)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("stream", [False, True], ids=["tasks", "stream"])
@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_a_write_on_ray_waits_for_its_catalog(
    served: Server, mode: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_before(served, mode)
    parts = [MORE.slice(first, 25) for first in range(0, 100, 25)]
    with monkeypatch.context() as patch, ends_within(BOUND):
        seen = at_step(patch, "before the commit", mode, lambda: served.restart_after(2.0))
        ds = ray.data.from_arrow(parts)
        report = lance_ray.write_lance(ds, **served.at, mode=mode, stream=stream, min_rows_per_file=25)
    assert seen
    assert report.rows == 100
    assert served.ids() == after(mode)
    assert (served.orphans(), served.ledger()) == (set(), [])


@PATIENT_WORKERS
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_that_open_a_table_wait_for_its_catalog(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    table_before(served, "compact_files")
    ds = lance_ray.read_lance(**served.at, columns=["id"])
    with ends_within(BOUND):
        served.restart_after(4.0)
        assert sorted(row["id"] for row in ds.take_all()) == BEFORE
    monkeypatch.setattr(compaction, "check_cluster", lambda _: served.restart_after(4.0))  # after the plan
    with ends_within(BOUND):
        OPERATIONS["compact_files"](**served.at)
    assert served.ids() == BEFORE
    assert (served.orphans(), served.ledger()) == (set(), [])


@PATIENT_WORKERS
@pytest.mark.slow
@pytest.mark.ray
def test_credentials_that_run_out_while_the_catalog_is_down_are_waited_for(
    ray_session: object, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LANCE_RAY_NO_BACKOFF", raising=False)
    s3.proxy.admits = catalogs.is_alive
    down = tmp_path / "down"
    properties = {
        "root": str(tmp_path / "entries"),
        "bucket": BUCKET,
        "endpoint": s3.proxy.url,
        "life": "2",
        "log": str(tmp_path / "asked"),
        "down": str(down),
    }
    name = f"down{time.monotonic_ns()}"
    at: dict[str, Any] = {"namespace_impl": "tests.catalogs.Vending", "namespace_properties": properties}
    at["table_id"] = [name]

    def slowly(table: pa.Table) -> pa.Table:
        time.sleep(0.4)
        return table

    lance_ray.create_table(data=rows(-10, 10), **at)
    made = ray.data.from_arrow([rows(first, 10) for first in range(0, 100, 10)])
    slow = made.map_batches(slowly, batch_format="pyarrow", batch_size=None)
    timers = [threading.Timer(1.0, down.touch), threading.Timer(5.0, down.unlink)]
    for timer in timers:
        timer.start()
    with ends_within(BOUND):
        lance_ray.write_lance(slow, **at, mode="append", min_rows_per_file=10)
    for timer in timers:
        timer.join()
    s3.proxy.admits = None
    place = Place(f"s3://{BUCKET}/{name}", s3.options(), s3)
    place.assert_holds(range(-10, 100))
