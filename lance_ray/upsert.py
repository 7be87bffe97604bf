"""``merge_into``: rows of a Ray Dataset in the place of those that have the same key, all others added. One commit.

Ray Data brings the rows of equal keys together; each group finds the rows that it replaces and is written as files.
What is replaced is marked deleted fragment by fragment, on workers, too. The commit brings in both at once, on top of
the version that was matched.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray
from lance.fragment import FragmentMetadata, RowIdSequence

from lance_ray import commit
from lance_ray.arrow import align, to_arrow
from lance_ray.catalog import LanceRestConfig
from lance_ray.column_jobs import ColumnWorkers, landed_in
from lance_ray.column_merge import MergeOptions, grouped, schema_of
from lance_ray.datasink import write_retry
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    RowCoverageError,
    SchemaMismatchError,
    translate_errors,
)
from lance_ray.executors import RayExecutor, check_dataset, connect_ray, unnamed_options
from lance_ray.full_start import start_in_full
from lance_ray.ledger import JobRef
from lance_ray.options import CommitOptions, WriteOptions, check_flag, check_positive, check_text, pairs
from lance_ray.predicates import key_condition
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.retry import is_interruption
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, TableRef, WriteTarget, address_of
from lance_ray.write import WriteSpec, WrittenFile, write_blocks

_GROUP = "__lance_ray_group"
_KEYS_AT_ONCE = 16384
_EXAMPLES = 5
_KINDS = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_date),
    *(pa.types.is_timestamp, pa.types.is_time, pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did."""

    target: str
    version: int
    """The version that has the rows."""
    inserted: int = 0
    """Rows of new keys."""
    updated: int = 0
    """Rows of the table that were replaced."""
    bytes: int = 0
    """Size in memory of the rows written."""
    files: int = 0
    """Data files written."""
    seconds: float = 0.0
    job_id: str = ""
    skipped: bool = False
    """Nothing was committed: there were no rows, or the job of this id had committed before."""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.target}: nothing to merge, version {self.version}"
        return (
            f"{self.target}: {self.updated:,} row(s) replaced, {self.inserted:,} added, {self.bytes / 1e6:,.1f} MB in"
            f" {self.files} file(s), {self.seconds:.2f} s, version {self.version}"
        )


@dataclass(frozen=True, slots=True)
class UpsertSpec:
    """What the tasks share."""

    write: WriteSpec
    on: str
    groups: int

    @property
    def table(self) -> PinnedTable:
        """The version that rows are matched with."""
        base = self.write.target.base
        assert base is not None  # noqa: S101 - only a table that exists is merged into
        return base

    @property
    def key(self) -> pa.Schema:
        """The key column as plain values that can be compared."""
        kind = self.table.open().schema.field(self.on).type
        return pa.schema([pa.field(self.on, kind.value_type if pa.types.is_dictionary(kind) else kind)])


def merge_into(
    ds: Any,
    uri: Any = None,
    *,
    on: str,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    num_workers: int | None = None,
    num_partitions: int | None = None,
    job_id: str | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    return_report: bool = False,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> lance.LanceDataset | MergeReport:
    """Put rows in the place of those that have the same key, and add the others (an upsert), in one commit.

    Every row of the table with a key of ``ds`` is replaced as a whole; stable row ids stay. A scalar index on the key
    makes the match quick.

    Args:
        ds: a Ray Dataset or a ``pyarrow.Table`` with all columns of the table, matched by name; others are left out.
        uri: path or URI of the table, or an opened dataset.
        on: the key column: numbers, text, bytes, booleans, dates, times or decimals.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        num_workers: tasks at once at most; by default what the cluster runs.
        num_partitions: groups of keys that are matched and written together, each in the memory of one worker and each
            with one look at the keys of the table; by default four for each CPU of the cluster.
        job_id: a job of this id that committed before is not repeated.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        return_report: return a :class:`MergeReport` in place of the dataset.
        progress: False hides all progress bars.
        ray_remote_args: options of ``ray.remote`` for the workers.

    Returns:
        The ``lance.LanceDataset`` of the version with the rows, or a report. Without rows nothing is committed.

    Raises:
        InvalidArgumentError, TableNotFoundError, StorageError, WorkerEnvironmentError: before any task starts.
        RowCoverageError: a key occurs twice in ``ds`` (``.duplicate``).
        SchemaMismatchError: the rows do not fit the table, or have null keys.
        CommitConflictError: others deleted, updated or compacted rows of the fragments concerned; run it again.
        CommitOutcomeUnknownError: the commit's answer was lost and the table cannot tell; no file was removed.

    After any error but the last the table is as it was, and the data files of the job are removed; small files of
    deletion marks go with :func:`lance_ray.cleanup_old_versions`. Concurrent appends land beside it. Two merges or
    appends at once may both add the same new key: let one writer do it.
    """
    address = address_of(locals())
    check_text("on", on, optional=False)
    check_positive("num_workers", num_workers)
    check_positive("num_partitions", num_partitions)
    check_flag("return_report", return_report)
    if not isinstance(ds, pa.Table):
        check_dataset(ds)
    options = MergeOptions.fold(
        on,
        ColumnWorkers.fold(num_workers, ray_remote_args),
        CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or (), job_id),
        progress,
    )
    target = WriteTarget.resolve(TableRef.fold(uri, address), "append")
    report = _merge(target, ds, options, num_partitions)
    return report if return_report else target.table.open_at(report.version)


def _merge(target: WriteTarget, ds: Any, options: MergeOptions, num_partitions: int | None) -> MergeReport:
    started = time.monotonic()
    (on,), table = options.on, target.base
    assert table is not None  # noqa: S101 - resolve() found it
    _check_key(table.open().schema, on)
    if (landed := landed_in(table, options.commit)) is not None:
        return MergeReport(table.ref.target, landed, job_id=options.commit.operation_id, skipped=True)
    connect_ray()
    ds = ray.data.from_arrow(ds) if isinstance(ds, pa.Table) else ds
    columns, known = table.open().schema.names, schema_of(ds).names
    if known and (missing := [name for name in columns if name not in known]):
        raise InvalidArgumentError("ds", missing, f"must have these columns of the table, too: it has {known}")
    job = JobRef(table, options.commit.operation_id, table.version)
    write = WriteSpec(target, WriteOptions("append"), target.schema, job, write_retry())
    spec = UpsertSpec(write, on, num_partitions or 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    check_cluster([table])
    with job.running("merge_into", exclusive=options.commit.job_id is not None):
        if options.commit.job_id is not None:
            job.end_earlier_runs()
        report = _run(spec, ds, options)
    return dataclasses.replace(report, seconds=time.monotonic() - started)


def _check_key(schema: pa.Schema, on: str) -> None:
    if on not in schema.names:
        raise InvalidArgumentError("on", on, f"must be a column of the table: {schema.names}")
    kind = schema.field(on).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(fits(kind) for fits in _KINDS):
        raise InvalidArgumentError("on", f"{on}: {kind}", "cannot be compared as a key")


def _run(spec: UpsertSpec, ds: Any, options: MergeOptions) -> MergeReport:
    """Match, write, delete, commit; what was certainly not committed is removed."""
    job, table, sent = spec.write.job, spec.table, False
    assert job is not None  # noqa: S101 - _merge() gives it one
    try:
        done = _Done.of(_written(spec, ds, options))
        if not done.files:
            job.end(None)
            return MergeReport(table.ref.target, table.version, job_id=job.job_id, skipped=True)
        marked = _marked(spec, done.addresses, options)
        job.check_open()
        sent = True  # an interrupt leaves the outcome open, and so does an error that says so
        once = dataclasses.replace(options.commit, max_attempts=1)  # what conflicts now will conflict again
        upsert = Upsert(table, done.files, marked)
        receipt = commit.apply(table, upsert, once, commit.Landing(job.job_id, table.version))
    except CommitOutcomeUnknownError:
        raise
    except BaseException as error:  # whatever it was goes on to the caller
        if not sent or isinstance(error, LanceRayError):
            job.end(None)
        raise
    job.end(len(done.files))
    return MergeReport(
        table.ref.target,
        receipt.version,
        inserted=done.inserted,
        updated=len(done.addresses),
        bytes=done.bytes,
        files=len(done.files),
        job_id=job.job_id,
    )


def _written(spec: UpsertSpec, ds: Any, options: MergeOptions) -> list[dict[str, Any]]:
    """What :func:`merge_group` says of each group of keys."""
    workers = options.workers
    with unnamed_options():
        routed = start_in_full(ds).map_batches(
            route,
            fn_kwargs={"spec": spec},
            batch_format="pyarrow",
            batch_size=None,
            compute=workers.tasks,
            **workers.ray_remote_args,
        )
    return grouped(routed, spec, workers, progress=options.progress, by=_GROUP, each=merge_group)


@dataclass(frozen=True, slots=True)
class _Done:
    """What all groups wrote together."""

    files: list[str]
    """Metadata of the new fragments."""
    addresses: np.ndarray
    """The rows that they replace."""
    inserted: int
    bytes: int

    @classmethod
    def of(cls, outcomes: Sequence[dict[str, Any]]) -> _Done:
        """The outcomes as one; raises RowCoverageError if a key was there twice."""
        groups = [outcome["group"] for outcome in outcomes]
        if len(groups) != len(set(groups)):  # then a key that comes twice would go unseen
            raise LanceRayError(f"Ray Data gave the rows of a group in several parts: {sorted(groups)[:20]}")
        if twice := sum(outcome["duplicate"] for outcome in outcomes):
            examples = [item for outcome in outcomes for item in outcome["examples"]][:_EXAMPLES]
            raise RowCoverageError(duplicate=twice, examples={"duplicate": examples})
        found = [np.frombuffer(base64.b64decode(outcome["addresses"]), np.uint64) for outcome in outcomes]
        return cls(
            [file for outcome in outcomes for file in outcome["files"]],
            np.concatenate(found) if found else np.empty(0, np.uint64),
            sum(outcome["inserted"] for outcome in outcomes),
            sum(outcome["bytes"] for outcome in outcomes),
        )


def route(table: pa.Table, spec: UpsertSpec) -> pa.Table:
    """Runs on a worker: some rows with the number of their group, which equal keys share."""
    wanted = spec.table.open().schema.names
    if missing := [name for name in wanted if name not in table.schema.names]:
        raise SchemaMismatchError(f"a block of ds has no columns {missing}: {table.schema.names}", columns=missing)
    keys = _keys(table, spec)
    if keys.null_count:
        raise SchemaMismatchError(f"{keys.null_count} row(s) of ds have no key", columns=[spec.on], actual="null")
    kind = keys.type
    plain = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not plain and not any(fits(kind) for fits in _KINDS[-3:]):
        keys = keys.cast(pa.string())
    hashes = pd.util.hash_array(keys.to_numpy(zero_copy_only=False), categorize=False)
    groups = pa.array((hashes % np.uint64(spec.groups)).astype(np.int64))
    return table.select(wanted).append_column(_GROUP, groups)


def _keys(table: pa.Table, spec: UpsertSpec) -> pa.Array:
    """The keys of some rows, of the table's type."""
    aligned = align(to_arrow(table.select([spec.on])), spec.key).column(0).combine_chunks()
    return aligned.chunk(0) if isinstance(aligned, pa.ChunkedArray) else aligned


def merge_group(table: pa.Table, spec: UpsertSpec) -> pa.Table:
    """Runs on a worker: the rows of some keys as files, those that replace others first; and which those are."""
    rows = to_arrow(table.drop_columns([_GROUP]))
    keys = _keys(rows, spec)
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    outcome: dict[str, Any] = {"duplicate": len(twice), "files": [], "addresses": "", "inserted": 0, "bytes": 0}
    outcome["examples"] = [str(item["values"]) for item in twice[:_EXAMPLES]]
    outcome["group"] = table.column(_GROUP)[0].as_py()
    if not len(twice):
        found = _targets(spec, keys)
        places = pc.index_in(found.column(spec.on), value_set=keys)
        matched = np.asarray(places.combine_chunks()).astype(np.int64)
        new = np.setdiff1d(np.arange(len(keys)), matched)
        files = write_blocks(spec.write, [rows.take(pa.array(np.concatenate([matched, new])))])
        ids = np.asarray(found.column("_rowid")) if spec.table.open().has_stable_row_ids else np.empty(0, np.uint64)
        outcome["files"] = list(_with_row_ids(files, ids))
        outcome["addresses"] = base64.b64encode(np.asarray(found.column("_rowaddr")).tobytes()).decode()
        outcome["inserted"], outcome["bytes"] = len(new), sum(file.size_bytes for file in files)
    return pa.table({"outcome": [json.dumps(outcome)]})


def _targets(spec: UpsertSpec, keys: pa.Array) -> pa.Table:
    """The rows of the table that have one of the keys: key, row id and address of each."""
    dataset = spec.table.open()
    indexed = any(list(item.field_names) == [spec.on] for item in dataset.describe_indices())
    parts = range(0, len(keys), _KEYS_AT_ONCE) if indexed else [0]
    few = indexed or len(keys) <= _KEYS_AT_ONCE  # else one look at all keys, instead of many
    conditions = [key_condition(spec.on, keys.slice(at, _KEYS_AT_ONCE)) for at in parts] if few else [None]

    schema = pa.schema([*spec.key, pa.field("_rowid", pa.uint64()), pa.field("_rowaddr", pa.uint64())])

    def once(condition: Any) -> list[pa.Table]:
        kept = []
        with translate_errors("look up keys of", spec.table.uri, secrets=spec.table.secrets):
            scanner = dataset.scanner(columns=[spec.on], filter=condition, with_row_id=True, with_row_address=True)
            for batch in scanner.to_batches():
                columns = [_keys(pa.Table.from_batches([batch]), spec), batch["_rowid"], batch["_rowaddr"]]
                told = pa.table(columns, schema)
                kept.append(told.filter(pc.is_in(told.column(0), keys)))
        return kept

    looks = [partial(once, condition) for condition in conditions]
    found = [spec.write.retry.call(look, retry_on=is_interruption, what="look up keys") for look in looks]
    return pa.concat_tables([schema.empty_table(), *(table for tables in found for table in tables)]).combine_chunks()


def _with_row_ids(files: Iterable[WrittenFile], ids: np.ndarray) -> Iterator[str]:
    """The fragments with the ids that their first rows keep; the commit gives ids to the others."""
    for file in files:
        metadata = file.metadata()
        kept, ids = ids[: file.rows], ids[file.rows :]
        if len(kept):
            metadata.row_id_meta = RowIdSequence(pa.array(kept, pa.uint64())).to_inline_metadata()
        yield json.dumps(metadata.to_json())


def _marked(spec: UpsertSpec, addresses: np.ndarray, options: MergeOptions) -> dict[int, str | None]:
    """The metadata of each fragment without the rows at these addresses; None for one that has no others."""
    addresses = np.sort(addresses)
    fragments, starts = np.unique(addresses >> np.uint64(32), return_index=True)
    tasks = [
        (int(number), part.tobytes())
        for number, part in zip(fragments, np.split(addresses, starts[1:]) if len(starts) else (), strict=True)
    ]
    if not tasks:
        return {}
    workers = options.workers
    executor = RayExecutor(workers.ray_remote_args, name="merge_into")
    run_options = RunOptions(workers.concurrency, progress=options.progress)
    with run_tasks(mark_deleted, tasks, shared=spec.table, options=run_options, executor=executor) as run:
        return {outcome.task[0]: outcome.unwrap() for outcome in run}


def mark_deleted(table: PinnedTable, task: tuple[int, bytes]) -> str | None:
    """Runs on a worker: a fragment with more of its rows marked deleted; None where none is left."""
    number, addresses = task
    offsets = np.frombuffer(addresses, np.uint64) & np.uint64(0xFFFFFFFF)
    fragment: Any = table.open().get_fragment(number)
    with translate_errors("mark rows deleted in", table.uri, secrets=table.secrets):
        metadata = fragment.delete_rows(offsets.tolist())
    return None if metadata is None else json.dumps(metadata.to_json())


@dataclass(frozen=True)
class Upsert(commit.Operation):
    """New fragments, and others without the rows that those replace, as of the version that was matched.

    The engine carries it over appends; a change of the same fragments by others is a conflict.
    """

    matched: PinnedTable
    files: Sequence[str]
    marked: Mapping[int, str | None]

    def base(self, table: PinnedTable) -> lance.LanceDataset:
        """The version that was matched, so that the engine compares with everything since."""
        self.changes(table.open_latest())
        return self.matched.open()

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's update of rows."""
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        return lance.LanceOperation.Update(
            removed_fragment_ids=[number for number, left in self.marked.items() if left is None],
            updated_fragments=[FragmentMetadata.from_json(left) for left in self.marked.values() if left is not None],
            new_fragments=[FragmentMetadata.from_json(file) for file in self.files],
            fields_modified=[],
            fields_for_preserving_frag_bitmap=[item for field in commit.field_identities(base) for item in field.ids],
            update_mode="rewrite_rows",
        )

    def changes(self, dataset: lance.LanceDataset) -> tuple[str, ...]:
        """Columns that others added; raises SchemaMismatchError for any other change of the schema."""
        written = commit.field_identities(self.matched.open())
        return commit.additive_changes(written, commit.field_identities(dataset))
