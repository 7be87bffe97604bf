"""Many at once on one table for a while: what was acknowledged is there once, and no reader sees half of a commit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray

from tests.faults.crew import APPENDERS, OTHERS, Journal, Member, assert_whole, batch
from tests.faults.driver import ROOT, wait_for
from tests.faults.model import local_tasks
from tests.faults.stores import Place

SECONDS = float(os.environ.get("LANCE_RAY_FIGHT_SECONDS", "60"))
"""How long the long ones fight."""


def crew_of(folder: Path, seconds: float, *, appenders: int = APPENDERS, address: str = "") -> list[Member]:
    """Appenders and the four others, on a table of one batch."""
    uri, journal = folder / "table", folder / "journal"
    journal.mkdir()
    Place(str(uri)).write(batch(0))
    roles = [*(("append", number) for number in range(appenders)), *((role, 0) for role in OTHERS)]
    return [Member(role, number, str(uri), str(journal), seconds, address) for role, number in roles]


def as_threads(crew: Sequence[Member]) -> Journal:
    """Let them work at once in this process."""
    errors: list[BaseException] = []

    def guarded(member: Member) -> None:
        try:
            member.work()
        except BaseException as error:  # noqa: BLE001 - whatever a thread ends with is what the test looks at
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(member,)) for member in crew]
    with local_tasks():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(crew[0].seconds + 120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return Journal(crew[0].journal)


def as_processes(crew: Sequence[Member]) -> Journal:
    """Let them work at once, each in a process of its own, from the moment on that all are ready."""
    folder = Path(crew[0].journal)
    environment = os.environ | {"PYTHONPATH": ROOT, "LANCE_RAY_NO_BACKOFF": "1"}
    running = []
    for member in crew:
        command = [sys.executable, "-m", "tests.faults.crew", member.argument]
        with member.sign.with_suffix(".log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))
    try:
        for member in crew:
            wait_for(member.sign, 240)
        (folder / "go").touch()
        for member, process in zip(crew, running, strict=True):
            code = process.wait(member.seconds + 180)
            assert code == 0, f"{member.role}: {member.sign.with_suffix('.log').read_text()[-3000:]}"
    finally:
        for process in running:
            process.kill()
            process.wait()
    return Journal(crew[0].journal)


def assert_nothing_lost(uri: str, journal: Journal) -> None:
    place = Place(uri)
    dataset = place.open()
    table = dataset.to_table()
    assert_whole(table)
    found = set(table["batch"].to_pylist()) - {0}
    acknowledged, spared = journal.batches("acknowledged"), journal.batches("spared")
    assert acknowledged - (journal.batches("doomed") - spared) - found == set()
    assert found & journal.batches("deleted") == set()
    assert found - acknowledged <= journal.batches("unknown")
    assert place.ledger() == set()
    for item in dataset.versions()[:: max(1, len(dataset.versions()) // 20)]:
        assert_whole(place.open(item["version"]).to_table(columns=["id", "batch", "sum"]))
    if "twice" in dataset.schema.names:
        values = dataset.to_table(columns=["id", "twice"], filter="twice IS NOT NULL")
        assert [2 * item for item in values["id"].to_pylist()] == values["twice"].to_pylist()


def assert_all_took_part(journal: Journal, appenders: int) -> None:
    print(f"{len(journal.batches('acknowledged'))} appends, {dict(journal.counts)}")
    assert len({number // 1_000_000 for number in journal.batches("acknowledged")}) == appenders
    assert journal.batches("deleted")
    assert journal.counts["compactions"]
    assert journal.counts["snapshots read"]
    assert journal.counts["columns added"] == 1


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def test_eight_appenders_and_four_others_for_some_seconds_lose_and_double_nothing(tmp_path: Path) -> None:
    crew = crew_of(tmp_path, 6)
    journal = as_threads(crew)
    assert_nothing_lost(crew[0].uri, journal)
    assert len(journal.batches("acknowledged")) >= APPENDERS
    assert journal.counts["snapshots read"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_appenders_and_four_others_for_a_minute_lose_and_double_nothing(tmp_path: Path) -> None:
    crew = crew_of(tmp_path, SECONDS)
    journal = as_threads(crew)
    assert_all_took_part(journal, APPENDERS)
    assert_nothing_lost(crew[0].uri, journal)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_processes_for_a_minute_lose_and_double_nothing(tmp_path: Path) -> None:
    crew = crew_of(tmp_path, SECONDS)
    journal = as_processes(crew)
    assert_all_took_part(journal, APPENDERS)
    assert_nothing_lost(crew[0].uri, journal)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(900)
def test_drivers_of_one_ray_for_a_minute_lose_and_double_nothing(tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    crew = crew_of(tmp_path, SECONDS, appenders=3, address=address)
    journal = as_processes(crew)
    assert_all_took_part(journal, 3)
    assert_nothing_lost(crew[0].uri, journal)


def test_an_error_of_the_crew_would_be_seen(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "table"))
    place.write(batch(0))
    place.write(batch(1).slice(1), "append")
    with pytest.raises(AssertionError):
        assert_whole(place.open().to_table())
    (tmp_path / "other").mkdir()
    (member, *_) = crew_of(tmp_path / "other", 1)
    journal = Journal(member.journal)
    assert_nothing_lost(member.uri, journal)
    journal.note("acknowledged", 5)
    with pytest.raises(AssertionError):
        assert_nothing_lost(member.uri, journal)
