"""The job ledger: what it records, what it removes, and what two processes may do to it at the same time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lance_ray import cleanup_orphans, ledger
from lance_ray.errors import InvalidArgumentError, LanceRayError, StorageError
from lance_ray.ledger import FOLDER, JobRef, WrittenPath
from tests.faults.proxy import Rule
from tests.faults.stores import Place, failing_with, rows


def header_of(place: Place, job: JobRef) -> Path:
    return Path(place.uri) / FOLDER / job.job_id / job.run / "job.json"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """Some process of this machine, alive."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def abandoned(place: Place, job_id: str = "job", files: int = 1) -> JobRef:
    """A run that recorded files, and whose driver (this process) no longer works on it."""
    job = place.job(job_id)
    with job.running("write"):
        for number in range(files):
            job.record([place.put_data_file(random.getrandbits(100) + number)])
    return job


# A job from its beginning to its end


def test_a_job_that_committed_leaves_no_ledger_and_all_its_files(everywhere: Place):
    job = everywhere.job()
    with job.running("write"):
        files = [everywhere.put_data_file(number) for number in range(3)]
        for file in files:
            job.record([file])
        assert set(job.recorded()) == set(files)
        assert job.is_open()
    job.close(len(files))
    assert everywhere.ledger() == set()
    assert everywhere.data_files() == {f"data/{file.name}" for file in files}


def test_files_of_an_attempt_that_ran_again_go_when_the_job_ends(place: Place):
    job = place.job()
    with job.running("write"):
        job.record([place.put_data_file(1)])
        (fragment,) = place.write(rows(0, 10)).get_fragments()
        committed = str(fragment.data_files()[0].path)
        job.record([WrittenPath(committed)])
    job.close(1)
    assert place.data_files() == {f"data/{committed}"}
    assert place.ledger() == set()


def test_a_failed_job_removes_what_it_recorded_and_nothing_else(everywhere: Place):
    foreign = everywhere.put_data_file(7)
    job = everywhere.job()
    with job.running("write"):
        own = everywhere.put_data_file(1)
        job.record([own])
        assert job.discard() == (own,)
    assert everywhere.data_files() == {f"data/{foreign.name}"}
    assert everywhere.ledger() == set()


def test_a_file_that_a_version_refers_to_is_never_removed_even_if_its_job_says_it_failed(place: Place):
    place.write(rows(0, 10))
    (name,) = place.referenced()
    job = place.job(since=0)
    with job.running("write"):
        job.record([WrittenPath(name.removeprefix("data/"))])
        assert job.discard() == ()
    place.assert_holds(range(10))


def test_a_file_is_kept_when_only_an_old_version_refers_to_it(place: Place):
    place.write(rows(0, 10))
    table = place.write(rows(10, 10), "append")
    new = {f"data/{file.path}" for file in table.get_fragments()[1].data_files()}
    place.write(rows(20, 10), "overwrite")
    job = place.job(since=1)
    with job.running("write"):
        job.record([WrittenPath(name.removeprefix("data/")) for name in new])
        job.discard()
    assert new <= place.data_files()


# Workers and the end of a job


def test_a_worker_that_records_after_the_end_of_its_job_takes_its_file_back(everywhere: Place):
    job = everywhere.job()
    with job.running("write"):
        pass
    job.close(0)
    late = everywhere.put_data_file(1)
    with pytest.raises(LanceRayError, match="was ended while"):
        job.record([late])
    assert everywhere.files() == set()


def test_a_file_whose_note_cannot_be_written_is_removed_at_once(on_s3: Place):
    assert on_s3.s3 is not None
    job = on_s3.job()
    with job.running("write"):
        file = on_s3.put_data_file(1)
        denied = Rule(method="PUT", path=FOLDER, status=403, code="AccessDenied")
        with on_s3.s3.proxy.failing(denied), failing_with(StorageError) as caught:
            job.record([file])
        assert caught.value.kind == "denied"
        assert on_s3.data_files() == set()
        job.discard()


def test_whatever_the_order_of_recording_and_ending_no_file_and_no_entry_stays(on_disk: Place):
    for attempt in range(25):
        job = on_disk.job()
        files = [on_disk.put_data_file(number) for number in range(4)]
        ready = threading.Barrier(len(files) + 1)

        def record(file: WrittenPath, job: JobRef = job, ready: threading.Barrier = ready) -> None:
            ready.wait()
            time.sleep(random.random() * 0.01)
            with suppress(LanceRayError):  # it came too late
                job.record([file])

        with job.running("write"), ThreadPoolExecutor(len(files)) as workers:
            recording = [workers.submit(record, file) for file in files]
            ready.wait()
            time.sleep(random.random() * 0.01)
            job.discard()
        assert all(future.exception() is None for future in recording)
        assert on_disk.files() == set(), f"attempt {attempt}"


def test_jobs_that_begin_and_end_beside_each_other_do_not_remove_each_others_folders(on_disk: Place):
    def one_job(number: int) -> None:
        for turn in range(15):
            job = on_disk.job(f"job{number}")
            with job.running("write"):
                file = on_disk.put_data_file(1000 * number + turn)
                job.record([file])
            job.close(1)

    with ThreadPoolExecutor(6) as drivers:
        list(drivers.map(one_job, range(6)))
    assert len(on_disk.data_files()) == 6 * 15
    assert on_disk.ledger() == set()


def test_an_entry_cut_short_by_a_crash_does_not_stop_a_clean_up(on_disk: Place):
    job = abandoned(on_disk)
    (header_of(on_disk, job).parent / "cut.json").write_text('{"files": [{"na')
    cleanup_orphans(**on_disk.to)
    assert on_disk.files() == set()


@pytest.mark.parametrize("name", ["../_versions/1.manifest", "/etc/passwd", "x.lance/../../y.lance", "notes.txt", ""])
def test_a_name_that_is_not_one_of_a_data_file_is_refused(on_disk: Place, name: str):
    on_disk.write(rows(0, 5))
    job = on_disk.job()
    with job.running("write"):
        job.record([WrittenPath(name)])
        with pytest.raises(LanceRayError, match="names neither a data file nor a segment"):
            job.discard()
    assert on_disk.ids() == list(range(5))


@pytest.mark.parametrize(
    "item",
    [
        WrittenPath("../data", folder="_indices"),
        WrittenPath(".", folder="_indices"),
        WrittenPath("12345678-1234-4234-8234-123456789abc", folder="_versions"),
        WrittenPath("12345678-1234-4234-8234-123456789abc", base="/", folder="_indices"),
        WrittenPath("12345678-1234-4234-8234-123456789abc/../../data", folder="_indices"),
    ],
    ids=str,
)
def test_a_name_that_is_not_one_of_a_segment_is_refused(on_disk: Place, item: WrittenPath):
    on_disk.write(rows(0, 5))
    job = on_disk.job()
    with job.running("create_index"):
        job.record([item])
        with pytest.raises(LanceRayError, match="names neither a data file nor a segment"):
            job.discard()
    assert on_disk.ids() == list(range(5))


HEX = f"{7:032x}.lance"


@pytest.mark.parametrize(
    "entry",
    [
        {"name": HEX, "folder": "../neighbour/data"},
        {"name": HEX, "folder": "../../neighbour/data"},
        {"name": HEX, "folder": "/tmp"},
        {"name": HEX, "folder": "_versions"},
        {"name": HEX, "folder": "", "base": "NEIGHBOUR/data"},
        {"name": HEX, "base": "NEIGHBOUR"},
        {"name": HEX, "base": "s3://elsewhere/table"},
        {"name": "a1b2c3d4-0000-0000-0000-00000000000a", "folder": "_indices/../../neighbour"},
        {"name": "../neighbour", "folder": "_indices"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_entry_that_leads_out_of_the_table_deletes_nothing(
    on_disk: Place, tmp_path: Path, entry: dict[str, str], dry_run: bool
):
    neighbour = Place(str(tmp_path / "neighbour"))
    for place in (on_disk, neighbour):
        place.write(rows(0, 5))
    neighbour.put_data_file(7)
    job = abandoned(on_disk)
    told = {key: value.replace("NEIGHBOUR", neighbour.uri) for key, value in entry.items()}
    (header_of(on_disk, job).parent / "forged.json").write_text(json.dumps({"files": [told]}))
    before = neighbour.files() | {f"own {name}" for name in on_disk.files() if not name.startswith(FOLDER)}
    with pytest.raises(LanceRayError, match="ledger of"):
        cleanup_orphans(**on_disk.to, dry_run=dry_run)
    assert neighbour.files() | {f"own {name}" for name in on_disk.files() if not name.startswith(FOLDER)} == before


def test_files_of_a_dead_create_in_a_further_base_go_when_the_caller_names_the_base(on_disk: Place, tmp_path: Path):
    base = Place(str(tmp_path / "base"))
    base.put_data_file(7)
    job = on_disk.job()
    with job.running("write"):
        job.record([WrittenPath(HEX, base.uri)])
    with pytest.raises(LanceRayError, match="base_store_params"):
        cleanup_orphans(**on_disk.to)
    assert len(base.files()) == 1
    assert len(cleanup_orphans(**on_disk.to, base_store_params={base.uri: {}}).files) == 1
    assert base.files() == set()


@pytest.mark.parametrize(
    "rule",
    [
        Rule("PUT", FOLDER, count=20, status=503),
        pytest.param(Rule("PUT", FOLDER, count=20, reset=True), marks=pytest.mark.slow),
    ],
    ids=["answers 503", "resets"],
)
@pytest.mark.slow
def test_a_note_is_written_again_while_the_store_throttles_or_resets(on_s3: Place, rule: Rule):
    assert on_s3.s3 is not None
    job = on_s3.job()
    with job.running("write"):
        file = on_s3.put_data_file(1)
        with on_s3.s3.proxy.failing(rule):
            job.record([file])
        assert rule.hits > 20
        assert job.recorded() == (file,)


# Whether a run is alive


def test_a_run_that_ends_earlier_runs_of_its_id_goes_on_itself(place: Place):
    abandoned(place, "again")
    job = place.job("again")
    with job.running("write", exclusive=True):
        file = place.put_data_file(2)
        job.record([file])
        job.end_earlier_runs()
        assert job.is_open()
        assert job.recorded() == (file,)
        assert len(place.data_files()) == 1


def test_a_run_of_this_process_is_alive_while_it_runs_and_dead_afterwards(place: Place):
    job = place.job()
    with job.running("write"):
        job.record([place.put_data_file(1)])
        report = cleanup_orphans(**place.to)
        assert [item.state for item in report.jobs] == ["running"]
        assert report.files == ()
        assert len(place.data_files()) == 1
    report = cleanup_orphans(**place.to)
    assert [item.state for item in report.jobs] == ["dead"]
    assert place.files() == set()


def test_a_run_whose_first_file_is_just_being_written_is_not_taken_for_a_dead_one(on_disk: Place):
    begun = Path(on_disk.uri) / "_lance_ray" / "job" / "run" / ".tmpL54UX5"
    begun.parent.mkdir(parents=True)
    begun.write_text('{"plan": null, "oper')
    report = cleanup_orphans(**on_disk.to)
    assert (report.jobs, report.files) == ((), ())
    assert begun.exists()


def test_a_dry_run_lists_what_would_go_and_touches_nothing(everywhere: Place):
    abandoned(everywhere, "one", files=2)
    abandoned(everywhere, "two")
    before = everywhere.files()
    report = cleanup_orphans(**everywhere.to, dry_run=True)
    assert everywhere.files() == before
    assert set(report.files) == everywhere.data_files()
    assert [(item.job_id, len(item.files)) for item in report.jobs] == [("one", 2), ("two", 1)]
    assert "would remove 3 orphaned file(s) of 2 job(s)" in str(report)
    done = cleanup_orphans(**everywhere.to)
    assert set(done.files) == set(report.files)
    assert "removed 3" in str(done)
    assert everywhere.files() == set()


def of_process(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    return {"pid": process.pid, "process_start": ledger._process_start(process.pid)}


def test_a_run_of_another_live_process_of_this_machine_is_alive_until_it_is_killed(
    on_disk: Place, other_process: subprocess.Popen[bytes]
):
    rewrite(header_of(on_disk, abandoned(on_disk)), **of_process(other_process))
    assert [item.state for item in cleanup_orphans(**on_disk.to).jobs] == ["running"]
    other_process.kill()
    other_process.wait()
    assert [item.state for item in cleanup_orphans(**on_disk.to).jobs] == ["dead"]
    assert on_disk.files() == set()


def test_a_process_that_got_the_number_of_a_dead_driver_is_not_taken_for_it(
    on_disk: Place, other_process: subprocess.Popen[bytes]
):
    rewrite(header_of(on_disk, abandoned(on_disk)), pid=other_process.pid, process_start="1")
    assert [item.state for item in cleanup_orphans(**on_disk.to).jobs] == ["dead"]


@pytest.mark.parametrize(
    ("seconds_ago", "state"), [(5, "running"), (ledger.DEAD_AFTER_SECONDS + 5, "dead")], ids=["fresh", "stale"]
)
@pytest.mark.parametrize(
    "elsewhere", ["another-host", None], ids=["another machine", "another container with the same name"]
)
def test_a_run_elsewhere_is_judged_by_its_heartbeat(
    on_disk: Place, elsewhere: str | None, seconds_ago: float, state: str
):
    processes = elsewhere or f"{ledger._process_space().split()[0]} another-boot pid:[1]"
    header = header_of(on_disk, abandoned(on_disk))
    rewrite(header, processes=processes, pid=2**22 + 1, started=time.time() - 9999)
    (header.parent / "beat.json").write_text(json.dumps({"heartbeat": time.time() - seconds_ago}))
    assert [item.state for item in cleanup_orphans(**on_disk.to).jobs] == [state]
    assert bool(on_disk.data_files()) is (state == "running")


def test_a_clean_up_removes_files_of_a_committed_run_that_no_version_refers_to(place: Place):
    place.write(rows(0, 10), transaction_properties={"lance_ray.operation_id": "done"})
    (name,) = place.referenced()
    job = place.job("done")
    with job.running("write"):
        job.record([WrittenPath(name.removeprefix("data/"))])
        job.record([place.put_data_file(1)])
    report = cleanup_orphans(**place.to)
    assert [item.state for item in report.jobs] == ["committed"]
    assert len(report.files) == 1
    place.assert_holds(range(10))


# The heartbeat


@pytest.fixture
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "HEARTBEAT_SECONDS", 0.02)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("fast_heartbeat")
def test_the_heartbeat_goes_on_through_a_failure_and_ends_with_the_job(on_s3: Place):
    assert on_s3.s3 is not None
    proxy = on_s3.s3.proxy

    def beats() -> int:
        return sum(request.method == "PUT" and "beat.json" in request.path for request in proxy.requests)

    job = on_s3.job()
    with job.running("write"):
        wait_until(lambda: beats() > 2)
        with proxy.failing(Rule("PUT", "beat.json", status=403, code="AccessDenied")) as rule:
            wait_until(lambda: rule.hits > 1)
        seen = beats()
        wait_until(lambda: beats() > seen + 1)
    job.close(0)
    seen = beats()
    time.sleep(0.2)
    assert beats() == seen
    assert on_s3.files() == set()


@pytest.mark.usefixtures("fast_heartbeat")
def test_a_run_that_was_cleaned_up_stays_ended_however_long_its_heart_beats(on_disk: Place):
    job = on_disk.job()
    beat = Path(on_disk.uri) / FOLDER / job.job_id / job.run / "beat.json"
    with job.running("write"):
        wait_until(beat.exists)
        header_of(on_disk, job).unlink()  # what a clean-up elsewhere does first
        beat.unlink(missing_ok=True)
        wait_until(beat.exists)
        assert not job.is_open()
        with pytest.raises(LanceRayError, match="was ended"):
            job.record([on_disk.put_data_file(1)])
        job.discard()
        assert on_disk.files() == set()
        time.sleep(0.1)
    assert on_disk.files() == set()


# Several runs of one job id


def test_a_second_run_of_a_job_is_refused_while_the_first_one_works(place: Place):
    first, second = place.job(), place.job()
    with first.running("write", exclusive=True):
        with pytest.raises(InvalidArgumentError, match="another run of this job is under way") as caught:
            second.end_earlier_runs()
        assert caught.value.parameter == "job_id"
        with pytest.raises(InvalidArgumentError), second.running("write", exclusive=True):
            pytest.fail("both runs went on")
        assert first.is_open()
        first.record([place.put_data_file(1)])
        first.discard()
    assert place.files() == set()


def test_a_run_removes_what_a_dead_run_of_its_job_left_but_nothing_of_other_jobs(place: Place):
    abandoned(place, "job", files=2)
    other = abandoned(place, "other")
    (kept,) = other.recorded()
    place.job("job").end_earlier_runs()
    assert place.data_files() == {f"data/{kept.name}"}
    assert all("/other/" in name for name in place.ledger())


def test_a_run_that_was_taken_for_dead_cannot_touch_or_outlive_the_run_that_replaced_it(everywhere: Place):
    zombie, heir = everywhere.job(), everywhere.job()
    with zombie.running("write"):
        lost = everywhere.put_data_file(1)
        zombie.record([lost])
        running = ledger._running.pop(zombie.run)  # as another machine sees it after five minutes without a beat
        heir.end_earlier_runs()
        with heir.running("write", exclusive=True):
            file = everywhere.put_data_file(2)
            heir.record([file])
            ledger._running[zombie.run] = running
            assert not zombie.is_open()
            assert heir.is_open()
            with pytest.raises(LanceRayError, match="was ended"):
                zombie.record([everywhere.put_data_file(3)])
            zombie.discard()
            assert heir.recorded() == (file,)
            assert everywhere.data_files() == {f"data/{file.name}"}
        heir.close(1)
    assert everywhere.files() == {f"data/{file.name}"}


def test_of_runs_of_one_job_that_start_together_at_most_one_goes_on(on_disk: Place):
    for _ in range(10):
        jobs = [on_disk.job() for _ in range(3)]
        ready, tried = threading.Barrier(len(jobs), timeout=60), threading.Barrier(len(jobs), timeout=60)

        def start(job: JobRef, ready: threading.Barrier = ready, tried: threading.Barrier = tried) -> bool:
            ready.wait()
            try:
                with job.running("write", exclusive=True):
                    tried.wait()  # none ends before all have begun
                    job.discard()
                    return True
            except InvalidArgumentError:
                tried.wait()
                return False

        with ThreadPoolExecutor(len(jobs)) as drivers:
            assert sum(drivers.map(start, jobs)) <= 1
        assert on_disk.files() == set()


def test_a_clean_up_that_meets_a_job_of_this_process_as_it_begins_lets_it_be(on_disk: Place, monkeypatch):
    write, reports = ledger._Store.write, []

    def written(store: Any, name: str, *args: Any) -> None:
        write(store, name, *args)
        reports.append(cleanup_orphans(**on_disk.to))

    monkeypatch.setattr(ledger._Store, "write", written)
    on_disk.write(rows(0, 1))
    job = on_disk.job()
    with job.running("write"):
        assert job.is_open()
        assert [item.state for item in reports[0].jobs] == ["running"]
    job.discard()
