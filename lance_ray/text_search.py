"""Full text search, and text and vectors together. One text query is one search of the engine: see :mod:`.search`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from lance.query import FullTextQuery, MatchQuery, MultiMatchQuery

from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import LocalExecutor, check_sendable
from lance_ray.nearest import DISTANCE, QUERY_INDEX, fetch
from lance_ray.options import ScanOptions, check_flag, check_positive, strings
from lance_ray.planning.search import fused
from lance_ray.progress import Reporter
from lance_ray.read import ROW_ID, ReadSpec, finish
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.search import SearchWorkers, ranked_spec, scanner_options_of, search_rows
from lance_ray.table import TableRef, address_of

SCORE, RELEVANCE = "_score", "_relevance_score"

_TASK_QUERIES = 16
_QUERY_BYTES = 4 * 1024**2  # a text query costs about as much as reading so many bytes of vectors


@dataclass(frozen=True, slots=True)
class TextTask:
    """Some of the queries, and the number of the first."""

    first: int
    queries: tuple[Any, ...]


def full_text_search(
    uri: Any = None,
    query: Any = None,
    *,
    text_columns: str | Sequence[str] | None = None,
    limit: int | None = 10,
    columns: Sequence[str] | dict[str, str] | None = None,
    filter: Any = None,
    prefilter: bool | None = None,
    fast_search: bool = False,
    with_row_id: bool = False,
    version: int | str | None = None,
    asof: Any = None,
    branch: str | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
    num_workers: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    scanner_options: dict[str, Any] | None = None,
    pool: Any = None,
    progress: bool | Reporter | None = False,
) -> pa.Table:
    """The rows of a table that match a text best, or for each of many texts. Needs an ``INVERTED`` index.

    Each query is one search of the engine, because its scores (BM25) need the statistics of the whole index; many
    queries run beside each other.

    Args:
        uri: path or URI of the table, or an opened dataset.
        query: text, a query of ``lance.query``, a dict of ``query`` and ``columns``, or a list of these. Queries of
            ``lance.query`` cannot be sent to other processes; ``functools.partial(MatchQuery, ...)``, or another
            function that makes the query, can.
        text_columns: the columns that a text is searched in; by default all that have an index.
        limit: rows of the result, for each query; None for all that match.
        columns: columns of the result, or a dict of name to SQL expression; all by default.
        filter: SQL or a pyarrow expression.
        prefilter: whether the filter comes before ``limit`` (the default).
        fast_search: leave out rows that the index does not know yet.
        with_row_id: add ``_rowid``.
        version: a version number or a tag; the newest by default.
        asof: the version of a time.
        branch: the branch to search.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        num_workers: tasks at once at most. Giving it, ``ray_remote_args`` or a pool sends the queries to the cluster,
            as very many are anyway.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        scanner_options: further options of ``LanceDataset.scanner``.
        pool: as for :func:`lance_ray.vector_search`.
        progress: True for a bar, a reporter of one's own, False for silence.

    Returns:
        A table of the columns and ``_score``, best first; for a list of queries with ``query_index`` (int32), by which
        it is sorted first.

    Raises:
        InvalidArgumentError: no query, a column that has no such index, a filter that does not parse.
        TableNotFoundError, VersionNotFoundError, StorageError: as for ``read_lance``.
        TaskFailedError: a query failed for good.
    """
    many = isinstance(query, (list, tuple))
    check_flag("fast_search", fast_search)
    texts = tuple(_text_query(item, text_columns) for item in (query if many else [query]))
    if not texts:
        raise InvalidArgumentError("query", query, "must name at least one query")
    check_positive("limit", limit)
    workers = SearchWorkers.fold(num_workers, ray_remote_args, pool, progress)
    address = address_of(locals())
    ref = TableRef.fold(uri, address, version=version, asof=asof, branch=branch)
    given = scanner_options_of(scanner_options, prefilter=prefilter, fast_search=fast_search or None)
    scan_options = ScanOptions.fold(
        {**given, "full_text_query": texts[0]}, columns=columns, filter=filter, limit=limit, with_row_id=with_row_id
    )
    spec = ranked_spec(ref, scan_options)
    if not many and not workers.asked:
        return search_rows(spec, workers)
    return _many(spec, texts, workers, batch=many)


def _text_query(query: Any, columns: str | Sequence[str] | None, parameter: str = "query") -> Any:
    """What the engine is asked: the query itself, or the text in the columns. A call of the result makes the query."""
    if columns is not None and not isinstance(query, str):
        raise InvalidArgumentError("text_columns", columns, "goes with a text; a query object names its own")
    if isinstance(query, str) and query.strip():
        names = (
            None if columns is None else strings("text_columns", (columns,) if isinstance(columns, str) else columns)
        )
        if names == ():
            raise InvalidArgumentError("text_columns", [], "must name a column")
        return query if names is None else _In(query, names)
    if isinstance(query, (FullTextQuery, Mapping)) or callable(query):
        return query
    raise InvalidArgumentError(parameter, query, "must be text that is not empty, a query of lance.query, or a dict")


@dataclass(frozen=True, slots=True)
class _In:
    """A text in some columns; unlike the engine's queries it can be sent to other processes."""

    text: str
    columns: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{self.text!r} with text_columns={list(self.columns)}"  # as the caller gave it, for messages

    def __call__(self) -> FullTextQuery:
        if len(self.columns) == 1:
            return MatchQuery(self.text, self.columns[0])
        return MultiMatchQuery(self.text, list(self.columns))


def _many(spec: ReadSpec, texts: Sequence[Any], workers: SearchWorkers, *, batch: bool) -> pa.Table:
    executor, slots = workers.choose(len(texts) * _QUERY_BYTES)
    if not isinstance(executor, LocalExecutor):
        for item in texts:
            check_sendable("query", item)
    size = max(1, min(_TASK_QUERIES, -(-len(texts) // slots)))
    tasks = [TextTask(at, tuple(texts[at : at + size])) for at in range(0, len(texts), size)]
    options = RunOptions(max_in_flight=workers.num_workers, progress=workers.progress)
    run = run_tasks(answer_texts, tasks, shared=spec, options=options, executor=executor, operation="full_text_search")
    with run:
        found = {outcome.index: outcome.unwrap() for outcome in run}
    table = pa.concat_tables([found[index] for index in range(len(tasks))]).combine_chunks()
    return table if batch else table.drop_columns([QUERY_INDEX])


def answer_texts(spec: ReadSpec, task: TextTask) -> pa.Table:
    """Runs on a worker: the rows of some queries, one after the other."""
    parts = []
    for at, text in enumerate(task.queries, task.first):
        scanner = {**spec.scan.scanner, "full_text_query": text}
        one = dataclasses.replace(spec, scan=dataclasses.replace(spec.scan, scanner=scanner))
        found = search_rows(one, SearchWorkers(threads=1))
        numbers = pa.array(np.full(found.num_rows, at, np.int32))
        parts.append(found.add_column(0, pa.field(QUERY_INDEX, pa.int32(), nullable=False), numbers))
    return pa.concat_tables(parts)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How two rankings become one."""

    limit: int
    candidates: int
    weights: tuple[float, float]
    rrf_k: float

    @classmethod
    def fold(cls, limit: Any, candidates: Any, weights: Any, rrf_k: Any) -> Fusion:
        """The value, checked."""
        check_positive("limit", limit, optional=False)
        check_positive("candidates", candidates)
        given = tuple(weights) if isinstance(weights, (list, tuple)) else ()
        if len(given) != 2 or not all(isinstance(item, (int, float)) and item >= 0 for item in given) or not any(given):
            raise InvalidArgumentError("weights", weights, "must be two numbers of at least 0: for vectors, for text")
        if not isinstance(rrf_k, (int, float)) or not rrf_k >= 0:
            raise InvalidArgumentError("rrf_k", rrf_k, "must be a number of at least 0")
        wanted = max(5 * limit, 50) if candidates is None else candidates
        if wanted < limit:
            raise InvalidArgumentError("candidates", candidates, f"must be at least limit={limit}")
        return cls(limit, wanted, (float(given[0]), float(given[1])), float(rrf_k))


def hybrid_search(
    uri: Any = None,
    *,
    nearest: Mapping[str, Any],
    full_text_query: Any,
    text_columns: str | Sequence[str] | None = None,
    limit: int = 10,
    candidates: int | None = None,
    weights: Sequence[float] = (1.0, 1.0),
    rrf_k: float = 60.0,
    columns: Sequence[str] | dict[str, str] | None = None,
    filter: Any = None,
    prefilter: bool | None = None,
    fast_search: bool = False,
    with_row_id: bool = False,
    version: int | str | None = None,
    asof: Any = None,
    branch: str | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
    num_workers: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    pool: Any = None,
    progress: bool | Reporter | None = False,
) -> pa.Table:
    """The rows that are near a vector, match a text, or both: two searches beside each other, fused by their ranks.

    A row gets ``weight / (rrf_k + rank)`` from each search that found it, ranks counting from 1 (reciprocal rank
    fusion: Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        uri: path or URI of the table, or an opened dataset.
        nearest: as for :func:`lance_ray.vector_search`, for one vector; its ``k`` is ``candidates``.
        full_text_query: text, a query of ``lance.query``, or a dict of ``query`` and ``columns``.
        text_columns: the columns that a text is searched in; by default all that have an index.
        limit: rows of the result.
        candidates: rows that each search contributes; 5 times ``limit``, and at least 50, by default.
        weights: of the vector search and of the text search.
        rrf_k: the constant of the fusion; a larger one makes the first ranks count less.
        columns: columns of the result, or a dict of name to SQL expression; all by default.
        filter: SQL or a pyarrow expression, for both searches.
        prefilter: whether the filter comes before the rankings (the default).
        fast_search: leave out rows that the indexes do not know yet.
        with_row_id: add ``_rowid``.
        version: a version number or a tag; the newest by default.
        asof: the version of a time.
        branch: the branch to search.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        num_workers: as for :func:`lance_ray.vector_search`.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        pool: as for :func:`lance_ray.vector_search`.
        progress: True for a bar, a reporter of one's own, False for silence.

    Returns:
        A table of the columns, ``_distance`` and ``_score`` as the searches gave them (null where one did not find the
        row), and ``_relevance_score`` (float64), best first, ties in the order of row ids.

    Raises:
        LanceRayError: as for :func:`lance_ray.vector_search` and :func:`lance_ray.full_text_search`.
    """
    fusion = Fusion.fold(limit, candidates, weights, rrf_k)
    workers = SearchWorkers.fold(num_workers, ray_remote_args, pool, progress)
    address = address_of(locals())
    ref = TableRef.fold(uri, address, version=version, asof=asof, branch=branch)
    if not isinstance(nearest, Mapping):
        raise InvalidArgumentError("nearest", nearest, "must be a dict with 'column' and 'q'")
    check_positive("nearest['k']", nearest.get("k"))
    check_flag("fast_search", fast_search)
    text = _text_query(full_text_query, text_columns, "full_text_query")
    if workers.asked:
        check_sendable("full_text_query", text)
    shared = scanner_options_of(None, prefilter=prefilter, fast_search=fast_search or None)
    halves = [
        ScanOptions.fold(
            {**shared, "nearest": {**nearest, "k": fusion.candidates}}, columns=[ROW_ID, DISTANCE], filter=filter
        ),
        ScanOptions.fold(
            {**shared, "full_text_query": text}, columns=[ROW_ID, SCORE], filter=filter, limit=fusion.candidates
        ),
    ]
    specs = [ranked_spec(ref, half) for half in halves]
    if QUERY_INDEX in specs[0].schema.names:
        raise InvalidArgumentError("nearest['q']", "many vectors", "a hybrid search is for one")
    rows = ranked_spec(ref, ScanOptions.fold(None, columns=columns, with_row_id=with_row_id))
    vectors, texts = _both(specs, workers)
    return _fuse(rows, vectors, texts, fusion)


def _both(specs: Sequence[ReadSpec], workers: SearchWorkers) -> list[pa.Table]:
    """The two rankings, searched at the same time."""
    run = run_tasks(
        _half, specs, shared=workers, options=RunOptions(progress=False), executor=LocalExecutor(2), operation="search"
    )
    with run:
        found = {outcome.index: outcome.unwrap() for outcome in run}
    return [found[0], found[1]]


def _half(workers: SearchWorkers, spec: ReadSpec) -> pa.Table:
    if "full_text_query" in spec.scan.scanner and workers.asked:
        text = spec.scan.scanner["full_text_query"]
        return _many(spec, [text], workers, batch=False)
    return search_rows(spec, workers)


def _fuse(rows: ReadSpec, vectors: pa.Table, texts: pa.Table, fusion: Fusion) -> pa.Table:
    # Rows of equal scores come from the engine in no order of their own.
    texts = texts.sort_by([(SCORE, "descending"), (ROW_ID, "ascending")])
    rankings = [np.asarray(half.column(ROW_ID)) for half in (vectors, texts)]
    row_ids, scores = fused(rankings, fusion.weights, fusion.rrf_k)
    row_ids, scores = row_ids[: fusion.limit], scores[: fusion.limit]
    table, present = fetch(rows, row_ids)
    row_ids, scores = row_ids[present], scores[present]
    table = finish(table, rows)
    for name, half, ids in ((DISTANCE, vectors, rankings[0]), (SCORE, texts, rankings[1])):
        places = {int(row_id): place for place, row_id in enumerate(ids)}
        taken = pa.array([places.get(int(row_id)) for row_id in row_ids], pa.int64())
        table = table.append_column(pa.field(name, pa.float32()), half.column(name).take(taken))
    return table.append_column(pa.field(RELEVANCE, pa.float64()), pa.array(scores)).combine_chunks()
