"""The driver is killed or interrupted: what is in the table, what stays behind, and who removes it."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from lance_ray import InvalidArgumentError, WriteReport, cleanup_orphans
from lance_ray.ledger import CleanupReport
from tests.faults.driver import BLOCK, Orders, driver, outcome, wait_for, write
from tests.faults.stores import SECRET, Place, rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

FORMER = range(-BLOCK, 0)


@pytest.fixture
def orders(tmp_path: Path) -> Callable[..., Orders]:
    def give(place: Place, **changes: Any) -> Orders:
        address = ray.get_runtime_context().gcs_address
        return dataclasses.replace(
            Orders(address, str(tmp_path), place.uri, place.options, job_id="nightly"), **changes
        )

    return give


def killed(orders: Orders) -> str:
    """Run a driver that kills itself; returns what it printed."""
    with driver(orders) as process:
        printed, _ = process.communicate(timeout=90)
        assert process.returncode == -signal.SIGKILL, printed
        assert SECRET not in printed
        return printed


def entries(place: Place) -> set[str]:
    return {name for name in place.ledger() if not name.endswith(("job.json", "beat.json"))}


def held_with_a_file_written(place: Place, orders: Orders) -> None:
    """Return when the driver's last block is held back and the file of the first one is recorded."""
    wait_for(orders.sign("held"))
    deadline = time.monotonic() + 100  # a loaded Ray holds new workers back for tens of seconds
    while not entries(place):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_again(orders: Orders) -> WriteReport:
    """The next run of the same job, by this process."""
    report: WriteReport = write(dataclasses.replace(orders, hold=""))
    return report


def states(report: CleanupReport) -> list[str]:
    return [job.state for job in report.jobs]


# Killed


@pytest.mark.slow
def test_killed_before_the_commit_and_cleaned_up(place: Place, orders):
    place.write(rows(-BLOCK, BLOCK))
    killed(orders(place, die="before"))
    assert place.ids() == list(FORMER)
    orphans = place.orphans()
    assert len(orphans) == 2

    dry = cleanup_orphans(**place.to, dry_run=True)
    assert states(dry) == ["dead"]
    assert set(dry.files) == orphans == place.orphans()

    assert set(cleanup_orphans(**place.to).files) == orphans
    place.assert_holds(FORMER)


@pytest.mark.slow
def test_killed_before_a_create_committed_and_cleaned_up(on_disk: Place, orders):
    killed(orders(on_disk, mode="create", die="before"))
    assert len(cleanup_orphans(**on_disk.to).files) == 2
    on_disk.assert_empty()


@pytest.mark.slow
def test_killed_before_the_commit_and_run_again(on_s3: Place, orders):
    on_s3.write(rows(-BLOCK, BLOCK))
    given = orders(on_s3, die="before")
    killed(given)
    assert run_again(given).rows == 2 * BLOCK
    on_s3.assert_holds([*FORMER, *given.ids])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["create", pytest.param("append", marks=pytest.mark.slow)])
def test_killed_after_the_commit_and_run_again(place: Place, orders, mode: str):
    former = FORMER if mode == "append" else range(0)
    if mode == "append":
        place.write(rows(-BLOCK, BLOCK))
    given = orders(place, mode=mode, die="after")
    killed(given)
    assert place.ids() == [*former, *given.ids]
    dry = cleanup_orphans(**place.to, dry_run=True)
    assert (states(dry), dry.files) == (["committed"], ())

    assert run_again(given).skipped
    place.assert_holds([*former, *given.ids])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["append", "overwrite"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_a_stream_and_run_again(on_disk: Place, orders, when: str, mode: str):
    on_disk.write(rows(-BLOCK, BLOCK))
    given = orders(on_disk, mode=mode, stream=True, die=when)
    killed(given)
    committed = {"append": BLOCK, "overwrite": 2 * BLOCK}[mode] if when == "after" else 0
    kept = list(FORMER) if mode == "append" or not committed else []
    assert on_disk.ids() == [*kept, *given.ids[:committed]]
    assert run_again(given).rows == 2 * BLOCK - committed
    on_disk.assert_holds([*(FORMER if mode == "append" else ()), *given.ids])


@pytest.mark.slow
def test_killed_while_its_tasks_write_and_run_again(on_disk: Place, orders):
    on_disk.write(rows(-BLOCK, BLOCK))
    given = orders(on_disk, hold="tasks")
    with driver(given) as process:
        held_with_a_file_written(on_disk, given)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    orphans = on_disk.orphans()
    assert len(orphans) == 1
    dry = cleanup_orphans(**on_disk.to, dry_run=True)
    assert (states(dry), set(dry.files)) == (["dead"], orphans)
    given.go.touch()  # a worker that outlived its driver would go on now, beside the next run
    assert run_again(given).rows == 2 * BLOCK
    on_disk.assert_holds([*FORMER, *given.ids])


# At work


@pytest.mark.slow
def test_a_job_at_work_is_not_touched_and_not_doubled(on_disk: Place, orders):
    on_disk.write(rows(-BLOCK, BLOCK))
    given = orders(on_disk, hold="tasks")
    with driver(given) as process:
        held_with_a_file_written(on_disk, given)
        before = on_disk.files()
        report = cleanup_orphans(**on_disk.to)
        assert (states(report), report.files) == (["running"], ())
        assert on_disk.files() == before

        with pytest.raises(InvalidArgumentError, match="under way"):
            run_again(given)
        assert on_disk.files() == before

        given.go.touch()
        assert outcome(process)["rows"] == 2 * BLOCK
    on_disk.assert_holds([*FORMER, *given.ids])


# Interrupted


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_write_removes_its_files(place: Place, orders):
    place.write(rows(-BLOCK, BLOCK))
    given = orders(place, hold="tasks")
    with driver(given) as process:
        held_with_a_file_written(place, given)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=20)
    assert process.returncode not in (0, None)
    assert "KeyboardInterrupt" in printed
    assert SECRET not in printed
    given.go.touch()
    deadline = time.monotonic() + 10
    while place.ledger() or place.orphans():
        assert time.monotonic() < deadline, place.files()
        time.sleep(0.1)
    place.assert_holds(FORMER)
