"""Columns whose values come from a Ray Dataset: brought to the fragments of their rows, checked row by row, committed.

Ray Data groups the rows by fragment. Each group is checked against the rows that the fragment has, and written as one
file; nothing is ever assigned by position. A worker holds the new columns of one fragment at a time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
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

from lance_ray import commit
from lance_ray.arrow import align, to_arrow, unify
from lance_ray.column_commits import AddColumns, UpdateColumns, fragments_of, schema_digest, schema_text
from lance_ray.columns import (
    ColumnsReport,
    ColumnWorkers,
    columns_of,
    fragments_of_one,
    record_result,
    refuse_existing,
    spread,
)
from lance_ray.datasource import read_lance
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    RowCoverageError,
    translate_errors,
    unwrap,
)
from lance_ray.ledger import JobRef
from lance_ray.options import CommitOptions, pairs
from lance_ray.planning.columns import ColumnResult
from lance_ray.planning.reads import batch_rows
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import PinnedTable, TableRef
from lance_ray.transforms import BatchFormat, Transform, fold_transform

_FRAGMENT, _ADDRESS = "__lance_ray_fragment", "__lance_ray_address"
_NOWHERE = -1
_EXAMPLES = 5
_MAX_PARTITIONS = 200


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
        names = (on,) if isinstance(on, str) else tuple(on)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise InvalidArgumentError("on", on, "must be '_rowaddr', '_rowid' or names of key columns")
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
    storage_options: dict[str, str] | None = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: str | None = None,
    namespace_properties: dict[str, str] | None = None,
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
        read_version: the version that the addresses are of; the newest by default.
        batch_size: rows that are matched at a time; whole blocks by default.
        concurrency: workers at once at most.
        job_id: a job of this id that committed before is not repeated.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        progress: False hides Ray Data's progress bars.
        ray_remote_args: options of ``ray.remote`` for the workers.
        storage_options: for the object store.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation.
        namespace_properties: what the namespace is connected with.
        table_id: the table's name in a namespace, with ``namespace_impl``.

    Raises:
        RowCoverageError: rows of ``ds`` occur twice or are unknown to the table, or rows of the table are missing.
        SnapshotChangedError: others appended rows (with full coverage), or changed fragments that have new values.
        LanceRayError: as for :func:`lance_ray.add_columns`. The table is as it was.
    """
    address = {
        "table_id": table_id,
        "namespace_impl": namespace_impl,
        "namespace_properties": namespace_properties,
        "storage_options": storage_options,
        "base_store_params": base_store_params,
    }
    options = MergeOptions.fold(
        on,
        ColumnWorkers.fold(concurrency, ray_remote_args),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        progress,
        full=require_full_coverage,
        schema=output_schema,
    )
    if ds is None:
        raise InvalidArgumentError("ds", None, "must be a Ray Dataset")
    return _merge(TableRef.fold(uri, address, version=read_version), ds, options, batch_size)


def add_columns_from(
    uri: Any = None,
    *,
    transform: Any,
    filter: str | None = None,
    read_columns: Sequence[str] | None = None,
    output_schema: pa.Schema | None = None,
    batch_format: BatchFormat = "pyarrow",
    batch_size: int | None = None,
    read_version: int | str | None = None,
    concurrency: int | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    storage_options: dict[str, str] | None = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: str | None = None,
    namespace_properties: dict[str, str] | None = None,
    table_id: Sequence[str] | None = None,
) -> ColumnsReport:
    """:func:`lance_ray.add_columns` through Ray Data: also large fragments are computed by all workers.

    The table is read in row ranges, the transform runs in ``map_batches``, and the values go back to the fragments of
    their rows. For few large fragments and costly functions; otherwise ``add_columns`` moves less data.

    Keywords are those of :func:`lance_ray.add_columns` and :func:`merge_columns_from`.
    """
    folded = fold_transform(transform, batch_format=batch_format, output_schema=output_schema)
    if isinstance(folded, pa.Schema):
        raise InvalidArgumentError("transform", folded.names, "columns of nulls are what add_columns() is for")
    address = {
        "table_id": table_id,
        "namespace_impl": namespace_impl,
        "namespace_properties": namespace_properties,
        "storage_options": storage_options,
        "base_store_params": base_store_params,
    }
    ref = TableRef.fold(uri, address, version=read_version)
    table = ref.pin()
    workers = ColumnWorkers.fold(concurrency, ray_remote_args)
    given: dict[str, Any] = {key: value for key, value in address.items() if value is not None}
    source = read_lance(
        table.uri if ref.namespace is None else None,
        **given,
        columns=dict(folded.sql) if folded.sql else read_columns,
        filter=filter,
        version=table.version,
        scanner_options={"with_row_address": True},
    )
    ds = source
    if not folded.sql:
        apply: Any = _Apply if folded.is_stateful else partial(_apply, folded)
        setup: dict[str, Any] = {"fn_constructor_args": (folded,)} if folded.is_stateful else {}
        ds = source.map_batches(
            apply,
            batch_format="pyarrow",
            batch_size=batch_size,
            concurrency=concurrency,
            **setup,
            **workers.ray_remote_args,
        )
    options = MergeOptions.fold(
        "_rowaddr",
        workers,
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        progress,
        full=filter is None,
        schema=output_schema,
    )
    return _merge(dataclasses.replace(ref, version=table.version, opened=""), ds, options, None)


def _apply(transform: Transform, table: pa.Table) -> pa.Table:
    batches = table.drop_columns(["_rowaddr"]).combine_chunks().to_batches()
    if not batches:
        return table.select(["_rowaddr"])
    found = transform(batches[0])
    return found.append_column("_rowaddr", table.column("_rowaddr"))


class _Apply:
    """The same for a class, of which each worker makes one."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform.load()

    def __call__(self, table: pa.Table) -> pa.Table:
        return _apply(self._transform, table)


def update_from(ref: TableRef, ds: Any, columns: tuple[str, ...], options: MergeOptions) -> ColumnsReport:
    """New values of columns for the rows that ``ds`` names; the others keep theirs."""
    schema = columns_of(ref.pin().open().schema, columns)
    return _merge(ref, ds, dataclasses.replace(options, schema=schema, full=False), None, update=True)


def _merge(
    ref: TableRef, ds: Any, options: MergeOptions, batch_size: int | None, *, update: bool = False
) -> ColumnsReport:
    started = time.monotonic()
    table = ref.pin()
    job_id = options.commit.operation_id
    if options.commit.job_id is not None:
        latest = table.open_latest()
        since = max(0, latest.version - commit.HISTORY)
        landed = commit.find_operation(latest, job_id, since, table.secrets)
        if landed is not None:
            return ColumnsReport(ref.target, landed, job_id=job_id, skipped=True)
    job = JobRef(table, job_id, table.version)
    output = _output(table, ds, options, update=update)
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


def _output(table: PinnedTable, ds: Any, options: MergeOptions, *, update: bool) -> pa.Schema:
    """The columns to be written, of the types that ``ds`` gives them."""
    schema = options.schema
    names: list[str] = []
    if schema is None or options.on:
        found = ds.schema()
        base = getattr(found, "base_schema", found)
        names = list(base.names) if base is not None else []
        if not isinstance(base, pa.Schema):
            base = to_arrow(ds.take_batch(16, batch_format="pandas")).schema if names else pa.schema([])
        if missing := [name for name in options.on if name not in names and names]:
            raise InvalidArgumentError("on", missing, f"must be columns of ds: {names}")
        if schema is None:
            schema = unify([pa.schema([item for item in base if item.name not in options.on])]).remove_metadata()
    if missing := [name for name in schema.names if names and name not in names]:
        raise InvalidArgumentError("columns", missing, f"must be columns of ds: {names}")
    if not schema.names:
        raise InvalidArgumentError("ds", names, f"must have columns beside {list(options.on)}")
    dataset = table.open()
    if update:
        return schema
    refuse_existing(schema.names, dataset.schema)
    unknown = [item.name for item in schema if pa.types.is_null(item.type)]
    if unknown:
        raise InvalidArgumentError("output_schema", unknown, "these columns of ds are of the null type; declare them")
    return schema if options.full else pa.schema([item.with_nullable(True) for item in schema])


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
        spec, dataset = self._spec, self._spec.table.open()
        fragments = fragments_of(dataset)
        self._collect(self._grouped(ds, batch_size, len(fragments)), fragments)
        version = self._commit(dataset)
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

    def _grouped(self, ds: Any, batch_size: int | None, fragments: int) -> list[dict[str, Any]]:
        spec, remote = self._spec, dict(self._options.workers.ray_remote_args)
        at_once = {"concurrency": self._options.workers.concurrency} if self._options.workers.concurrency else {}
        routed = ds.map_batches(
            route, fn_kwargs={"spec": spec}, batch_format="pyarrow", batch_size=batch_size, **at_once, **remote
        )
        cpus = int(ray.cluster_resources().get("CPU", 1))
        partitions = max(1, min(fragments, _MAX_PARTITIONS, max(4 * cpus, fragments // 8)))
        grouped = routed.groupby(_FRAGMENT, num_partitions=partitions)
        merged = grouped.map_groups(merge_group, fn_kwargs={"spec": spec}, batch_format="pyarrow", **at_once, **remote)
        if self._options.progress is False:
            context = merged.context
            context.enable_progress_bars = False
        try:
            return [json.loads(row["outcome"]) for row in merged.take_all()]
        except Exception as error:  # Ray wraps what a task raised: only the type inside says what it was
            found = unwrap(error)
            if found is error:
                raise
            raise found from error

    def _collect(self, outcomes: Sequence[dict[str, Any]], fragments: Mapping[int, Mapping[str, Any]]) -> None:
        """The results; or what is wrong, over all fragments.

        Raises:
            RowCoverageError: rows do not match.
        """
        counts = {name: sum(outcome[name] for outcome in outcomes) for name in ("duplicate", "unknown", "missing")}
        examples: dict[str, list[Any]] = {}
        for outcome in outcomes:
            for name, values in outcome["examples"].items():
                examples[name] = (examples.get(name, []) + values)[:_EXAMPLES]
        for outcome in outcomes:
            if outcome["result"] is not None:
                item = outcome["result"]
                self._results[item["fragment"]] = ColumnResult(**{**item, "fields": tuple(item["fields"])})
        if self._spec.full:
            seen = {outcome["fragment"] for outcome in outcomes}
            for item, metadata in fragments.items():
                if item not in seen:
                    deleted = (metadata.get("deletion_file") or {}).get("num_deleted_rows") or 0
                    counts["missing"] += metadata["physical_rows"] - deleted
                    examples["missing"] = [*examples.get("missing", []), f"fragment {item}"][:_EXAMPLES]
        if any(counts.values()):
            raise RowCoverageError(**counts, examples=examples)

    def _commit(self, dataset: lance.LanceDataset) -> int:
        spec, job = self._spec, self._spec.job
        if not self._results:
            if spec.update:
                return dataset.version
            version = commit.add_null_columns(spec.table, spec.output)
            self._committed = True
            return version
        if not job.is_open():
            raise LanceRayError(f"job {job.job_id} was ended by a clean-up before it could commit")
        kind = UpdateColumns if spec.update else AddColumns
        operation = kind(spec.table, schema_digest(dataset), self._results, complete=spec.full)
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
        if self._unsettled:
            return
        if self._committed:
            self._spec.job.close(len(self._results))
        else:
            self._spec.job.discard()


def route(table: pa.Table, spec: MergeSpec) -> pa.Table:
    """Runs on a worker: the new values of some rows, each with the address of its row and the fragment of that."""
    source, found = _addresses(table, spec)
    values = align(to_arrow(table.select(spec.output.names)), spec.output)
    values = values.take(pa.array(source))
    keys = table.select(list(spec.on)).take(pa.array(source))
    fragments = np.where(found >= 0, found >> 32, _NOWHERE)
    values = values.append_column(_ADDRESS, pa.array(np.maximum(found, 0), pa.int64()))
    unknown = np.flatnonzero(found < 0)
    text = np.full(len(found), None, dtype=object)
    for place in unknown[:_EXAMPLES]:
        row = keys.slice(int(place), 1).to_pylist()[0]
        text[place] = str(next(iter(row.values())) if len(row) == 1 else row)
    told = pa.array(list(text), pa.string())
    return values.append_column(_FRAGMENT, pa.array(fragments, pa.int64())).append_column("__lance_ray_key", told)


def _addresses(table: pa.Table, spec: MergeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a row of ``table`` and the address of a row that it is for; -1 where the table has none."""
    dataset = spec.table.open()
    everything = np.arange(table.num_rows)
    single = spec.on[0] if len(spec.on) == 1 else ""
    if single == "_rowaddr" or (single == "_rowid" and not dataset.has_stable_row_ids):
        ids = table.column(single).cast(pa.int64()).combine_chunks()
        return everything, np.asarray(ids.fill_null(-1))
    look = _by_row_id if single == "_rowid" else _by_keys
    with translate_errors("look up rows of", spec.table.uri, secrets=spec.table.secrets):
        return look(dataset, table, spec)


def _by_row_id(dataset: lance.LanceDataset, table: pa.Table, _: MergeSpec) -> tuple[np.ndarray, np.ndarray]:
    ids = table.column("_rowid").cast(pa.uint64()).combine_chunks()
    wanted = pc.unique(ids.drop_null())
    mask = serialize_row_addrs(wanted.to_pylist())  # keyed by row id, whatever its name says
    scanner = dataset.scanner(columns=[], with_row_id=True, with_row_address=True, row_addr_allowlist=mask)
    return _joined(table.select(["_rowid"]), scanner.to_table(), ("_rowid",))


def _by_keys(dataset: lance.LanceDataset, table: pa.Table, spec: MergeSpec) -> tuple[np.ndarray, np.ndarray]:
    schema = columns_of(dataset.schema, spec.on)
    keys = align(to_arrow(table.select(list(spec.on))), schema)
    parts = [pc.field(name).isin(pc.unique(keys.column(name).combine_chunks().drop_null())) for name in spec.on]
    if not table.num_rows:
        return np.arange(0), np.arange(0)
    scanner = dataset.scanner(columns=list(spec.on), filter=reduce(and_, parts), with_row_address=True)
    return _joined(keys, scanner.to_table(), spec.on)


def _joined(wanted: pa.Table, found: pa.Table, on: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    left = wanted.append_column(_FRAGMENT, pa.array(np.arange(wanted.num_rows)))
    right = found.select([*on, "_rowaddr"]).cast(
        pa.schema([*(left.schema.field(name) for name in on), pa.field("_rowaddr", pa.uint64())])
    )
    joined = left.join(right, keys=list(on), join_type="left outer").sort_by(_FRAGMENT)
    addresses = joined.column("_rowaddr").cast(pa.int64()).combine_chunks().fill_null(_NOWHERE)
    return np.asarray(joined.column(_FRAGMENT)), np.asarray(addresses)


def merge_group(table: pa.Table, spec: MergeSpec) -> pa.Table:
    """Runs on a worker: the values of one fragment, checked against its rows and written, or what is wrong."""
    fragment = table.column(_FRAGMENT)[0].as_py()
    dataset = spec.table.open()
    outcome: dict[str, Any] = {"fragment": fragment, "duplicate": 0, "unknown": 0, "missing": 0, "examples": {}}
    outcome["result"] = None
    addresses = np.asarray(table.column(_ADDRESS)).astype(np.uint64)
    live = _live(dataset, fragment) if fragment in set(dataset.fragment_ids()) else np.empty(0, np.uint64)
    if fragment == _NOWHERE:
        outcome["unknown"] = table.num_rows
        outcome["examples"]["unknown"] = table.column("__lance_ray_key").drop_null().to_pylist()[:_EXAMPLES]
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


def _live(dataset: lance.LanceDataset, fragment: int) -> np.ndarray:
    found: Any = dataset.get_fragment(fragment)
    scanned = dataset.scanner(columns=[], with_row_address=True, fragments=[found]).to_table()
    return np.asarray(scanned.column("_rowaddr"))


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
            engine = {"schema": schema_text(schema)}
    result = ColumnResult(
        fragment,
        dataset.version,
        planned,
        json.loads(json.dumps(metadata.to_json())),
        rows=values.num_rows,
        **engine,
    )
    return record_result(spec.job, dataset, result)
