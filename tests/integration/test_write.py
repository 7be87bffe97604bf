"""Writing on a real Ray: what each mode does to a table, what a failure leaves, and how large the files are."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lance
import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from lance import DatasetBasePath
from lance.namespace import RestAdapter
from ray.data import Dataset, SaveMode
from ray.data.expressions import col

from lance_ray import (
    InvalidArgumentError,
    SchemaMismatchError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    WriteReport,
    read_lance,
    write_lance,
)
from lance_ray.commit import OPERATION_ID
from tests.blocks import (
    SECRET,
    TYPED,
    assert_no_table,
    assert_nothing_left_over,
    data_files,
    dataset,
    dead_s3,
    files_below,
    ids_of,
    produced,
    rows,
    rows_per_file,
    s3_answering,
    transaction,
    versions,
    written_rows,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Ray leaves the log files of its executions to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]
MB = 1024**2


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An address without a table."""
    return str(tmp_path / "table")


@pytest.fixture
def table(uri: str) -> str:
    """A table with the ids 0, 1, 2 in version 1."""
    lance.write_dataset(rows(0, 3), uri)
    return uri


def content(folder: str) -> dict[str, bytes]:
    """Every byte below a folder."""
    return {name: (Path(folder) / name).read_bytes() for name in files_below(folder)}


def marking(folder: Path) -> Dataset:
    """A dataset that leaves a file behind when any of its rows is made."""

    def block(number: int) -> pa.Table:
        (folder / "ran").touch()
        return rows(number, 1)

    return produced(block, 2)


# Create


def test_a_create_is_one_commit_and_reports_what_it_did(uri: str):
    report = write_lance(dataset(rows(0, 2), rows(2, 3)), uri)
    assert sorted(ids_of(uri)) == [0, 1, 2, 3, 4]
    assert versions(uri) == [1]
    assert_nothing_left_over(uri)
    assert report == WriteReport(
        target=uri,
        version=1,
        rows=5,
        bytes=rows(0, 2).nbytes + rows(2, 3).nbytes,
        files=1,
        fragments=1,
        small_files=1,
        deleted_rows=0,
        seconds=report.seconds,
        job_id="",
        versions=(1,),
    )
    assert 0 < report.seconds < 60


def test_a_report_reads_well():
    report = WriteReport("/data/t", 3, 1_234_567, 250_000_000, 2, 7, seconds=2.5, schema_changes=("lang",))
    assert str(report) == (
        "/data/t: 1,234,567 rows, 250.0 MB in 2 file(s), 2.50 s (100 MB/s), version 3, 7 fragment(s);"
        " null in new columns ['lang']"
    )
    assert str(WriteReport("/data/t", 3, skipped=True)) == "/data/t: nothing written, version 3"


@pytest.mark.parametrize("mode", ["create", SaveMode.CREATE, SaveMode.ERROR])
def test_a_create_refuses_an_existing_table_before_any_row_is_made(table: str, tmp_path: Path, mode: Any):
    before = content(table)
    with pytest.raises(TableExistsError):
        write_lance(marking(tmp_path), table, mode=mode)
    assert content(table) == before
    assert not (tmp_path / "ran").exists()


def test_of_racing_creates_one_wins_and_the_files_of_the_others_go(uri: str):
    def create(number: int) -> WriteReport | TableExistsError:
        try:
            return write_lance(dataset(rows(100 * number, 5)), uri)
        except TableExistsError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(create, range(3)))
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, WriteReport)]
    assert len(winners) == 1
    assert ids_of(uri) == list(range(100 * winners[0], 100 * winners[0] + 5))
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("name", ["with space", "100%", "50%20off", "a#b", "a?b=c", "größe", "a+b&c"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str):
    uri = str(tmp_path / name / "table")
    write_lance(dataset(rows(0, 2)), uri)
    write_lance(dataset(rows(2, 1)), uri, mode="append")
    assert ids_of(uri) == [0, 1, 2]
    assert_nothing_left_over(uri)
    assert read_lance(uri).count() == 3


def test_files_are_in_the_order_of_the_rows_where_ray_preserves_it(uri: str):
    blocks = produced(lambda number: rows(10 * number, 10), 6)
    blocks.context.execution_options.preserve_order = True
    write_lance(blocks, uri, min_rows_per_file=1)
    assert ids_of(uri) == list(range(60))
    assert len(rows_per_file(uri)) == 6


# Append


def test_an_append_adds_rows_in_one_commit(table: str):
    report = write_lance(dataset(rows(3, 2)), table, mode="append")
    assert ids_of(table) == [0, 1, 2, 3, 4]
    assert (report.version, report.versions, report.rows, report.files, report.fragments) == (2, (2,), 2, 1, 2)
    assert_nothing_left_over(table)


def test_an_append_reports_what_was_deleted_before(table: str):
    lance.dataset(table).delete("id = 1")
    report = write_lance(dataset(rows(3, 2)), table, mode=SaveMode.APPEND)
    assert (report.deleted_rows, report.rows, ids_of(table)) == (1, 2, [0, 2, 3, 4])


def test_an_append_to_no_table_is_refused_before_any_row_is_made(uri: str, tmp_path: Path):
    with pytest.raises(TableNotFoundError):
        write_lance(marking(tmp_path), uri, mode="append")
    assert_no_table(uri)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("empty", [rows(0, 0), pa.table({})], ids=["typed", "columnless"])
def test_an_append_of_no_rows_makes_no_version(table: str, empty: pa.Table):
    report = write_lance(dataset(empty), table, mode="append")
    assert (report.version, report.versions, report.rows, report.skipped) == (1, (), 0, False)
    assert versions(table) == [1]
    assert_nothing_left_over(table)


def test_appends_of_four_threads_all_land(table: str):
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda n: write_lance(dataset(rows(10 * n, 5)), table, mode="append"), range(1, 5)))
    assert sorted(ids_of(table)) == [0, 1, 2, *(10 * n + i for n in range(1, 5) for i in range(5))]
    assert sorted(report.version for report in reports) == [2, 3, 4, 5]
    assert_nothing_left_over(table)


@ray.remote(num_cpus=0)
def append_from_another_process(uri: str, first: int) -> tuple[int, int]:
    return os.getpid(), write_lance(dataset(rows(first, 5)), uri, mode="append").version


@pytest.mark.slow
def test_appends_of_other_processes_all_land(table: str):
    answers = ray.get([append_from_another_process.remote(table, 10 * n) for n in (1, 2)], timeout=120)
    assert len({pid for pid, _ in answers} | {os.getpid()}) == 3
    assert sorted(version for _, version in answers) == [2, 3]
    assert sorted(ids_of(table)) == [0, 1, 2, *(10 * n + i for n in (1, 2) for i in range(5))]
    assert_nothing_left_over(table)


def changing(uri: str, change: Callable[[lance.LanceDataset], Any]) -> Dataset:
    """Rows 10 and 11; while they are made, somebody else changes the table."""

    def block(number: int) -> pa.Table:
        if number == 0:
            change(lance.dataset(uri))
        return rows(10 + number, 1)

    return produced(block, 2)


def test_an_append_beside_a_new_nullable_column_lands_and_says_so(table: str):
    report = write_lance(
        changing(table, lambda other: other.add_columns(pa.field("lang", pa.string()))), table, mode="append"
    )
    assert report.schema_changes == ("lang",)
    assert "null in new columns ['lang']" in str(report)
    assert written_rows(table)[-1] == {"id": 11, "text": "row 11", "lang": None}
    assert_nothing_left_over(table)


@pytest.mark.parametrize(
    "change",
    [
        lambda other: other.drop_columns(["text"]),
        lambda other: other.alter_columns({"path": "id", "data_type": pa.int32()}),
        lambda other: other.alter_columns({"path": "text", "name": "body"}),
        lambda other: lance.write_dataset(pa.table({"other": [1]}), other.uri, mode="overwrite"),
    ],
    ids=["dropped", "retyped", "renamed", "replaced"],
)
def test_an_append_beside_any_other_change_of_the_schema_is_refused_and_leaves_no_file(
    table: str, change: Callable[[lance.LanceDataset], Any]
):
    with pytest.raises(SchemaMismatchError) as caught:
        write_lance(changing(table, change), table, mode="append")
    assert caught.value.columns
    assert versions(table) == [1, 2]
    assert lance.dataset(table).count_rows() == (1 if "other" in lance.dataset(table).schema.names else 3)
    assert_nothing_left_over(table)


# Overwrite


@pytest.mark.parametrize(
    "new", [rows(50, 2), pa.table({"name": ["a"], "vector": [[1.0, 2.0]]})], ids=["same schema", "other schema"]
)
def test_an_overwrite_is_one_commit_and_the_old_version_stays_readable(table: str, new: pa.Table):
    report = write_lance(dataset(new), table, mode="overwrite")
    assert written_rows(table) == new.to_pylist()
    assert lance.dataset(table).schema == new.schema
    assert (versions(table), report.version, report.fragments) == ([1, 2], 2, 1)
    assert ids_of(table, version=1) == [0, 1, 2]
    assert_nothing_left_over(table)


def test_an_overwrite_of_no_table_makes_it(uri: str):
    assert write_lance(dataset(rows(0, 2)), uri, mode=SaveMode.OVERWRITE).version == 1
    assert ids_of(uri) == [0, 1]


def test_an_overwrite_replaces_what_others_appended_meanwhile(table: str):
    write_lance(
        changing(table, lambda other: lance.write_dataset(rows(7, 1), other, mode="append")), table, mode="overwrite"
    )
    assert sorted(ids_of(table)) == [10, 11]


def test_a_table_may_be_read_while_it_is_overwritten(table: str):
    write_lance(read_lance(table).filter(expr=col("id") > 0), table, mode="overwrite")
    assert ids_of(table) == [1, 2]


OTHER = pa.schema([pa.field("name", pa.string()), pa.field("score", pa.float32())])
NONE_OF_IT = {
    "an empty block": lambda: dataset(OTHER.empty_table()),
    "a filter": lambda: dataset(pa.table({"name": ["a"], "score": [1.0]}, schema=OTHER)).filter(expr=col("score") > 2),
    "a function": lambda: produced(lambda number: OTHER.empty_table(), 2),
}


@pytest.mark.parametrize("make", NONE_OF_IT.values(), ids=NONE_OF_IT.keys())
@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_no_rows_make_an_empty_table_with_the_schema_of_the_blocks(uri: str, make: Callable[[], Dataset], mode: str):
    if mode == "overwrite":
        lance.write_dataset(rows(0, 3), uri)
    report = write_lance(make(), uri, mode=mode)
    found = lance.dataset(uri)
    assert (found.count_rows(), found.schema) == (0, OTHER)
    assert (report.rows, report.files, report.fragments, report.skipped) == (0, 0, 0, False)
    assert report.version == found.version == (2 if mode == "overwrite" else 1)
    assert_nothing_left_over(uri)


def test_no_rows_and_a_given_schema_make_an_empty_table_with_it(table: str):
    write_lance(dataset(pa.table({})), table, mode="overwrite", schema=OTHER)
    assert (lance.dataset(table).count_rows(), lance.dataset(table).schema) == (0, OTHER)


def test_no_rows_of_no_schema_empty_the_table_and_leave_it_its_schema(table: str):
    write_lance(dataset(pa.table({})), table, mode="overwrite")
    assert (lance.dataset(table).count_rows(), lance.dataset(table).schema) == (0, TYPED)


def test_no_rows_of_no_schema_cannot_make_a_table(uri: str):
    with pytest.raises(InvalidArgumentError, match="schema"):
        write_lance(dataset(pa.table({})), uri)
    assert_no_table(uri)


# Ignore


@pytest.mark.parametrize("mode", ["ignore", SaveMode.IGNORE])
def test_ignore_leaves_an_existing_table_alone_and_makes_no_row(table: str, tmp_path: Path, mode: Any):
    before = content(table)
    report = write_lance(marking(tmp_path), table, mode=mode)
    assert (report.skipped, report.version, report.rows, report.versions) == (True, 1, 0, ())
    assert content(table) == before
    assert not (tmp_path / "ran").exists()


def test_ignore_makes_a_table_where_there_is_none(uri: str):
    report = write_lance(dataset(rows(0, 2)), uri, mode="ignore")
    assert (report.skipped, report.version, ids_of(uri)) == (False, 1, [0, 1])


def test_ignore_skips_too_when_somebody_else_makes_the_table_meanwhile(uri: str):
    def block(number: int) -> pa.Table:
        lance.write_dataset(rows(70, 2), uri, mode="overwrite")
        return rows(number, 1)

    report = write_lance(produced(block, 1), uri, mode="ignore")
    assert (report.skipped, ids_of(uri)) == (True, [70, 71])
    assert_nothing_left_over(uri)


# What a commit carries


@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_message_and_properties_are_kept_with_the_version(uri: str, mode: str):
    if mode == "append":
        lance.write_dataset(rows(0, 1), uri)
    report = write_lance(
        dataset(rows(1, 2)),
        uri,
        mode=mode,
        commit_message="the nightly load",
        transaction_properties={"source": "crawl-7", "attempt": "1"},
        job_id="load-7",
    )
    properties = dict(transaction(uri, report.version).transaction_properties or {})
    assert properties.pop("source") == "crawl-7"
    assert properties.pop("attempt") == "1"
    assert properties.pop(OPERATION_ID) == "load-7"
    assert list(properties.values()) == ["the nightly load"]


@pytest.mark.parametrize("mode", ["create", "append", "overwrite", "ignore"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_has_committed_is_not_written_again(uri: str, tmp_path: Path, mode: str, stream: bool):
    if mode == "append":
        lance.write_dataset(rows(0, 1), uri)
    first = write_lance(dataset(rows(1, 2)), uri, mode=mode, job_id="load-7", stream=stream)
    lance.write_dataset(rows(90, 1), uri, mode="append")
    before = content(uri)
    again = write_lance(marking(tmp_path), uri, mode=mode, job_id="load-7", stream=stream)
    assert (first.skipped, first.job_id) == (False, "load-7")
    assert (again.skipped, again.rows, again.versions) == (True, 0, ())
    assert again.version == (first.version if not stream or mode != "append" else again.version)
    assert content(uri) == before
    assert not (tmp_path / "ran").exists() or (stream and mode == "append")


def test_the_callers_lock_guards_the_commit_and_stays_on_the_driver(table: str):
    lock, guarded = threading.Lock(), []

    @contextmanager
    def commit_lock(version: int) -> Iterator[None]:
        with lock:
            guarded.append(version)
            yield

    write_lance(dataset(rows(3, 1)), table, mode="append", commit_lock=commit_lock)
    assert guarded == [2]


def test_another_job_is_written_beside_it(table: str):
    for job in ("one", "two"):
        write_lance(dataset(rows(3, 1)), table, mode="append", job_id=job)
    assert ids_of(table) == [0, 1, 2, 3, 3]


# In a stream


@pytest.fixture
def small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of about 80 KB."""
    monkeypatch.setattr("lance_ray.options.DEFAULT_BUNDLE_BYTES", 80_000)


def wide(first: int, count: int) -> pa.Table:
    """Rows of about 1 KB."""
    return rows(first, count).append_column("pad", pa.array(["x" * 1000] * count))


@pytest.mark.usefixtures("small_bundles")
def test_a_streamed_append_commits_bundle_by_bundle_in_order(uri: str):
    lance.write_dataset(wide(0, 1), uri)
    report = write_lance(dataset(*(wide(1 + 50 * n, 50) for n in range(8))), uri, mode="append", stream=True)
    assert ids_of(uri) == list(range(401))
    assert report.versions == tuple(range(2, 2 + len(report.versions)))
    assert 3 <= len(report.versions) <= 6
    assert (report.rows, report.version, report.files) == (400, report.versions[-1], len(report.versions))
    assert_nothing_left_over(uri)


@pytest.mark.usefixtures("small_bundles")
@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_any_other_stream_becomes_visible_in_one_commit(uri: str, mode: str):
    if mode == "overwrite":
        lance.write_dataset(wide(900, 1), uri)
    report = write_lance(dataset(*(wide(50 * n, 50) for n in range(8))), uri, mode=mode, stream=True)
    assert ids_of(uri) == list(range(400))
    assert len(report.versions) == 1
    assert report.files > 2
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("skipped", [0, 1, 10, 17, 30, 31])
def test_a_stream_resumes_after_exactly_so_many_rows(uri: str, skipped: int):
    lance.write_dataset(rows(100, 1), uri)
    blocks = dataset(rows(0, 10), rows(10, 10), rows(20, 10))
    report = write_lance(blocks, uri, mode="append", stream=True, resume_rows=skipped, batch_size=4)
    assert ids_of(uri) == [100, *range(skipped, 30)]
    assert report.rows == max(0, 30 - skipped)


@pytest.mark.usefixtures("small_bundles")
@pytest.mark.parametrize(("limits", "most"), [({"max_rows_per_file": 30}, 30), ({"max_bytes_per_file": 20_000}, 20)])
def test_a_stream_keeps_to_the_size_of_files(uri: str, limits: dict[str, Any], most: int):
    write_lance(dataset(wide(0, 50), wide(50, 50)), uri, stream=True, **limits)
    assert max(rows_per_file(uri)) <= most
    assert ids_of(uri) == list(range(100))


def test_a_stream_of_no_rows_makes_an_empty_table(uri: str):
    report = write_lance(dataset(OTHER.empty_table()), uri, stream=True)
    assert (report.version, lance.dataset(uri).schema, lance.dataset(uri).count_rows()) == (1, OTHER, 0)


@pytest.mark.usefixtures("small_bundles")
def test_a_stream_that_failed_goes_on_where_its_job_had_stopped(uri: str):
    lance.write_dataset(wide(0, 1), uri)

    def blocks(fail: bool) -> Dataset:
        def block(number: int) -> pa.Table:
            deadline = time.monotonic() + 30
            while fail and number == 5 and time.monotonic() < deadline and lance.dataset(uri).version == 1:
                time.sleep(0.05)  # until something is in the table
            if fail and number == 5:
                raise RuntimeError("power cut")
            return wide(1 + 50 * number, 50)

        return produced(block, 8)

    with pytest.raises(Exception, match="power cut"):
        write_lance(blocks(fail=True), uri, mode="append", stream=True, job_id="load")
    done = lance.dataset(uri).count_rows()
    assert 1 < done < 401
    assert_nothing_left_over(uri)
    report = write_lance(blocks(fail=False), uri, mode="append", stream=True, job_id="load")
    assert ids_of(uri) == list(range(401))
    assert report.rows == 401 - done
    assert_nothing_left_over(uri)


# Failures


def failing_late(uri: str) -> Dataset:
    """Blocks that become files, until one of them fails when there are some."""

    def block(number: int) -> pa.Table:
        deadline = time.monotonic() + 30
        while number == 3 and len(data_files(uri)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        if number == 3:
            raise ValueError("a bug in the caller's function")
        return rows(10 * number, 10)

    return produced(block, 4)


@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_a_function_that_raises_on_a_late_block_leaves_the_table_as_it_was(uri: str, mode: str):
    if mode != "create":
        lance.write_dataset(rows(0, 3), uri)
    before = content(uri)
    with pytest.raises(Exception, match="a bug in the caller's function"):
        write_lance(failing_late(uri), uri, mode=mode, min_rows_per_file=1)
    assert content(uri) == before


def test_an_interrupt_leaves_the_table_as_it_was(table: str, monkeypatch: pytest.MonkeyPatch):
    before = content(table)
    write = Dataset.write_datasink

    def interrupted(self: Dataset, *args: Any, **kwargs: Any) -> None:
        def stop(result: Any) -> None:
            assert len(data_files(table)) == 2
            raise KeyboardInterrupt

        monkeypatch.setattr(args[0], "on_write_complete", stop)
        write(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "write_datasink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_lance(dataset(rows(3, 2)), table, mode="append")
    assert content(table) == before


def test_rows_that_are_in_the_table_are_reported_even_if_the_ledger_cannot_be_closed(
    table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*args: Any) -> None:
        raise StorageError("slow down", kind="transient")

    monkeypatch.setattr("lance_ray.ledger.JobRef.close", broken)
    with caplog.at_level(logging.WARNING):
        report = write_lance(dataset(rows(3, 2)), table, mode="append")
    assert (report.rows, ids_of(table)) == (2, [0, 1, 2, 3, 4])
    assert "cleanup_orphans" in caplog.text


# File sizes


def test_many_tiny_blocks_become_one_file(uri: str):
    report = write_lance(dataset(*(rows(100 * n, 100) for n in range(500))), uri)
    assert rows_per_file(uri) == [50_000]
    assert report.files == 1
    assert sorted(ids_of(uri)) == list(range(50_000))


def test_rows_decide_when_asked_to(uri: str):
    write_lance(dataset(*(rows(100 * n, 100) for n in range(12))), uri, min_rows_per_file=300)
    assert rows_per_file(uri) == [300] * 4


def test_no_file_has_more_rows_than_allowed(uri: str):
    write_lance(dataset(rows(0, 25), rows(25, 25)), uri, max_rows_per_file=20)
    assert sorted(rows_per_file(uri)) == [10, 20, 20]


def test_no_file_has_more_bytes_than_allowed(uri: str):
    block = pa.table({"v": pa.FixedSizeListArray.from_arrays(np.arange(256 * 4096, dtype=np.float32), 256)})  # 4 MB
    report = write_lance(dataset(block, block), uri, max_bytes_per_file=MB)
    assert max(rows_per_file(uri)) == 1024
    assert 8 <= report.files <= 10


@ray.remote(num_cpus=0)
def one_block(megabytes: int) -> Any:
    """Rows of 2,048 bytes, the first number of each saying which it is."""
    count = megabytes * MB // 2048
    values = np.zeros((count, 512), dtype=np.float32)
    values[:, 0] = np.arange(count)
    return pa.table({"v": pa.FixedSizeListArray.from_arrays(values.reshape(-1), 512)})


def of_one_block(megabytes: int) -> Dataset:
    block: Any = one_block.remote(megabytes)
    return ray.data.from_arrow_refs([block])


def first_numbers(uri: str) -> Any:
    return lance.dataset(uri).to_table(columns={"x": "v[1]"}).column("x").to_numpy()


def test_one_large_block_is_spread_over_files(uri: str):
    report = write_lance(of_one_block(300), uri, max_bytes_per_file=64 * MB)
    assert (report.files, max(rows_per_file(uri))) == (5, 64 * MB // 2048)
    assert np.array_equal(first_numbers(uri), np.arange(300 * MB // 2048))


def private_bytes_of_writers() -> int:
    """Memory that write tasks hold beyond the object store, now."""
    sizes = [0]
    for process in psutil.process_iter(["name", "cmdline"]):
        with suppress(psutil.Error):  # it is over by now
            if "Write" in " ".join(process.info["cmdline"] or []):
                memory = process.memory_info()
                sizes.append(memory.rss - memory.shared)  # the object store is shared
    return max(sizes)


@pytest.mark.slow
def test_a_block_of_three_gigabytes_is_written_in_half_a_gigabyte_of_memory(uri: str):
    block = of_one_block(3072).materialize()
    idle = private_bytes_of_writers()
    samples, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            samples.append(private_bytes_of_writers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        report = write_lance(block, uri)
    finally:
        done.set()
        watcher.join()
    assert (report.files, idle) == (3, 0)
    assert len(samples) > 5
    assert 0 < max(samples) < 512 * MB
    assert np.array_equal(first_numbers(uri), np.arange(3072 * MB // 2048))


# What Ray is asked for


def test_ray_gets_the_options_of_its_tasks(uri: str, monkeypatch: pytest.MonkeyPatch):
    asked = {}
    write = Dataset.write_datasink

    def spy(self: Dataset, sink: Any, **kwargs: Any) -> None:
        asked.update(kwargs)
        write(self, sink, **kwargs)

    monkeypatch.setattr(Dataset, "write_datasink", spy)
    given = {"num_cpus": 0.5}
    write_lance(dataset(rows(0, 2)), uri, ray_remote_args=given, concurrency=1)
    assert asked == {"ray_remote_args": {"num_cpus": 0.5}, "concurrency": 1}
    assert given == {"num_cpus": 0.5}
    assert ids_of(uri) == [0, 1]


# Further places for files


@pytest.mark.parametrize("is_root", [True, False], ids=["dataset root", "plain folder"])
def test_files_go_to_the_bases_asked_for(tmp_path: Path, uri: str, is_root: bool):
    bases = [
        DatasetBasePath(str(tmp_path / name), name=name, is_dataset_root=is_root, id=number)
        for number, name in enumerate(("hot", "cold"), 1)
    ]
    write_lance(dataset(rows(0, 2)), uri, initial_bases=bases, target_bases=["hot"])
    write_lance(dataset(rows(2, 2)), uri, mode="append", target_bases=[str(tmp_path / "cold")])
    assert ids_of(uri) == [0, 1, 2, 3]
    assert data_files(uri) == set()
    assert len(files_below(tmp_path / "hot")) == len(files_below(tmp_path / "cold")) == 1
    assert not (Path(uri) / "_lance_ray").exists()


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"target_bases": ["cold", "hot"]}, {"hot": 3, "cold": 3}),
        ({"target_all_bases": True}, {"table": 2, "hot": 2, "cold": 2}),
        ({"target_all_bases": False}, {"hot": 3, "cold": 3}),
    ],
    ids=["named", "all", "all others"],
)
def test_files_go_to_several_bases_in_turn(tmp_path: Path, asked: dict[str, Any], wanted: dict[str, int]):
    uri = str(tmp_path / "table")
    bases = [DatasetBasePath(str(tmp_path / name), name=name) for name in ("hot", "cold")]
    for mode, place in (("create", {**asked, "initial_bases": bases}), ("append", asked)):
        write_lance(dataset(rows(0, 6)), uri, mode=mode, stream=True, max_rows_per_file=1, **place)
        found = {path.name: len(list(path.rglob("*.lance"))) for path in tmp_path.iterdir()}
        assert {name: count for name, count in found.items() if count} == wanted
        wanted = {name: 2 * count for name, count in wanted.items()}
    assert sorted(ids_of(uri)) == sorted([*range(6)] * 2)


def test_a_base_by_a_relative_path_is_the_folder_beside_the_driver(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
):
    """Workers have other current folders."""
    monkeypatch.chdir(tmp_path)
    bases = [DatasetBasePath("hot", name="hot")]
    write_lance(dataset(rows(0, 2)), uri, initial_bases=bases, target_bases=["./hot"])
    write_lance(dataset(rows(2, 2)), uri, mode="append", target_bases=["hot"])
    monkeypatch.chdir("/")
    assert ids_of(uri) == [0, 1, 2, 3]
    assert len(files_below(tmp_path / "hot")) == 2


@pytest.mark.parametrize("is_root", [True, False], ids=["dataset root", "plain folder"])
@pytest.mark.parametrize("mode", ["create", "append"])
def test_a_failed_write_takes_its_files_out_of_the_bases(tmp_path: Path, uri: str, is_root: bool, mode: str):
    base = DatasetBasePath(str(tmp_path / "hot"), name="hot", is_dataset_root=is_root)
    place: dict[str, Any] = {"initial_bases": [base], "target_bases": ["hot"]}
    if mode == "append":
        write_lance(dataset(rows(0, 2)), uri, **place)
        place = {"target_bases": ["hot"]}
    before = content(str(tmp_path))
    mismatched = pa.table({"id": [1.5], "text": ["x"]})

    def block(number: int) -> pa.Table:
        deadline = time.monotonic() + 30
        while number and len(files_below(tmp_path / "hot")) < 1 + (mode == "append") and time.monotonic() < deadline:
            time.sleep(0.05)
        return mismatched if number else rows(10, 5)

    with pytest.raises(SchemaMismatchError):
        write_lance(produced(block, 2), uri, mode=mode, schema=TYPED, min_rows_per_file=1, **place)
    assert content(str(tmp_path)) == before


# Namespaces


@pytest.fixture(params=["dir", "rest"])
def namespace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Keywords that name a table of a namespace."""
    if request.param == "dir":
        yield {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}, "table_id": ["t"]}
        return
    with RestAdapter("dir", {"root": str(tmp_path)}, port=0) as server:
        properties = {"uri": f"http://127.0.0.1:{server.port}"}
        yield {"namespace_impl": "rest", "namespace_properties": properties, "table_id": ["t"]}


def test_a_namespace_table_is_created_appended_to_and_overwritten(namespace: dict[str, Any]):
    with pytest.raises(TableNotFoundError):
        write_lance(dataset(rows(0, 1)), mode="append", **namespace)
    assert write_lance(dataset(rows(0, 2)), **namespace).version == 1
    with pytest.raises(TableExistsError):
        write_lance(dataset(rows(0, 2)), **namespace)
    assert write_lance(dataset(rows(2, 2)), mode="append", **namespace).version == 2
    assert read_lance(**namespace).count() == 4
    report = write_lance(dataset(pa.table({"other": [1]})), mode="overwrite", **namespace)
    assert report.version == 3
    assert read_lance(**namespace).take_all() == [{"other": 1}]


def test_a_create_that_failed_in_a_namespace_can_be_done_again(namespace: dict[str, Any]):
    with pytest.raises(SchemaMismatchError):
        write_lance(dataset(rows(0, 1)), schema=pa.schema([("id", pa.int64())]), **namespace)
    assert write_lance(dataset(rows(0, 2)), **namespace).version == 1
    assert read_lance(**namespace).count() == 2


# Secrets and endpoints


def texts_of(error: BaseException) -> str:
    """Everything that a printed traceback of an error says about it and its causes."""
    parts: list[str] = []
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None:
            parts += [str(found), repr(found), *getattr(found, "__notes__", [])]
            pending += [found.__cause__, None if found.__suppress_context__ else found.__context__]
    return "\n".join(parts)


@pytest.mark.parametrize("mode", ["create", "append"])
@pytest.mark.slow
def test_an_endpoint_where_nobody_listens_ends_at_once_and_shows_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
):
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        write_lance(marking(tmp_path), "s3://bucket/table", mode=mode, storage_options=dead_s3())
    assert time.monotonic() - started < 10
    assert caught.value.kind == "unreachable"
    assert SECRET not in texts_of(caught.value) + caplog.text
    assert not (tmp_path / "ran").exists()


def test_refused_credentials_are_named_as_such_and_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with s3_answering(403) as options, caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        write_lance(marking(tmp_path), "s3://bucket/table", storage_options=options)
    assert caught.value.kind == "denied"
    assert SECRET not in texts_of(caught.value) + caplog.text


def test_no_secret_is_in_the_names_of_tasks_nor_in_the_plan_that_ray_prints(uri: str, monkeypatch: pytest.MonkeyPatch):
    printed = []
    write = Dataset.write_datasink

    def spy(self: Dataset, sink: Any, **kwargs: Any) -> None:
        printed.extend([sink.get_name(), repr(sink), str(vars(sink))])
        write(self, sink, **kwargs)

    monkeypatch.setattr(Dataset, "write_datasink", spy)
    report = write_lance(dataset(rows(0, 2)), uri, storage_options={"aws_secret_access_key": SECRET})
    assert SECRET not in "\n".join(printed) + repr(report)


def test_a_path_below_a_file_ends_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        write_lance(dataset(rows(0, 1)), tmp_path / "file" / "table")
    assert caught.value.kind == "invalid"
    assert time.monotonic() - started < 10
