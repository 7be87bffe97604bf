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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from lance_ray import commit
from lance_ray.arrow import engine_safe, row_width
from lance_ray.catalog import LanceRestConfig
from lance_ray.column_commits import (
    AddColumns,
    ColumnsOperation,
    UpdateColumns,
    added_fields,
    as_dict,
    live_rows,
    schema_digest,
)
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    SnapshotChangedError,
    translate_errors,
)
from lance_ray.executors import ActorExecutor, Executor, RayExecutor, check_ray_options, checked_ray_args, connect_ray
from lance_ray.ledger import JobRef, WrittenPath
from lance_ray.options import (
    CommitOptions,
    ScanOptions,
    check_flag,
    check_positive,
    check_schema,
    check_text,
    check_version,
    pairs,
    strings,
)
from lance_ray.planning.columns import ColumnResult
from lance_ray.planning.reads import batch_rows
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter, check_progress
from lance_ray.read import table_schema
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, TableRef, address_of, newest
from lance_ray.transforms import (
    Appending,
    BatchFormat,
    Transform,
    aligned,
    fold_transform,
    output_of,
    require_names,
)

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 16
MAX_REPLANS = 5
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

    @property
    def rows_updated(self) -> int:
        """The same as ``rows``, by the name that other connectors have."""
        return self.rows

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
    table: PinnedTable
    """At the version to compute on."""
    spec: ColumnSpec
    workers: ColumnWorkers
    commit: CommitOptions
    progress: bool | Reporter | None = None
    max_replans: int = MAX_REPLANS

    @property
    def asked(self) -> int | str | None:
        """The version that the caller asked for; an opened dataset only says where to start."""
        return None if self.table.ref.opened else self.table.ref.version


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
        for name, value in given.items():
            check_ray_options({name: value}, name)
        return cls(concurrency, {**checked_ray_args(ray_remote_args), **given})

    @property
    def tasks(self) -> TaskPoolStrategy:
        """The same for a step of Ray Data."""
        return TaskPoolStrategy(self.concurrency)

    def executor(self, operation: str, *, stateful: bool) -> Executor:
        """Ray tasks; actors for a transform with state."""
        if not stateful:
            return RayExecutor(self.ray_remote_args, name=operation)
        return ActorExecutor(self.slots(), load, self.ray_remote_args)

    def slots(self) -> int:
        """How many workers with state: as asked, or what the cluster runs at once."""
        if self.concurrency is not None:
            return self.concurrency
        connect_ray()
        have, args = ray.cluster_resources(), self.ray_remote_args
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
    transform_version: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    max_replans: int = MAX_REPLANS,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
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
            rest. A run with another transform or other columns is refused: transforms are compared by their code and
            by all values that it uses (arguments, closures, globals, attributes of classes and objects).
        transform_version: compared in place of those, for a transform that uses what changes without a meaning, or
            what cannot be looked into, such as a service or a file of weights.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        max_replans: how often fragments that others added or changed meanwhile are computed, and the commit repeated.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        ray_remote_args: options of ``ray.remote`` for the workers.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
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

    Concurrent appends, deletes, updates and compactions do not stop it: fragments that they bring or change are
    computed on the newest version and the commit is repeated, ``max_replans`` times. Others who add one of these
    columns win.
    """
    check_schema("reader_schema", reader_schema)
    folded = fold_transform(
        transform,
        batch_format=batch_format,
        output_schema=reader_schema if output_schema is None else output_schema,
        setup=(fn_constructor_args, fn_constructor_kwargs),
        version=transform_version,
    )
    address = address_of(locals())
    table = at_version(uri, address, read_version)
    options = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id)
    if isinstance(folded, pa.Schema):
        _refuse(
            "columns of nulls are not computed",
            filter=filter,
            read_columns=read_columns,
            output_schema=reader_schema if output_schema is None else output_schema,
            batch_size=batch_size,
            read_version=read_version,
            fn_constructor_args=fn_constructor_args,
            fn_constructor_kwargs=fn_constructor_kwargs,
            transform_version=transform_version,
        )
        return add_nulls(table, folded, options)
    return run_job(
        fold_job(
            "add_columns",
            table,
            folded,
            Reading(read_columns, filter, batch_size),
            ColumnWorkers.fold(concurrency, ray_remote_args, num_cpus=num_cpus, num_gpus=num_gpus),
            options,
            Running(progress, max_replans),
        )
    )


def merge_columns(uri: Any = None, *, transform: Any, **keywords: Any) -> ColumnsReport:
    """:func:`add_columns` for a function that returns its batch with the new columns appended.

    Columns that the table has already are left as they are. Keywords are those of :func:`add_columns`, and what is said
    there of failures and of concurrent changes holds here, too.
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
    transform_version: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    max_replans: int = MAX_REPLANS,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
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
        transform_version: the same.
        commit_message: the same.
        transaction_properties: the same.
        max_replans: the same.
        progress: the same.
        ray_remote_args: the same.
        storage_options: the same.
        base_store_params: the same.
        namespace_impl: the same.
        namespace_properties: the same.
        rest_config: the same.
        io_config: the same.
        table_id: the same.

    Returns:
        What was done.

    Raises:
        RowCoverageError: ``ds`` names a row twice, or rows that the table does not have; nothing is changed.
        LanceRayError: as for :func:`add_columns`.

    What is said of failures and of concurrent changes at :func:`add_columns` holds here, too; with ``ds``, what is said
    at :func:`lance_ray.update_columns_from`.
    """
    from lance_ray.column_merge import MergeOptions, update_from

    if (ds is None) == (transform is None):
        raise InvalidArgumentError("transform", transform, "give either a transform or ds")
    check_flag("where_null", where_null)
    check_text("filter", filter)
    if ds is None and not (isinstance(on, str) and on == "_rowaddr"):
        raise InvalidArgumentError("on", on, "says how ds names rows, and goes with it")
    address = address_of(locals())
    table = at_version(uri, address, read_version)
    options = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id)
    workers = ColumnWorkers.fold(concurrency, ray_remote_args, num_cpus=num_cpus, num_gpus=num_gpus)
    if ds is not None:
        _refuse(
            "ds itself says which rows have which values, and is not computed again",
            filter=filter,
            where_null=where_null or None,
            changed_since=changed_since,
            read_columns=read_columns,
            batch_format=None if batch_format == "pyarrow" else batch_format,
            batch_size=batch_size,
            fn_constructor_args=fn_constructor_args,
            fn_constructor_kwargs=fn_constructor_kwargs,
            transform_version=transform_version,
            max_replans=None if max_replans == MAX_REPLANS else max_replans,
        )
        return update_from(table, ds, columns, MergeOptions.fold(on, workers, options, progress))
    folded = fold_transform(
        transform,
        batch_format=batch_format,
        setup=(fn_constructor_args, fn_constructor_kwargs),
        version=transform_version,
    )
    if isinstance(folded, pa.Schema):
        raise InvalidArgumentError("transform", folded.names, "must be SQL expressions, a function or a class")
    output = columns_of(table.open().schema, columns)
    chosen = _Chosen(tuple(output.names), filter, where_null, changed_since)
    job = fold_job(
        "update_columns",
        table,
        folded,
        Reading(read_columns, chosen.predicate(table), batch_size),
        workers,
        options,
        Running(progress, max_replans),
    )
    return run_job(dataclasses.replace(job, spec=dataclasses.replace(job.spec, output=output, update=True)))


def at_version(uri: Any, address: dict[str, Any], read_version: Any) -> PinnedTable:
    """The table to compute on."""
    check_version("read_version", read_version)
    return TableRef.fold(uri, address, version=read_version).pin()


def _refuse(why: str, **arguments: Any) -> None:
    """Raise InvalidArgumentError for the first of these arguments that was given: it would have no effect."""
    for name, value in arguments.items():
        if value is not None:
            raise InvalidArgumentError(name, value, why)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which values of a table an update computes."""

    columns: tuple[str, ...]
    filter: str | None
    where_null: bool
    changed_since: int | None

    def predicate(self, table: PinnedTable) -> str | None:
        """The rows, as SQL."""
        kinds = [f"`{name}` IS NULL" for name in self.columns] if self.where_null else []
        if self.changed_since is not None:
            check_positive("changed_since", self.changed_since, zero=True)
            if not table.open().has_stable_row_ids:
                raise InvalidArgumentError(
                    "changed_since", self.changed_since, "the table has no stable row ids, and so no versions of rows"
                )
            kinds.append(f"_row_last_updated_at_version > {self.changed_since}")
        parts = ([f"({' OR '.join(kinds)})"] if kinds else []) + ([f"({self.filter}\n)"] if self.filter else [])
        return " AND ".join(parts) or None


def columns_of(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """These columns of a table.

    Raises:
        InvalidArgumentError: it does not have one, or none is named.
    """
    unknown = [name for name in strings("columns", names) if name not in schema.names]
    if unknown or not names:
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
    max_replans: int = MAX_REPLANS


def fold_job(
    operation: str,
    table: PinnedTable,
    transform: Transform,
    reading: Reading,
    workers: ColumnWorkers,
    options: CommitOptions,
    running: Running,
) -> ColumnJob:
    """The job, checked as far as nothing has to be computed."""
    check_positive("batch_size", reading.batch_size)
    check_positive("max_replans", running.max_replans, optional=False, zero=True)
    check_progress(running.progress)
    check_text("filter", reading.filter)
    columns = None if reading.columns is None else strings("read_columns", reading.columns)
    if transform.sql and columns is not None:
        raise InvalidArgumentError("read_columns", columns, "SQL expressions name what they read")
    if not transform.sql:
        check_scan(table, "read_columns", columns=columns)
    if reading.filter is not None:
        check_scan(table, "filter", filter=reading.filter, columns=[], with_row_id=True)
    job = JobRef(table, options.operation_id, table.version)
    spec = ColumnSpec(transform, job, columns, reading.filter, reading.batch_size)
    return ColumnJob(operation, table, spec, workers, options, running.progress, running.max_replans)


def check_scan(table: PinnedTable, parameter: str, **asked: Any) -> None:
    """Refuse columns, expressions or a filter that the table cannot be read by, by the name of the argument."""
    try:
        table_schema(table, ScanOptions.fold(None, **asked))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(parameter, next(iter(asked.values())), str(error)) from error


def add_nulls(table: PinnedTable, schema: pa.Schema, options: CommitOptions) -> ColumnsReport:
    """Columns of nulls, by metadata alone."""
    started, target = time.monotonic(), table.ref.target
    if (landed := landed_in(table, options)) is not None:
        return ColumnsReport(target, landed, job_id=options.operation_id, skipped=True)
    table, job_id = newest(table), options.operation_id
    refuse_existing(schema.names, table.open().schema)
    required = [item.name for item in schema if not item.nullable]
    if required:
        raise InvalidArgumentError("transform", required, "a column of nulls must be nullable")
    operation = AddColumns(table, schema, {}, complete=False)
    version = commit.apply(table, operation, options, commit.Landing(job_id, table.version)).version
    fragments, seconds = len(table.open_at(version).fragment_ids()), time.monotonic() - started
    return ColumnsReport(target, version, tuple(schema.names), fragments=fragments, seconds=seconds, job_id=job_id)


def refuse_existing(names: Sequence[str], schema: pa.Schema) -> None:
    """Raise InvalidArgumentError if the table has such columns already."""
    if existing := sorted(set(names) & set(schema.names)):
        raise InvalidArgumentError("transform", existing, "the table has columns of these names; see update_columns()")


FirstRound = Callable[[ColumnJob, ColumnSpec, Sequence[int]], Sequence[ColumnResult]]
"""What computes the fragments of a job's first plan, where that is not one task for each."""


def run_job(job: ColumnJob, first_round: FirstRound | None = None) -> ColumnsReport:
    """Plan, run, commit, and end the ledger."""
    started = time.monotonic()
    table, ref = job.table, job.spec.job
    if (landed := landed_in(table, job.commit)) is not None:
        return ColumnsReport(table.ref.target, landed, job_id=ref.job_id, skipped=True)
    plan = None if job.commit.job_id is None else _plan_of(job)
    earlier = [] if plan is None else _earlier_plans(job, plan)
    since = min([table.version, *(int(item["read_version"]) for item in earlier)])
    ref = dataclasses.replace(ref, since=since)
    job = dataclasses.replace(job, spec=dataclasses.replace(job.spec, job=ref))
    check_cluster([table])
    with ref.running(job.operation, exclusive=plan is not None, plan=plan):
        run = _Run(job, started, first_round)
        try:
            if earlier:
                run.take_over()
            return run.through()
        finally:
            run.tidy()


def landed_in(table: PinnedTable, options: CommitOptions) -> int | None:
    """The version that a job which the caller gave an id committed before, or None."""
    if options.job_id is None:
        return None
    latest = table.open_latest()
    since = max(0, latest.version - commit.HISTORY)
    return commit.find_operation(latest, options.job_id, since, table.secrets)


def _earlier_plans(job: ColumnJob, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of earlier runs of the same job, which must have had the same arguments.

    The version that they read may differ: a result goes with its own, and counts while its fragment is the same.
    """
    earlier = job.spec.job.earlier_plans()
    for other in earlier:
        differing = sorted(key for key in plan if key != "read_version" and other.get(key) != plan[key])
        if differing:
            raise InvalidArgumentError(
                "job_id",
                job.commit.job_id,
                f"an unfinished run of this job differs in {differing}; use its arguments, another id, or remove it"
                " with cleanup_orphans(). A transform that uses what changes by itself needs a transform_version",
            )
    return earlier


def _plan_of(job: ColumnJob) -> dict[str, Any]:
    spec = job.spec
    return {
        "operation": job.operation,
        "version": job.asked,
        "read_version": job.table.version,
        "columns": None if spec.columns is None else list(spec.columns),
        "filter": spec.filter,
        "output": None if spec.output is None else str(spec.output),
        "transform": spec.transform.fingerprint(),
    }


@dataclass(frozen=True, slots=True)
class ColumnTask:
    """One fragment of one version."""

    table: PinnedTable
    fragment: int
    output: pa.Schema | None = None
    """The columns to write. Here, so that what all tasks share stays one object, and a model is loaded once."""


class _Run:
    """One job on its way: rounds of tasks, each for the fragments that have no values which fit."""

    def __init__(self, job: ColumnJob, started: float, first_round: FirstRound | None) -> None:
        self._job = job
        self._spec = job.spec
        """With all columns of the output, once they are found out. What tasks share stays the job's own, one object."""
        self._table = job.table
        self._started = started
        self._first_round = first_round
        self._results: dict[int, ColumnResult] = {}
        self._report = ColumnsReport(job.table.ref.target, job.table.version, job_id=job.spec.job.job_id)
        self._workers: Executor | None = None
        self._committed: int | None = None
        self._unsettled = False

    def take_over(self) -> None:
        """What an earlier run of the job has finished."""
        found = map(ColumnResult.read, self._job.spec.job.take_over())
        self._results = {result.fragment: result for result in sorted(found, key=lambda result: result.version)}

    def through(self) -> ColumnsReport:
        """Compute and commit, again for what others changed meanwhile.

        Raises:
            SnapshotChangedError: they did not stop changing it.
        """
        try:
            self._spec = dataclasses.replace(self._spec, output=self._output())
            self._round(first=True)
            for _ in range(self._job.max_replans):
                if (report := self._try_commit()) is not None:
                    return report
                self._follow()
                self._round(first=False)
            return self._commit()
        finally:
            self._release()

    def _try_commit(self) -> ColumnsReport | None:
        try:
            return self._commit()
        except SnapshotChangedError as changed:
            logger.info("%s: %s; computing these", self._job.table.ref.target, changed)
            return None

    def _executor(self) -> Executor:
        if self._workers is None:
            stateful = self._spec.transform.is_stateful
            self._workers = self._job.workers.executor(self._job.operation, stateful=stateful)
        return self._workers

    def _release(self) -> None:
        if isinstance(self._workers, ActorExecutor):
            self._workers.close()
        self._workers = None

    def _output(self) -> pa.Schema:
        spec, dataset = self._job.spec, self._table.open()
        schema = spec.transform.schema
        if spec.update:
            schema = spec.output
        elif schema is None and spec.transform.sql:
            with _translated(self._table):
                found = dataset.scanner(**_projection(spec)).projected_schema
                schema = pa.schema([item for item in found if item.name not in _SYSTEM])
        elif schema is None:
            task = ColumnTask(self._table, -1)
            with run_tasks(sample, [task], shared=spec, options=self._options(), executor=self._executor()) as run:
                schema = pa.ipc.read_schema(pa.py_buffer(next(run).unwrap()))
        assert schema is not None  # noqa: S101 - each branch gave one
        if spec.transform.sql:
            require_names([name for name, _ in spec.transform.sql], schema.names)
        if not spec.update:
            refuse_existing(schema.names, dataset.schema)
        nullable = spec.filter is not None
        return pa.schema([item.with_nullable(True) if nullable else item for item in schema])

    def _options(self) -> RunOptions:
        return RunOptions(max_in_flight=self._job.workers.concurrency, progress=self._job.progress)

    def _round(self, *, first: bool) -> None:
        todo = self._operation().stale(self._table.open())
        if first:
            self._report = dataclasses.replace(self._report, resumed=len(set(self._results) - set(todo)))
        if not todo:
            return
        if first and self._first_round is not None:
            self._release()  # or the workers that tried some rows would hold what the first round needs
            for result in self._first_round(self._job, self._spec, todo):
                self._keep(result)
            return
        if not first:
            self._report = dataclasses.replace(self._report, recomputed=self._report.recomputed + len(todo))
        tasks = [ColumnTask(self._table, item, self._spec.output) for item in todo]
        options = dataclasses.replace(self._options(), on_failure="report")
        run = run_tasks(
            compute,
            tasks,
            shared=self._job.spec,
            options=options,
            executor=self._executor(),
            operation=self._job.operation,
        )
        failed = None
        with run:
            for outcome in run:
                if outcome.error is None:
                    self._keep(outcome.unwrap())
                failed = failed or outcome.error
        self._report = dataclasses.replace(self._report, retried=self._report.retried + run.report.retried)
        if failed is not None:
            raise failed

    def _keep(self, result: ColumnResult) -> None:
        self._results[result.fragment] = result
        self._report = dataclasses.replace(
            self._report,
            rows=self._report.rows + result.rows,
            bytes=self._report.bytes + result.bytes,
            files=self._report.files + result.has_file,
        )

    def _operation(self) -> ColumnsOperation:
        assert self._spec.output is not None  # noqa: S101 - through() has found it out
        kind = UpdateColumns if self._spec.update else AddColumns
        return kind(self._table, self._spec.output, self._results)

    def _commit(self) -> ColumnsReport:
        job, operation = self._spec.job, self._operation()
        if self._spec.update and not any(result.has_file for result in self._results.values()):
            latest = self._table.open_latest()
            operation.fitting(latest)
            return dataclasses.replace(self._done(latest.version), skipped=True)
        if not job.is_open():
            raise LanceRayError(f"job {job.job_id} was ended by a clean-up before it could commit")
        self._unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.apply(self._table, operation, self._job.commit, commit.Landing(job.job_id, job.since))
        except LanceRayError as error:
            self._unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self._unsettled = False
        return self._done(receipt.version)

    def _done(self, version: int) -> ColumnsReport:
        ids = set(self._table.open_at(version).fragment_ids())
        self._committed = sum(result.has_file for item, result in self._results.items() if item in ids)
        return dataclasses.replace(
            self._report,
            version=version,
            columns=tuple(self._operation().output.names),
            fragments=len(ids),
            seconds=time.monotonic() - self._started,
        )

    def _follow(self) -> None:
        """Go on from the newest version, if its columns let that be."""
        self._table = newest(self._table)
        self._operation().refuse(self._table.open())

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
        self._loaded = loaded
        self._task = task

    def __iter__(self) -> Iterator[tuple[np.ndarray | None, pa.Table]]:
        """The addresses of some rows, where they are needed, and their values."""
        addressed = self.spec.update or self.spec.filter is not None
        try:
            for batch in self._scan(addressed=addressed):
                addresses = np.asarray(batch.column("_rowaddr")) if addressed else None
                self.rows += batch.num_rows
                yield addresses, values_of(self._loaded, batch, self.output)
        except Exception as error:  # kept for compute(), which raises it again with its own type
            self.error = error
            raise

    def tables(self) -> Iterator[pa.RecordBatch]:
        """The values alone."""
        for _, table in self:
            yield from table.to_batches()

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
        """Rows of a batch."""
        return rows_of_batch(self.spec, self.dataset, self.output)


def values_of(loaded: Loaded, batch: pa.RecordBatch, output: pa.Schema) -> pa.Table:
    """The new values of a batch that was read for them.

    Raises:
        SchemaMismatchError: they are not the columns of the output.
    """
    spec = loaded.spec
    if spec.transform.sql:
        return aligned(pa.Table.from_batches([batch]), output, _SYSTEM)
    hidden = [name for name in _SYSTEM if name not in (spec.columns or ())]
    batch = batch.select([name for name in batch.schema.names if name not in hidden])
    if spec.update:
        return aligned(loaded.transform(batch), output, None)
    return aligned(loaded.transform(batch), output, batch.schema.names if spec.transform.keeps_input else ())


def rows_of_batch(spec: ColumnSpec, dataset: lance.LanceDataset, output: pa.Schema) -> int:
    """Rows of a batch: as asked, or some 4 MiB of the wider of what is read and what is written."""
    if spec.batch_size is not None:
        return spec.batch_size
    widths = map(row_width, (dataset.scanner(**_projection(spec)).projected_schema, output))
    return batch_rows(max(fixed + _VARYING_BYTES * varying for fixed, varying in widths))


_VARYING_BYTES = 64


def _add(values: _Values, writing: Any, planned: dict[str, Any]) -> ColumnResult:
    if values.spec.filter is None:
        batches = values.tables()
    else:
        held = [(addresses, table) for addresses, table in values if addresses is not None]
        if not held:
            return unchanged(values.dataset, planned)
        batches = iter(_spread(values, planned["id"], held).to_batches())
    reader = pa.RecordBatchReader.from_batches(values.output, batches)
    # The engine cuts what it reads to its own batches: small ones cost three times as much as those of the reader.
    metadata, schema = writing.merge_columns(reader, batch_size=values.batch_rows())
    return _record(values, planned, metadata, added=added_fields(schema, values.dataset.lance_schema))


def _spread(values: _Values, fragment: int, held: Sequence[tuple[np.ndarray, pa.Table]]) -> pa.Table:
    """Values for all rows of the fragment: those computed, and null for the others."""
    computed = np.concatenate([addresses for addresses, _ in held])
    return spread(pa.concat_tables([table for _, table in held]), computed, live_rows(values.dataset, fragment))


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
        return unchanged(values.dataset, planned)
    table = pa.concat_tables(held)
    metadata, fields, offsets = writing.update_columns(table.to_reader(), "_rowaddr", "_rowaddr", with_offsets=True)
    return _record(values, planned, metadata, fields=tuple(fields), offsets=bytes(offsets).hex())


def _with_addresses(table: pa.Table, addresses: np.ndarray) -> pa.Table:
    return table.append_column(pa.field("_rowaddr", pa.uint64()), pa.array(addresses, pa.uint64()))


def _record(values: _Values, planned: dict[str, Any], metadata: Any, **engine: Any) -> ColumnResult:
    return record_result(values.spec.job, values.dataset, planned, metadata, rows=values.rows, **engine)


def unchanged(dataset: lance.LanceDataset, planned: dict[str, Any]) -> ColumnResult:
    """The result for a fragment of which no row is concerned."""
    return ColumnResult(planned["id"], dataset.version, planned, planned, digest=schema_digest(dataset))


def record_result(
    job: JobRef, dataset: lance.LanceDataset, planned: dict[str, Any], metadata: Any, **engine: Any
) -> ColumnResult:
    """The result for a fragment with a new file, which the ledger knows from now on.

    Args:
        job: whose ledger.
        dataset: the version that was read.
        planned: the fragment there.
        metadata: the fragment with the file, as the engine returned it.
        engine: what else belongs to the result.
    """
    result = unchanged(dataset, planned)
    result = dataclasses.replace(result, updated=json.loads(json.dumps(metadata.to_json())), **engine)
    files = result.new_files
    result = dataclasses.replace(result, bytes=sum(file["file_size_bytes"] or 0 for file in files))
    bases = dataset.base_paths()
    paths = [
        WrittenPath(file["path"], None if file["base_id"] is None else str(bases[file["base_id"]].path))
        for file in files
    ]
    job.record(paths, as_dict(result))
    return result
