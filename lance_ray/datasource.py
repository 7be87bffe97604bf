"""Reading with Ray Data: :func:`read_lance`, and the Ray Datasource that plans tasks and takes pushdown."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lance
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.expressions import Expr

from lance_ray.arrow import row_width, unify
from lance_ray.blobs import mean_bytes
from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import check_ray_options, check_sendable, unnamed_options
from lance_ray.full_start import start_in_full
from lance_ray.memory import keep_freed_memory, object_store_share
from lance_ray.options import (
    PlanOptions,
    ScanOptions,
    check_flag,
    check_positive,
    default_blobs,
    fold_dataset_options,
    fold_seed,
    split_base_params,
)
from lance_ray.planning.reads import Cut, ReadTaskPlan, number_of_tasks, plan_reads
from lance_ray.predicates import columns_of, split_predicate
from lance_ray.preflight import check_cluster
from lance_ray.read import (
    ReadSpec,
    ReadTaskRows,
    blobs_of,
    bytes_per_row,
    fragment_stats,
    index_answer,
    read_batch_rows,
    scan,
    table_schema,
)
from lance_ray.retry import RetryPolicy
from lance_ray.search import SearchWorkers, search_rows, with_search_options
from lance_ray.table import PinnedTable, TableRef, address_of

logger = logging.getLogger(__name__)


_NO_DATASET_OPTIONS = dict.fromkeys(
    (
        "version",
        "asof",
        "block_size",
        "index_cache_size_bytes",
        "metadata_cache_size_bytes",
        "commit_lock",
        "default_scan_options",
        "read_params",
        "session",
    )
)


class LanceDatasource(Datasource):
    """Lance tables as a Ray Datasource: pickles small (no open handle, no manifest), plans by bytes, takes pushdown.

    Ray calls :meth:`get_read_tasks` several times before it runs anything, to learn the number of rows and the schema.
    Those calls are answered from totals; fragments are only looked at, and an index only asked, for the call that runs.
    """

    def __init__(  # noqa: PLR0917 - lance-ray's order
        self,
        uri: Any = None,
        table_id: Sequence[str] | None = None,
        columns: Sequence[str] | dict[str, str] | None = None,
        filter: Any = None,
        storage_options: Any = None,
        scanner_options: dict[str, Any] | None = None,
        dataset_options: dict[str, Any] | None = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        fragment_ids: Sequence[int] | None = None,
        namespace_impl: Any = None,
        namespace_properties: dict[str, str] | None = None,
        with_metadata: bool = False,
    ) -> None:
        """See :func:`read_lance`. Resolves the version and checks columns and filter at once."""
        check_flag("with_metadata", with_metadata)
        dataset_options, base_store_params = split_base_params(dataset_options, base_store_params)
        version, asof, open_options = fold_dataset_options(dataset_options, **_NO_DATASET_OPTIONS)
        scan_options = ScanOptions.fold(
            scanner_options,
            defaults=open_options.default_scan_options,
            columns=columns,
            filter=filter,
            fragment_ids=fragment_ids,
            with_row_address=with_metadata,
            with_fragment_id=with_metadata,
            blobs=default_blobs(scanner_options, "bytes"),
        )
        address = {
            "table_id": table_id,
            "namespace_impl": namespace_impl,
            "namespace_properties": namespace_properties,
            "storage_options": storage_options,
            "base_store_params": base_store_params,
        }
        refs = [
            TableRef.fold(item, address, version=version, asof=asof, open_options=open_options) for item in _uris(uri)
        ]
        self._start(_specs([ref.pin() for ref in refs], scan_options), PlanOptions())

    @classmethod
    def of(cls, specs: Sequence[ReadSpec], plan: PlanOptions) -> LanceDatasource:
        """The source of reads that are folded and checked already."""
        source = cls.__new__(cls)
        source._start(specs, plan)
        return source

    def _start(self, specs: Sequence[ReadSpec], plan: PlanOptions) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Ray's base class is typed in parts
        self._specs = tuple(specs)
        self._plan = plan
        self._projection_map: dict[str, str] | None = None

    @property
    def lance_dataset(self) -> lance.LanceDataset:
        """The table at the version that is read; of several, the first."""
        return self._specs[0].table.open()

    @property
    def fragments(self) -> list[lance.LanceFragment]:
        """The fragments that are read, in table order; of several tables, those of the first."""
        dataset, wanted = self.lance_dataset, self._specs[0].scan.fragment_ids
        return [item for item in dataset.get_fragments() if wanted is None or item.fragment_id in wanted]

    def get_name(self) -> str:
        """The name that Ray shows for the read: ``ReadLance``."""
        return "Lance"

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of the projected columns, or None where a filter or a ranking decides how many rows there are."""
        if any(spec.has_filter or spec.scan.is_search for spec in self._specs):
            return None
        return sum(outline.size_bytes for spec in self._specs for outline in (_outline(spec),))

    def supports_projection_pushdown(self) -> bool:
        """True: only the columns that are needed are read."""
        return True

    def supports_predicate_pushdown(self) -> bool:
        """Whether a later filter may be moved into the scan: not where it must see only the rows selected here."""
        return not any(spec.scan.refuses_predicates for spec in self._specs)

    def apply_projection(self, projection_map: dict[str, str] | None) -> LanceDatasource:
        """The same source for these columns of the present ones (values of the map are ignored, as Ray wants it).

        Raises:
            InvalidArgumentError: a column that the read does not have.
        """
        clone = copy.copy(self)
        clone._projection_map = self._combine_projection_map(self._projection_map, projection_map)
        projection = None if clone._projection_map is None else tuple(clone._projection_map)
        _check_known("columns", projection or (), self._specs[0].schema)
        clone._specs = tuple(dataclasses.replace(spec, projection=projection) for spec in self._specs)
        return clone

    def apply_predicate(self, predicate_expr: Expr) -> LanceDatasource:
        """The same source with a filter, or this very object when none of it can be decided by Lance.

        Raises:
            InvalidArgumentError: a column that the read does not have, or that was not selected from it.
        """
        _check_known("expr", columns_of(predicate_expr), self._specs[0].output_schema)
        specs = [_with_predicate(spec, predicate_expr) for spec in self._specs]
        if any(spec is None for spec in specs):
            return self
        clone = copy.copy(self)
        clone._predicate_expr = (
            predicate_expr if self._predicate_expr is None else self._predicate_expr & predicate_expr
        )
        clone._specs = tuple(spec for spec in specs if spec is not None)
        return clone

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - decided by the plan; Ray is asked for one block, see read_lance
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """The tasks of the read. Only the call that runs carries a ``data_context``; the others get an outline.

        An outline's tasks are real: each plans for itself when run, and reads its share.
        """
        make = functools.partial(_read_task, limit=per_task_row_limit)
        if len(self._specs) > 1 and _is_counted(self._specs[0].scan) and self._specs[0].has_filter:
            return [make(self._specs[0], functools.partial(_scan_window, self._specs), _EMPTY)]
        cpus = _cluster_cpus()
        tasks: list[ReadTask] = []
        for spec in self._specs:
            cut = self._cut(spec, cpus)
            if data_context is not None:
                tasks += [make(spec, _reader(spec, rows), plan) for rows, plan in _plan(spec, cut)]
                continue
            outline = _outline(spec)
            count = self._count_tasks(spec, outline, cut)
            for share in range(count):
                read = functools.partial(_scan_share, spec, cut, share, count)
                tasks.append(make(spec, read, outline.share(share, count)))
        return tasks or [make(self._specs[0], functools.partial(_nothing, self._specs[0].output_schema), _EMPTY)]

    def _count_tasks(self, spec: ReadSpec, outline: _Outline, cut: Cut) -> int:
        if spec.scan.is_single_task:
            return 1
        if cut.group_size is not None:
            return max(1, -(-outline.fragments // cut.group_size))
        return min(number_of_tasks(outline.size_bytes, cut, outline.fragments), max(outline.rows, 1))

    def _cut(self, spec: ReadSpec, cpus: int) -> Cut:
        tables = len(self._specs)
        override = self._plan.override_num_blocks
        return Cut(
            cpus=cpus,
            filtered=spec.filter is not None,
            group_size=self._plan.fragment_group_size,
            num_tasks=None if override is None else max(1, override // tables),
            shuffle_seed=self._plan.shuffle_seed,
            splittable=not spec.is_masked,
            most_bytes=object_store_share(),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Outline:
    """Totals of a read, from the manifest's summary."""

    rows: int
    size_bytes: int
    fragments: int

    def share(self, index: int, count: int) -> ReadTaskPlan:
        rows = self.rows * (index + 1) // count - self.rows * index // count
        return ReadTaskPlan((), rows, self.size_bytes // count)


_EMPTY = ReadTaskPlan((), 0, 0)
_ALL = ReadTaskRows()


def _outline(spec: ReadSpec) -> _Outline:
    dataset = spec.table.open()
    ids = spec.scan.fragment_ids
    if ids is None:
        rows, fragments = dataset.count_rows(), len(dataset.fragment_ids())
    else:
        stats = fragment_stats(spec.table, 1.0, ids)
        rows, fragments = sum(stats.rows), len(ids)
    rows = max(0, rows - spec.scan.offset)
    if spec.scan.limit is not None:
        rows = min(rows, spec.scan.limit)
    return _Outline(rows, int(rows * _row_bytes(spec)), fragments)


@functools.lru_cache(maxsize=64)
def _cached_row_bytes(table: PinnedTable, schema: bytes) -> float:
    return bytes_per_row(table, pa.ipc.read_schema(pa.py_buffer(schema)))


def _row_bytes(spec: ReadSpec) -> float:
    schema, wanted = spec.output_schema, spec.scan.blob_range
    if not spec.read_blobs:
        return _cached_row_bytes(spec.table, schema.serialize().to_pybytes())
    payload = (
        0.0
        if spec.scan.blobs == "handles"
        else sum(mean_bytes(spec.table, column.source, wanted) for column in spec.read_blobs)
    )
    return _scanned_row_bytes(spec) + payload


def _scanned_row_bytes(spec: ReadSpec) -> float:
    """Bytes of a row as the scan gives it, blobs as their descriptors."""
    blobs = {column.path[0] for column in spec.read_blobs}
    rest = pa.schema([item for item in spec.output_schema if item.name not in blobs])
    return _cached_row_bytes(spec.table, rest.serialize().to_pybytes()) + 32.0 * len(blobs)


def _plan(spec: ReadSpec, cut: Cut) -> list[tuple[ReadTaskRows, ReadTaskPlan]]:
    """The rows of each task, in table order. Looks at the fragments, and asks an index once where one can answer."""
    scan_options = spec.scan
    counted = _is_counted(scan_options)
    if scan_options.is_single_task or (counted and spec.has_filter):
        return [(_ALL, _outline(spec).share(0, 1))]
    answer = None if counted else index_answer(spec)
    if answer is not None:
        return _plan_answer(spec, answer, cut)
    varies = row_width(spec.output_schema)[1] > 0
    stats = fragment_stats(spec.table, _row_bytes(spec), scan_options.fragment_ids, varies=varies)
    plans = plan_reads(stats, cut, offset=scan_options.offset, limit=scan_options.limit)
    return [(ReadTaskRows(plan.pieces), plan) for plan in plans]


def _plan_answer(spec: ReadSpec, answer: Any, cut: Cut) -> list[tuple[ReadTaskRows, ReadTaskPlan]]:
    count = answer.shape[1]
    if count == 0:
        return []
    if cut.shuffle_seed is not None:
        order = list(range(count))
        random.Random(cut.shuffle_seed).shuffle(order)
        answer = answer[:, order]
    row_bytes = _row_bytes(spec)
    tasks = min(count, number_of_tasks(count * row_bytes, dataclasses.replace(cut, filtered=False)))
    planned = []
    for index in range(tasks):
        part = answer[:, count * index // tasks : count * (index + 1) // tasks]
        fragments = tuple(sorted({int(item) for item in part[1] >> 32}))
        rows = ReadTaskRows(row_ids=part[0].tobytes(), fragment_ids=fragments)
        planned.append((rows, ReadTaskPlan((), part.shape[1], int(part.shape[1] * row_bytes))))
    return planned


def _is_counted(options: ScanOptions) -> bool:
    return options.limit is not None or options.offset > 0


def _windows(specs: Sequence[ReadSpec]) -> list[ReadSpec]:
    """A limit and an offset over all tables, in their order, as one of each table, by the rows that each has."""
    skip, left = specs[0].scan.offset, specs[0].scan.limit
    found = []
    for spec in specs:
        rows = spec.table.open().count_rows()
        start = min(skip, rows)
        count = rows - start if left is None else min(rows - start, left)
        found.append(dataclasses.replace(spec, scan=dataclasses.replace(spec.scan, offset=start, limit=count)))
        skip, left = skip - start, None if left is None else left - count
    return found


def _scan_window(specs: Sequence[ReadSpec]) -> Iterable[pa.Table]:
    """The rows of all tables between a limit and an offset that count the rows that pass a filter."""
    keep_freed_memory()
    skip, left = specs[0].scan.offset, specs[0].scan.limit
    for spec in specs:
        most = None if left is None else skip + left
        for table in scan(dataclasses.replace(spec, scan=dataclasses.replace(spec.scan, offset=0, limit=most)), _ALL):
            part = table.slice(min(skip, table.num_rows), left)
            skip -= min(skip, table.num_rows)
            left = None if left is None else left - part.num_rows
            if part.num_rows:
                yield part
        if left == 0:
            return


def _scan_rows(spec: ReadSpec, rows: ReadTaskRows) -> Iterable[pa.Table]:
    keep_freed_memory()
    return scan(spec, rows)


def _search_rows(spec: ReadSpec, workers: SearchWorkers) -> Iterable[pa.Table]:
    keep_freed_memory()
    return [search_rows(spec, workers)]


def _reader(spec: ReadSpec, rows: ReadTaskRows) -> Callable[[], Iterable[pa.Table]]:
    if spec.scan.is_search:
        return functools.partial(_search_rows, spec, SearchWorkers())
    return functools.partial(_scan_rows, spec, rows)


def _scan_share(spec: ReadSpec, cut: Cut, share: int, count: int) -> Iterable[pa.Table]:
    """The share-th of count parts of a read that was only outlined."""
    keep_freed_memory()
    planned = _plan(spec, cut)
    for rows, _ in planned[len(planned) * share // count : len(planned) * (share + 1) // count]:
        yield from _reader(spec, rows)()


def _nothing(schema: pa.Schema) -> Iterable[pa.Table]:
    return [schema.empty_table()]


def _read_task(
    spec: ReadSpec, read: Callable[[], Iterable[pa.Table]], plan: ReadTaskPlan, *, limit: int | None
) -> ReadTask:
    call: Any = read  # always a partial
    answered = call.func is _scan_rows and call.args[1].row_ids is not None and spec.residual is None
    exact = answered or not (spec.scan.is_search or spec.has_filter)
    metadata = BlockMetadata(
        num_rows=plan.rows if exact else None,
        size_bytes=plan.size_bytes if exact else None,
        exec_stats=None,
        input_files=None,
    )
    return ReadTask(read, metadata, schema=spec.output_schema, per_task_row_limit=limit)


def _check_known(parameter: str, names: Iterable[str], schema: pa.Schema) -> None:
    unknown = [name for name in names if name not in schema.names]
    if unknown:
        raise InvalidArgumentError(parameter, unknown, f"are not columns of the dataset, which has {schema.names}")


def _with_predicate(spec: ReadSpec, predicate: Expr) -> ReadSpec | None:
    """The read with a filter pushed into it, or None when Ray had better filter by itself."""
    if spec.filter is not None and not isinstance(spec.filter, str):
        return None  # a pyarrow expression and SQL cannot be joined
    schema = pa.schema([]) if spec.scan.expressions else spec.table.open().schema
    known = pa.schema([item for item in schema if item.name in columns_of(predicate).intersection(spec.schema.names)])
    split = split_predicate(predicate, known)
    if split.sql is None:
        return None
    sql = split.sql if spec.sql is None else f"({spec.sql}) AND ({split.sql})"
    residual = split.residual
    if spec.residual is not None:
        residual = spec.residual if residual is None else spec.residual & residual
    return dataclasses.replace(spec, sql=sql, residual=residual)


def _cluster_cpus() -> int:
    if not ray.is_initialized():
        return 1
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def read_lance(
    uri: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    columns: Sequence[str] | dict[str, str] | None = None,
    filter: Any = None,
    version: int | str | None = None,
    asof: Any = None,
    branch: str | None = None,
    limit: int | None = None,
    offset: int | None = None,
    nearest: Mapping[str, Any] | None = None,
    full_text_query: Any = None,
    prefilter: bool | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    scanner_options: dict[str, Any] | None = None,
    dataset_options: dict[str, Any] | None = None,
    default_scan_options: dict[str, Any] | None = None,
    fragment_ids: Sequence[int] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    with_metadata: bool = False,
    with_row_id: bool = False,
    with_row_address: bool = False,
    blobs: str | None = None,
    blob_range: tuple[int, int] | None = None,
    blob_batch_bytes: int | None = None,
    fragment_group_size: int | None = None,
    shuffle: bool | int | None = None,
    block_size: int | None = None,
    index_cache_size_bytes: int | None = None,
    metadata_cache_size_bytes: int | None = None,
    commit_lock: Any = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: float | None = None,
    concurrency: int | None = None,
    override_num_blocks: int | None = None,
    label_selector: dict[str, str] | None = None,
    fallback_strategy: list[dict[str, Any]] | None = None,
    max_calls: int | None = None,
    resources: dict[str, float] | None = None,
    accelerator_type: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> Dataset:
    """A Ray Dataset of the rows of a Lance table, read in parallel from one version that is resolved now.

    Nothing is read before the dataset is consumed; columns and filters that are chosen later (``select_columns``,
    ``ds.filter(expr=...)``) are pushed into the scan. Blocks are Arrow tables in table order where Ray preserves order.

    Args:
        uri: path or URI of a table, an opened ``lance.LanceDataset``, or a list of paths and URIs, whose rows come out
            one table after the other with one schema (missing columns are null).
        table_id: the table's name in a namespace, with ``namespace_impl``.
        columns: names to read, or a dict of name to SQL expression. Metadata columns (``_rowid``, ``_rowaddr``,
            ``_row_created_at_version``, ``_row_last_updated_at_version``) may be named too.
        filter: SQL text or a pyarrow expression, with Lance's meaning; for a search also a query, as
            ``full_text_query`` takes it.
        version: a version number or a tag; the newest by default.
        asof: the newest version that existed at this time, inclusive (datetime or ISO string; naive means local).
        branch: the branch to read.
        limit: rows to read, over the whole table and in its order (of a list, over all tables in the list's order).
        offset: rows to skip before those.
        nearest: read only the rows nearest to a vector, nearest first, with their ``_distance``: see
            :func:`lance_ray.vector_search`. One block with exactly the k nearest of the whole table comes out, however
            many tasks find them; nothing is searched before the dataset is consumed.
        full_text_query: read only the rows that match a text, best first, with their ``_score``: text, a dict of
            ``query`` and ``columns``, or ``functools.partial(MatchQuery, ...)`` or another function that makes one of
            ``lance.query`` (these themselves cannot be sent to workers). ``limit`` says how many.
        prefilter: whether ``filter`` comes before the ranking of ``nearest`` and ``full_text_query`` (the default), or
            removes rows from its result.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes;
            vended ones of a namespace win over them.
        base_store_params: storage options of further bases, by base URI.
        scanner_options: anything else that ``LanceDataset.scanner`` takes (``batch_size``, ``nearest``, ...).
        dataset_options: ``version``, ``asof``, ``block_size``, ``index_cache_size_bytes``,
            ``metadata_cache_size_bytes``, ``commit_lock``, ``default_scan_options`` and ``base_store_params`` as a
            dict; keywords win. Also ``read_params``, the decoder's switches ``cache_repetition_index`` and
            ``validate_on_decode``, which every worker has, too; and ``session``, a ``lance.Session`` that this process
            plans with (it goes to no other: each worker has one of its own, of the cache sizes given).
        default_scan_options: scanner options that ``scanner_options`` overrides.
        fragment_ids: only these fragments; an empty list reads nothing.
        namespace_impl: ``dir``, ``rest`` or another Lance Namespace implementation.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        with_metadata: add ``_rowaddr`` and ``_fragid`` (uint64).
        with_row_id: add ``_rowid`` (uint64).
        with_row_address: add ``_rowaddr`` (uint64).
        blobs: how blob columns come out: ``bytes`` (the default here; ``large_binary``), ``descriptors`` (the default
            of ``ray.data.read_lance``, as in Ray; structs without any payload) or ``handles``
            (:class:`lance_ray.BlobHandle` objects, opened where they are used).
        blob_range: read only these bytes of each blob, as (offset, length); a negative offset counts from the end, and
            what lies beyond the end is left out.
        blob_batch_bytes: payload of blobs that a task reads at a time (32 MiB); a larger blob is read by itself.
        fragment_group_size: whole fragments for each task; wins over ``override_num_blocks`` and the planner.
        shuffle: read row ranges in a random order; a number is the seed, which makes the order repeatable.
        block_size: bytes of the smallest I/O request.
        index_cache_size_bytes: index cache of each process.
        metadata_cache_size_bytes: metadata cache of each process.
        commit_lock: for stores without atomic commits.
        num_cpus: CPUs of each read task; like the other Ray options below, as in ``ray.data.read_datasource``.
        num_gpus: GPUs of each read task.
        memory: heap bytes of each read task.
        concurrency: tasks at once at most; does not change how many there are.
        override_num_blocks: tasks to cut the read into; decided from bytes and CPUs by default.
        label_selector: labels that a node must have.
        fallback_strategy: other labels, tried in order.
        max_calls: tasks that a worker runs before it exits.
        resources: custom resources of each task.
        accelerator_type: accelerator of each task.
        runtime_env: runtime environment of each task.
        ray_remote_args: further options of ``ray.remote``.

    Returns:
        The dataset. ``count()`` and ``schema()`` answer from the manifest, or from an index, where they can.

    Raises:
        InvalidArgumentError: a bad argument, an unknown column, a filter that does not parse. Before any task starts.
        TableNotFoundError: there is no table at the address.
        VersionNotFoundError: it has no such version, tag or branch.
        StorageError: the store could not be reached, or refused.
        WorkerEnvironmentError: a node of the cluster cannot read it.

    A transient storage error is retried from the row reached, by the number of attempts and the longest wait that
    ``DataContext.lance_config`` sets for reads (also by ``RAY_DATA_LANCE_READ_FRAGMENTS_...``); which errors are
    transient is decided by their type and not by its substrings.

    Concurrent writers, compactions and deletions do not disturb a read: it stays on its version. Only
    ``cleanup_old_versions`` of that very version does.
    """
    check_flag("with_metadata", with_metadata)
    dataset_options, base_store_params = split_base_params(dataset_options, base_store_params)
    version, asof, open_options = fold_dataset_options(
        dataset_options,
        read_params=None,
        session=None,
        version=version,
        asof=asof,
        block_size=block_size,
        index_cache_size_bytes=index_cache_size_bytes,
        metadata_cache_size_bytes=metadata_cache_size_bytes,
        commit_lock=commit_lock,
        default_scan_options=default_scan_options,
    )
    scan_options = ScanOptions.fold(
        with_search_options(scanner_options, nearest, full_text_query, prefilter),
        defaults=open_options.default_scan_options,
        columns=columns,
        filter=filter,
        limit=limit,
        offset=offset,
        fragment_ids=fragment_ids,
        with_row_id=with_row_id,
        with_row_address=True if with_metadata and with_row_address is False else with_row_address,
        with_fragment_id=with_metadata,
        blobs=default_blobs(scanner_options, "bytes") if blobs is None else blobs,
        blob_range=blob_range,
        blob_batch_bytes=blob_batch_bytes,
    )
    check_sendable("full_text_query", scan_options.scanner.get("full_text_query"))
    check_sendable("filter", scan_options.filter)
    plan = PlanOptions(fragment_group_size, override_num_blocks, fold_seed(shuffle))
    if plan.shuffle_seed is not None and scan_options.is_single_task:
        raise InvalidArgumentError("shuffle", shuffle, "cannot be combined with order_by, nearest or full text")
    check_positive("concurrency", concurrency)
    named = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "memory": memory,
        "label_selector": label_selector,
        "fallback_strategy": fallback_strategy,
        "max_calls": max_calls,
        "resources": resources,
        "accelerator_type": accelerator_type,
        "runtime_env": runtime_env,
    }
    _check_remote_args(ray_remote_args, named)
    address = address_of(locals())
    refs = [
        TableRef.fold(item, address, version=version, asof=asof, branch=branch, open_options=open_options)
        for item in _uris(uri)
    ]
    tables = [ref.pin() for ref in refs]
    check_cluster(tables)
    with unnamed_options():
        dataset: Dataset = ray.data.read_datasource(
            make_datasource(tables, scan_options, plan),
            concurrency=concurrency,
            override_num_blocks=1,  # the plan decides how many; Ray would split their output to reach any other number
            **_remote_args(ray_remote_args, named),
        )
    return start_in_full(dataset)


def _check_remote_args(remote_args: dict[str, Any] | None, named: dict[str, Any]) -> None:
    check_ray_options(remote_args)
    for name, value in named.items():
        if value is not None:
            check_ray_options({name: value}, name)


def _remote_args(remote_args: dict[str, Any] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Ray's options by name where they have one: Ray is about to drop the dict. Those given by name win."""
    merged = {**(remote_args or {}), **{key: value for key, value in named.items() if value is not None}}
    rest = {key: merged.pop(key) for key in [*merged] if key not in named}
    return {**merged, "ray_remote_args": rest or None}


def _uris(uri: Any) -> list[Any]:
    if not isinstance(uri, (list, tuple)):
        return [uri]
    if not uri:
        raise InvalidArgumentError("uri", uri, "the list of tables must not be empty")
    return list(uri)


def make_datasource(tables: Sequence[PinnedTable], scan_options: ScanOptions, plan: PlanOptions) -> LanceDatasource:
    """The datasource of pinned tables; checks columns and filter against them."""
    return LanceDatasource.of(_specs(tables, scan_options), plan)


def versions_read(ds: Dataset, table: PinnedTable) -> list[int]:
    """The versions of a table that the rows of a dataset come from, as far as Ray still knows: not after a
    ``materialize()``.
    """
    plan = getattr(ds, "_logical_plan", None)  # Ray has no public name for it
    sources = [] if plan is None else [getattr(item, "datasource", None) for item in plan.sources()]
    reads = [spec for source in sources if isinstance(source, LanceDatasource) for spec in source._specs]
    return sorted({spec.table.version for spec in reads if spec.table.uri == table.uri})


def _specs(tables: Sequence[PinnedTable], options: ScanOptions) -> list[ReadSpec]:
    if len(tables) > 1 and (options.is_single_task or options.fragment_ids is not None):
        raise InvalidArgumentError(
            "uri", f"{len(tables)} tables", "fragment_ids, order_by, nearest and full text are for one table"
        )
    schemas = [table_schema(table, _present(table, options, tables)) for table in tables]
    schema = schemas[0] if len(schemas) == 1 else unify(schemas, stored=False)
    if options.names is not None:
        schema = pa.schema([schema.field(name) for name in schema.names], schema.metadata)
    config = DataContext.get_current().lance_config
    retry = RetryPolicy(config.read_fragments_max_attempts, max_delay=config.read_fragments_retry_max_backoff_s)
    present = [_present(table, options, tables) for table in tables]
    specs = [
        ReadSpec(table, scan_options, schema, retry=retry, blobs=blobs_of(table, scan_options))
        for table, scan_options in zip(tables, present, strict=True)
    ]
    if len(specs) > 1 and _is_counted(options) and not specs[0].has_filter:
        specs = _windows(specs)
    return [
        dataclasses.replace(spec, batch_size=read_batch_rows(spec.output_schema, _scanned_row_bytes(spec)))
        for spec in specs
    ]


def _present(table: PinnedTable, options: ScanOptions, tables: Sequence[PinnedTable]) -> ScanOptions:
    """The options for one of several tables: columns that only others have are left out of its scan."""
    if len(tables) == 1 or options.columns is None or options.expressions:
        return options
    elsewhere = {name for other in tables for name in other.open().schema.names}
    here = set(table.open().schema.names)
    return dataclasses.replace(
        options, columns=tuple(name for name in options.columns if name in here or name not in elsewhere)
    )
