"""Search over the cluster: nearest neighbours in shards, full text as one engine search, and both together.

A vector search is cut into shards (:mod:`lance_ray.planning.search`), each answered by the engine, and the nearest of
all are the answer. A small one is a single call of the engine; a larger one runs in threads of this process, which the
engine's own search of rows without an index does not; a large one on the cluster. A text search cannot be cut: its
scores need the statistics of the whole index.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray

from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import Executor, LocalExecutor, RayExecutor, checked_ray_args, connect_ray
from lance_ray.nearest import (
    DISTANCE,
    QUERY_INDEX,
    NearestSpec,
    VectorIndex,
    explain_shard,
    fetch,
    flat_stats,
    has_matrix_form,
    search_shard,
    vector_indices,
    vector_type,
)
from lance_ray.options import OpenOptions, ScanOptions, as_matrix, check_flag, check_positive, check_text
from lance_ray.planning.search import SHARD_BYTES, SHARD_QUERIES, Found, Shard, Sharing, nearest_of, plan_search, within
from lance_ray.pools import executor_of, get_global_pool
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter, check_progress
from lance_ray.read import FRAGMENT_ID, ROW_ADDRESS, ReadSpec, ReadTaskRows, finish, scan, table_schema
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import TableRef, address_of

THREADS_BYTES = 4 * 1024**3
"""Up to so many bytes of vectors, weighed by the number of queries, threads of this process are used; measured in
benchmarks/README.md. Beyond it, and whenever the caller says what workers to use, the cluster is."""

_QUERY_WEIGHT = 1 / 32  # a further query costs as much as this part of reading the vectors
_TUNING = {"batch_size", "batch_readahead", "fragment_readahead", "io_buffer_size", "late_materialization", "use_stats"}
_SHARDED_OPTIONS = frozenset(
    {
        "nearest",
        "prefilter",
        "fast_search",
        "use_scalar_index",
        "blob_handling",
        "disable_scoring_autoprojection",
        *_TUNING,
    }
)
_SHARD_SCAN_OPTIONS = ("use_scalar_index", "io_buffer_size", "use_stats")
_RESERVED = ("fast_search", "fragments", "index_segments", "nearest", "limit", "offset", "full_text_query")


@dataclass(frozen=True, slots=True)
class SearchWorkers:
    """Where a search runs, as the caller said it."""

    num_workers: int | None = None
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pool: Any = None
    progress: bool | Reporter | None = False
    threads: int | None = None
    """Only so many threads of this process."""
    shard_bytes: int = field(default_factory=lambda: SHARD_BYTES)
    """See :data:`lance_ray.planning.search.SHARD_BYTES`. Here, so that what the driver says holds on workers."""
    threads_bytes: int = field(default_factory=lambda: THREADS_BYTES)
    """See :data:`THREADS_BYTES`."""

    @classmethod
    def fold(
        cls, num_workers: Any, ray_remote_args: Mapping[str, Any] | None, pool: Any, progress: Any
    ) -> SearchWorkers:
        """The workers, checked."""
        check_positive("num_workers", num_workers)
        check_progress(progress)
        args = checked_ray_args(ray_remote_args)
        pool = get_global_pool() if pool is None else pool
        if pool is not None:
            executor_of(pool, check=True)
            if args:
                raise InvalidArgumentError("ray_remote_args", sorted(args), "the pool has its own")
        return cls(num_workers, args, pool, progress)

    @property
    def asked(self) -> bool:
        """Whether the caller wants workers, however small the work is."""
        return self.pool is not None or self.num_workers is not None or bool(self.ray_remote_args)

    def choose(self, cost: float) -> tuple[Executor, int]:
        """Where tasks of this cost run, and how many at once."""
        if self.threads is not None:
            return LocalExecutor(self.threads), self.threads
        if not self.asked and cost <= self.threads_bytes:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            return LocalExecutor(threads), threads
        connect_ray()
        at_once = self.num_workers or getattr(self.pool, "processes", None)
        slots = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
        if self.pool is not None:
            return executor_of(self.pool), slots
        return RayExecutor(self.ray_remote_args, name="lance_ray.search"), slots


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a vector search asks beyond the scan options that it shares with a read."""

    index_name: str | None = None
    oversample: float = 1.0
    include_unindexed: bool = True


def search_rows(spec: ReadSpec, workers: SearchWorkers, asked: _Asked | None = None) -> pa.Table:
    """The rows of a ranked read: one table, in the order of the ranking."""
    asked = asked or _Asked()
    plan = _plan(spec, asked, workers)
    if plan is None:
        tables = list(scan(spec, ReadTaskRows()))
        return pa.concat_tables(tables).combine_chunks() if tables else spec.output_schema.empty_table()
    k = int(spec.scan.scanner["nearest"].get("k") or _DEFAULT_K)
    postfilter = spec.filter is not None and not spec.scan.scanner.get("prefilter", True)
    found = nearest_of(plan.run(search_shard), plan.nearest.k if postfilter else k)
    return _with_columns(spec, found, k, batch=plan.is_batch)


_DEFAULT_K = 10


@dataclass(frozen=True, slots=True)
class _Plan:
    """A search in shards."""

    nearest: NearestSpec
    shards: tuple[Shard, ...]
    executor: Executor
    workers: SearchWorkers
    is_batch: bool

    def run(self, worker: Any) -> list[Any]:
        """What each shard found."""
        if not isinstance(self.executor, LocalExecutor):
            check_cluster([self.nearest.table])
        options = RunOptions(max_in_flight=self.workers.num_workers, progress=self.workers.progress)
        run = run_tasks(
            worker, self.shards, shared=self.nearest, options=options, executor=self.executor, operation="search"
        )
        with run:
            return [outcome.unwrap() for outcome in run]


def _plan(spec: ReadSpec, asked: _Asked, workers: SearchWorkers) -> _Plan | None:
    """The shards of a search, or None where one call of the engine is right or quicker."""
    dataset, options = spec.table.open(), spec.scan.scanner
    nearest = options.get("nearest")
    if not isinstance(nearest, Mapping) or not _can_be_cut(spec):
        return None
    column, rest = nearest["column"], {key: value for key, value in nearest.items() if key not in ("column", "q", "k")}
    kind = vector_type(dataset.schema, column)
    if kind is None or not pa.types.is_fixed_size_list(kind):
        return None
    matrix = as_matrix(nearest["q"])
    queries = matrix if matrix is not None else np.asarray(nearest["q"])[None, :]
    rest = {key: value for key, value in rest.items() if value is not None}
    index = choose_index(dataset, column, rest, asked.index_name)
    fast = bool(options.get("fast_search")) or not asked.include_unindexed
    k = int(nearest.get("k") or _DEFAULT_K)
    what = NearestSpec(
        spec.table,
        column,
        queries,
        math.ceil(k * asked.oversample),
        rest,
        filter=spec.filter if options.get("prefilter", True) else None,
        scanner={key: options[key] for key in _SHARD_SCAN_OPTIONS if key in options},
        index=index,
        include_unindexed=index is None or not fast,
    )
    what = dataclasses.replace(what, matrix=has_matrix_form(kind, queries, what.metric, rest))
    flat = flat_stats(what, _vector_bytes(kind))
    size = sum(flat.weights)
    if index is not None and fast and not index.segments:
        return None
    small = size * len(queries) <= 2 * workers.shard_bytes and len(queries) < 2 * SHARD_QUERIES
    forced = asked != _Asked() or workers.asked
    if small and not forced and (index is None or len(index.segments) == 1):
        return None
    executor, slots = workers.choose(size * (1 + len(queries) * _QUERY_WEIGHT))
    share = Sharing(slots, workers.shard_bytes, splittable=what.matrix)
    shards = plan_search(len(queries), index.segments if index else (), flat, share)
    return _Plan(what, tuple(shards), executor, workers, matrix is not None)


def _vector_bytes(kind: pa.DataType) -> float:
    return float(kind.list_size * (kind.value_type.bit_width / 8))


def _can_be_cut(spec: ReadSpec) -> bool:
    options = spec.scan.scanner
    plain = spec.filter is None or spec.scan.has_condition
    computed = any(DISTANCE in sql or "_score" in sql for _, sql in spec.scan.expressions)
    return set(options) <= _SHARDED_OPTIONS and plain and not computed and spec.scan.fragment_ids is None


def choose_index(
    dataset: lance.LanceDataset, column: str, options: Mapping[str, Any], name: str | None
) -> VectorIndex | None:
    """The index that answers, as the engine chooses it: none where another metric is asked for, or no index.

    Raises:
        InvalidArgumentError: the index that was named is none of the column.
    """
    have = vector_indices(dataset, column)
    if name is not None and name not in [item.name for item in have]:
        raise InvalidArgumentError(
            "index_name", name, f"is no vector index of {column}, which has {[item.name for item in have]}"
        )
    if options.get("use_index") is False:
        return None
    metric = options.get("metric")
    fitting = [item for item in have if name in (None, item.name) and metric in (None, item.metric)]
    return fitting[0] if fitting else None


def _with_columns(spec: ReadSpec, found: Found, k: int, *, batch: bool) -> pa.Table:
    """The rows found with the columns asked for."""
    scan_options = spec.scan
    postfilter = spec.filter if not scan_options.scanner.get("prefilter", True) else None
    plain = {key: scan_options.scanner[key] for key in ("blob_handling",) if key in scan_options.scanner}
    bare = dataclasses.replace(
        spec,
        scan=dataclasses.replace(scan_options, scanner=plain, filter=None, limit=None, offset=0),
        projection=_stored(spec),
    )
    table, present = fetch(bare, found.row_id, postfilter)
    found = found.select(present)
    kept = within(found.query, k)
    table, found = table.filter(pa.array(kept)), found.select(kept)
    first = scan_options.offset
    chosen = slice(first, None if scan_options.limit is None else first + scan_options.limit)
    table, found = table.slice(first, scan_options.limit), found.select(np.arange(len(found))[chosen])
    table = table.append_column(pa.field(DISTANCE, pa.float32()), pa.array(found.distance))
    if batch:
        table = table.append_column(pa.field(QUERY_INDEX, pa.int32(), nullable=False), pa.array(found.query))
    return finish(table, spec).combine_chunks()


def _stored(spec: ReadSpec) -> tuple[str, ...] | None:
    """Of the columns that come out, those that are read."""
    names = [name for name in spec.output_schema.names if name not in (DISTANCE, QUERY_INDEX)]
    if FRAGMENT_ID in names and ROW_ADDRESS not in names:
        names.append(ROW_ADDRESS)
    return tuple(names)


def vector_search(
    uri: Any = None,
    *,
    nearest: Mapping[str, Any],
    index_name: str | None = None,
    columns: Sequence[str] | dict[str, str] | None = None,
    filter: Any = None,
    prefilter: bool | None = None,
    version: int | str | None = None,
    asof: Any = None,
    branch: str | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    block_size: int | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
    num_workers: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    oversample_factor: float = 1.0,
    include_unindexed: bool = True,
    fast_search: bool = False,
    analyze_plan: bool = False,
    with_row_id: bool = False,
    scanner_options: dict[str, Any] | None = None,
    pool: Any = None,
    progress: bool | Reporter | None = False,
) -> Any:
    """The k nearest rows of a table to a vector, or to each of many, over index segments and rows without an index.

    Distances are Lance's: ``l2`` is squared, ``dot`` is 1 - dot product, ``cosine`` 1 - cosine similarity. Without an
    index the rows are exactly those of a search in one process, ties in the order of row ids. With one, each segment
    is searched as the engine does it, so that no neighbour is lost which a search in one process finds.

    What cannot be cut into shards is one call of the engine in this process, whatever workers were asked for: columns
    of several vectors in a row (``q`` is then the vectors of one query), a ``lance.query.MinHashQuery`` as ``nearest``
    (ten rows; ``read_lance`` takes it with any ``limit``), a filter that is itself a query, and scanner options that
    choose rows (``row_addr_allowlist`` and the like). So are ``fragment_ids`` in ``read_lance(nearest=...)``, in one
    task.

    Args:
        uri: path or URI of the table, or an opened dataset.
        nearest: ``column``, ``q`` (a vector, or a 2-D array or list of vectors for many queries), ``k`` (10), and any
            of ``metric``, ``nprobes``, ``minimum_nprobes``, ``maximum_nprobes``, ``refine_factor``, ``ef``,
            ``use_index``, ``distance_range``, ``approx_mode``, ``query_parallelism``, ``search_effort``.
        index_name: the index to use, where the column has several.
        columns: columns of the result, or a dict of name to SQL expression; all by default.
        filter: SQL or a pyarrow expression.
        prefilter: whether the filter comes before the ranking (the default), or removes rows from the k nearest.
        version: a version number or a tag; the newest by default.
        asof: the version of a time.
        branch: the branch to search.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        block_size: bytes of the smallest I/O request.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        num_workers: shards at once at most. Giving it, ``ray_remote_args`` or a pool sends also a small search to the
            cluster; by default size decides.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        oversample_factor: each shard is asked for k times this many rows (at least 1), of which the k nearest are
            kept: helps where an index only estimates distances, and with ``prefilter=False``.
        include_unindexed: whether rows that the index does not know are searched, too.
        fast_search: the opposite of ``include_unindexed``, by the engine's name.
        analyze_plan: run the search and return the engine's analysis of each shard as text.
        with_row_id: add ``_rowid``.
        scanner_options: further options of ``LanceDataset.scanner``.
        pool: :class:`lance_ray.WarmWorkers`, or a ``ray.util.multiprocessing.Pool``; by default the global one. A
            process that dies is replaced in either. A ``Pool`` that gives no result for an hour ends the search.
        progress: True for a bar, a reporter of one's own, False for silence.

    Returns:
        A table of the columns and ``_distance``, nearest first; for many queries with ``query_index`` (int32), by which
        it is sorted first. Fewer than k rows where there are not more. With ``analyze_plan`` a string.

    Raises:
        InvalidArgumentError: unknown column or index, a query of another dimension or type, k not positive; before any
            task starts.
        TableNotFoundError, VersionNotFoundError, StorageError, WorkerEnvironmentError: as for ``read_lance``.
        TaskFailedError: a shard failed for good.
    """
    if nearest is None:
        raise InvalidArgumentError("nearest", None, "must be a dict with 'column' and 'q', or a query of lance.query")
    options = scanner_options_of(scanner_options, nearest=nearest, prefilter=prefilter)
    check_text("index_name", index_name)
    check_flag("analyze_plan", analyze_plan)
    check_flag("include_unindexed", include_unindexed)
    check_flag("fast_search", fast_search)
    if fast_search:
        options["fast_search"] = True
    if not isinstance(oversample_factor, (int, float)) or not 1 <= oversample_factor < math.inf:
        raise InvalidArgumentError("oversample_factor", oversample_factor, "must be at least 1, and finite")
    workers = SearchWorkers.fold(num_workers, ray_remote_args, pool, progress)
    ref = TableRef.fold(
        uri,
        address_of(locals()),
        version=version,
        asof=asof,
        branch=branch,
        open_options=OpenOptions(block_size),
    )
    scan_options = ScanOptions.fold(options, columns=columns, filter=filter, with_row_id=with_row_id)
    asked = _Asked(index_name, float(oversample_factor), include_unindexed)
    spec = ranked_spec(ref, scan_options)
    _check_index(spec, asked)
    return _analysis(spec, asked, workers) if analyze_plan else search_rows(spec, workers, asked)


def scanner_options_of(given: Mapping[str, Any] | None, **own: Any) -> dict[str, Any]:
    """The caller's ``scanner_options`` with those of a search that have keywords; no other may be among them."""
    if given is not None and not isinstance(given, Mapping):
        raise InvalidArgumentError("scanner_options", given, "must be a mapping of scanner options")
    if taken := sorted(set(given or ()) & set(_RESERVED)):
        raise InvalidArgumentError("scanner_options", taken, "have keywords of their own")
    return {**(given or {}), **{key: value for key, value in own.items() if value is not None}}


def with_search_options(given: Any, nearest: Any, full_text_query: Any, prefilter: Any) -> Any:
    """``scanner_options`` with the keywords of a ranked read, which win; what is no mapping is left to be refused."""
    own = {"nearest": nearest, "full_text_query": full_text_query, "prefilter": prefilter}
    own = {key: value for key, value in own.items() if value is not None}
    return {**(given or {}), **own} if own and (given is None or isinstance(given, Mapping)) else given


def ranked_spec(ref: TableRef, scan_options: ScanOptions) -> ReadSpec:
    """The read of a pinned table, checked against it."""
    table = ref.pin()
    return ReadSpec(table, scan_options, table_schema(table, scan_options))


def _check_index(spec: ReadSpec, asked: _Asked) -> None:
    options = spec.scan.scanner
    nearest = options["nearest"]
    if not isinstance(nearest, Mapping):
        return
    index = choose_index(spec.table.open(), nearest["column"], nearest, asked.index_name)
    if index is None and (options.get("fast_search") or not asked.include_unindexed):
        raise InvalidArgumentError(
            "fast_search", True, f"no vector index of {nearest['column']} can answer, so that no row would be searched"
        )


def _analysis(spec: ReadSpec, asked: _Asked, workers: SearchWorkers) -> str:
    plan = _plan(spec, asked, workers)
    if plan is not None:
        return "\n".join(plan.run(explain_shard))
    dataset = spec.table.open()
    kwargs = {**spec.scanner_kwargs(dataset), "limit": spec.scan.limit, "offset": spec.scan.offset or None}
    text: str = dataset.scanner(**kwargs).analyze_plan()
    return text
