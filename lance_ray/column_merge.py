"""Columns whose values come from a Ray Dataset: brought to the fragments of their rows, checked row by row, committed.

Ray Data sorts the rows by fragment. Each group is checked against the rows that the fragment has, and written as one
file; nothing is ever assigned by position. What a worker holds at a time is a range of that order: about as many values
as a block of the dataset has, or those of one fragment.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import and_
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from lance.dataset import serialize_row_addrs
from ray.data import ActorPoolStrategy
from ray.data.context import ShuffleStrategy

from lance_ray import commit
from lance_ray.arrow import align, to_arrow, unify
from lance_ray.catalog import LanceRestConfig
from lance_ray.column_commits import AddColumns, UpdateColumns, added_fields, live_rows
from lance_ray.column_jobs import (
    MAX_REPLANS,
    ColumnJob,
    ColumnsReport,
    ColumnWorkers,
    landed_in,
    refuse_existing,
    run_job,
)
from lance_ray.column_values import (
    ColumnSpec,
    Loaded,
    fragments_of_one,
    load,
    record_result,
    rows_of_batch,
    spread,
    unchanged,
    values_of,
)
from lance_ray.columns import Reading, Running, at_version, columns_of, fold_job
from lance_ray.datasource import make_datasource, versions_read
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    RowCoverageError,
    SchemaMismatchError,
    TaskFailedError,
    translate_errors,
    unwrap,
)
from lance_ray.executors import check_dataset, unnamed_options
from lance_ray.full_start import start_in_full
from lance_ray.ledger import JobRef
from lance_ray.options import (
    CommitOptions,
    PlanOptions,
    ScanOptions,
    check_flag,
    check_positive,
    check_schema,
    pairs,
    strings,
)
from lance_ray.planning.columns import ColumnResult
from lance_ray.planning.reads import batch_rows
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter, check_progress
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import PinnedTable, address_of
from lance_ray.transforms import BatchFormat, fold_transform, lists_unless_told

_FRAGMENT, _ADDRESS, _KEY = "__lance_ray_fragment", "__lance_ray_address", "__lance_ray_key"
_SYSTEM = ("_rowaddr", "_rowid")
_NOWHERE = -1
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How rows are matched, where the work runs, and what the commit carries."""

    on: tuple[str, ...]
    workers: ColumnWorkers
    commit: CommitOptions
    progress: bool | Reporter | None = None
    full: bool = True
    """Whether each row of the table needs a value."""
    schema: pa.Schema | None = None

    @classmethod
    def fold(cls, on: Any, workers: ColumnWorkers, options: CommitOptions, progress: Any, **more: Any) -> MergeOptions:
        """The options, checked."""
        names = strings("on", (on,) if isinstance(on, str) else on)
        if not names or not all(names):
            raise InvalidArgumentError("on", on, "must be '_rowaddr', '_rowid' or names of key columns")
        check_progress(progress)
        check_flag("require_full_coverage", more.get("full", True))
        check_schema("output_schema", more.get("schema"))
        return cls(names, workers, options, progress, **more)


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """What the tasks share."""

    table: PinnedTable
    job: JobRef
    on: tuple[str, ...]
    output: pa.Schema
    full: bool
    update: bool
    retry: RetryPolicy = field(default_factory=RetryPolicy)


def merge_columns_from(
    uri: Any = None,
    ds: Any = None,
    *,
    on: str | Sequence[str] = "_rowaddr",
    require_full_coverage: bool = True,
    output_schema: pa.Schema | None = None,
    read_version: int | str | None = None,
    batch_size: int | None = None,
    concurrency: int | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
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
    """Add the columns of a Ray Dataset to a table, each value to the row that it names.

    Args:
        uri: path or URI of the table, or an opened dataset.
        ds: the new columns beside those of ``on``, in any order of rows.
        on: how ``ds`` names rows: ``_rowaddr`` or ``_rowid`` of ``read_version``, or key columns. A key that the table
            has several times gives its value to each of these rows; null keys match nothing.
        require_full_coverage: whether a row of the table without a value is an error, or gets null. So for rows that
            others append meanwhile.
        output_schema: the new columns; by default as ``ds`` has them.
        read_version: the version that the addresses are of; by default the one that ``ds`` was read at where it comes
            from ``read_lance`` of this table and was not materialized since, else the newest.
        batch_size: rows that are matched at a time; whole blocks by default.
        concurrency: workers at once at most.
        job_id: a job of this id that committed before is not repeated.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        progress: False hides Ray Data's progress bars.
        ray_remote_args: options of ``ray.remote`` for the workers.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.

    Returns:
        A :class:`ColumnsReport`: the version, and how many rows got values.

    Raises:
        RowCoverageError: rows of ``ds`` occur twice or are unknown to the table, or rows of the table are missing.
        SnapshotChangedError: others appended rows (with full coverage), or changed fragments that have new values.
        LanceRayError: as for :func:`lance_ray.add_columns`.

    After an error the table is as it was. Concurrent deletes land beside it, and so do appends where their rows may get
    null; other changes of the same fragments are conflicts: run it again on the newest version.
    """
    address = address_of(locals())
    options = MergeOptions.fold(
        on,
        ColumnWorkers.fold(concurrency, ray_remote_args),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        progress,
        full=require_full_coverage,
        schema=output_schema,
    )
    return _merge(at_version(uri, address, read_version), ds, options, batch_size)


def add_columns_from(
    uri: Any = None,
    *,
    transform: Any,
    filter: str | None = None,
    read_columns: Sequence[str] | None = None,
    output_schema: pa.Schema | None = None,
    batch_format: BatchFormat | None = None,
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
    """:func:`lance_ray.add_columns` through Ray Data: also large fragments are computed by all workers.

    The table is read in row ranges, the transform runs in ``map_batches``, and the values go back to the fragments of
    their rows. For few large fragments and costly functions; otherwise ``add_columns`` moves less data. Fragments that
    others append or change meanwhile are computed as ``add_columns`` does it.

    Keywords, result, errors and what is said of concurrent changes are those of :func:`lance_ray.add_columns`, but for
    ``batch_format``: a plain function takes a dict of lists unless the caller says otherwise, as lance-ray's does;
    ``pyarrow`` is quicker. No fragment is finished before all values are computed, so that a run with a ``job_id``
    which failed earlier leaves nothing to go on from.
    """
    folded = fold_transform(
        transform,
        batch_format=lists_unless_told(transform, batch_format),
        output_schema=output_schema,
        setup=(fn_constructor_args, fn_constructor_kwargs),
        version=transform_version,
    )
    if isinstance(folded, pa.Schema):
        raise InvalidArgumentError("transform", folded.names, "columns of nulls are what add_columns() is for")
    address = address_of(locals())
    job = fold_job(
        "add_columns",
        at_version(uri, address, read_version),
        folded,
        Reading(read_columns, filter, batch_size),
        ColumnWorkers.fold(concurrency, ray_remote_args, num_cpus=num_cpus, num_gpus=num_gpus),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        Running(progress, max_replans),
    )
    return run_job(job, by_ray_data)


def by_ray_data(job: ColumnJob, spec: ColumnSpec, fragments: Sequence[int]) -> list[ColumnResult]:
    """The values of some fragments, each computed by many workers at once."""
    table, output = job.table, spec.output
    assert output is not None  # noqa: S101 - found out before the first round
    scan = ScanOptions.fold(
        None,
        columns=dict(spec.transform.sql) if spec.transform.sql else spec.columns,
        filter=spec.filter,
        fragment_ids=list(fragments),
        with_row_address=True,
    )
    # The plan decides how many blocks; Ray would split their output to reach any other number.
    source = ray.data.read_datasource(make_datasource([table], scan, PlanOptions()), override_num_blocks=1)
    apply: dict[str, Any] = {"fn": partial(_apply, Loaded(spec, spec.transform)), "compute": job.workers.tasks}
    if spec.transform.is_stateful:
        actors = ActorPoolStrategy(size=job.workers.slots())
        apply = {"fn": _Apply, "fn_constructor_args": (spec,), "compute": actors}
    with unnamed_options():
        computed = start_in_full(source).map_batches(
            **apply,
            batch_format="pyarrow",
            batch_size=rows_of_batch(spec, table.open(), output),
            **job.workers.ray_remote_args,
        )
    merging = MergeSpec(table, spec.job, ("_rowaddr",), output, full=spec.filter is None, update=False)
    plain = {key: value for key, value in job.workers.ray_remote_args.items() if key != "num_gpus"}
    merging_workers = dataclasses.replace(job.workers, ray_remote_args=plain)
    outcomes = grouped(computed, merging, merging_workers, progress=job.progress)
    results = results_of(outcomes, merging, fragments)
    dataset = table.open()
    rest = (item for item in fragments if item not in results)
    return [*results.values(), *(unchanged(dataset, fragments_of_one(dataset, item)) for item in rest)]


def _apply(loaded: Loaded, table: pa.Table) -> pa.Table:
    addresses = table.column("_rowaddr")
    values = values_of(loaded, table.combine_chunks().to_batches()[0], loaded.spec.output or pa.schema([]))
    return _routed(values, np.asarray(addresses).astype(np.int64))


class _Apply:
    """The same for a class, of which each worker makes one."""

    def __init__(self, spec: ColumnSpec) -> None:
        self._loaded = load(spec)

    def __call__(self, table: pa.Table) -> pa.Table:
        return _apply(self._loaded, table)


def update_columns_from(
    uri: Any = None,
    ds: Any = None,
    *,
    columns: Sequence[str],
    on: str | Sequence[str] = "_rowaddr",
    read_version: int | str | None = None,
    batch_size: int | None = None,
    concurrency: int | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
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
    """New values of columns that the table has, from a Ray Dataset, each to the row that it names; others keep theirs.

    The same as :func:`lance_ray.update_columns` with ``ds``, which also computes values over the table itself.

    Args:
        uri: path or URI of the table, or an opened dataset.
        ds: new values, in any order, for some rows; further columns are left out.
        columns: the columns to replace; types stay those of the table.
        on: as for :func:`merge_columns_from`.
        read_version: the same.
        batch_size: the same.
        concurrency: the same.
        job_id: the same.
        commit_message: the same.
        transaction_properties: the same.
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
        A :class:`ColumnsReport`: the version, and how many rows got values. Without rows in ``ds`` nothing is
        committed.

    Raises:
        RowCoverageError: ``ds`` names a row twice, or rows that the table does not have.
        SnapshotChangedError: others deleted, updated or compacted rows of fragments that have new values.
        LanceRayError: as for :func:`lance_ray.add_columns`.

    After an error the table is as it was. Appends by others meanwhile land beside it.
    """
    address = address_of(locals())
    options = MergeOptions.fold(
        on,
        ColumnWorkers.fold(concurrency, ray_remote_args),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        progress,
    )
    return update_from(at_version(uri, address, read_version), ds, columns, options, batch_size)


def update_from(
    table: PinnedTable, ds: Any, columns: Sequence[str], options: MergeOptions, batch_size: int | None = None
) -> ColumnsReport:
    """New values of columns for the rows that ``ds`` names; the others keep theirs."""
    schema = columns_of(table.open().schema, columns)
    return _merge(table, ds, dataclasses.replace(options, schema=schema, full=False), batch_size, update=True)


def _merge(
    table: PinnedTable, ds: Any, options: MergeOptions, batch_size: int | None, *, update: bool = False
) -> ColumnsReport:
    started = time.monotonic()
    check_positive("batch_size", batch_size)
    check_dataset(ds)
    if (landed := landed_in(table, options.commit)) is not None:
        return ColumnsReport(table.ref.target, landed, job_id=options.commit.operation_id, skipped=True)
    _check_keys(table.open(), options.on)
    if options.on[0] in _SYSTEM:
        table = _as_read(table, ds)
    output = _output(table.open(), ds, options, update=update)
    job = JobRef(table, options.commit.operation_id, table.version)
    spec = MergeSpec(table, job, options.on, output, options.full, update)
    check_cluster([table])
    with job.running("merge_columns", exclusive=options.commit.job_id is not None):
        merge = _Merge(spec, options)
        try:
            if options.commit.job_id is not None:
                job.end_earlier_runs()
            return merge.run(ds, batch_size, started)
        finally:
            merge.tidy()


def _as_read(table: PinnedTable, ds: Any) -> PinnedTable:
    """The version that the addresses in ``ds`` are of, where the caller has not said it and ``ds`` is a read of it."""
    if table.ref.version is not None:
        return table
    found = versions_read(ds, table)
    if len(found) > 1:
        raise InvalidArgumentError("read_version", found, "ds was read at several versions; say which one counts")
    if found in ([], [table.version]):
        return table
    return dataclasses.replace(table.ref, version=found[0]).pin()


def _check_keys(dataset: lance.LanceDataset, on: Sequence[str]) -> None:
    """Raise InvalidArgumentError if the table's rows cannot be found by these."""
    if len(on) == 1 and on[0] in _SYSTEM:
        return
    unknown = [name for name in on if name not in dataset.schema.names]
    if unknown:
        raise InvalidArgumentError(
            "on", unknown, f"must be '_rowaddr' or '_rowid' alone, or columns of the table: {dataset.schema.names}"
        )
    nested = [name for name in on if pa.types.is_nested(dataset.schema.field(name).type)]
    if nested:
        raise InvalidArgumentError("on", nested, "lists, structs and maps cannot be compared as keys")


def _output(dataset: lance.LanceDataset, ds: Any, options: MergeOptions, *, update: bool) -> pa.Schema:
    """The columns to be written, of the types that ``ds`` gives them; for an update of those in the table."""
    given = schema_of(ds)
    schema = options.schema
    if schema is None:
        schema = unify([pa.schema([item for item in given if item.name not in options.on])]).remove_metadata()
    if given.names:
        for parameter, wanted in (("on", options.on), ("columns", schema.names)):
            if missing := [name for name in wanted if name not in given.names]:
                raise InvalidArgumentError(parameter, missing, f"must be columns of ds: {given.names}")
        keys = _key_schema(dataset, options.on)
        align(
            to_arrow(given.empty_table()).select(keys.names), keys
        )  # types that never fit are told before anything runs
        align(to_arrow(given.empty_table()).select(schema.names), schema)
    if not schema.names:
        raise InvalidArgumentError("ds", given.names, f"must have columns beside {list(options.on)}, or output_schema")
    if update:
        return schema
    refuse_existing(schema.names, dataset.schema)
    unknown = [item.name for item in schema if pa.types.is_null(item.type)]
    if unknown:
        raise InvalidArgumentError("output_schema", unknown, "these columns of ds are of the null type; declare them")
    return schema if options.full else pa.schema([item.with_nullable(True) for item in schema])


def schema_of(ds: Any) -> pa.Schema:
    """The columns of a dataset as Arrow types; none where it is empty and does not know."""
    with _running(ds.context):
        found = ds.schema()
        base = getattr(found, "base_schema", found)
        if base is None or isinstance(base, pa.Schema):
            return base or pa.schema([])
        return to_arrow(ds.take_batch(16, batch_format="pandas")).schema if base.names else pa.schema([])


def _key_schema(dataset: lance.LanceDataset, on: Sequence[str]) -> pa.Schema:
    """The keys by which rows are found, as plain types that can be joined."""
    fields = []
    for name in on:
        kind = pa.int64() if name in _SYSTEM else dataset.schema.field(name).type
        fields.append(pa.field(name, kind.value_type if pa.types.is_dictionary(kind) else kind))
    return pa.schema(fields)


class _Merge:
    """One merge on its way."""

    def __init__(self, spec: MergeSpec, options: MergeOptions) -> None:
        self._spec = spec
        self._options = options
        self._committed = False
        self._unsettled = False
        self._results: dict[int, ColumnResult] = {}

    def run(self, ds: Any, batch_size: int | None, started: float) -> ColumnsReport:
        """Group, check, write, commit."""
        spec, workers = self._spec, self._options.workers
        with unnamed_options():
            routed = start_in_full(ds).map_batches(
                route,
                fn_kwargs={"spec": spec},
                batch_format="pyarrow",
                batch_size=batch_size,
                compute=workers.tasks,
                **workers.ray_remote_args,
            )
        outcomes = grouped(routed, spec, workers, progress=self._options.progress)
        self._results = results_of(outcomes, spec, list(spec.table.open().fragment_ids()))
        version = self._commit()
        results = self._results.values()
        return ColumnsReport(
            spec.table.ref.target,
            version,
            tuple(spec.output.names),
            rows=sum(result.rows for result in results),
            bytes=sum(result.bytes for result in results),
            files=len(results),
            fragments=len(spec.table.open_at(version).fragment_ids()),
            seconds=time.monotonic() - started,
            job_id=spec.job.job_id,
            skipped=spec.update and not results,
        )

    def _commit(self) -> int:
        spec, job = self._spec, self._spec.job
        if spec.update and not self._results:
            return spec.table.version
        job.check_open()
        kind = UpdateColumns if spec.update else AddColumns
        operation = kind(spec.table, spec.output, self._results, complete=spec.full)
        self._unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.apply(spec.table, operation, self._options.commit, commit.Landing(job.job_id, job.since))
        except LanceRayError as error:
            self._unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self._unsettled, self._committed = False, True
        return receipt.version

    def tidy(self) -> None:
        """End the ledger; what was certainly not committed goes."""
        if not self._unsettled:
            self._spec.job.end(len(self._results) if self._committed else None)


def grouped(
    routed: Any,
    spec: Any,
    workers: ColumnWorkers,
    *,
    progress: Any,
    by: str = _FRAGMENT,
    each: Callable[..., pa.Table] | None = None,
) -> list[dict[str, Any]]:
    """What a function says of each group of rows: by default :func:`merge_group`, of each fragment.

    Args:
        routed: the rows.
        spec: what the function is told besides a group; it returns one row with ``outcome``, in JSON.
        workers: where it runs.
        progress: False hides Ray Data's bars.
        by: the column that makes the groups.
        each: the function.

    Raises:
        LanceRayError: what a worker raised of this package.
        TaskFailedError: anything else, such as an error of the caller's own function; it is the cause.
    """
    # Sorting takes blocks without rows, which the hash shuffle fails on, and its ranges do not grow with the table.
    settings: dict[str, Any] = {"shuffle_strategy": ShuffleStrategy.SORT_SHUFFLE_PULL_BASED}
    if progress is False:
        settings["enable_progress_bars"] = False
    with _running(routed.context, **settings), unnamed_options():
        merged = routed.groupby(by).map_groups(
            each or merge_group,
            fn_kwargs={"spec": spec},
            batch_format="pyarrow",
            compute=workers.tasks,
            **workers.ray_remote_args,
        )
        return [json.loads(row["outcome"]) for row in merged.take_all()]


@contextmanager
def _running(context: Any, **settings: Any) -> Iterator[None]:
    """Run a dataset so that what its functions raise comes out as an error of this package.

    Args:
        context: of the dataset. It is the caller's own, so everything in it is as before afterwards.
        settings: for the time of the run.
    """
    settings["raise_original_map_exception"] = True  # what Ray wraps it in loses it on the way to the driver
    before = {name: getattr(context, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        yield
    except Exception as error:  # noqa: BLE001 - Ray wraps what a task raised: only what is inside says what it was
        raise _told(error) from (getattr(error, "cause", None) or error)
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _told(error: Exception) -> LanceRayError:
    found = unwrap(error)
    if isinstance(found, LanceRayError):
        found.args = (str(found).partition("\nFailed to apply UDF")[0],)  # Ray adds advice of its own to the text
        return found
    return TaskFailedError("Ray Data", 1, getattr(error, "cause", None) or error)


def results_of(
    outcomes: Sequence[dict[str, Any]], spec: MergeSpec, fragments: Sequence[int]
) -> dict[int, ColumnResult]:
    """The results by fragment.

    Raises:
        RowCoverageError: rows do not match, in these outcomes or because a fragment has none.
    """
    counts = {name: sum(outcome[name] for outcome in outcomes) for name in ("duplicate", "unknown", "missing")}
    examples: dict[str, list[Any]] = {}
    for outcome in outcomes:
        for name, values in outcome["examples"].items():
            examples[name] = (examples.get(name, []) + values)[:_EXAMPLES]
    seen = [outcome["fragment"] for outcome in outcomes]
    if len(seen) != len(set(seen)):
        raise LanceRayError(f"Ray Data gave the rows of a fragment in several groups: {sorted(seen)[:20]}")
    for item in fragments if spec.full else ():
        if item not in seen:
            found: Any = spec.table.open().get_fragment(item)
            counts["missing"] += found.count_rows()
            examples["missing"] = [*examples.get("missing", []), f"fragment {item}"][:_EXAMPLES]
    if any(counts.values()):
        raise RowCoverageError(**counts, examples=examples)
    results = [ColumnResult.read(outcome["result"]) for outcome in outcomes]
    return {result.fragment: result for result in results}


def route(table: pa.Table, spec: MergeSpec) -> pa.Table:
    """Runs on a worker: the new values of some rows, each with the address of its row and the fragment of that."""
    if missing := [name for name in (*spec.on, *spec.output.names) if name not in table.schema.names]:
        raise SchemaMismatchError(f"a block of ds has no columns {missing}: {table.schema.names}", columns=missing)
    keys = to_arrow(table.select(list(spec.on)))
    source, found = _addresses(keys, spec)
    values = align(to_arrow(table.select(spec.output.names)), spec.output).take(pa.array(source))
    told = np.full(len(found), None, dtype=object)
    for place in np.flatnonzero(found < 0)[:_EXAMPLES]:
        row = keys.slice(int(source[place]), 1).to_pylist()[0]
        told[place] = str(next(iter(row.values())) if len(row) == 1 else row)
    return _routed(values, found, told)


def _routed(values: pa.Table, addresses: np.ndarray, keys: np.ndarray | None = None) -> pa.Table:
    """Values with the addresses of their rows, negative where there is no such row; then perhaps its key as text."""
    told = pa.nulls(len(addresses), pa.string()) if keys is None else pa.array(list(keys), pa.string())
    fragments = np.where(addresses >= 0, addresses >> 32, _NOWHERE)
    return (
        values.append_column(_ADDRESS, pa.array(np.maximum(addresses, 0), pa.int64()))
        .append_column(_FRAGMENT, pa.array(fragments, pa.int64()))
        .append_column(_KEY, told)
    )


def _addresses(keys: pa.Table, spec: MergeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a row of ``keys`` and the address of a row that it is for; -1 where the table has none."""
    dataset = spec.table.open()
    name = spec.on[0]
    with translate_errors("look up rows of", spec.table.uri, secrets=spec.table.secrets):
        if name not in _SYSTEM:
            return _by_keys(dataset, align(keys, _key_schema(dataset, spec.on)))
        numbers = _numbers(keys, name)
        if name == "_rowaddr" or not dataset.has_stable_row_ids:
            return np.arange(len(numbers)), numbers
        return _by_row_id(dataset, numbers)


def _numbers(keys: pa.Table, name: str) -> np.ndarray:
    """Row ids or addresses; -1 for null and for what none can be."""
    column = keys.column(name)
    if pa.types.is_unsigned_integer(column.type):  # beyond int64 there are none
        column = pc.if_else(pc.less(column, pa.scalar(2**63, pa.uint64())), column.cast(pa.uint64()), None)
    numbers = align(keys.select([]).append_column(name, column), pa.schema([pa.field(name, pa.int64())])).column(name)
    found: np.ndarray = np.maximum(np.asarray(numbers.combine_chunks().fill_null(_NOWHERE)), _NOWHERE)
    return found


def _by_row_id(dataset: lance.LanceDataset, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mask = serialize_row_addrs(np.unique(numbers[numbers >= 0]).tolist())  # keyed by row id, whatever its name says
    scanner = dataset.scanner(columns=[], with_row_id=True, with_row_address=True, row_addr_allowlist=mask)
    wanted = pa.table({"_rowid": pa.array(numbers, mask=numbers < 0)})
    return _joined(wanted, scanner.to_table(), pa.schema([pa.field("_rowid", pa.int64())]))


def _by_keys(dataset: lance.LanceDataset, keys: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """By a scan of the key columns. What the engine can compare it filters itself, perhaps by an index."""
    wanted = {name: pc.unique(keys.column(name).combine_chunks().drop_null()) for name in keys.schema.names}
    pushed = {name for name in wanted if dataset.schema.field(name).type in _PUSHED}
    filters = [pc.field(name).isin(wanted[name]) for name in pushed]
    scanner = dataset.scanner(
        columns=list(wanted), filter=reduce(and_, filters) if filters else None, with_row_address=True
    )
    schema = pa.schema([*keys.schema, pa.field("_rowaddr", pa.uint64())])
    found = [schema.empty_table()]
    for batch in scanner.to_batches():
        rows = align(to_arrow(batch), schema)
        known = [pc.is_in(rows.column(name), values) for name, values in wanted.items() if name not in pushed]
        found.append(rows.filter(reduce(pc.and_, known)) if known else rows)
    return _joined(keys, pa.concat_tables(found), keys.schema)


_PUSHED = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.string())


def _joined(wanted: pa.Table, found: pa.Table, on: pa.Schema) -> tuple[np.ndarray, np.ndarray]:
    left = wanted.append_column(_FRAGMENT, pa.array(np.arange(wanted.num_rows)))
    right = found.select([*on.names, "_rowaddr"]).cast(pa.schema([*on, pa.field("_rowaddr", pa.uint64())]))
    joined = left.join(right, keys=on.names, join_type="left outer").sort_by(_FRAGMENT)
    addresses = joined.column("_rowaddr").cast(pa.int64()).combine_chunks().fill_null(_NOWHERE)
    return np.asarray(joined.column(_FRAGMENT)), np.asarray(addresses)


def merge_group(table: pa.Table, spec: MergeSpec) -> pa.Table:
    """Runs on a worker: the values of one fragment, checked against its rows and written, or what is wrong."""
    fragment = table.column(_FRAGMENT)[0].as_py()
    dataset = spec.table.open()
    outcome: dict[str, Any] = {"fragment": fragment, "duplicate": 0, "unknown": 0, "missing": 0, "examples": {}}
    outcome["result"] = None
    addresses = np.asarray(table.column(_ADDRESS)).astype(np.uint64)
    live = live_rows(dataset, fragment) if fragment in set(dataset.fragment_ids()) else np.empty(0, np.uint64)
    if fragment == _NOWHERE:
        outcome["unknown"] = table.num_rows
        outcome["examples"]["unknown"] = table.column(_KEY).drop_null().to_pylist()[:_EXAMPLES]
    else:
        _check(outcome, addresses, live, spec)
    if not (outcome["duplicate"] or outcome["unknown"] or outcome["missing"]):
        values = align(table.select(spec.output.names), spec.output)
        write: Callable[[], ColumnResult] = partial(_write, spec, fragment, values, addresses, live)
        outcome["result"] = dataclasses.asdict(spec.retry.call(write, retry_on=is_interruption, what="write columns"))
    return pa.table({"outcome": [json.dumps(outcome)]})


def _check(outcome: dict[str, Any], addresses: np.ndarray, live: np.ndarray, spec: MergeSpec) -> None:
    unique, counts = np.unique(addresses, return_counts=True)
    wrong = {
        "duplicate": unique[counts > 1],
        "unknown": np.setdiff1d(unique, live),
        "missing": np.setdiff1d(live, unique) if spec.full else np.empty(0, np.uint64),
    }
    for name, found in wrong.items():
        outcome[name] = len(found)
        if len(found):
            outcome["examples"][name] = [f"_rowaddr {int(item)}" for item in found[:_EXAMPLES]]


def _write(spec: MergeSpec, fragment: int, values: pa.Table, addresses: np.ndarray, live: np.ndarray) -> ColumnResult:
    dataset = spec.table.open()
    planned = fragments_of_one(dataset, fragment)
    writing: Any = dataset.get_fragment(fragment)
    rows = batch_rows(values.nbytes / max(1, values.num_rows))
    with translate_errors("write columns of", spec.table.uri, secrets=spec.table.secrets):
        if spec.update:
            given = values.append_column(pa.field("_rowaddr", pa.uint64()), pa.array(addresses, pa.uint64()))
            metadata, fields, offsets = writing.update_columns(
                given.to_reader(), "_rowaddr", "_rowaddr", with_offsets=True
            )
            engine: dict[str, Any] = {"fields": tuple(fields), "offsets": bytes(offsets).hex()}
        else:
            metadata, schema = writing.merge_columns(spread(values, addresses, live).to_reader(), batch_size=rows)
            engine = {"added": added_fields(schema, dataset.lance_schema)}
    return record_result(spec.job, dataset, planned, metadata, rows=values.num_rows, **engine)
