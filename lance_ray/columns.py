"""Columns added to a table, or computed anew: per fragment on workers, one commit on the driver, resumable.

Each worker scans one fragment of the pinned version, computes, and writes one new file beside the old ones; the driver
commits all at once. What others commit meanwhile is settled by metadata: a fragment that was appended or changed is
computed on the newest version and the commit repeated, everything else is kept.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray

from lance_ray import commit
from lance_ray.arrow import align, engine_safe, row_width
from lance_ray.column_commits import (
    AddColumns,
    ColumnsOperation,
    UpdateColumns,
    as_dict,
    fragments_of,
    schema_digest,
    schema_text,
)
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    SnapshotChangedError,
    translate_errors,
)
from lance_ray.executors import ActorExecutor, Executor, RayExecutor, checked_ray_args
from lance_ray.ledger import JobRef, WrittenPath
from lance_ray.options import CommitOptions, check_positive, pairs
from lance_ray.planning.columns import ColumnResult
from lance_ray.planning.reads import batch_rows
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, TableRef, newest
from lance_ray.transforms import Appending, BatchFormat, Transform, aligned, fold_transform, output_of

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 16
_MAX_REPLANS = 5
_SYSTEM = ("_rowid", "_rowaddr")


@dataclass(frozen=True, slots=True)
class ColumnsReport:
    """What a change of columns did."""

    target: str
    version: int
    """The version that holds the columns."""
    columns: tuple[str, ...] = ()
    rows: int = 0
    """Rows computed."""
    bytes: int = 0
    """Bytes of the files written."""
    files: int = 0
    """Data files written."""
    fragments: int = 0
    """Fragments of the table now."""
    resumed: int = 0
    """Fragments whose values an earlier run of the job had written."""
    recomputed: int = 0
    """Fragments computed after the first plan, because others added or changed them meanwhile."""
    retried: int = 0
    """Attempts beyond each fragment's first."""
    seconds: float = 0.0
    job_id: str = ""
    skipped: bool = False
    """Nothing was done: there was nothing to do, or the job of this id had committed before."""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.target}: nothing to do, version {self.version}"
        text = (
            f"{self.target}: {', '.join(self.columns)}: {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB in {self.files}"
            f" file(s), {self.seconds:.2f} s, version {self.version}, {self.fragments} fragment(s)"
        )
        counts = {name: getattr(self, name) for name in ("resumed", "recomputed", "retried")}
        return text + "".join(f", {count} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """What the tasks of one job share."""

    transform: Transform
    job: JobRef
    columns: tuple[str, ...] | None
    """Columns that the transform reads; None for all."""
    filter: str | None
    batch_size: int | None
    output: pa.Schema | None = None
    """The columns of an update; on the driver, all columns once they are found out."""
    update: bool = False


@dataclass(frozen=True, slots=True)
class ColumnJob:
    """A job, folded from the public keywords and checked."""

    operation: str
    ref: TableRef
    spec: ColumnSpec
    workers: ColumnWorkers
    commit: CommitOptions
    progress: bool | Reporter | None = None
    max_replans: int = _MAX_REPLANS


@dataclass(frozen=True, slots=True)
class ColumnWorkers:
    """Where the tasks run."""

    concurrency: int | None = None
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fold(cls, concurrency: Any, ray_remote_args: Mapping[str, Any] | None, **resources: Any) -> ColumnWorkers:
        """The workers; ``num_cpus``, ``num_gpus`` and ``memory`` are for each."""
        check_positive("concurrency", concurrency)
        given = {key: value for key, value in resources.items() if value is not None}
        return cls(concurrency, checked_ray_args({**(ray_remote_args or {}), **given}))

    def executor(self, operation: str, *, stateful: bool) -> Executor:
        """Ray tasks; actors for a transform with state."""
        if not stateful:
            return RayExecutor(self.ray_remote_args, name=operation)
        return ActorExecutor(self.concurrency or _slots(self.ray_remote_args), load, self.ray_remote_args)


def _slots(args: Mapping[str, Any]) -> int:
    if not ray.is_initialized():
        ray.init()
    have = ray.cluster_resources()
    cpus, gpus = args.get("num_cpus", 1), args.get("num_gpus")
    slots = [have.get("CPU", 1.0) / cpus] if cpus else []
    slots += [have.get("GPU", 0.0) / gpus] if gpus else []
    return max(1, int(min(slots, default=1)))


def add_columns(
    uri: Any = None,
    *,
    transform: Any,
    filter: str | None = None,
    read_columns: Sequence[str] | None = None,
    reader_schema: pa.Schema | None = None,
    output_schema: pa.Schema | None = None,
    batch_format: BatchFormat = "pyarrow",
    batch_size: int | None = None,
    read_version: int | str | None = None,
    concurrency: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    fn_constructor_args: Sequence[Any] | None = None,
    fn_constructor_kwargs: Mapping[str, Any] | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    max_replans: int = _MAX_REPLANS,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    storage_options: dict[str, str] | None = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: str | None = None,
    namespace_properties: dict[str, str] | None = None,
    table_id: Sequence[str] | None = None,
) -> ColumnsReport:
    """Add columns to a table: each fragment on a worker, one commit.

    Args:
        uri: path or URI of the table, or an opened dataset.
        transform: a dict of SQL expressions by column name; a function from a batch to the new columns, of as many
            rows; a ``lance.batch_udf``; a class, of which each worker makes one object and calls it with batches (a
            model that is loaded once); or a ``pa.Field``, a list of them or a ``pa.Schema`` for columns of nulls, which
            changes metadata only.
        filter: SQL; rows that do not match get null, and are not given to the transform.
        read_columns: columns that a function is given; all by default. ``_rowid`` and ``_rowaddr`` may be among them.
        reader_schema: another name of ``output_schema``.
        output_schema: the new columns; by default what the transform makes of some rows.
        batch_format: what a function takes: ``pyarrow`` (a RecordBatch), ``pandas`` (a DataFrame) or ``numpy`` (a dict
            of arrays). It may return any of them, or a Table.
        batch_size: rows of a batch at most; by default some 4 MiB of what is read.
        read_version: the version to compute on, a number or a tag; the newest by default.
        concurrency: workers at once at most; by default what the cluster runs.
        num_cpus: CPUs of each worker.
        num_gpus: GPUs of each worker.
        fn_constructor_args: for the constructor of a class.
        fn_constructor_kwargs: the same by name.
        job_id: makes the job resumable: what is finished stays when it fails, and the next run with this id does the
            rest. A run with another transform or other columns is refused.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        max_replans: how often fragments that others added or changed meanwhile are computed, and the commit repeated.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        ray_remote_args: options of ``ray.remote`` for the workers.
        storage_options: for the object store.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation.
        namespace_properties: what the namespace is connected with.
        table_id: the table's name in a namespace, with ``namespace_impl``.

    Returns:
        What was done.

    Raises:
        InvalidArgumentError, TableNotFoundError, VersionNotFoundError, StorageError, WorkerEnvironmentError: before
            any task starts.
        SchemaMismatchError, TaskFailedError: the transform failed, or returned what no column holds.
        SnapshotChangedError: others kept changing the fragments.
        CommitConflictError, StorageError: not committed.
        CommitOutcomeUnknownError: the answer of the commit was lost and the table cannot tell; no file was removed.

    A failed job leaves the table as it was. Its files are removed; with a ``job_id`` they wait for the next run.
    """
    folded = fold_transform(
        transform,
        batch_format=batch_format,
        output_schema=output_schema or reader_schema,
        setup=(fn_constructor_args, fn_constructor_kwargs),
    )
    address = {
        "table_id": table_id,
        "namespace_impl": namespace_impl,
        "namespace_properties": namespace_properties,
        "storage_options": storage_options,
        "base_store_params": base_store_params,
    }
    ref = TableRef.fold(uri, address, version=read_version)
    options = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id)
    if isinstance(folded, pa.Schema):
        return add_nulls(ref, folded, options)
    return run_job(
        fold_job(
            "add_columns",
            ref,
            folded,
            Reading(read_columns, filter, batch_size),
            ColumnWorkers.fold(concurrency, ray_remote_args, num_cpus=num_cpus, num_gpus=num_gpus),
            options,
            Running(progress, max_replans),
        )
    )


def merge_columns(uri: Any = None, *, transform: Any, **keywords: Any) -> ColumnsReport:
    """:func:`add_columns` for a function that returns its batch with the new columns appended.

    Columns that the table has already are left as they are. Keywords are those of :func:`add_columns`.
    """
    return add_columns(uri, transform=Appending(transform), **keywords)


def update_columns(
    uri: Any = None,
    ds: Any = None,
    *,
    columns: Sequence[str],
    transform: Any = None,
    on: str | Sequence[str] = "_rowaddr",
    filter: str | None = None,
    where_null: bool = False,
    changed_since: int | None = None,
    read_columns: Sequence[str] | None = None,
    batch_format: BatchFormat = "pyarrow",
    batch_size: int | None = None,
    read_version: int | str | None = None,
    concurrency: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    fn_constructor_args: Sequence[Any] | None = None,
    fn_constructor_kwargs: Mapping[str, Any] | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    max_replans: int = _MAX_REPLANS,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    storage_options: dict[str, str] | None = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: str | None = None,
    namespace_properties: dict[str, str] | None = None,
    table_id: Sequence[str] | None = None,
) -> ColumnsReport:
    """Compute columns anew, for all rows or some: each fragment with such rows gets a file that replaces the columns.

    Give either a ``transform``, which runs over the table, or ``ds``, a Ray Dataset with new values of the rows that it
    names. Types stay those of the table. Row ids stay; where the table has stable ones, only the rows concerned
    count as updated in this version. Indexes of these columns no longer cover these fragments.

    Args:
        uri: path or URI of the table, or an opened dataset.
        ds: new values, in any order, for some rows; see ``on``.
        columns: the columns to replace.
        transform: as for :func:`add_columns`; returns at least ``columns``.
        on: how ``ds`` names rows: ``_rowaddr``, ``_rowid``, or key columns.
        filter: SQL; only rows that match are computed.
        where_null: only rows in which one of ``columns`` is null.
        changed_since: only rows that were added or changed after this version (the table needs stable row ids). With
            ``where_null``, rows of either kind; ``filter`` narrows both.
        read_columns: as for :func:`add_columns`.
        batch_format: the same.
        batch_size: the same.
        read_version: the same.
        concurrency: the same.
        num_cpus: the same.
        num_gpus: the same.
        fn_constructor_args: the same.
        fn_constructor_kwargs: the same.
        job_id: the same.
        commit_message: the same.
        transaction_properties: the same.
        max_replans: the same.
        progress: the same.
        ray_remote_args: the same.
        storage_options: the same.
        base_store_params: the same.
        namespace_impl: the same.
        namespace_properties: the same.
        table_id: the same.

    Returns:
        What was done.

    Raises:
        RowCoverageError: ``ds`` names a row twice, or rows that the table does not have; nothing is changed.
        LanceRayError: as for :func:`add_columns`.
    """
    from lance_ray.column_merge import MergeOptions, update_from

    if (ds is None) == (transform is None):
        raise InvalidArgumentError("transform", transform, "give either a transform or ds")
    address = {
        "table_id": table_id,
        "namespace_impl": namespace_impl,
        "namespace_properties": namespace_properties,
        "storage_options": storage_options,
        "base_store_params": base_store_params,
    }
    ref = TableRef.fold(uri, address, version=read_version)
    options = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id)
    workers = ColumnWorkers.fold(concurrency, ray_remote_args, num_cpus=num_cpus, num_gpus=num_gpus)
    if ds is not None:
        surplus: dict[str, Any] = {"filter": filter, "where_null": where_null or None, "changed_since": changed_since}
        surplus |= {"read_columns": read_columns, "batch_size": batch_size, "fn_constructor_args": fn_constructor_args}
        if given := sorted(key for key, value in surplus.items() if value is not None):
            raise InvalidArgumentError("ds", given, "ds itself says which rows have which values")
        return update_from(ref, ds, tuple(columns), MergeOptions.fold(on, workers, options, progress))
    chosen = _Chosen(tuple(columns), filter, where_null, changed_since)
    folded = fold_transform(transform, batch_format=batch_format, setup=(fn_constructor_args, fn_constructor_kwargs))
    if isinstance(folded, pa.Schema):
        raise InvalidArgumentError("transform", folded.names, "must be SQL expressions, a function or a class")
    job = fold_job(
        "update_columns",
        ref,
        folded,
        Reading(read_columns, chosen.predicate(ref), batch_size),
        workers,
        options,
        Running(progress, max_replans),
    )
    return run_job(dataclasses.replace(job, spec=dataclasses.replace(job.spec, output=chosen.output(ref), update=True)))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which values of a table an update computes."""

    columns: tuple[str, ...]
    filter: str | None
    where_null: bool
    changed_since: int | None

    def output(self, ref: TableRef) -> pa.Schema:
        """The columns as the table has them."""
        return columns_of(ref.pin().open().schema, self.columns)

    def predicate(self, ref: TableRef) -> str | None:
        """The rows, as SQL."""
        kinds = [f"`{name}` IS NULL" for name in self.columns] if self.where_null else []
        if self.changed_since is not None:
            check_positive("changed_since", self.changed_since, zero=True)
            if not ref.pin().open().has_stable_row_ids:
                raise InvalidArgumentError(
                    "changed_since", self.changed_since, "the table has no stable row ids, and so no versions of rows"
                )
            kinds.append(f"_row_last_updated_at_version > {self.changed_since}")
        parts = ([f"({' OR '.join(kinds)})"] if kinds else []) + ([f"({self.filter})"] if self.filter else [])
        return " AND ".join(parts) or None


def columns_of(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """These columns of a table.

    Raises:
        InvalidArgumentError: it does not have one, or none is named.
    """
    unknown = [name for name in names if name not in schema.names]
    if unknown or not names or isinstance(names, str):
        raise InvalidArgumentError("columns", unknown or names, f"must be columns of the table: {schema.names}")
    return pa.schema([schema.field(name) for name in dict.fromkeys(names)])


@dataclass(frozen=True, slots=True)
class Reading:
    """What the transform is given."""

    columns: Sequence[str] | None = None
    filter: str | None = None
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """How the job shows itself, and how long it goes on against others."""

    progress: bool | Reporter | None = None
    max_replans: int = _MAX_REPLANS


def fold_job(
    operation: str,
    ref: TableRef,
    transform: Transform,
    reading: Reading,
    workers: ColumnWorkers,
    options: CommitOptions,
    running: Running,
) -> ColumnJob:
    """The job, checked as far as no table is needed."""
    check_positive("batch_size", reading.batch_size)
    check_positive("max_replans", running.max_replans, optional=False, zero=True)
    if reading.filter is not None and not (isinstance(reading.filter, str) and reading.filter.strip()):
        raise InvalidArgumentError("filter", reading.filter, "must be a SQL expression")
    columns = None if reading.columns is None else tuple(reading.columns)
    if transform.sql and columns is not None:
        raise InvalidArgumentError("read_columns", columns, "SQL expressions name what they read")
    job = JobRef(ref.unpinned(), options.operation_id)
    spec = ColumnSpec(transform, job, columns, reading.filter, reading.batch_size)
    return ColumnJob(operation, ref, spec, workers, options, running.progress, running.max_replans)


def add_nulls(ref: TableRef, schema: pa.Schema, options: CommitOptions) -> ColumnsReport:
    """Columns of nulls, by metadata alone."""
    started = time.monotonic()
    if options.message is not None or options.properties:
        raise InvalidArgumentError("commit_message", options.message, "columns of nulls carry no message or properties")
    table = newest(ref.pin())
    refuse_existing(schema.names, table.open().schema)
    required = [item.name for item in schema if not item.nullable]
    if required:
        raise InvalidArgumentError("transform", required, "a column of nulls must be nullable")
    version = commit.add_null_columns(table, schema)
    fragments = len(table.open_at(version).fragment_ids())
    return ColumnsReport(
        ref.target, version, tuple(schema.names), fragments=fragments, seconds=time.monotonic() - started
    )


def refuse_existing(names: Sequence[str], schema: pa.Schema) -> None:
    """Raise InvalidArgumentError if the table has such columns already."""
    if existing := sorted(set(names) & set(schema.names)):
        raise InvalidArgumentError("transform", existing, "the table has columns of these names; see update_columns()")


def run_job(job: ColumnJob) -> ColumnsReport:
    """Plan, run, commit, and end the ledger."""
    started = time.monotonic()
    spec = job.spec
    landed = _landed(job)
    if landed is not None:
        return ColumnsReport(job.ref.target, landed, job_id=spec.job.job_id, skipped=True)
    table, resumes = _read_version(job)
    plan = _plan_of(job, table)
    job = dataclasses.replace(job, spec=dataclasses.replace(spec, job=JobRef(table, spec.job.job_id, table.version)))
    check_cluster([table])
    with job.spec.job.running(job.operation, exclusive=job.commit.job_id is not None, plan=_kept(job, plan)):
        run = _Run(job, table, started)
        try:
            if resumes:
                run.take_over()
            return run.through()
        finally:
            run.tidy()


def _landed(job: ColumnJob) -> int | None:
    if job.commit.job_id is None:
        return None
    table = job.spec.job.table
    latest = table.open_latest()
    since = max(0, latest.version - commit.HISTORY)
    return commit.find_operation(latest, job.commit.job_id, since, table.secrets)


def _read_version(job: ColumnJob) -> tuple[PinnedTable, bool]:
    """The version to compute on: that of an earlier run of the same job, if there is one to go on from."""
    table = job.ref.pin()
    plans = [] if job.commit.job_id is None else job.spec.job.earlier_plans()
    if not plans:
        return table, False
    earlier = plans[-1]
    if job.ref.version is None:
        table = dataclasses.replace(job.ref, version=int(earlier["read_version"]), opened="").pin()
    mine = _plan_of(job, table)
    differing = sorted(key for key in mine if earlier.get(key) != mine[key])
    if differing:
        raise InvalidArgumentError(
            "job_id",
            job.commit.job_id,
            f"an unfinished run of this job differs in {differing}; use its arguments, another id, or remove it with"
            " cleanup_orphans()",
        )
    return table, True


def _plan_of(job: ColumnJob, table: PinnedTable) -> dict[str, Any]:
    spec = job.spec
    return {
        "operation": job.operation,
        "read_version": table.version,
        "columns": None if spec.columns is None else list(spec.columns),
        "filter": spec.filter,
        "output": None if spec.output is None else str(spec.output),
        "transform": spec.transform.fingerprint(),
    }


def _kept(job: ColumnJob, plan: dict[str, Any]) -> dict[str, Any] | None:
    return None if job.commit.job_id is None else plan


@dataclass(frozen=True, slots=True)
class ColumnTask:
    """One fragment of one version."""

    table: PinnedTable
    fragment: int
    output: pa.Schema | None = None
    """The columns to write. Here, so that what all tasks share stays one object, and a model is loaded once."""


class _Run:
    """One job on its way: rounds of tasks, each for the fragments that have no values which fit."""

    def __init__(self, job: ColumnJob, table: PinnedTable, started: float) -> None:
        self._job = job
        self._table = table
        self._started = started
        self._results: dict[int, ColumnResult] = {}
        self._report = ColumnsReport(job.ref.target, table.version, job_id=job.spec.job.job_id)
        self._digest = schema_digest(table.open())
        self._committed: int | None = None
        self._unsettled = False

    def take_over(self) -> None:
        """What an earlier run of the job has finished."""
        for item in self._job.spec.job.take_over():
            result = ColumnResult(**{**item, "fields": tuple(item["fields"])})
            self._results[result.fragment] = result
        self._report = dataclasses.replace(self._report, resumed=len(self._results))

    def through(self) -> ColumnsReport:
        """Compute and commit, again for what others changed meanwhile.

        Raises:
            SnapshotChangedError: they did not stop changing it.
        """
        spec = self._job.spec
        executor = self._job.workers.executor(self._job.operation, stateful=spec.transform.is_stateful)
        try:
            spec = dataclasses.replace(spec, output=self._output(executor))
            self._round(spec, executor, first=True)
            for _ in range(self._job.max_replans):
                if (report := self._try_commit(spec)) is not None:
                    return report
                self._follow()
                self._round(spec, executor, first=False)
            return self._commit(spec)
        finally:
            if isinstance(executor, ActorExecutor):
                executor.close()

    def _try_commit(self, spec: ColumnSpec) -> ColumnsReport | None:
        try:
            return self._commit(spec)
        except SnapshotChangedError as changed:
            logger.info("%s: %s; computing these", self._job.ref.target, changed)
            return None

    def _output(self, executor: Executor) -> pa.Schema:
        spec, dataset = self._job.spec, self._table.open()
        schema = spec.transform.schema
        if spec.update:
            schema = spec.output
        elif schema is None and spec.transform.sql:
            with _translated(self._table):
                found = dataset.scanner(**_projection(spec)).projected_schema
                schema = pa.schema([item for item in found if item.name not in _SYSTEM])
        elif schema is None:
            run = run_tasks(
                sample, [ColumnTask(self._table, -1)], shared=spec, options=self._options(), executor=executor
            )
            with run:
                schema = pa.ipc.read_schema(pa.py_buffer(next(run).unwrap()))
        assert schema is not None  # noqa: S101 - each branch gave one
        if not spec.update:
            refuse_existing(schema.names, dataset.schema)
        nullable = spec.filter is not None
        return pa.schema([item.with_nullable(True) if nullable else item for item in schema])

    def _options(self) -> RunOptions:
        return RunOptions(max_in_flight=self._job.workers.concurrency, progress=self._job.progress)

    def _round(self, spec: ColumnSpec, executor: Executor, *, first: bool) -> None:
        operation = self._operation(spec)
        dataset = self._table.open()
        now = fragments_of(dataset)
        todo = operation.stale(dataset, now, list(now))
        if not todo:
            return
        if not first:
            self._report = dataclasses.replace(self._report, recomputed=self._report.recomputed + len(todo))
        tasks = [ColumnTask(self._table, item, spec.output) for item in todo]
        options = dataclasses.replace(self._options(), on_failure="report")
        shared = self._job.spec
        run = run_tasks(
            compute, tasks, shared=shared, options=options, executor=executor, operation=self._job.operation
        )
        failed = None
        with run:
            for outcome in run:
                if outcome.error is not None:
                    failed = failed or outcome.error
                    continue
                result = outcome.unwrap()
                self._results[result.fragment] = result
                self._count(result)
        self._report = dataclasses.replace(self._report, retried=self._report.retried + run.report.retried)
        if failed is not None:
            raise failed

    def _count(self, result: ColumnResult) -> None:
        self._report = dataclasses.replace(
            self._report,
            rows=self._report.rows + result.rows,
            bytes=self._report.bytes + result.bytes,
            files=self._report.files + result.has_file,
        )

    def _operation(self, spec: ColumnSpec) -> ColumnsOperation:
        kind = UpdateColumns if spec.update else AddColumns
        return kind(self._table, self._digest, self._results)

    def _commit(self, spec: ColumnSpec) -> ColumnsReport:
        assert spec.output is not None  # noqa: S101 - through() has found it out
        job = spec.job
        if not any(result.has_file for result in self._results.values()):
            return self._without_values(spec, spec.output)
        if not job.is_open():
            raise LanceRayError(f"job {job.job_id} was ended by a clean-up before it could commit")
        self._unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.apply(
                self._table, self._operation(spec), self._job.commit, commit.Landing(job.job_id, job.since)
            )
        except LanceRayError as error:
            self._unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self._unsettled = False
        return self._done(spec.output, receipt.version)

    def _without_values(self, spec: ColumnSpec, output: pa.Schema) -> ColumnsReport:
        """No row was computed: an empty table gets the columns, and an update is over."""
        if spec.update:
            return dataclasses.replace(self._done(output, newest(self._table).version), skipped=True)
        required = [item.name for item in output if not item.nullable]
        if required:
            raise InvalidArgumentError("output_schema", required, "there are no rows; the columns must be nullable")
        return self._done(output, commit.add_null_columns(self._table, output))

    def _done(self, output: pa.Schema, version: int) -> ColumnsReport:
        ids = set(self._table.open_at(version).fragment_ids())
        self._committed = sum(result.has_file for item, result in self._results.items() if item in ids)
        return dataclasses.replace(
            self._report,
            version=version,
            columns=tuple(output.names),
            fragments=len(ids),
            seconds=time.monotonic() - self._started,
        )

    def _follow(self) -> None:
        """Go on from the newest version. Where its columns are others, all values are computed again."""
        self._table = newest(self._table)
        digest = schema_digest(self._table.open())
        if digest != self._digest:
            self._digest = digest
            self._results.clear()

    def tidy(self) -> None:
        """End the ledger. What failed for certain goes, or waits for the next run of a job that has a name."""
        job = self._job.spec.job
        try:
            if self._unsettled:
                return
            if self._committed is not None:
                job.close(self._committed)  # the files of fragments that are gone are nobody's
            elif self._job.commit.job_id is None or not self._results:
                job.discard()
            else:
                logger.warning("%d finished fragment(s) wait for the next run of %s", len(self._results), job.job_id)
        except LanceRayError as failure:  # what the caller must hear is how the job went
            logger.warning("the ledger of job %s is left for cleanup_orphans(): %s", job.job_id, failure)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The state of a worker: the spec, and its transform ready for use."""

    spec: ColumnSpec
    transform: Transform


def load(spec: ColumnSpec) -> Loaded:
    """Runs on a worker, once where workers keep state."""
    return Loaded(spec, spec.transform.load())


def sample(state: Any, task: ColumnTask) -> bytes:
    """Runs on a worker: the schema of the new columns, from some rows."""
    loaded = state if isinstance(state, Loaded) else load(state)
    spec, dataset = loaded.spec, task.table.open()
    with _translated(task.table):
        table = dataset.scanner(filter=spec.filter, limit=_SAMPLE_ROWS, **_projection(spec)).to_table()
    given = table.combine_chunks().to_batches()
    batch = given[0] if given else pa.RecordBatch.from_pylist([], schema=table.schema)
    found = output_of(loaded.transform(batch), spec.transform, dataset.schema)
    serialized: bytes = found.serialize().to_pybytes()
    return serialized


def compute(state: Any, task: ColumnTask) -> ColumnResult:
    """Runs on a worker: the values of one fragment, written as one new file that the ledger knows."""
    loaded = state if isinstance(state, Loaded) else load(state)
    dataset = task.table.open()
    planned = fragments_of_one(dataset, task.fragment)
    values = _Values(loaded, task, dataset)
    writing: Any = dataset.get_fragment(task.fragment)
    write = _update if loaded.spec.update else _add
    with translate_errors("write columns of", task.table.uri, secrets=task.table.secrets):
        try:
            result = write(values, writing, planned)
        except Exception:
            if values.error is not None:  # the engine tells only its text
                raise values.error from None
            raise
    return result


def fragments_of_one(dataset: lance.LanceDataset, fragment: int) -> dict[str, Any]:
    """What the manifest says of one fragment."""
    found: Any = dataset.get_fragment(fragment)
    return dict(json.loads(json.dumps(found.metadata.to_json())))


def _translated(table: PinnedTable) -> Any:
    return translate_errors("read", table.uri, secrets=table.secrets)


def _projection(spec: ColumnSpec) -> dict[str, Any]:
    """What the scanner is told about columns."""
    if spec.transform.sql:
        # The engine scans for constants alone only beside something that it has to read.
        return {"columns": dict(spec.transform.sql), "with_row_address": True}
    if spec.columns is None:
        return {}
    return {
        "columns": [name for name in spec.columns if name not in _SYSTEM],
        "with_row_id": "_rowid" in spec.columns,
        "with_row_address": "_rowaddr" in spec.columns,
    }


class _Values:
    """The new values of one fragment, batch by batch, computed as they are asked for."""

    def __init__(self, loaded: Loaded, task: ColumnTask, dataset: lance.LanceDataset) -> None:
        assert task.output is not None  # noqa: S101 - found out before the first of these tasks
        self.spec = loaded.spec
        self.output = task.output
        self.dataset = dataset
        self.error: Exception | None = None
        """Why the computation ended early; what reads it from the engine's side is told a text only."""
        self.rows = 0
        self._transform = loaded.transform
        self._task = task

    def __iter__(self) -> Iterator[tuple[np.ndarray | None, pa.Table]]:
        """The addresses of some rows, where they are needed, and their values."""
        addressed = self.spec.update or self.spec.filter is not None
        try:
            for batch in self._scan(addressed=addressed):
                addresses = np.asarray(batch.column("_rowaddr")) if addressed else None
                self.rows += batch.num_rows
                yield addresses, self._values_of(batch)
        except Exception as error:  # kept for compute(), which raises it again with its own type
            self.error = error
            raise

    def tables(self) -> Iterator[pa.RecordBatch]:
        """The values alone."""
        for _, table in self:
            yield from table.to_batches()

    def _values_of(self, batch: pa.RecordBatch) -> pa.Table:
        if self.spec.transform.sql:
            return aligned(pa.Table.from_batches([batch]), self.output)
        if "_rowaddr" in batch.schema.names and "_rowaddr" not in (self.spec.columns or ()):
            batch = batch.select([name for name in batch.schema.names if name != "_rowaddr"])
        found = self._transform(batch)
        if self.spec.transform.keeps_input or self.spec.update:
            return aligned(found, self.output)
        return align(found, self.output)

    def _scan(self, *, addressed: bool) -> Iterator[pa.RecordBatch]:
        fragment: Any = self.dataset.get_fragment(self._task.fragment)
        kwargs = _projection(self.spec)
        kwargs["with_row_address"] = addressed or kwargs.get("with_row_address", False)
        with _translated(self._task.table):
            scanner = self.dataset.scanner(
                fragments=[fragment], filter=self.spec.filter, batch_size=self.batch_rows(), **kwargs
            )
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield batch

    def batch_rows(self) -> int:
        """Rows of a batch: as asked, or some 4 MiB of the wider of what is read and what is written."""
        if self.spec.batch_size is not None:
            return self.spec.batch_size
        names = self.spec.columns
        read = self.dataset.schema if names is None else [self.dataset.schema.field(name) for name in _plain(names)]
        widths = [row_width(pa.schema(fields)) for fields in (list(read), list(self.output))]
        return batch_rows(max(fixed + _VARYING_BYTES * varying for fixed, varying in widths))


_VARYING_BYTES = 64


def _plain(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in _SYSTEM]


def _add(values: _Values, writing: Any, planned: dict[str, Any]) -> ColumnResult:
    version = values.dataset.version
    if values.spec.filter is None:
        batches = values.tables()
    else:
        held = [(addresses, table) for addresses, table in values if addresses is not None]
        if not held:
            return ColumnResult(planned["id"], version, planned, planned)
        batches = iter(_spread(values, planned["id"], held).to_batches())
    reader = pa.RecordBatchReader.from_batches(values.output, batches)
    # The engine cuts what it reads to its own batches: small ones cost three times as much as those of the reader.
    metadata, schema = writing.merge_columns(reader, batch_size=values.batch_rows())
    return _record(values, planned, metadata, schema=schema_text(schema))


def _spread(values: _Values, fragment: int, held: Sequence[tuple[np.ndarray, pa.Table]]) -> pa.Table:
    """Values for all rows of the fragment: those computed, and null for the others."""
    live: Any = values.dataset.get_fragment(fragment)
    scanned = values.dataset.scanner(columns=[], with_row_address=True, fragments=[live]).to_table()
    computed = np.concatenate([addresses for addresses, _ in held])
    return spread(pa.concat_tables([table for _, table in held]), computed, np.asarray(scanned.column("_rowaddr")))


def spread(table: pa.Table, addresses: np.ndarray, live: np.ndarray) -> pa.Table:
    """The rows of a table, which are for ``addresses``, in the order of ``live``; null where there is none."""
    order = np.argsort(addresses, kind="stable")
    places = np.searchsorted(addresses[order], live)
    places[places == len(order)] = 0
    found = addresses[order][places] == live
    indices = pa.array(order[places], mask=~found)
    return engine_safe(table.take(indices))


def _update(values: _Values, writing: Any, planned: dict[str, Any]) -> ColumnResult:
    held = [_with_addresses(table, addresses) for addresses, table in values if addresses is not None]
    if not held:
        return ColumnResult(planned["id"], values.dataset.version, planned, planned)
    table = pa.concat_tables(held)
    metadata, fields, offsets = writing.update_columns(table.to_reader(), "_rowaddr", "_rowaddr", with_offsets=True)
    return _record(values, planned, metadata, fields=tuple(fields), offsets=bytes(offsets).hex())


def _with_addresses(table: pa.Table, addresses: np.ndarray) -> pa.Table:
    return table.append_column(pa.field("_rowaddr", pa.uint64()), pa.array(addresses, pa.uint64()))


def _record(values: _Values, planned: dict[str, Any], metadata: Any, **engine: Any) -> ColumnResult:
    updated = json.loads(json.dumps(metadata.to_json()))
    result = ColumnResult(planned["id"], values.dataset.version, planned, updated, rows=values.rows, **engine)
    return record_result(values.spec.job, values.dataset, result)


def record_result(job: JobRef, dataset: lance.LanceDataset, result: ColumnResult) -> ColumnResult:
    """Note a result in the ledger; returned with the size of its file."""
    files = result.new_files
    result = dataclasses.replace(result, bytes=sum(file["file_size_bytes"] or 0 for file in files))
    bases = dataset.base_paths()
    paths = [
        WrittenPath(file["path"], None if file["base_id"] is None else str(bases[file["base_id"]].path))
        for file in files
    ]
    job.record(paths, as_dict(result))
    return result
