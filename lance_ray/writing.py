"""Writing with Ray Data: :func:`write_lance`, which runs as tasks, as a stream on the driver, or without Ray."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from lance_ray import commit
from lance_ray.arrow import check_names, to_arrow
from lance_ray.block_refs import shares_of, write_shares
from lance_ray.catalog import LanceRestConfig
from lance_ray.commit import CommitReceipt, Landing
from lance_ray.datasink import TableSink, check_target, check_workers, commit_files, files_schema, write_retry
from lance_ray.errors import (
    InvalidArgumentError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    translate_errors,
    unwrap,
)
from lance_ray.executors import check_dataset, check_ray_options
from lance_ray.full_start import start_in_full
from lance_ray.ledger import JobRef
from lance_ray.options import CommitOptions, OpenOptions, WriteOptions, check_flag, check_positive, pairs
from lance_ray.runner import RunOptions
from lance_ray.table import PinnedTable, TableRef, WriteTarget, address_of
from lance_ray.write import WriteSpec, WrittenFile, write_blocks

logger = logging.getLogger(__name__)

_LEADING_ROWS = "lance_ray.leading_rows"
_BUNDLE = "#"  # between a job id, which cannot have it, and the number of a bundle


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What a write did, and what the table looks like after it."""

    target: str
    version: int
    """The version that holds the rows."""
    rows: int = 0
    """Rows written by this call."""
    bytes: int = 0
    """Their size in memory."""
    files: int = 0
    """Data files written."""
    fragments: int = 0
    """Fragments of the table now."""
    small_files: int = 0
    """Fragments of the table that compaction would merge."""
    deleted_rows: int = 0
    """Rows of the table that are marked deleted."""
    seconds: float = 0.0
    job_id: str = ""
    versions: tuple[int, ...] = ()
    """All versions made by this call (several with ``stream=True``)."""
    schema_changes: tuple[str, ...] = ()
    """Columns that others added meanwhile; null in the rows of this call."""
    skipped: bool = False
    """Nothing was written: the table exists (mode ``ignore``), or the job of this id had committed before."""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.target}: nothing written, version {self.version}"
        rate = self.bytes / 1e6 / self.seconds if self.seconds else 0.0
        text = (
            f"{self.target}: {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB in {self.files} file(s),"
            f" {self.seconds:.2f} s ({rate:,.0f} MB/s), version {self.version}, {self.fragments} fragment(s)"
        )
        return text + (f"; null in new columns {list(self.schema_changes)}" if self.schema_changes else "")


@dataclass(frozen=True, slots=True)
class WriteJob:
    """A write, folded from the public keywords and checked."""

    ref: TableRef
    options: WriteOptions
    commit: CommitOptions
    ray_remote_args: dict[str, Any] | None = None
    concurrency: int | None = None


def write_lance(
    ds: Dataset,
    uri: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    mode: Any = "create",
    min_rows_per_file: int = 1024 * 1024,
    max_rows_per_file: int = 64 * 1024 * 1024,
    max_bytes_per_file: int | None = None,
    data_storage_version: str | None = None,
    enable_stable_row_ids: bool = False,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    initial_bases: Sequence[Any] | None = None,
    target_bases: Sequence[str] | None = None,
    target_all_bases: bool | None = None,
    external_blob_mode: str = "reference",
    allow_external_blob_outside_bases: bool = False,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    commit_message: str | None = None,
    transaction_properties: dict[str, str] | None = None,
    commit_lock: Any = None,
    job_id: str | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    concurrency: int | None = None,
    stream: bool = False,
    batch_size: int | None = None,
    resume_rows: int = 0,
) -> WriteReport:
    """Write a Ray Dataset to a Lance table: files on the workers, then one commit on the driver.

    Args:
        ds: the rows.
        uri: path or URI of the table.
        table_id: the table's name in a namespace, with ``namespace_impl``; a new table is declared there.
        schema: what the table shall have. Blocks are aligned to it by name: reordered, cast where no value changes
            (floats may be rounded to a narrower float type that it names), missing nullable columns null. In an append
            the table's own decides, and one that cannot fit it is refused. Without a schema a new table gets the union
            of the blocks' schemas.
        mode: ``create`` (a table must not exist), ``append`` (it must), ``overwrite`` (rows and schema are replaced in
            one commit), ``ignore`` (do nothing if it exists), or Ray's ``SaveMode``.
        min_rows_per_file: other than the default, rows decide how much one task writes; by default bytes do (256 MiB).
        max_rows_per_file: rows of a file at most.
        max_bytes_per_file: bytes in memory of a file at most; an estimate where widths vary.
        data_storage_version: file format of a new table; the engine's default.
        enable_stable_row_ids: for a new table: row ids survive compaction and updates.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes;
            vended ones of a namespace win over them.
        base_store_params: storage options of further bases, by base URI.
        initial_bases: base paths to register with a new table.
        target_bases: names or paths of bases that the files go to, in turn.
        target_all_bases: all bases of the table in turn: with its own folder (True), or without it (False).
        external_blob_mode: ``reference`` or ``ingest`` for blobs given by URI.
        allow_external_blob_outside_bases: allow references to blobs outside the registered bases.
        namespace_impl: ``dir``, ``rest`` or another Lance Namespace implementation.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        commit_lock: for stores without atomic commits.
        job_id: makes the write repeatable: a job that committed before (within the newest 256 versions) is not written
            again, and what a killed run of the same id left is removed first.
        ray_remote_args: options of ``ray.remote`` for the write tasks.
        concurrency: write tasks at once at most.
        stream: write on the driver, in order, with bounded memory; an append commits every 256 MiB.
        batch_size: rows read at a time with ``stream``.
        resume_rows: leading rows to skip with ``stream``.

    Returns:
        A report; with it, the rows are in the table exactly once.

    Raises:
        InvalidArgumentError, TableExistsError, TableNotFoundError, StorageError, WorkerEnvironmentError: before any
            task starts.
        SchemaMismatchError: blocks do not fit the schema or each other.
        CommitConflictError: others kept winning.
        CommitOutcomeUnknownError: the commit's answer was lost and the table cannot tell; no file was removed.

    A transient storage error is retried by the number of attempts and the longest wait that
    ``DataContext.lance_config`` sets for writes; which errors are transient is decided by their type.

    After any error but the last the table is as it was, and the files that the job finished are removed (what a killed
    process left goes with :func:`lance_ray.cleanup_orphans` or the next run of the same job id). Concurrent appends all
    land. A concurrent change of the schema that the written rows do not fit is a SchemaMismatchError.
    """
    job = WriteJob(
        TableRef.fold(
            uri,
            address_of(locals()),
            open_options=OpenOptions(commit_lock=commit_lock),
        ),
        WriteOptions(
            mode,
            schema,
            min_rows_per_file,
            max_rows_per_file,
            max_bytes_per_file,
            data_storage_version,
            enable_stable_row_ids,
            initial_bases,
            target_bases,
            external_blob_mode,
            allow_external_blob_outside_bases,
            target_all_bases=target_all_bases,
        ),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        ray_remote_args,
        concurrency,
    )
    check_positive("concurrency", concurrency)
    check_positive("batch_size", batch_size)
    check_positive("resume_rows", resume_rows, optional=False, zero=True)
    check_flag("stream", stream)
    check_ray_options(ray_remote_args)
    check_dataset(ds)
    if not stream and (resume_rows or batch_size is not None):
        raise InvalidArgumentError(
            "resume_rows" if resume_rows else "batch_size", resume_rows or batch_size, "needs stream=True"
        )
    if stream and (ray_remote_args or concurrency is not None):
        name = "concurrency" if concurrency is not None else "ray_remote_args"
        raise InvalidArgumentError(
            name, concurrency or sorted(ray_remote_args or ()), "stream=True writes on the driver"
        )
    streaming = functools.partial(_run_streaming, _Streaming(batch_size, resume_rows), job, ds)
    return _run(job, streaming if stream else functools.partial(_run_tasks, job, ds))


@dataclass(frozen=True, slots=True)
class _Streaming:
    batch_size: int | None
    skip: int
    """Leading rows that are in the table already."""
    bundle: int = 0
    """Number of the first bundle to commit."""


@dataclass(frozen=True, slots=True)
class _Done:
    """What a write did: the files, the commits, and whether an earlier run of the job had done it all."""

    files: tuple[WrittenFile, ...]
    receipts: tuple[CommitReceipt, ...]
    skipped: bool = False


_Write = Callable[[WriteSpec, CommitOptions], _Done]


def write_here(job: WriteJob, tables: Iterable[Any]) -> WriteReport:
    """Write Arrow tables or batches in this process, without Ray, as one commit."""
    return _run(job, functools.partial(_run_here, tables))


def _run_here(tables: Iterable[Any], spec: WriteSpec, options: CommitOptions) -> _Done:
    sink = TableSink(spec, options)
    try:
        files = write_blocks(spec, tables)
        receipt = commit_files(sink, spec, files, options)
    except BaseException as error:
        sink.abandon(error)  # whatever it was goes on to the caller
        raise
    return _Done(tuple(files), () if receipt is None else (receipt,))


def _run(job: WriteJob, write: _Write) -> WriteReport:
    started = time.monotonic()
    mode, named = job.options.mode, job.commit.job_id is not None
    if named:
        landed = _earlier_run(job)
        if landed is not None:
            return _report(job, landed, (), None, started, skipped=True)
    target = WriteTarget.resolve(job.ref, mode)
    if target.mode == "ignore" and target.base is not None:
        return _report(job, target.base, (), None, started, skipped=True)
    check_target(target, job.options)
    spec = _spec_of(job, target)
    ledger = spec.job
    assert ledger is not None  # noqa: S101 - _spec_of() gives it one
    options = dataclasses.replace(job.commit, job_id=ledger.job_id)
    try:
        with ledger.running(f"write ({mode})", exclusive=named):
            check_workers(ledger)
            done = write(spec, options)
    except TableExistsError:
        if mode != "ignore":
            raise
        return _report(job, target.table, (), None, started, skipped=True)
    ledger.end(sum(1 for file in done.files if file.rows))
    return _report(job, target.table, done.files, done.receipts, started, skipped=done.skipped)


def _spec_of(job: WriteJob, target: WriteTarget) -> WriteSpec:
    ledger = _ledger(job, target.table, target.base_version)
    return WriteSpec(target, job.options, files_schema(target, job.options), ledger, write_retry())


def _ledger(job: WriteJob, table: PinnedTable, since: int = 0) -> JobRef:
    bases = tuple(str(base.path) for base in job.options.initial_bases or ())
    return JobRef(table, job.commit.operation_id, since, bases=bases)


def _earlier_run(job: WriteJob) -> PinnedTable | None:
    """The table at the version that an earlier run of the job made; else None, with what that run left removed."""
    try:
        table = job.ref.unpinned()
        ledger = _ledger(job, table)
        ledger.end_earlier_runs()  # before the look at the table: what is over by now shows there
        newest = table.open_latest()
    except TableNotFoundError:
        return None
    found = commit.find_operation(newest, ledger.job_id, max(0, newest.version - commit.HISTORY), table.secrets)
    return None if found is None else dataclasses.replace(table, version=found)


def _run_tasks(job: WriteJob, ds: Dataset, spec: WriteSpec, options: CommitOptions) -> _Done:
    sink = TableSink(spec, options)
    try:
        sink.fallback_schema = _checked_schema(ds, spec)
        remote_args = dict(job.ray_remote_args or {})
        share_bytes = sink.min_bytes_per_write  # None: rows decide
        plain = sink.fallback_schema is not None and not remote_args  # Arrow blocks, and no wishes for Ray's tasks
        shares = shares_of(ds, share_bytes) if plain and share_bytes else []
        if shares:
            quiet = None if ds.context.enable_progress_bars else False
            write_shares(sink, shares, RunOptions(max_in_flight=job.concurrency, progress=quiet))
        else:
            start_in_full(ds).write_datasink(sink, ray_remote_args=remote_args, concurrency=job.concurrency)
    except BaseException as error:
        # Ctrl-C does not reach on_write_failed; whatever it was goes on to the caller, in the package's own type.
        sink.abandon(error)
        cause = unwrap(error)
        if cause is error:
            raise
        raise cause from error
    return _Done(sink.written, () if sink.receipt is None else (sink.receipt,))


def _checked_schema(ds: Dataset, spec: WriteSpec) -> pa.Schema | None:
    """The dataset's schema where Ray knows it; its names are checked before any task starts."""
    known = _known_schema(ds)
    if known is not None and spec.schema is None:
        check_names(known)
    return known


def _known_schema(ds: Dataset, *, fetch: bool = False) -> pa.Schema | None:
    """The dataset's schema, by default only where Ray knows it without running anything."""
    try:
        found = ds.schema(fetch_if_missing=fetch)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # its blocks differ in a way that Ray cannot put together
        return None
    base = getattr(found, "base_schema", None)
    return base if isinstance(base, pa.Schema) else None


def _resumed(streaming: _Streaming, job: WriteJob, base: PinnedTable) -> _Streaming:
    """The same, past the bundles that earlier runs of the job appended."""
    newest = base.open()
    for _, properties in commit.history(newest, max(0, newest.version - commit.HISTORY), base.secrets):
        job_id, _, number = properties[commit.OPERATION_ID].rpartition(_BUNDLE)
        if job_id == job.commit.job_id:
            return dataclasses.replace(streaming, skip=int(properties[_LEADING_ROWS]), bundle=int(number) + 1)
    return streaming


def _run_streaming(streaming: _Streaming, job: WriteJob, ds: Dataset, spec: WriteSpec, options: CommitOptions) -> _Done:
    """Write on the driver in order; appends commit bundle by bundle, anything else once at the end."""
    appends, base = spec.target.mode == "append", spec.target.base
    if job.commit.job_id is not None and appends and base is not None:
        streaming = _resumed(streaming, job, base)
    sink = TableSink(spec, options)
    files: list[WrittenFile] = []
    receipts: list[CommitReceipt] = []
    try:
        sink.fallback_schema = _checked_schema(ds, spec)
        for number, tables in enumerate(_bundles(_tables(ds, streaming), spec.options), streaming.bundle):
            bundle = write_blocks(spec, tables)
            files += bundle
            if appends:
                # Under an id of its own, so that a lost answer is told from the bundles before it.
                since = receipts[-1].version if receipts else spec.target.base_version
                landing = Landing(f"{options.operation_id}{_BUNDLE}{number}", since)
                rows = streaming.skip + sum(file.rows for file in files)
                receipts += filter(None, [commit_files(sink, spec, bundle, _with_progress(options, rows), landing)])
        if not appends:
            if not files and spec.schema is None:
                sink.fallback_schema = _known_schema(ds, fetch=True)
            receipts += filter(None, [commit_files(sink, spec, files, options)])
    except BaseException as error:
        sink.abandon(error)  # the rows of finished commits stay
        raise
    return _Done(tuple(files), tuple(receipts), skipped=not receipts and streaming.bundle > 0)


def _with_progress(options: CommitOptions, rows: int) -> CommitOptions:
    """The same, noting how many leading rows of the input are in the table with this commit, for a next run."""
    return dataclasses.replace(options, notes=((_LEADING_ROWS, str(rows)),))


def _tables(ds: Dataset, streaming: _Streaming) -> Iterator[pa.Table]:
    skip = streaming.skip
    with _in_order(ds):
        for batch in ds.iter_batches(batch_size=streaming.batch_size, batch_format="pyarrow"):
            table = to_arrow(batch)
            rest = table.slice(min(skip, table.num_rows))
            skip -= table.num_rows - rest.num_rows
            if rest.num_rows:
                yield rest


@contextmanager
def _in_order(ds: Dataset) -> Iterator[None]:
    """Without this, blocks come as their tasks finish."""
    options = ds.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        yield
    finally:
        options.preserve_order = before


def _bundles(tables: Iterable[pa.Table], options: WriteOptions) -> Iterator[list[pa.Table]]:
    enough = options.min_rows_per_file if options.rows_decide else options.bundle_bytes
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.num_rows if options.rows_decide else table.nbytes
        if size >= enough:
            yield held
            held, size = [], 0
    if held:
        yield held


def _report(
    job: WriteJob,
    table: PinnedTable,
    files: Sequence[WrittenFile],
    receipts: Sequence[CommitReceipt] | None,
    started: float,
    *,
    skipped: bool = False,
) -> WriteReport:
    try:
        dataset = table.open_at(receipts[-1].version) if receipts else table.open_latest()
        with translate_errors("read the statistics of", table.uri, secrets=table.secrets):
            stats: dict[str, Any] = dict(dataset.stats.dataset_stats())
        version = dataset.version
    except (TableNotFoundError, StorageError) as error:
        if not receipts and not isinstance(error, TableNotFoundError):
            raise
        stats, version = {}, receipts[-1].version if receipts else 0  # the rows are in the table all the same
    return WriteReport(
        target=job.ref.target,
        version=table.version if skipped and table.version else version,
        rows=sum(file.rows for file in files),
        bytes=sum(file.size_bytes for file in files),
        files=sum(1 for file in files if file.rows),
        fragments=stats.get("num_fragments", 0),
        small_files=stats.get("num_small_files", 0),
        deleted_rows=stats.get("num_deleted_rows", 0),
        seconds=time.monotonic() - started,
        job_id=job.commit.job_id or "",
        versions=tuple(receipt.version for receipt in receipts or ()),
        schema_changes=tuple(dict.fromkeys(name for receipt in receipts or () for name in receipt.schema_changes)),
        skipped=skipped,
    )
