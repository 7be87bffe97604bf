"""Every way to write, under every fault of its tasks, its store and its commit, on a real Ray: one oracle for all.

The rows of before or of after, once each (a streamed append: of before and of the bundles that it committed); nothing
left beside the table; and the same job, run again, does what is left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from lance_ray import WriteReport, cleanup_orphans, commit, write_lance
from lance_ray.errors import LanceRayError, StorageError, TableExistsError
from tests.faults.proxy import Rule
from tests.faults.stores import Place, ends_within, failing_with, rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

BLOCKS, BLOCK = 4, 50
FORMER, NEW = list(range(-BLOCK, 0)), list(range(BLOCKS * BLOCK))
MODES: dict[str, dict[str, Any]] = {
    "create": {"mode": "create"},
    "append": {"mode": "append"},
    "overwrite": {"mode": "overwrite"},
    "stream": {"mode": "append", "stream": True},
    "streamed overwrite": {"mode": "overwrite", "stream": True},
}
SOON = 30.0


def each_mode(*quick: str) -> Any:
    """The test for every mode; those that are not named are left to the long run."""
    marks = [pytest.param(mode, marks=[] if mode in quick else [pytest.mark.slow], id=mode) for mode in MODES]
    return pytest.mark.parametrize("mode", marks)


def blocks(spoil: Callable[[pa.Table], pa.Table] | None = None) -> ray.data.Dataset:
    """The rows to write, as blocks that become a file each."""

    def make(batch: dict[str, Any]) -> pa.Table:
        table = rows(int(batch["id"][0]) * BLOCK, BLOCK)
        return table if spoil is None else spoil(table)

    return ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(make, batch_size=None)


def begin(place: Place, mode: str) -> None:
    if mode != "create":
        place.write(rows(-BLOCK, BLOCK))


def write(place: Place, mode: str, ds: ray.data.Dataset | None = None) -> WriteReport:
    options: dict[str, Any] = {} if "stream" in MODES[mode] else {"concurrency": 1}
    return write_lance(
        blocks() if ds is None else ds, **place.to, **MODES[mode], **options, job_id="nightly", min_rows_per_file=BLOCK
    )


def after(mode: str) -> list[int]:
    return [*FORMER, *NEW] if MODES[mode]["mode"] == "append" else NEW


def exists(place: Place) -> bool:
    return any(name.startswith("_versions/") for name in place.files())


def assert_nothing_or_whole_bundles(place: Place, mode: str) -> None:
    """What a write that ended with an error may leave."""
    assert place.ledger() == set()
    if mode == "create":
        place.assert_empty()
        return
    assert place.orphans() == set()
    found = place.ids()
    bundles = range(0, len(NEW), BLOCK) if mode == "stream" else [0]
    assert found in [[*FORMER, *NEW[:end]] for end in bundles]


def assert_a_second_run_does_the_rest(place: Place, mode: str) -> None:
    write(place, mode)
    place.assert_holds(after(mode))


# Workers


@each_mode()
def test_a_worker_that_is_killed_is_replaced(on_disk: Place, tmp_path: Path, mode: str):
    mark = tmp_path / "died"

    def deadly(table: pa.Table) -> pa.Table:
        if table["id"][0].as_py() == BLOCK and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return table

    begin(on_disk, mode)
    write(on_disk, mode, blocks(deadly))
    assert mark.exists()
    on_disk.assert_holds(after(mode))


def poisoned(table: pa.Table) -> pa.Table:
    """Of which one cannot be made."""
    if table["id"][0].as_py() == 2 * BLOCK:
        raise ArithmeticError("the caller's own mistake")
    return table


def of_another_type(table: pa.Table) -> pa.Table:
    """Of which one does not fit the others."""
    if table["id"][0].as_py() != 2 * BLOCK:
        return table
    return pa.table({"id": pa.array(["no number"] * BLOCK)})


@each_mode("overwrite")
@pytest.mark.parametrize("spoil", [poisoned, of_another_type])
def test_a_poisoned_block_ends_the_write_with_its_own_error(on_disk: Place, mode: str, spoil: Any):
    begin(on_disk, mode)
    with pytest.raises(Exception, match=r"own mistake|id"), ends_within(SOON):
        write(on_disk, mode, blocks(spoil))
    assert_nothing_or_whole_bundles(on_disk, mode)
    assert_a_second_run_does_the_rest(on_disk, mode)


# The store


@each_mode("stream")
@pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}], ids=["throttles", "resets"])
def test_a_store_that_fails_for_a_while_costs_nothing_but_time(on_s3: Place, mode: str, fault: dict[str, Any]):
    begin(on_s3, mode)
    assert on_s3.s3 is not None
    with on_s3.s3.proxy.failing(Rule("PUT", "/data/", count=3, **fault)) as rule, ends_within(SOON):
        write(on_s3.impatient, mode)
    assert rule.hits > 3
    on_s3.assert_holds(after(mode))


@each_mode()
@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_a_store_that_refuses_in_the_middle_ends_the_write_soon(on_s3: Place, mode: str, code: str):
    begin(on_s3, mode)
    assert on_s3.s3 is not None
    refused = Rule("PUT", "/data/", skip=2, status=403, code=code)
    with on_s3.s3.proxy.failing(refused), failing_with(StorageError) as caught, ends_within(SOON):
        write(on_s3, mode)
    assert caught.value.kind == "denied"
    assert_nothing_or_whole_bundles(on_s3, mode)
    assert_a_second_run_does_the_rest(on_s3, mode)


@pytest.fixture
def noise() -> Callable[[pa.Table], pa.Table]:
    """Makes each block half a megabyte that does not compress."""

    def add(table: pa.Table) -> pa.Table:
        return table.append_column("data", pa.array([os.urandom(2**20 // 100) for _ in range(BLOCK)]))

    return add


@each_mode()
def test_a_disk_that_fills_up_ends_the_write_soon(small_disk: Path, mode: str, noise: Any):
    place = Place(str(small_disk / "table"))
    if mode != "create":
        place.write(noise(rows(-BLOCK, BLOCK)))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4_200_000))
    with failing_with(StorageError) as caught, ends_within(SOON):
        write(place, mode, blocks(noise))
    assert caught.value.kind == "full"
    assert_nothing_or_whole_bundles(place, mode)
    filler.unlink()
    write(place, mode, blocks(noise))
    place.assert_holds(after(mode))


# The commit


@each_mode()
def test_a_commit_whose_answer_is_lost_is_not_repeated(on_s3: Place, mode: str):
    begin(on_s3, mode)
    assert on_s3.s3 is not None
    lost = Rule("PUT", "/_versions/", count=1, lose_answer=True)
    with on_s3.s3.proxy.failing(lost), ends_within(SOON):
        write(on_s3.impatient, mode)
    assert lost.hits
    on_s3.assert_holds(after(mode))


@pytest.fixture
def outsider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Somebody else commits just before the write does, once."""
    apply = commit.apply

    def use(action: Callable[[], Any]) -> None:
        waiting = [action]

        def late(*args: Any, **kwargs: Any) -> Any:
            if waiting:
                waiting.pop()()
            return apply(*args, **kwargs)

        monkeypatch.setattr(commit, "apply", late)

    yield use
    monkeypatch.undo()


@each_mode()
def test_somebody_else_s_commit_of_the_last_moment_is_kept_or_replaced_as_the_mode_says(
    place: Place, mode: str, outsider: Any
):
    begin(place, mode)
    outsider(lambda: place.write(rows(5000, 10), "create" if mode == "create" else "append"))
    ended: LanceRayError | None = None
    try:
        write(place, mode)
    except TableExistsError as error:
        ended = error
    assert (ended is not None) == (mode == "create")
    others = list(range(5000, 5010))
    expected = others if mode == "create" else after(mode) + (others if MODES[mode]["mode"] == "append" else [])
    assert cleanup_orphans(**place.to).files == ()
    place.assert_holds(expected)
