"""What each operation makes of each kind of fault, with its tasks in this process: all of it or nothing, in time.

One oracle for all: the rows, ids and columns of before or of after, nothing left behind once it is cleaned up, and the
operation works when it is run again.
"""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_ray
from lance_ray import cleanup_orphans
from lance_ray.errors import CommitOutcomeUnknownError, LanceRayError, StorageError, TaskFailedError, unwrap
from tests.faults.death import OPERATIONS, STEPS, begin
from tests.faults.driver import ROOT
from tests.faults.model import local_tasks
from tests.faults.proxy import Rule
from tests.faults.stores import Place, ends_within, rows
from tests.tables import read_here

BEFORE = list(range(100))
MORE_IDS = list(range(1000, 1100))
WITH_MORE = {"create": MORE_IDS, "append": BEFORE + MORE_IDS, "overwrite": MORE_IDS}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    with local_tasks():
        yield


# Requests to the store

READS: dict[str, Callable[..., Any]] = {
    "read_lance": lambda **at: read_here(**at),
    "take": lambda **at: lance_ray.take(**at, keys=[5, 50], on="id"),
    "vector_search": lambda **at: lance_ray.vector_search(
        **at, nearest={"column": "vector", "q": np.zeros(4, np.float32), "k": 3}
    ),
}
ON_STORE = OPERATIONS | READS
REQUESTS: dict[str, dict[str, Any]] = {
    "GET": {"method": "GET", "path": r"^(?!.*list-type)"},
    "LIST": {"method": "GET", "path": "list-type"},
    "HEAD": {"method": "HEAD"},
    "PUT": {"method": "PUT"},
    "DELETE": {"method": "DELETE|POST"},
}
QUICK = {("append", "PUT"), ("compact_files", "GET"), ("compact_files", "PUT"), ("read_lance", "GET"), ("take", "GET")}


def marked(name: str, request: str) -> Any:
    marks = [] if (name, request) in QUICK else [pytest.mark.slow]
    return pytest.param(name, request, marks=marks, id=f"{name} {request}")


MATRIX = [marked(name, request) for name in ON_STORE for request in REQUESTS]


@pytest.fixture
def table(on_s3: Place) -> Place:
    """Ten fragments of ten rows."""
    vectors = pa.FixedSizeListArray.from_arrays(np.arange(400, dtype=np.float32), 4)
    on_s3.write(rows(0, 100).append_column("vector", vectors), max_rows_per_file=10)
    return on_s3


def target_of(table: Place, name: str) -> Place:
    """Where the operation works: what creates a table does it beside the one that is there."""
    return Place(f"{table.uri}-new", table.options, table.s3) if name == "create" else table


def exists(place: Place) -> bool:
    return any(name.startswith("_versions/") for name in place.files())


def version_of(place: Place) -> int:
    return place.open().version if exists(place) else 0


def after(name: str) -> list[int]:
    """The ids once the operation is done."""
    return WITH_MORE.get(name, BEFORE)


def assert_whole_or_untouched(place: Place, name: str, version: int) -> None:
    cleanup_orphans(**place.to)
    assert place.ledger() == set()
    if not exists(place):
        assert (name, version, place.data_files()) == ("create", 0, set())
        return
    assert place.orphans() == set()
    now = place.open()
    if now.version == version:
        assert place.ids() == BEFORE
    else:
        assert place.ids() in (BEFORE, after(name))
    if "new" in now.schema.names:
        found = now.to_table(columns=["id", "new"])
        assert found["new"].to_pylist() == [2 * item for item in found["id"].to_pylist()]
    if now.describe_indices():
        assert now.to_table(columns=["id"], filter="id = 7")["id"].to_pylist() == [7]


def rerun(place: Place, name: str) -> None:
    with suppress(lance_ray.InvalidArgumentError, lance_ray.TableExistsError):  # it may have been done all the same
        ON_STORE[name](**place.to)
    assert set(place.ids()) >= set(after(name))


@pytest.mark.parametrize(("name", "request_kind"), MATRIX)
def test_requests_that_fail_twice_cost_nothing(table: Place, name: str, request_kind: str) -> None:
    assert table.s3 is not None
    place = target_of(table, name)
    version = version_of(place)
    with table.s3.proxy.failing(Rule(**REQUESTS[request_kind], status=503, count=2)), ends_within(60):
        ON_STORE[name](**place.to)
    assert_whole_or_untouched(place, name, version)
    assert place.ids() == after(name)
    assert name in READS or place.open().version > version


@pytest.mark.parametrize(("name", "request_kind"), MATRIX)
def test_requests_that_are_refused_for_good_end_in_time_with_all_or_nothing(
    table: Place, name: str, request_kind: str
) -> None:
    assert table.s3 is not None
    place = target_of(table, name)
    version = version_of(place)
    rule = Rule(**REQUESTS[request_kind], status=403, code="AccessDenied")
    with table.s3.proxy.failing(rule), ends_within(30):
        try:
            ON_STORE[name](**place.to)
        except LanceRayError as error:
            found = unwrap(error)
            if isinstance(found, TaskFailedError):
                found = found.__cause__ or found
            assert isinstance(found, (StorageError, LanceRayError))
            assert getattr(found, "kind", "denied") == "denied"
    assert_whole_or_untouched(place, name, version)
    rerun(place, name)


# A commit whose answer is lost


LOST = [pytest.param(name, marks=[] if name == "add_columns" else [pytest.mark.slow]) for name in OPERATIONS]


@pytest.mark.parametrize("patient", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOST)
def test_a_commit_whose_answer_is_lost_is_there_once(table: Place, name: str, patient: bool) -> None:
    assert table.s3 is not None
    place = target_of(table, name)
    version = version_of(place)
    lost = Rule("PUT", "/_versions/", count=1, lose_answer=True)
    with table.s3.proxy.failing(lost), ends_within(60):
        try:
            OPERATIONS[name](**(place if patient else place.impatient).to)
        except CommitOutcomeUnknownError:
            assert name == "compact_files"  # whose first commit only reserves, and tells no version
    assert lost.hits
    assert place.open().version > version
    assert_whole_or_untouched(place, name, version)
    assert place.ids() == after(name)
    rerun(place, name)


# A full disk


@pytest.mark.parametrize("name", ["compact_files", "create_scalar_index", "add_columns"])
def test_a_disk_that_is_full_leaves_the_table_as_it_was(small_disk: Path, name: str) -> None:
    place = Place(str(small_disk / "table"))
    noise = np.random.default_rng(0).integers(0, 2**62, 100_000)
    lance.write_dataset(pa.table({"id": noise}), place.uri, max_rows_per_file=5_000)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(5_050_000))
    operation = {
        "compact_files": lambda: lance_ray.compact_files(
            place.uri, compaction_options={"target_rows_per_fragment": 100_000}, progress=False
        ),
        "create_scalar_index": lambda: lance_ray.create_scalar_index(
            place.uri, column="id", index_type="BTREE", progress=False
        ),
        "add_columns": lambda: lance_ray.add_columns(place.uri, transform={"new": "id * 3"}, progress=False),
    }[name]
    with pytest.raises(LanceRayError) as caught, ends_within(20):
        operation()
    causes = [caught.value, caught.value.__cause__, *getattr(caught.value, "failures", ())]
    causes += [getattr(item, "__cause__", None) for item in causes]
    assert "full" in {getattr(item, "kind", None) for item in causes}
    assert place.open().version == 1
    filler.unlink()
    cleanup_orphans(place.uri)
    assert place.orphans() == set()
    assert place.ledger() == set()
    operation()
    assert sorted(place.open().to_table(columns=["id"])["id"].to_pylist()) == sorted(noise.tolist())


# A driver that is killed

FEW = {("append", "after the commit"), ("compact_files", "before the commit")}
DEATHS = [
    pytest.param(name, step, marks=[] if (name, step) in FEW else [pytest.mark.slow], id=f"{name} {step}")
    for name in OPERATIONS
    for step in STEPS
]


@pytest.mark.parametrize(("name", "step"), DEATHS)
def test_a_driver_killed_at_any_step_leaves_all_or_nothing_and_what_goes_by_name(
    on_disk: Place, name: str, step: str
) -> None:
    if name != "create":
        begin(on_disk.uri)
    command = [sys.executable, "-m", "tests.faults.death", name, step, on_disk.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (-9, 0), done.stderr[-2000:]
    assert done.returncode == -9 or "ledger" in step or "note" in step  # not every operation takes every step
    cleanup_orphans(on_disk.uri)
    # A file that is finished and not yet noted has a name that only the engine knew.
    unknown = 1 if step == "before its first note" else 0
    assert len(on_disk.data_files() if name == "create" and not exists(on_disk) else on_disk.orphans()) <= unknown
    assert on_disk.ledger() == set()
    before = None if name == "create" else BEFORE
    committed = done.returncode == 0 or step in ("after the commit", "before the ledger ends", "after the ledger ends")
    assert (on_disk.ids() if exists(on_disk) else None) == (after(name) if committed else before)
    if not committed:
        OPERATIONS[name](uri=on_disk.uri)
        assert on_disk.ids() == after(name)
    lance_ray.cleanup_old_versions(on_disk.uri, older_than=dt.timedelta(0), delete_unverified=True)
    assert on_disk.orphans() == set()
