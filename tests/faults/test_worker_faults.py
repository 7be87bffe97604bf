"""What goes wrong on workers: they die, the engine fails under their hands, scans break. No row is lost or doubled.

Faults that must strike inside a write task travel there in a subclass of the datasink, since patches of this process do
not reach workers. A file tells the attempts that come later that the fault has been.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray.data

from lance_ray import read_lance, write, write_lance, writing
from lance_ray.block_refs import FEWEST_BLOCKS
from lance_ray.datasink import TableSink
from lance_ray.errors import LanceRayError, StorageError
from lance_ray.ledger import JobRef
from lance_ray.retry import RetryPolicy
from lance_ray.write import WriteSpec, WrittenFile
from tests.faults.stores import Place, ends_within, failing_with, rows
from tests.tables import source_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def first_time(flag: Path) -> bool:
    """Whether nobody asked before, in whatever process."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    """As the kernel's out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def blocks(count: int, size: int = 100) -> ray.data.Dataset:
    """So many blocks of so many rows, made on the workers."""
    return ray.data.range(count * size, override_num_blocks=count)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / "fault-has-been"


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch, flag: Path) -> Callable[[type[FaultySink]], None]:
    """Makes ``write_lance`` use a datasink with a fault."""

    def use(cls: type[FaultySink]) -> None:
        def make(spec: WriteSpec, options: Any) -> TableSink:
            made = cls(spec, options)
            made.flag = flag
            return made

        monkeypatch.setattr(writing, "TableSink", make)

    return use


class FaultySink(TableSink):
    """A datasink whose workers meet a fault in their first attempt."""

    flag: Path


# A worker dies


def test_a_worker_dies_in_the_map_before_the_write(place: Place, flag: Path):
    def deadly(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["id"][0] == 200 and first_time(flag):
            die()
        return batch

    report = write_lance(blocks(4).map_batches(deadly, batch_size=None), **place.to)
    assert flag.exists()
    assert report.rows == 400
    place.assert_holds(range(400))


class DiesAfterWriting(FaultySink):
    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:
        written = super().write(blocks, ctx)
        if first_time(self.flag):
            die()
        return written


def test_a_write_task_dies_with_its_files_written_and_recorded(everywhere: Place, flag: Path, sink):
    everywhere.write(rows(-100, 50))
    sink(DiesAfterWriting)
    report = write_lance(blocks(4), **everywhere.to, mode="append", min_rows_per_file=100)
    assert flag.exists()
    assert report.rows == 400
    everywhere.assert_holds([*range(-100, -50), *range(400)])


def test_a_task_that_writes_many_small_blocks_of_the_object_store_dies(place: Place, flag: Path, sink):
    refs: list[Any] = [ray.put(pa.table({"id": pa.array([number], pa.int64())})) for number in range(FEWEST_BLOCKS)]
    sink(DiesAfterWriting)
    report = write_lance(ray.data.from_arrow_refs(refs), **place.to)
    assert flag.exists()
    assert report.rows == FEWEST_BLOCKS
    place.assert_holds(range(FEWEST_BLOCKS))


class DiesBetweenFiles(FaultySink):
    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:
        def deadly() -> Iterator[Any]:
            for block in blocks:
                yield block
                if first_time(self.flag):
                    yield block.slice(0, 0)  # lets the file before it be finished
                    die()

        return super().write(deadly(), ctx)


@pytest.mark.slow
def test_a_write_task_dies_between_two_of_its_files(on_disk: Place, flag: Path, sink):
    sink(DiesBetweenFiles)
    write_lance(blocks(4), **on_disk.to, max_rows_per_file=60)
    assert flag.exists()
    on_disk.assert_holds(range(400))


class DiesEveryTime(FaultySink):
    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:
        written = super().write(blocks, ctx)
        if not first_time(self.flag):  # one task lives, so that there is something to remove
            die()
        return written


@pytest.mark.slow
def test_every_attempt_of_a_worker_dies_and_the_write_fails_without_a_trace(on_disk: Place, sink):
    on_disk.write(rows(-100, 50))
    sink(DiesEveryTime)
    with pytest.raises(ray.exceptions.RayError), ends_within(60):
        write_lance(blocks(3), **on_disk.to, mode="append", min_rows_per_file=100, ray_remote_args={"max_retries": 1})
    on_disk.assert_holds(range(-100, -50))


def test_a_worker_dies_while_it_reads(on_disk: Place, flag: Path):
    on_disk.write(rows(0, 400), max_rows_per_file=100)

    def deadly(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["id"][-1] >= 200 and first_time(flag):
            die()
        return batch

    ds = read_lance(**on_disk.to, fragment_group_size=1).map_batches(deadly, batch_size=None)
    assert sorted(row["id"] for row in ds.take_all()) == list(range(400))
    assert flag.exists()


# The rows themselves fail


def test_an_error_of_the_callers_own_code_comes_out_and_no_file_stays(place: Place):
    place.write(rows(0, 10))

    def faulty(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["id"][0] == 300:
            raise ArithmeticError("the caller's own mistake")
        return batch

    ds = blocks(4).map_batches(faulty, batch_size=None)
    with pytest.raises(Exception, match="the caller's own mistake"):
        write_lance(ds, **place.to, mode="append", min_rows_per_file=100, concurrency=1)
    place.assert_holds(range(10))


# The engine fails under a worker's hands


class ConsumesHalf(FaultySink):
    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:
        real: Any = vars(write)["write_fragments"]

        def once(reader: Any, *args: Any, **kwargs: Any) -> Any:
            if not first_time(self.flag):
                return real(reader, *args, **kwargs)
            for _ in range(2):
                reader.read_next_batch()
            raise OSError("LanceError(IO): Generic S3 error: status code: 503 Service Unavailable: SlowDown")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "write_fragments", once)
            patch.setattr(write, "SMALL_BYTES", 0)  # so that four blocks are four batches
            return super().write(blocks, ctx)


def test_the_engine_fails_after_half_of_its_reader_and_the_retry_gets_all_rows(everywhere: Place, flag: Path, sink):
    sink(ConsumesHalf)
    report = write_lance(blocks(4), **everywhere.to)
    assert flag.exists()
    assert report.rows == 400
    everywhere.assert_holds(range(400))


def spec_of(place: Place, job: JobRef | None = None, **retry: Any) -> WriteSpec:
    from lance_ray.options import WriteOptions
    from lance_ray.table import TableRef, WriteTarget

    target = WriteTarget.resolve(TableRef.fold(place.uri, {"storage_options": place.options}), "create")
    return WriteSpec(target, WriteOptions("create"), None, job, RetryPolicy(base_delay=0, **retry))


@pytest.mark.parametrize(
    "error",
    [
        OSError("LanceError(IO): Generic S3 error: status code: 503 Service Unavailable: SlowDown"),
        OSError("LanceError(IO): Generic S3 error: HTTP error: error sending request"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=["throttled", "nobody answers", "reset"],
)
@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("consumed", [0, 1, 2, 4])
def test_however_much_the_engine_consumed_each_attempt_gets_all_rows(on_disk, monkeypatch, consumed, failures, error):
    real, attempts = vars(write)["write_fragments"], []

    def failing(reader: Any, *args: Any, **kwargs: Any) -> Any:
        attempts.append(1)
        if len(attempts) > failures:
            return real(reader, *args, **kwargs)
        for _ in range(consumed):
            reader.read_next_batch()
        raise error

    monkeypatch.setattr(write, "write_fragments", failing)
    monkeypatch.setattr(write, "SMALL_BYTES", 0)  # so that four blocks are four batches
    chunks = [rows(first, 100) for first in range(0, 400, 100)]
    (file,) = write.write_blocks(spec_of(on_disk), chunks)
    assert len(attempts) == failures + 1
    assert (file.rows, file.metadata().physical_rows) == (400, 400)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("LanceError(IO): No space left on device (os error 28)", "full"),
        ("LanceError(IO): status code: 403 Forbidden: AccessDenied", "denied"),
        ("LanceError(IO): status code: 404 Not Found: NoSuchBucket", "missing"),
    ],
)
def test_a_permanent_failure_of_the_engine_is_not_tried_again(on_disk: Place, monkeypatch, error: str, kind: str):
    attempts = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        attempts.append(1)
        raise OSError(error)

    monkeypatch.setattr(write, "write_fragments", failing)
    with failing_with(StorageError) as caught:
        write.write_blocks(spec_of(on_disk), [rows(0, 100)])
    assert caught.value.kind == kind
    assert len(attempts) == 1


def test_a_store_that_never_recovers_is_given_up_within_the_stated_attempts(on_disk: Place, monkeypatch):
    attempts = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        attempts.append(1)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(write, "write_fragments", failing)
    with failing_with(StorageError):
        write.write_blocks(spec_of(on_disk, max_attempts=4), [rows(0, 100)])
    assert len(attempts) == 4


@pytest.mark.parametrize("lost", [1, 100])
def test_an_engine_that_writes_fewer_rows_than_it_was_given_is_caught(on_disk: Place, monkeypatch, lost: int):
    real: Any = vars(write)["write_fragments"]

    def lossy(reader: Any, *args: Any, **kwargs: Any) -> Any:
        kept = reader.read_all().slice(lost)
        return real(kept.to_reader(), *args, **kwargs)

    monkeypatch.setattr(write, "write_fragments", lossy)
    with pytest.raises(LanceRayError, match="rows"):
        write.write_blocks(spec_of(on_disk), [rows(0, 100)])


# A scan breaks


@pytest.fixture
def breaking_scans(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes each scan of this process fail after some batches, a number of times; returns the batches of each scan."""

    def use(after: int, failures: int, error: Exception) -> list[int]:
        real, seen = lance.LanceScanner.to_batches, []

        def to_batches(self: Any) -> Iterator[pa.RecordBatch]:
            seen.append(0)
            number = len(seen)
            for batch in real(self):
                if number <= failures and seen[-1] == after:
                    raise error
                seen[-1] += 1
                yield batch
            if number <= failures:
                raise error

        monkeypatch.setattr(lance.LanceScanner, "to_batches", to_batches)
        return seen

    return use


def scan_here(place: Place, **options: Any) -> list[int]:
    """The ids of a read whose tasks run in this process."""
    tasks = source_of(place.uri, **options).get_read_tasks(1, data_context=ray.data.DataContext.get_current())
    tables = [table for task in tasks for table in task()]
    return [value for table in tables for value in table["id"].to_pylist()]


@pytest.mark.parametrize(
    "error",
    [
        OSError("LanceError(IO): Generic S3 error: error decoding response body"),
        pa.ArrowInvalid("External error: LanceError(IO): HTTP error: error sending request"),
    ],
    ids=["cut short", "nobody answers"],
)
@pytest.mark.parametrize("failures", [1, 4])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"filter": "id % 3 = 0"}], ids=["all rows", "filtered"])
def test_a_scan_that_breaks_goes_on_at_the_row_reached(
    on_disk, breaking_scans, monkeypatch, options, after, failures, error
):
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    on_disk.write(rows(0, 400), max_rows_per_file=150)
    seen = breaking_scans(after, failures, error)
    ids = scan_here(on_disk, scanner_options={"batch_size": 40}, fragment_group_size=3, **options)
    assert ids == list(range(0, 400, 3 if options else 1))
    assert len(seen) == failures + 1


def test_a_scan_that_never_recovers_ends_in_an_error(on_disk: Place, breaking_scans, monkeypatch):
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    on_disk.write(rows(0, 400))
    seen = breaking_scans(0, 1000, OSError("LanceError(IO): connection reset by peer"))
    with failing_with(StorageError):
        scan_here(on_disk)
    assert len(seen) == RetryPolicy().max_attempts


def test_a_scan_whose_file_is_gone_fails_at_once(on_disk: Place):
    on_disk.write(rows(0, 400))
    for name in on_disk.data_files():
        (Path(on_disk.uri) / name).unlink()
    with pytest.raises(Exception, match=r"(?i)not found|no such file"), ends_within(10):
        read_lance(**on_disk.to).take_all()
