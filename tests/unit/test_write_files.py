"""The worker side of writing, without Ray: blocks become files of the asked size, and no attempt loses a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from lance.fragment import write_fragments

from lance_ray import write
from lance_ray.errors import InvalidArgumentError, LanceRayError, SchemaMismatchError, StorageError
from lance_ray.ledger import JobRef
from lance_ray.write import WriteSpec, WrittenFile, write_blocks
from tests.blocks import data_files, files_below, rows, spec_for

MB = 1024**2
TRANSIENT = "LanceError(IO): Generic S3 error: Server returned non-2xx status code: 503 Service Unavailable"
PERMANENT = "LanceError(IO): Generic S3 error: Server returned non-2xx status code: 403 Forbidden"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def numbers(count: int, first: int = 0, width: int = 1) -> pa.Table:
    """``count`` rows of ``8 * width`` bytes that tell where they belong."""
    values = np.repeat(np.arange(first, first + count, dtype=np.int64), width)
    return pa.table({"v": pa.FixedSizeListArray.from_arrays(values, width)})


def read_back(spec: WriteSpec, files: Iterable[WrittenFile]) -> pa.Table:
    """The rows of the files, in their order, as a table of its own."""
    kept = [file for file in files if file.fragment]
    operation = lance.LanceOperation.Overwrite(kept[0].arrow_schema, [file.metadata() for file in kept])
    return lance.LanceDataset.commit(spec.target.table.uri, operation).to_table()


def firsts(table: pa.Table) -> list[int]:
    return [value[0] for value in table.column("v").to_pylist()]


# How rows become files


@pytest.mark.parametrize("limit", [1, 4, 5, 7, 21, 22])
def test_the_row_limit_is_exact_whatever_the_blocks_are(tmp_path: Path, limit: int):
    spec = spec_for(tmp_path / "t", max_rows_per_file=limit)
    files = write_blocks(spec, [numbers(7), numbers(5, 7), numbers(0), numbers(9, 12)])
    full, rest = divmod(21, limit)
    assert [file.rows for file in files] == [limit] * full + [rest] * bool(rest)
    assert firsts(read_back(spec, files)) == list(range(21))


def test_small_blocks_share_a_file(tmp_path: Path):
    files = write_blocks(spec_for(tmp_path / "t"), (numbers(10, start) for start in range(0, 1000, 10)))
    assert [file.rows for file in files] == [1000]
    assert len(data_files(tmp_path / "t")) == 1


def test_the_byte_limit_ends_a_file_wherever_a_block_ends(tmp_path: Path):
    blocks = [numbers(1024, start, width=128) for start in range(0, 8192, 1024)]  # 1 MB each
    spec = spec_for(tmp_path / "t", max_bytes_per_file=int(2.5 * MB))
    files = write_blocks(spec, blocks)
    assert [file.rows for file in files] == [2560, 2560, 2560, 512]
    assert all(file.size_bytes <= 2.5 * MB for file in files)
    assert firsts(read_back(spec, files)) == list(range(8192))


def test_a_block_larger_than_the_byte_limit_is_cut(tmp_path: Path):
    spec = spec_for(tmp_path / "t", max_bytes_per_file=MB)
    files = write_blocks(spec, [numbers(10_000, width=128)])  # 10 MB
    assert all(file.size_bytes <= MB for file in files)
    assert len(files) <= 12
    assert firsts(read_back(spec, files)) == list(range(10_000))


def test_a_row_larger_than_the_byte_limit_has_a_file_of_its_own(tmp_path: Path):
    files = write_blocks(spec_for(tmp_path / "t", max_bytes_per_file=100), [numbers(3, width=64)])
    assert [file.rows for file in files] == [1, 1, 1]


def test_both_limits_hold_at_once(tmp_path: Path):
    spec = spec_for(tmp_path / "t", max_bytes_per_file=MB, max_rows_per_file=300)
    assert [file.rows for file in write_blocks(spec, [numbers(700, width=128)])] == [300, 300, 100]
    assert [file.rows for file in write_blocks(spec, [numbers(300, width=1024)])] == [128, 128, 44]


def test_when_rows_decide_bytes_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lance_ray.options.DEFAULT_FILE_BYTES", MB)
    blocks = [numbers(1000, start, width=128) for start in range(0, 4000, 1000)]
    by_rows = write_blocks(spec_for(tmp_path / "rows", min_rows_per_file=10), blocks)
    by_bytes = write_blocks(spec_for(tmp_path / "bytes"), blocks)
    assert (len(by_rows), len(by_bytes)) == (1, 4)


def test_a_file_says_what_is_in_it(tmp_path: Path):
    spec = spec_for(tmp_path / "t")
    (file,) = write_blocks(spec, [rows(0, 10), rows(10, 5)])
    assert (file.rows, file.arrow_schema) == (15, rows(0, 1).schema)
    assert file.size_bytes == rows(0, 15).nbytes
    assert [Path(item.path).name for item in file.metadata().files] == list(data_files(tmp_path / "t"))


def test_blocks_of_every_kind_become_the_same_rows(tmp_path: Path):
    kinds: list[Any] = [
        rows(0, 2),
        rows(2, 2).to_batches()[0],
        rows(4, 2).to_pandas(),
        {"id": np.array([6, 7]), "text": ["row 6", "row 7"]},
    ]
    spec = spec_for(tmp_path / "t", schema=rows(0, 1).schema)
    assert read_back(spec, write_blocks(spec, kinds)) == rows(0, 8)


def test_rows_of_none_make_no_file_but_tell_their_schema(tmp_path: Path):
    columnless = pd.DataFrame()
    (nothing,) = write_blocks(spec_for(tmp_path / "t"), [columnless, rows(0, 0), rows(0, 0)])
    assert (nothing.rows, nothing.fragment, nothing.arrow_schema) == (0, None, rows(0, 0).schema)
    assert files_below(tmp_path) == set()
    assert write_blocks(spec_for(tmp_path / "t"), []) == []


def test_a_column_of_unknown_type_is_told_but_not_written(tmp_path: Path):
    block = pa.table({"id": [1, 2], "later": pa.nulls(2)})
    (file,) = write_blocks(spec_for(tmp_path / "t"), [block])
    assert file.arrow_schema.field("later").type == pa.null()
    assert len(file.metadata().files[0].fields) == 1
    (untyped,) = write_blocks(spec_for(tmp_path / "u"), [pa.table({"later": pa.nulls(2)})])
    assert (untyped.rows, untyped.fragment) == (2, None)


def test_blocks_of_one_file_are_aligned_to_each_other(tmp_path: Path):
    spec = spec_for(tmp_path / "t")
    blocks = [
        pa.table({"a": [1], "b": pa.nulls(1)}),
        pa.table({"b": ["x"], "a": [2]}),
        pa.table({"a": [3], "c": [0.5]}),
    ]
    (file,) = write_blocks(spec, blocks)
    assert read_back(spec, [file]).to_pylist() == [
        {"a": 1, "b": None, "c": None},
        {"a": 2, "b": "x", "c": None},
        {"a": 3, "b": None, "c": 0.5},
    ]


def test_conflicting_blocks_of_one_file_are_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(SchemaMismatchError, match=r"'a'.*int64.*string"):
        write_blocks(spec_for(tmp_path / "t"), [pa.table({"a": [1]}), pa.table({"a": ["x"]})])
    assert files_below(tmp_path) == set()


# Attempts


class FlakyEngine:
    """Fails its first calls after reading ``consumed`` batches of what it was given; counts all calls."""

    def __init__(self, failures: int, error: Exception, consumed: int = 1) -> None:
        self.failures, self.error, self.consumed = failures, error, consumed
        self.calls = 0
        self._engine = write_fragments

    def __call__(self, reader: pa.RecordBatchReader, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            for _ in range(self.consumed):
                reader.read_next_batch()
            raise self.error
        return self._engine(reader, *args, **kwargs)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FlakyEngine]:
    def make(*args: Any, **kwargs: Any) -> FlakyEngine:
        flaky = FlakyEngine(*args, **kwargs)
        monkeypatch.setattr(write, "write_fragments", flaky)
        return flaky

    return make


@pytest.mark.parametrize("error", [OSError(TRANSIENT), ConnectionResetError("reset")], ids=["answer 503", "reset"])
def test_a_retry_after_half_of_the_rows_were_read_writes_all_of_them(tmp_path: Path, engine: Any, error: Exception):
    flaky = engine(3, error, consumed=2)
    spec = spec_for(tmp_path / "t", max_rows_per_file=400)
    blocks = [numbers(100, start, width=4096) for start in range(0, 800, 100)]  # large enough not to be joined
    files = write_blocks(spec, blocks)
    assert [file.rows for file in files] == [400, 400]
    assert flaky.calls == 3 + 2
    assert firsts(read_back(spec, files)) == list(range(800))


@pytest.mark.parametrize(
    "error",
    [OSError(PERMANENT), OSError(28, "No space left on device"), ValueError("Invalid user input: no"), KeyError("x")],
    ids=["answer 403", "disk full", "input", "bug"],
)
def test_what_no_retry_can_help_is_tried_once(tmp_path: Path, engine: Any, error: Exception):
    flaky = engine(99, error)
    with pytest.raises((StorageError, InvalidArgumentError, KeyError)):
        write_blocks(spec_for(tmp_path / "t"), [numbers(10)])
    assert flaky.calls == 1


def test_a_store_that_stays_down_is_given_up(tmp_path: Path, engine: Any):
    flaky = engine(99, OSError(TRANSIENT))
    spec = spec_for(tmp_path / "t")
    with pytest.raises(StorageError) as caught:
        write_blocks(spec, [numbers(10)])
    assert flaky.calls == spec.retry.max_attempts
    assert caught.value.kind == "transient"


@pytest.mark.parametrize("lost", ["all", "some"])
def test_an_engine_that_writes_fewer_rows_than_it_was_given_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
):
    engine = write_fragments

    def forgetful(reader: pa.RecordBatchReader, *args: Any, **kwargs: Any) -> Any:
        kept = pa.Table.from_batches(reader, reader.schema).slice(0, 7).to_reader()
        return [] if lost == "all" else engine(kept, *args, **kwargs)

    monkeypatch.setattr(write, "write_fragments", forgetful)
    with pytest.raises(LanceRayError, match=rf"wrote {0 if lost == 'all' else 7} rows .* instead of 10"):
        write_blocks(spec_for(tmp_path / "t"), [numbers(10)])


def test_a_note_that_fails_for_a_moment_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = spec_for(tmp_path / "t")
    job = JobRef(spec.target.table, "job")
    upload, calls = lance.file.LanceFileSession.upload_file, []

    def flaky(session: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise OSError(TRANSIENT)
        return upload(session, *args)

    with job.running("write"):
        monkeypatch.setattr(lance.file.LanceFileSession, "upload_file", flaky)
        write_blocks(dataclasses.replace(spec, job=job), [rows(0, 5)])
        assert {file.name for file in job.recorded()} == data_files(tmp_path / "t")
        assert len(calls) == 2
    job.discard()
    assert files_below(tmp_path / "t") == set()


def test_files_are_in_the_ledger_before_a_later_block_fails(tmp_path: Path):
    spec = spec_for(tmp_path / "t", max_rows_per_file=5)
    job = JobRef(spec.target.table, "job")
    with job.running("write"):
        with pytest.raises(SchemaMismatchError):
            write_blocks(
                dataclasses.replace(spec, schema=rows(0, 1).schema, job=job),
                [rows(0, 5), rows(5, 5), pa.table({"id": ["not a number"], "text": ["x"]})],
            )
        assert len(job.recorded()) == 2
        assert {file.name for file in job.recorded()} == data_files(tmp_path / "t")
        job.discard()
    assert files_below(tmp_path / "t") == set()


# What goes to the engine


def test_an_append_takes_the_format_and_the_ids_of_the_table(tmp_path: Path):
    uri = str(tmp_path / "t")
    lance.write_dataset(rows(0, 2), uri, data_storage_version="2.0")
    table = lance.dataset(uri)
    table.add_columns({"twice": "id * 2"})
    table.drop_columns(["text"])
    table.add_columns(pa.field("text", pa.string()))  # the same name, another column
    spec = spec_for(uri, "append")
    (file,) = write_blocks(spec, [pa.table({"text": ["x"], "twice": [8], "id": [4]})])
    (written,) = file.metadata().files
    assert (written.file_major_version, written.file_minor_version) == (2, 0)
    assert written.fields == [item.id() for item in table.checkout_version(table.latest_version).lance_schema.fields()]


def test_an_overwrite_keeps_the_format_of_the_table(tmp_path: Path):
    uri = str(tmp_path / "t")
    lance.write_dataset(rows(0, 2), uri, data_storage_version="2.0")
    (file,) = write_blocks(spec_for(uri, "overwrite"), [pa.table({"other": [1]})])
    (written,) = file.metadata().files
    assert (written.file_major_version, written.file_minor_version) == (2, 0)


def test_a_spec_without_a_job_notes_nothing(tmp_path: Path):
    write_blocks(spec_for(tmp_path / "t"), [rows(0, 1)])
    assert [path.split("/")[0] for path in files_below(tmp_path / "t")] == ["data"]
