"""The worker side of a vector search: one shard of it, and the columns of the rows that were found.

Distances are always the engine's own, so that those of any two shards compare. Where an index only estimates them and
other rows are searched without one, the engine computes those of the index's rows anew, as it does in one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.dataset import serialize_row_addrs

from lance_ray.arrow import engine_safe
from lance_ray.errors import translate_errors
from lance_ray.options import ScanOptions
from lance_ray.planning.reads import FragmentStats
from lance_ray.planning.search import Found, Segment, Shard, nearest_of
from lance_ray.read import ROW_ID, ReadSpec, ReadTaskRows, batches, fragment_stats, selections
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import PinnedTable, in_memory
from lance_ray.vectors import Candidates, TooManyCandidatesError, block_rows

DISTANCE, QUERY_INDEX = "_distance", "query_index"

MATRIX_QUERIES = 4
"""From so many queries on, one matrix product for all of them costs less than the engine's search for each."""

_RESCORED_QUERIES = 64
"""Queries whose candidates the engine decides between at a time: each is compared with those of all of them."""

_REFINED_PAIRS, _REFINED_ROWS = 640, 160
"""Refining many queries together, each query is compared with the candidates of as many others as fit the first number;
more candidates for each query than the second leave it to the engine."""

_REFINED_TIES = 16
"""So many more candidates are asked for: of equally near ones the engine takes others for one query than for many."""

_REFINED_OPTIONS = frozenset(
    {
        "metric",
        "use_index",
        "query_parallelism",
        "approx_mode",
        "search_effort",
        "nprobes",
        "minimum_nprobes",
        "maximum_nprobes",
        "ef",
        "refine_factor",
    }
)
_MATRIX_OPTIONS = frozenset({"metric", "use_index", "query_parallelism", "approx_mode", "search_effort"})


@dataclass(frozen=True, slots=True, eq=False)
class NearestSpec:
    """What all shards of a search share."""

    table: PinnedTable
    column: str
    queries: np.ndarray
    """Of shape (queries, dimension)."""
    k: int
    """Rows wanted of each shard for each query."""
    options: Mapping[str, Any]
    """The engine's ``nearest`` but for column, query and k."""
    filter: Any = None
    """Applied before ranking."""
    scanner: Mapping[str, Any] = field(default_factory=dict)
    index: VectorIndex | None = None
    include_unindexed: bool = True
    matrix: bool = False
    """Whether a matrix product may choose the candidates of rows that no index knows."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def metric(self) -> str | None:
        """As the engine is told it where no index says it."""
        asked = self.options.get("metric")
        return asked if asked is not None or self.index is None else self.index.metric


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """An index of the column: its segments, the fragments that they know, and their metric."""

    name: str
    metric: str
    segments: tuple[Segment, ...]
    fragments: frozenset[int]


def vector_type(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of a column, nested ones by path; None where there is none."""
    name, _, rest = path.partition(".")
    if path in schema.names:
        return schema.field(path).type
    if name not in schema.names:
        return None
    kind: pa.DataType | None = schema.field(name).type
    for part in rest.split("."):
        index = kind.get_field_index(part) if kind is not None and pa.types.is_struct(kind) else -1
        kind = kind.field(index).type if index >= 0 and kind is not None else None
    return kind


def vector_indices(dataset: lance.LanceDataset, column: str) -> list[VectorIndex]:
    """The vector indexes of a column, newest definition last."""
    fragments = set(dataset.fragment_ids())
    found = []
    for item in dataset.describe_indices():
        details = item.details if isinstance(item.details, Mapping) else {}
        if list(item.field_names) != [column] or "metric_type" not in details:
            continue
        segments = tuple(Segment(str(part.uuid), int(part.size_bytes or 0)) for part in item.segments)
        covered = {fragment for part in item.segments for fragment in part.fragment_ids}
        metric = str(details["metric_type"]).lower()
        found.append(VectorIndex(item.name, metric, segments, frozenset(covered & fragments)))
    return found


def flat_stats(spec: NearestSpec, dimension_bytes: float) -> FragmentStats:
    """The fragments that no segment knows, weighed by the bytes of their vectors."""
    stats = fragment_stats(spec.table, dimension_bytes, None)
    covered = spec.index.fragments if spec.index is not None else frozenset()
    if not spec.include_unindexed:
        return stats.select([])
    return stats.select([place for place, item in enumerate(stats.ids) if item not in covered])


def search_shard(spec: NearestSpec, shard: Shard) -> Found:
    """Runs on a worker: the nearest rows of a shard, for each of its queries."""
    dataset = spec.retry.call(spec.table.open, retry_on=is_interruption, what="open")
    queries = spec.queries[shard.first : shard.last]
    found = _indexed(dataset, spec, queries, shard) if shard.segments else _flat(dataset, spec, queries, shard)
    return found.after(shard.first)


def explain_shard(spec: NearestSpec, shard: Shard) -> str:
    """Runs on a worker: the engine's analysis of a shard, which runs it."""
    dataset = spec.table.open()
    queries = spec.queries[shard.first : shard.last]
    if shard.segments:
        plans = [scanner(dataset, spec, queries, index_segments=list(shard.segments)).analyze_plan()]
        title = f"segments {', '.join(shard.segments)}"
    else:
        plans = [
            scanner(dataset, spec, queries, flat=True, **item).analyze_plan() for item in _masks(dataset, spec, shard)
        ]
        title = f"fragments {', '.join(f'{piece.first}-{piece.last}' for piece in shard.pieces)}, without an index"
    return "\n".join([f"== queries {shard.first} to {shard.last - 1}: {title}", *plans])


def scanner(
    dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, *, flat: bool = False, **selection: Any
) -> Any:
    """The engine's search for row ids and distances."""
    nearest = {**spec.options, "column": spec.column, "q": queries[0] if len(queries) == 1 else queries, "k": spec.k}
    if flat:
        nearest |= {"use_index": False, "metric": spec.metric}
    arguments = {**spec.scanner, "filter": spec.filter, "prefilter": True, **selection}
    return dataset.scanner(
        columns=[ROW_ID, DISTANCE], nearest=nearest, disable_scoring_autoprojection=True, **arguments
    )


def _ask(
    dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, *, flat: bool = False, **selection: Any
) -> Found:
    if len(queries) > 1 and QUERY_INDEX in dataset.schema.names:  # the engine's own name for the query of a row
        each = (_ask(dataset, spec, queries[at : at + 1], flat=flat, **selection) for at in range(len(queries)))
        return nearest_of(
            (Found(item.query + np.int32(at), item.row_id, item.distance) for at, item in enumerate(each)), spec.k
        )

    def once() -> pa.Table:
        with translate_errors("search", spec.table.uri, secrets=spec.table.secrets):
            return scanner(dataset, spec, queries, flat=flat, **selection).to_table()

    table = spec.retry.call(once, retry_on=is_interruption, what="search")
    query = table.column(QUERY_INDEX) if len(queries) > 1 else np.zeros(table.num_rows, np.int32)
    return Found.of(query, table.column(ROW_ID), table.column(DISTANCE))


def _indexed(dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, shard: Shard) -> Found:
    if _can_refine_together(spec, len(queries)):
        starts = range(0, len(queries), _RESCORED_QUERIES)
        refined = (_refined(dataset, spec, queries[at : at + _RESCORED_QUERIES], shard).after(at) for at in starts)
        return nearest_of(refined, spec.k)
    found = _ask(dataset, spec, queries, index_segments=list(shard.segments))
    assert spec.index is not None  # noqa: S101 - segments come from it
    # Even an index that keeps whole vectors rounds their distances in its own way.
    alone = not spec.include_unindexed or spec.index.fragments.issuperset(dataset.fragment_ids())
    if alone or "refine_factor" in spec.options or not len(found):
        return found
    parts = range(0, len(queries), _RESCORED_QUERIES)
    chosen = [(at, found.row_id[(found.query >= at) & (found.query < at + _RESCORED_QUERIES)]) for at in parts]
    return _rescored(dataset, spec, queries, chosen)


def _can_refine_together(spec: NearestSpec, queries: int) -> bool:
    factor = spec.options.get("refine_factor")
    few = isinstance(factor, (int, np.integer)) and spec.k * factor <= _REFINED_ROWS
    return few and queries >= MATRIX_QUERIES and set(spec.options) <= _REFINED_OPTIONS


def _refined(dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, shard: Shard) -> Found:
    """What the engine finds with ``refine_factor``, which it does for each query by itself, reading its candidates.

    Here the candidates of all queries are read at once. Each query keeps to its own, so that what it finds does not
    depend on the others.
    """
    options = {name: value for name, value in spec.options.items() if name != "refine_factor"}
    wanted = spec.k * spec.options["refine_factor"]
    estimated = dataclasses.replace(spec, k=wanted + _REFINED_TIES, options=options)
    rough = _with_ties(_ask(dataset, estimated, queries, index_segments=list(shard.segments)), wanted)
    if not len(rough):
        return rough
    vectors, have = _read_vectors(dataset, spec, np.unique(rough.row_id))
    exact = dataclasses.replace(spec, column=_HELD, options=options, filter=None, scanner={})
    size = max(1, _REFINED_PAIRS // wanted)
    parts = []
    for first in range(0, len(queries), size):
        own = rough.select((rough.query >= first) & (rough.query < first + size))
        ids = np.unique(own.row_id)
        if not len(ids):
            continue
        held = in_memory(pa.table([vectors.take(pa.array(np.searchsorted(have, ids)))], [_HELD]))
        some = queries[first : first + size]
        found = _ask(held, dataclasses.replace(exact, k=len(ids)), some, flat=True)
        is_own = np.zeros((len(some), len(ids)), bool)
        is_own[own.query - first, np.searchsorted(ids, own.row_id)] = True
        found = found.select(is_own[found.query, found.row_id])
        parts.append(Found(found.query, ids[found.row_id], found.distance).after(first))
    return nearest_of(parts, spec.k)


def _with_ties(found: Found, k: int) -> Found:
    """The k nearest of each query, and those as near as the last of them: rows with one code in an index."""
    place = np.arange(len(found)) - np.searchsorted(found.query, found.query)
    last = place == k - 1
    limit = np.full(int(found.query.max(initial=-1)) + 1, np.inf, np.float32)
    limit[found.query[last]] = found.distance[last]
    return found.select(found.distance <= limit[found.query])


def _rescored(
    dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, candidates: Sequence[tuple[int, np.ndarray]]
) -> Found:
    """The nearest of some rows by the engine's exact distances.

    The engine would read the whole column for a search among chosen rows; reading the rows alone and searching them in
    memory is the same computation.

    Args:
        dataset: the snapshot.
        spec: the search.
        queries: all of them.
        candidates: the number of a first query, and the ids of the rows for it and the next ones.
    """
    row_ids = np.unique(np.concatenate([ids for _, ids in candidates]))
    vectors, have = _read_vectors(dataset, spec, row_ids)
    parts = []
    for first, ids in candidates:
        places = np.flatnonzero(np.isin(have, ids))
        if len(places):
            held = in_memory(pa.table([vectors.take(pa.array(places))], [_HELD]))
            some = queries[first : first + _RESCORED_QUERIES]
            found = _ask(held, dataclasses.replace(spec, column=_HELD, filter=None, scanner={}), some, flat=True)
            parts.append(Found(found.query, have[places][found.row_id], found.distance).after(first))
    return nearest_of(parts, spec.k)


def _read_vectors(
    dataset: lance.LanceDataset, spec: NearestSpec, row_ids: np.ndarray
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The vectors of some rows, and their row ids, both in the order of row ids."""
    mask = serialize_row_addrs(row_ids.tolist())

    def once() -> pa.Table:
        with translate_errors("read", spec.table.uri, secrets=spec.table.secrets):
            return dataset.scanner(columns=[spec.column], with_row_id=True, row_addr_allowlist=mask).to_table()

    table = spec.retry.call(once, retry_on=is_interruption, what="read")
    order = np.argsort(np.asarray(table.column(ROW_ID)), kind="stable")
    table = table.take(pa.array(order))
    return table.column(0), np.asarray(table.column(ROW_ID))


_HELD = "vector"


def _flat(dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, shard: Shard) -> Found:
    if spec.matrix and (len(queries) >= MATRIX_QUERIES or not all(piece.is_whole for piece in shard.pieces)):
        try:
            return _by_matrix(dataset, spec, queries, shard)
        except TooManyCandidatesError:
            pass  # as many equal distances as this: only the engine's own order tells
    parts = [_ask(dataset, spec, queries, flat=True, **selection) for selection in _masks(dataset, spec, shard)]
    return nearest_of(parts, spec.k)


def has_matrix_form(kind: pa.DataType, queries: np.ndarray, metric: str | None, options: Iterable[str]) -> bool:
    """Whether one matrix product can choose candidates: for 32-bit floats and what is asked of them."""
    plain = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
    return plain and set(options) <= _MATRIX_OPTIONS and Candidates.can_rank(queries, metric or "l2")


def _by_matrix(dataset: lance.LanceDataset, spec: NearestSpec, queries: np.ndarray, shard: Shard) -> Found:
    candidates = Candidates(queries.astype(np.float32), spec.k, spec.metric or "l2")
    for batch in batches(dataset, _vectors(spec, len(queries)), ReadTaskRows(shard.pieces)):
        candidates.offer(*_matrix_of(batch))
    return _rescored(dataset, spec, queries, list(candidates.parts(_RESCORED_QUERIES)))


def _vectors(spec: NearestSpec, queries: int) -> ReadSpec:
    scan = ScanOptions.fold(dict(spec.scanner), columns=[spec.column], filter=spec.filter, with_row_id=True)
    return ReadSpec(spec.table, scan, pa.schema([]), batch_size=block_rows(queries), retry=spec.retry)


def _matrix_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that are there, without a copy, and their row ids."""
    column, row_ids = batch.column(0), np.asarray(batch.column(ROW_ID))
    if column.null_count:
        row_ids = row_ids[np.asarray(column.is_valid())]
    values = column.flatten()
    # The engine takes a missing number of a vector for what stands in its place.
    plain = pa.Array.from_buffers(values.type, len(values), [None, values.buffers()[1]], offset=values.offset)
    return plain.to_numpy().reshape(-1, column.type.list_size), row_ids


def _masks(dataset: lance.LanceDataset, spec: NearestSpec, shard: Shard) -> Iterator[dict[str, Any]]:
    yield from selections(dataset, _vectors(spec, 1), ReadTaskRows(shard.pieces), masked=True)


def fetch(spec: ReadSpec, row_ids: np.ndarray, postfilter: Any = None) -> tuple[pa.Table, np.ndarray]:
    """The columns of rows, in the order of ``row_ids``, and which of these there are (all, without a filter)."""
    dataset = spec.retry.call(spec.table.open, retry_on=is_interruption, what="open")
    kwargs = {**spec.scanner_kwargs(dataset), "with_row_id": True, "filter": postfilter}
    columns = kwargs["columns"]
    if not isinstance(columns, Mapping):
        kwargs["columns"] = None if columns is None else [name for name in columns if name != ROW_ID]
    mask = serialize_row_addrs(np.unique(row_ids).tolist())

    def once() -> pa.Table:
        with translate_errors("read", spec.table.uri, secrets=spec.table.secrets):
            return dataset.scanner(**kwargs, row_addr_allowlist=mask).to_table()

    table = spec.retry.call(once, retry_on=is_interruption, what="read")
    places, present = places_of(np.asarray(table.column(ROW_ID)), row_ids)
    return engine_safe(table.take(pa.array(places[present]))), present


def places_of(have: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted id is among those there are, and whether it is."""
    if not len(have):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(have, kind="stable")
    places = np.minimum(np.searchsorted(have[order], wanted), len(have) - 1)
    return order[places], have[order][places] == wanted
