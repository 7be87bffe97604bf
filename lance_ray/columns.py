"""Columns added to a table, or computed anew: per fragment on workers, one commit on the driver, resumable.

Each worker scans one fragment of the pinned version, computes, and writes one new file beside the old ones
(:mod:`lance_ray.column_values`); the driver commits all at once (:mod:`lance_ray.column_jobs`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lance_ray import commit
from lance_ray.catalog import LanceRestConfig
from lance_ray.column_commits import AddColumns
from lance_ray.column_jobs import (
    MAX_REPLANS,
    ColumnJob,
    ColumnsReport,
    ColumnWorkers,
    landed_in,
    refuse_existing,
    run_job,
)
from lance_ray.column_values import ColumnSpec
from lance_ray.errors import InvalidArgumentError
from lance_ray.ledger import JobRef
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
from lance_ray.progress import Reporter, check_progress
from lance_ray.read import table_schema
from lance_ray.table import PinnedTable, TableRef, address_of, newest
from lance_ray.transforms import Appending, BatchFormat, Transform, fold_transform


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
