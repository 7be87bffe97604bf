"""Neighbours for the rows of a Ray Dataset: streamed through workers that keep the table and its index open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Dataset, TaskPoolStrategy

from lance_ray.arrow import to_arrow
from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import check_dataset, check_sendable, checked_ray_args, connect_ray, unnamed_options
from lance_ray.full_start import start_in_full
from lance_ray.memory import keep_freed_memory
from lance_ray.nearest import QUERY_INDEX, vector_type
from lance_ray.options import ScanOptions, check_flag, check_mapping, check_positive, check_text
from lance_ray.preflight import check_cluster
from lance_ray.read import ReadSpec
from lance_ray.search import SearchWorkers, choose_index, ranked_spec, scanner_options_of, search_rows
from lance_ray.table import PinnedTable, TableRef, address_of

_FLAT_QUERIES, _INDEX_QUERIES = 256, 64
"""Queries that are searched together: one pass over rows without an index serves all, an index is asked for each."""


@dataclass(frozen=True, slots=True)
class JoinSpec:
    """What the workers of a join share."""

    spec: ReadSpec
    """The search for one vector of zeros."""
    on: str
    output: str
    explode: bool
    prefix: str

    def __post_init__(self) -> None:
        check_text("on", self.on, optional=False)
        check_text("output", self.output, optional=False)
        check_flag("explode", self.explode)
        if not isinstance(self.prefix, str):
            raise InvalidArgumentError("prefix", self.prefix, "must be text")

    @property
    def neighbours(self) -> pa.Schema:
        """The columns of a neighbour."""
        return self.spec.output_schema

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return len(self.spec.scan.scanner["nearest"]["q"])

    def names(self) -> list[str]:
        """The columns that the join adds."""
        return [self.prefix + name for name in self.neighbours.names] if self.explode else [self.output]


def nearest_join(
    ds: Dataset,
    uri: Any = None,
    *,
    on: str,
    column: str = "vector",
    k: int = 10,
    columns: Sequence[str] | dict[str, str] | None = None,
    nearest: Mapping[str, Any] | None = None,
    filter: Any = None,
    prefilter: bool | None = None,
    fast_search: bool = False,
    with_row_id: bool = False,
    output: str = "neighbors",
    explode: bool = False,
    prefix: str = "",
    batch_size: int | None = None,
    concurrency: int | None = None,
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
    scanner_options: dict[str, Any] | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> Dataset:
    """The rows of a Ray Dataset with the k nearest rows of a table to the vector in each.

    Lazy, as everything in Ray Data: the search runs when the result is consumed. Each worker process opens the table
    once, at the version that is resolved now, and keeps it open and its index in memory, also for the next join.

    Args:
        ds: the queries.
        uri: path or URI of the table, or an opened dataset.
        on: the column of ``ds`` that holds the vectors. Rows without one have no neighbours.
        column: the column of the table that is searched.
        k: neighbours of each row.
        columns: columns of the neighbours, or a dict of name to SQL expression; all but ``column`` by default.
        nearest: further options of the search (``metric``, ``nprobes``, ``refine_factor``, ``use_index``, ...): see
            :func:`lance_ray.vector_search`.
        filter: SQL or a pyarrow expression on the table.
        prefilter: whether the filter comes before the ranking (the default).
        fast_search: leave out rows that the index does not know yet.
        with_row_id: add ``_rowid`` to the neighbours.
        output: name of the column that is added: a list of structs, nearest first.
        explode: instead one row for each neighbour, with its columns beside those of ``ds``; rows without neighbours
            have none.
        prefix: put before the names of these columns.
        batch_size: queries that are searched together; 256 by default, and 64 through an index. Without an index a
            batch reads the whole column once, so that larger ones cost less for each query.
        concurrency: batches at once at most; by default as many as the cluster has CPUs for.
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
        scanner_options: further options of ``LanceDataset.scanner``.
        ray_remote_args: options of ``ray.remote`` for the workers.

    Returns:
        The dataset. Neighbours have ``_distance`` beside the columns chosen.

    Raises:
        InvalidArgumentError: unknown column or option, k not positive, a name that occurs twice, vectors of another
            type or dimension where ``ds`` knows its schema; before anything runs. Where it does not, or its lists are
            of any length, they are found when they are reached, and end the dataset with Ray's error of a task.
        TableNotFoundError, VersionNotFoundError, StorageError, WorkerEnvironmentError: as for ``read_lance``.
    """
    check_positive("k", k, optional=False)
    check_positive("batch_size", batch_size)
    check_positive("concurrency", concurrency)
    check_mapping("nearest", nearest)
    check_flag("fast_search", fast_search)
    remote_args = checked_ray_args(ray_remote_args)
    if given := sorted({"column", "q", "k"} & set(nearest or ())):
        raise InvalidArgumentError("nearest", given, "are keywords of nearest_join")
    address = address_of(locals())
    check_sendable("filter", filter)
    table = TableRef.fold(uri, address, version=version, asof=asof, branch=branch).pin()
    check_text("column", column, optional=False)
    dimension = _dimension(table, column)
    names = columns if columns is not None else [name for name in table.open().schema.names if name != column]
    asked = {**(nearest or {}), "column": column, "q": np.zeros(dimension, np.float32), "k": k}
    given_options = scanner_options_of(
        scanner_options, nearest=asked, prefilter=prefilter, fast_search=fast_search or None
    )
    scan_options = ScanOptions.fold(given_options, columns=names, filter=filter, with_row_id=with_row_id)
    spec = ranked_spec(dataclasses.replace(table.ref, version=table.version, asof=None), scan_options)
    join = JoinSpec(spec, on, output, explode, prefix)
    check_dataset(ds)
    _check_names(ds, join)
    connect_ray()
    check_cluster([table])
    index = choose_index(table.open(), column, nearest or {}, None)
    batch: Any = join_batch  # Ray declares functions of one argument only
    with unnamed_options():
        joined: Dataset = start_in_full(ds).map_batches(
            batch,
            fn_kwargs={"join": join},
            batch_format="pyarrow",
            batch_size=batch_size or (_FLAT_QUERIES if index is None else _INDEX_QUERIES),
            compute=TaskPoolStrategy(size=concurrency),
            **{"num_cpus": 1, **remote_args},
        )
    return joined


def _dimension(table: PinnedTable, column: str) -> int:
    schema = table.open().schema
    kind = vector_type(schema, column)
    if kind is None or not pa.types.is_fixed_size_list(kind):
        found = "is no column of the table" if kind is None else f"is of type {kind}"
        raise InvalidArgumentError("column", column, f"{found}; must be a fixed-size list: one of {schema.names}")
    return int(kind.list_size)


def _check_names(ds: Dataset, join: JoinSpec) -> None:
    schema = ds.schema(fetch_if_missing=False)
    have = list(schema.names) if schema is not None else None
    if have is not None and join.on not in have:
        raise InvalidArgumentError("on", join.on, f"must be a column of ds: {have}")
    if have is not None and isinstance(kind := schema.types[have.index(join.on)], pa.DataType):
        _check_vectors(_known_type(kind), join)
    if twice := sorted(set(have or ()) & set(join.names())):
        raise InvalidArgumentError(
            "prefix" if join.explode else "output", twice, "are columns of ds already; choose another name"
        )


def join_batch(table: pa.Table, join: JoinSpec) -> pa.Table:
    """Runs on a worker: some queries with their neighbours."""
    keep_freed_memory()
    if join.on not in table.schema.names:
        raise InvalidArgumentError("on", join.on, f"must be a column of ds: {table.schema.names}")
    if twice := sorted(set(table.schema.names) & set(join.names())):
        raise InvalidArgumentError("output", twice, "are columns of ds already; choose another name")
    queries, rows = _queries(to_arrow(table.select([join.on])).column(0), join)
    found = _search(join.spec, queries)
    owner = rows[np.asarray(found.column(QUERY_INDEX))] if found.num_rows else np.empty(0, np.int64)
    found = found.drop_columns([QUERY_INDEX])
    if join.explode:
        return _exploded(table, found, owner, join)
    ends = np.searchsorted(owner, np.arange(table.num_rows + 1)).astype(np.int32)
    arrays = [_flat(found.column(name)) for name in found.schema.names]
    structs = pa.StructArray.from_arrays(arrays, fields=list(found.schema))
    return table.append_column(join.output, pa.ListArray.from_arrays(pa.array(ends), structs))


def _search(spec: ReadSpec, queries: np.ndarray) -> pa.Table:
    schema = pa.schema([pa.field(QUERY_INDEX, pa.int32(), nullable=False), *spec.schema], spec.schema.metadata)
    if not len(queries):
        return schema.empty_table()
    nearest = {**spec.scan.scanner["nearest"], "q": queries}
    scan = dataclasses.replace(spec.scan, scanner={**spec.scan.scanner, "nearest": nearest})
    return search_rows(dataclasses.replace(spec, scan=scan, schema=schema), SearchWorkers(threads=1))


def _known_type(kind: pa.DataType) -> pa.DataType:
    """What blocks of this type come as."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.storage_type if len(kind.shape) == 1 else kind
    if isinstance(kind, pa.ExtensionType):
        return to_arrow(pa.schema([pa.field("vectors", kind)]).empty_table()).schema.field(0).type
    return kind


def _check_vectors(kind: pa.DataType, join: JoinSpec) -> None:
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _is_number(kind.value_type):
        raise InvalidArgumentError("on", join.on, f"is of type {kind}; must be a list of numbers")
    if fixed and kind.list_size != join.dimension:
        raise InvalidArgumentError(
            "on", join.on, f"has vectors of {kind.list_size} numbers; the table's have {join.dimension}"
        )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _queries(column: pa.ChunkedArray, join: JoinSpec) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that can be searched for, and the numbers of their rows."""
    kind = _known_type(column.type)
    _check_vectors(kind, join)
    array, dimension = _flat(column), join.dimension
    if kind != array.type:
        array = array.storage
    present = np.asarray(array.is_valid())
    lengths = np.asarray(array.drop_null().value_lengths())
    if wrong := sorted(set(lengths[lengths != dimension].tolist())):
        raise InvalidArgumentError("on", join.on, f"has vectors of {wrong[:5]} numbers; the table's have {dimension}")
    values = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    usable = np.isfinite(values.astype(np.float64)).all(axis=1)  # nothing is near what is not a number
    return np.ascontiguousarray(values[usable]), np.flatnonzero(present)[usable]


def _flat(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _exploded(table: pa.Table, found: pa.Table, owner: np.ndarray, join: JoinSpec) -> pa.Table:
    result = table.take(pa.array(owner, pa.int64()))
    for name, field in zip(join.names(), found.schema, strict=True):
        result = result.append_column(field.with_name(name), found.column(field.name))
    return result
