"""What keeps indexes good: new fragments taken in, segments merged, indexes listed, dropped and loaded ahead."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import ray

from lance_ray import commit
from lance_ray.catalog import LanceRestConfig
from lance_ray.commit import FRAGMENT_REUSE, described_indices
from lance_ray.errors import CommitConflictError, InvalidArgumentError, translate_errors
from lance_ray.executors import ActorExecutor, check_ray_options, checked_ray_args
from lance_ray.index import dataset_at, fold_commit, fold_index_ref, report_of, settled
from lance_ray.index_build import (
    Build,
    BuildOptions,
    BuildSpec,
    IndexDef,
    IndexReport,
    MergeTask,
    Tasks,
    UnknownFragments,
    all_fragments,
    build_segment,
    index_column,
    kind_name,
    kind_of,
    outdated,
    segments_of,
)
from lance_ray.index_models import Models, stored_models
from lance_ray.ledger import JobRef
from lance_ray.options import CommitOptions, check_flag, check_positive, check_text, strings
from lance_ray.planning.indexes import SAMPLE_RATE, IndexKind, SegmentTask, latest, merge_groups
from lance_ray.pools import executor_of, get_global_pool
from lance_ray.progress import Reporter, check_progress
from lance_ray.read import bytes_per_row
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, TableRef, newest

logger = logging.getLogger(__name__)

_INTERNAL = "__lance_"
_UNKNOWN_TO_BUILD = ("lance_tokenizer", "signature_version")
_PREWARM_ROUNDS = 3
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """An index of a table, and how much of the table it knows."""

    name: str
    kind: str
    columns: tuple[str, ...]
    segments: int
    fragments: int
    """Fragments that it knows."""
    unindexed_fragments: int
    rows: int
    """Live rows in fragments that it knows."""
    unindexed_rows: int
    bytes: int | None
    """Size of its files; None where the table was written by a version that did not note it."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the engine says of its parameters."""

    @property
    def coverage(self) -> float:
        """Part of the rows that it knows, 0 to 1."""
        total = self.rows + self.unindexed_rows
        return self.rows / total if total else 1.0

    def __str__(self) -> str:
        size = "" if self.bytes is None else f", {self.bytes / 1e6:,.1f} MB"
        return (
            f"{self.name}: {self.kind} on {', '.join(self.columns)}, {self.segments} segment(s) over {self.fragments}"
            f" fragment(s), {self.coverage:.1%} of {self.rows + self.unindexed_rows:,} rows{size}"
        )


@dataclass(frozen=True, slots=True)
class PrewarmReport:
    """Which processes hold an index in their caches now."""

    target: str
    name: str
    processes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.target}: index {self.name!r} loaded in {len(self.processes)} process(es), {self.seconds:.2f} s"


def refresh_index(
    uri: Any = None,
    name: str | None = None,
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    block_size: int | None = None,
    num_workers: int | None = None,
    num_segments: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    progress: bool | Reporter | None = None,
    return_report: bool = False,
) -> lance.LanceDataset | tuple[IndexReport, ...]:
    """Index the fragments that an index does not know yet, as further segments; those that it has stay as they are.

    New segments are built with the parameters of the index, those of a vector index with its centroids, codebook or
    rotation. An index that must be one segment (``IVF_SQ``, ``IVF_HNSW_SQ``, codebooks for dot products) and one that
    knows no row yet is built as a whole.

    Args:
        uri: path or URI of the table, or an opened dataset.
        name: the index; all of the table by default.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        block_size: bytes of the smallest I/O request.
        num_workers: tasks at once at most; by default what the cluster runs.
        num_segments: new segments; by default one for each task, where each has enough to do.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        commit_message: of the versions that have the segments.
        transaction_properties: of their transactions.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        return_report: return the reports, one for each index, instead of the dataset.

    Returns:
        The newest version as a dataset, or the reports; ``version`` is None where there was nothing to do.

    Raises:
        InvalidArgumentError: there is no such index.
        TaskFailedError, CommitConflictError, CommitOutcomeUnknownError: as for
            :func:`lance_ray.create_scalar_index`; indexes that were done before stay done.

    What is said of concurrent changes at :func:`lance_ray.create_scalar_index` holds here, too.
    """
    upkeep = _Upkeep.fold(fold_index_ref(uri, locals()), locals())
    return upkeep.answer([_refresh(upkeep, item) for item in upkeep.names(name)], return_report)


def optimize_indices(
    uri: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    indices: Sequence[str] | str | None = None,
    index_names: Sequence[str] | str | None = None,
    num_indices_to_merge: int | None = 1,
    num_segments: int | None = None,
    retrain: bool = False,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    block_size: int | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    num_workers: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    progress: bool | Reporter | None = None,
    return_report: bool = False,
) -> lance.LanceDataset | tuple[IndexReport, ...]:
    """Take in new fragments and merge segments, on workers; each index changes in one commit.

    Segments that share their models are merged from what they hold. Where the engine cannot do that, the segment is
    built from the rows of the table with the newest model.

    Args:
        uri: path or URI of the table, or an opened dataset.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        indices: names of indexes; all by default.
        index_names: the engine's name of ``indices``.
        num_indices_to_merge: so many of the newest segments become one with the rows not indexed yet, as in the
            engine; 0 only adds segments, None merges all.
        num_segments: instead: merge all segments in groups, so that there are so many afterwards.
        retrain: build anew from the rows, with newly trained models.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        block_size: bytes of the smallest I/O request.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        num_workers: tasks at once at most; by default what the cluster runs.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        commit_message: of the versions that have the segments.
        transaction_properties: of their transactions.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        return_report: return the reports, one for each index, instead of the dataset.

    Returns:
        The newest version as a dataset, or the reports; ``version`` is None where there was nothing to do.

    Raises:
        LanceRayError: as :func:`refresh_index`. Indexes that were finished by then stay; the others are as they were.

    Rows that others append meanwhile are left for a next call.
    """
    upkeep = _Upkeep.fold(fold_index_ref(uri, locals()), locals())
    check_positive("num_indices_to_merge", num_indices_to_merge, zero=True)
    check_flag("retrain", retrain)
    merging = _Merging(num_indices_to_merge, num_segments, retrain)
    names = known = upkeep.names(None)
    if indices is not None and index_names is not None:
        raise InvalidArgumentError("index_names", index_names, "is another name of indices, which is given too")
    parameter, chosen = ("indices", indices) if index_names is None else ("index_names", index_names)
    if chosen is not None:
        names = list(strings(parameter, [chosen] if isinstance(chosen, str) else chosen))
    if unknown := [name for name in names if name not in known]:
        raise InvalidArgumentError(parameter, unknown, f"must be indexes of the table: {known}")
    return upkeep.answer([_optimize(upkeep, name, merging) for name in names], return_report)


def list_indices(
    uri: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> list[IndexInfo]:
    """The indexes of the newest version, and how much of the table each knows; from metadata alone.

    Args:
        uri: path or URI of the table, or an opened dataset.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        One :class:`IndexInfo` for each index.

    Raises:
        TableNotFoundError, StorageError: the table cannot be opened.
    """
    table = fold_index_ref(uri, locals()).pin()
    dataset = table.open()
    rows = {item.fragment_id: item.physical_rows - item.num_deletions for item in dataset.get_fragments()}
    found = [item for item in described_indices(dataset) if not item.name.startswith(_INTERNAL)]
    return [_info(item, rows) for item in found]


def drop_index(
    uri: Any = None,
    name: str = "",
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> lance.LanceDataset:
    """Drop an index in one commit. Its files stay for older versions, until those are cleaned up.

    Args:
        uri: path or URI of the table, or an opened dataset.
        name: the index.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        The dataset at the version without it.

    Raises:
        InvalidArgumentError: there is no such index.
        CommitConflictError, StorageError: it is still there.

    It is dropped from the newest version, so that concurrent appends, deletes and updates land beside it; after a
    conflict with a compaction or a build of this index it is tried again.
    """
    table = newest(fold_index_ref(uri, locals()).pin())
    _described(table.open(), name)
    options = CommitOptions(job_id=f"drop-{uuid.uuid4().hex}")
    landing = commit.Landing(options.operation_id, table.version)
    return table.open_at(commit.apply(table, commit.DropIndex(name), options, landing).version)


def prewarm(
    uri: Any = None,
    name: str = "",
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    with_position: bool = False,
    pool: Any = None,
) -> PrewarmReport:
    """Load an index into the cache of this process and of warm workers, so that the first searches find it there.

    Args:
        uri: path or URI of the table, or an opened dataset.
        name: the index.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        with_position: also the positions of words, of an ``INVERTED`` index that has them.
        pool: :class:`lance_ray.WarmWorkers`, or a ``ray.util.multiprocessing.Pool``; by default the global one.

    Returns:
        The processes that hold it.

    Raises:
        InvalidArgumentError: there is no such index, or the pool is none.
        StorageError, TaskFailedError: it could not be loaded.
    """
    began = time.monotonic()
    check_flag("with_position", with_position)
    table = fold_index_ref(uri, locals()).pin()
    _described(table.open(), name)
    warming = _Warming(table, name, with_position)
    processes = {load(warming, 0).process}
    pool = get_global_pool() if pool is None else pool
    if pool is not None:
        executor = executor_of(pool)
        if isinstance(executor, ActorExecutor):
            executor.fill(_START_SECONDS)
        workers = int(getattr(pool, "processes", None) or getattr(pool, "_processes", None) or 1)
        warmed: set[str] = set()
        for _ in range(_PREWARM_ROUNDS):
            run = run_tasks(
                load,
                range(workers),
                shared=warming,
                options=RunOptions(progress=False),
                executor=executor,
                operation="prewarm",
            )
            with run:
                warmed |= {outcome.unwrap().process for outcome in run}
            if len(warmed) >= workers:
                break
        processes |= warmed
    return PrewarmReport(table.ref.target, name, tuple(sorted(processes)), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class _Warming:
    table: PinnedTable
    name: str
    with_position: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where an index was loaded."""

    process: str


def load(warming: _Warming, task: int) -> Loaded:  # noqa: ARG001 - tasks are all alike
    """Runs on a worker: the index into the cache of this process."""
    table = warming.table
    with translate_errors("load an index of", table.uri, secrets=table.secrets):
        table.open().prewarm_index(warming.name, with_position=warming.with_position)
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "local"
    return Loaded(f"{node}:{os.getpid()}")


@dataclass(frozen=True, slots=True)
class _Merging:
    """Which segments become one."""

    newest: int | None
    num_segments: int | None
    retrain: bool


@dataclass(frozen=True, slots=True)
class _Upkeep:
    """The table, and how work on its indexes is done."""

    table: PinnedTable
    options: BuildOptions
    num_segments: int | None

    @classmethod
    def fold(cls, ref: TableRef, given: Mapping[str, Any]) -> _Upkeep:
        check_positive("num_workers", given["num_workers"])
        check_positive("num_segments", given["num_segments"])
        check_progress(given["progress"])
        check_flag("return_report", given["return_report"])
        remote = checked_ray_args(given["ray_remote_args"])
        check_ray_options(remote)
        carried = fold_commit(given["commit_message"], given["transaction_properties"])
        options = BuildOptions(
            given["num_workers"], None, ray_remote_args=remote, progress=given["progress"], commit=carried
        )
        return cls(newest(ref.pin()), options, given["num_segments"])

    def names(self, name: str | None) -> list[str]:
        """The index of that name, or all of the table."""
        dataset = self.table.open()
        if name is not None:
            return [_described(dataset, name).name]
        return [item.name for item in described_indices(dataset) if _is_ours(item)]

    def answer(
        self, reports: Sequence[IndexReport], return_report: bool
    ) -> lance.LanceDataset | tuple[IndexReport, ...]:
        return tuple(reports) if return_report else dataset_at(self.table, None)


def _is_ours(described: Any) -> bool:
    if described.name.startswith(_INTERNAL):
        return False
    try:
        kind_of(described)
    except InvalidArgumentError as error:  # an index that only the engine builds does not stop the others
        logger.warning("%s; it is left as it is", error)
        return False
    return True


def _described(dataset: lance.LanceDataset, name: Any) -> Any:
    check_text("name", name, optional=False)
    found = {item.name: item for item in described_indices(dataset) if not item.name.startswith(_INTERNAL)}
    if name not in found:
        raise InvalidArgumentError("name", name, f"must be an index of the table: {sorted(found)}")
    return found[name]


def _info(described: Any, rows: Mapping[int, int]) -> IndexInfo:
    known = {item for segment in described.segments for item in segment.fragment_ids} & set(rows)
    indexed = sum(rows[item] for item in known)
    details = described.details if isinstance(described.details, Mapping) else {}
    return IndexInfo(
        described.name,
        kind_name(described),
        tuple(described.field_names),
        len(described.segments),
        len(known),
        len(rows) - len(known),
        indexed,
        sum(rows.values()) - indexed,
        described.total_size_bytes,
        dict(details),
    )


def definition_of(table: PinnedTable, described: Any) -> IndexDef:
    """An index of the table as it would be built again: its parameters, without models."""
    kind = kind_of(described)
    column = described.field_names[0]
    details = described.details if isinstance(described.details, Mapping) else {}
    if not kind.is_vector:
        return IndexDef(described.name, column, kind, options=_scalar_options(table, described, kind))
    graph = details.get("hnsw") or {}
    compression = details.get("compression") or {}
    hints = details.get("runtime_hints") or {}
    options = {
        "skip_transpose": True if hints.get("lance.skip_transpose") == "true" else None,
        "max_level": graph.get("max_level"),
        "m": graph.get("max_connections"),
        "ef_construction": graph.get("construction_ef"),
        "num_bits": compression.get("num_bits") if kind.name.endswith(("_PQ", "_RQ")) else None,
    }
    return IndexDef(
        described.name,
        column,
        kind,
        str(details["metric_type"]).lower(),
        {name: value for name, value in options.items() if value is not None},
        sub_vectors=compression.get("num_sub_vectors"),
        max_iterations=_number(hints.get("lance.ivf.max_iters"), unless=50),
        sample_rate=_number(hints.get("lance.ivf.sample_rate"), unless=None) or SAMPLE_RATE,
    )


def _number(text: str | None, *, unless: int | None) -> int | None:
    found = None if text is None else int(text)
    return None if found == unless else found


def _scalar_options(table: PinnedTable, described: Any, kind: IndexKind) -> dict[str, Any]:
    details = described.details if isinstance(described.details, Mapping) else {}
    if kind.name in ("ZONEMAP", "BLOOMFILTER", "RTREE", "INVERTED"):
        with translate_errors("read the indexes of", table.uri, secrets=table.secrets):
            parts = table.open().stats.index_stats(described.name)["indices"]
        found: dict[str, Any] = next(iter(parts), {})
        details = found.get("params", found)
    allowed = kind.parameters
    options = {name: value for name, value in details.items() if value is not None and name not in _UNKNOWN_TO_BUILD}
    if "tokenizer" in options:
        options["tokenizer"] = {name: value for name, value in options["tokenizer"].items() if value is not None}
    return {name: value for name, value in options.items() if allowed is None or name in allowed}


def _begin(upkeep: _Upkeep, name: str) -> tuple[Build, JobRef, Any]:
    table = newest(upkeep.table)
    described = _described(table.open(), name)
    definition = definition_of(table, described)
    column = index_column(table, definition.column, lambda schema: bytes_per_row(table, schema))
    ledger = JobRef(table, f"index-{uuid.uuid4().hex}", table.version)
    return Build(table, definition, column, ledger, upkeep.options), ledger, described


def _stored(table: PinnedTable, described: Any, kind: IndexKind) -> dict[str, Models | None]:
    """The models of the segments that know a fragment, newest segment last."""
    dataset = table.open()
    useful = [item for item in described.segments if item.fragment_ids]
    order = latest(((str(item.uuid), item.dataset_version_at_last_update) for item in useful), None)
    return {item: stored_models(dataset, item, kind.name) for item in order} if kind.is_vector else {}


def _has_rows(described: Any) -> bool:
    return any(item.fragment_ids for item in described.segments)


def _change(upkeep: _Upkeep, name: str, operation: str, change: Any) -> IndexReport:
    """Change an index as of a version, and again from the start when others changed the table in a way that matters."""
    began = time.monotonic()
    for attempt in range(upkeep.options.max_rebuilds + 1):
        build, ledger, described = _begin(upkeep, name)
        tasks = Tasks(build.table, build.options, operation)
        try:
            with settled(ledger, build, operation):
                receipt = change(build, tasks, described)
        except CommitConflictError as conflict:
            if not conflict.retryable or attempt == upkeep.options.max_rebuilds:
                raise
            logger.info("%s of index %s begins anew: %s", operation, name, conflict)
            continue
        if not build.outrun or attempt == upkeep.options.max_rebuilds:
            return report_of(build, receipt, tasks, operation, time.monotonic() - began)
        logger.info("%s of index %s goes on: others rewrote meanwhile what was indexed", operation, name)
    raise AssertionError  # pragma: no cover - the loop returns or raises


def _refresh(upkeep: _Upkeep, name: str) -> IndexReport:
    def change(build: Build, tasks: Tasks, described: Any) -> Any:
        dataset = build.table.open()
        missing = UnknownFragments(name)(dataset)
        if not missing:
            return None
        build.options = dataclasses.replace(build.options, num_segments=upkeep.num_segments)
        build.share(_stored(build.table, described, build.index.kind))
        if build.index.one_segment or not _has_rows(described):
            return build.through(tasks, all_fragments)
        stale, again = _outdated(build, described, missing)
        segments = build.segments_for(tasks, build.stats(missing | again))
        return _landed(build, segments, lambda item: str(item.uuid) in stale or not item.fragment_ids)

    return _change(upkeep, name, "refresh_index", change)


def _outdated(build: Build, described: Any, missing: frozenset[int]) -> tuple[frozenset[str], frozenset[int]]:
    """Segments that must go because they hold rows of the missing fragments, and the fragments that they know."""
    if build.index.kind.is_vector:  # which the engine masks by what each segment is said to know
        return frozenset(), frozenset()
    dataset = build.table.open()
    stale = outdated(dataset, described.segments, missing)
    known = {number for item in described.segments if str(item.uuid) in stale for number in item.fragment_ids}
    return stale, frozenset(known) & all_fragments(dataset)


def _landed(build: Build, segments: Sequence[Any], replaces: Any) -> Any:
    receipt = build.put(segments, replaces)
    build.outrun = build.has_lost(receipt, segments, UnknownFragments(build.index.name))
    return receipt


def _optimize(upkeep: _Upkeep, name: str, merging: _Merging) -> IndexReport:
    def change(build: Build, tasks: Tasks, described: Any) -> Any:
        return _optimized(build, tasks, described, merging)

    return _change(upkeep, name, "optimize_indices", change)


def _optimized(build: Build, tasks: Tasks, described: Any, merging: _Merging) -> Any:
    """The change of one index, as of the version that was pinned; None when there is nothing to change."""
    dataset = build.table.open()
    name = build.index.name
    missing = UnknownFragments(name)(dataset)
    stored = _stored(build.table, described, build.index.kind)
    whole = build.index.one_segment and (missing or len(described.segments) > 1)
    if merging.retrain or whole or not _has_rows(described):
        build.index = dataclasses.replace(build.index, partitions=_partitions(stored))
        return build.through(tasks, all_fragments) if all_fragments(dataset) else None
    if build.index.one_segment:
        return None
    build.share(stored)
    stale, again = _outdated(build, described, missing)
    added = build.segments_for(tasks, build.stats(missing | again)) if missing else []
    template = added[0] if added else _template(build, described)
    have = {str(item.uuid): item for item in segments_of(dataset, name, template) if str(item.uuid) not in stale}
    new = {str(item.uuid): item for item in added}
    models = stored | dict.fromkeys(new, build.index.models)
    parts = _Parts(build, have, new, models)
    groups = parts.groups(described, merging)
    merged = build.merged(tasks, [parts.task(group) for group in groups])
    gone = stale.union(*groups)
    segments = [*merged, *(item for key, item in new.items() if key not in gone)]
    if not segments:
        return None
    return _landed(build, segments, lambda item: str(item.uuid) in gone or not item.fragment_ids)


def _partitions(stored: Mapping[str, Models | None]) -> int | None:
    counts = [len(item.centroids) for item in stored.values() if item is not None and item.centroids is not None]
    return counts[-1] if counts else None


@dataclass(frozen=True, slots=True)
class _Parts:
    """The segments that there are and those just built, in the engine's form, and what vector ones were built with."""

    build: Build
    have: Mapping[str, Any]
    new: Mapping[str, Any]
    models: Mapping[str, Models | None]

    def groups(self, described: Any, merging: _Merging) -> list[tuple[str, ...]]:
        """Which of them become one."""
        useful = {key: item for key, item in self.have.items() if item.fragment_ids}
        if merging.num_segments is not None:
            sizes = {str(item.uuid): int(item.size_bytes or 0) for item in described.segments}
            sizes = {key: sizes[key] for key in useful}
            sizes |= {key: sum(file.size_bytes or 0 for file in item.files or ()) for key, item in self.new.items()}
            return merge_groups(sizes, merging.num_segments)
        chosen = latest(((key, item.dataset_version) for key, item in useful.items()), merging.newest)
        together = (*chosen, *self.new) if merging.newest != 0 else ()
        return [together] if len(together) > 1 else []

    def task(self, group: Sequence[str]) -> MergeTask:
        """The merge of a group."""
        parts = [self.have.get(item) or self.new[item] for item in group]
        known = {item for part in parts for item in part.fragment_ids}
        stats = self.build.stats(known & all_fragments(self.build.table.open()))
        return MergeTask(tuple(parts), tuple(sorted(stats.ids)), sum(stats.rows), self._alike(group))

    def _alike(self, group: Sequence[str]) -> bool:
        """Whether the engine may merge their files."""
        dataset = self.build.table.open()
        if self.build.index.kind.is_vector:
            # Addresses that a compaction left to be translated later are translated no more in a merged segment.
            deferred = any(item.name == FRAGMENT_REUSE for item in described_indices(dataset))
            found = [self.models.get(item) for item in group]
            return not deferred and all(item is not None and item.same_as(self.build.index.models) for item in found)
        # Segments that hold more than they are said to know would bring it back.
        return not (dataset.has_stable_row_ids and self.build.index.kind.name in ("INVERTED", "LABEL_LIST"))


def _template(build: Build, described: Any) -> Any:
    """A segment of the index in the engine's form, for what all of them share: built of no fragment."""
    if build.index.kind.without_rows:
        return build_segment(BuildSpec(build.table, build.job, build.index), SegmentTask(())).segment
    return commit.bare_segment(described, described.segments[0])


__all__ = [
    "IndexInfo",
    "PrewarmReport",
    "drop_index",
    "list_indices",
    "optimize_indices",
    "prewarm",
    "refresh_index",
]
