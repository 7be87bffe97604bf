"""Point lookups: many rows by position, row id or key, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lance_ray.arrow import align, engine_safe, to_arrow
from lance_ray.blobs import filled, mean_bytes
from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError, RowCoverageError, translate_errors
from lance_ray.executors import LocalExecutor
from lance_ray.nearest import fetch
from lance_ray.options import BLOB_MODES, ScanOptions, check_choice
from lance_ray.predicates import key_condition
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.read import ROW_ID, ReadSpec, blobs_of, finish, fragment_stats, table_schema
from lance_ray.retry import is_interruption
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.search import SearchWorkers
from lance_ray.table import TableRef, address_of

_EXAMPLES = 5
_TASK_ROWS = 16384
_ROW_COST = 16 * 1024  # a random read costs about as much as reading so many bytes in sequence

Missing = Literal["error", "null", "skip"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """How rows are named: by position in the table, by row id, or by a key column."""

    kind: Literal["indices", "row_ids", "keys"]
    on: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LookupTask:
    """Some of the rows asked for, each once."""

    names: pa.Array


def take(
    uri: Any = None,
    indices: Any = None,
    *,
    row_ids: Any = None,
    keys: Any = None,
    on: str | None = None,
    columns: Sequence[str] | dict[str, str] | None = None,
    missing: Missing = "error",
    blobs: str = "bytes",
    blob_range: tuple[int, int] | None = None,
    blob_batch_bytes: int | None = None,
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
    """Rows of a table in the order in which they are named, read in parallel; a row named twice comes twice.

    Give one of ``indices``, ``row_ids`` and ``keys``.

    Args:
        uri: path or URI of the table, or an opened dataset.
        indices: positions in the table, from 0, deleted rows not counted.
        row_ids: values of ``_rowid``.
        keys: values of the column ``on``; quick where it has a scalar index, else the column is scanned. A key of
            several rows is an error.
        on: the key column.
        columns: columns of the result, or a dict of name to SQL expression; all by default.
        missing: what to do about rows that there are not: ``error``, a row of nulls (``null``), or ``skip``.
        blobs: how blob columns come out: ``bytes`` (``large_binary``), ``descriptors`` (structs without any payload) or
            ``handles`` (:class:`lance_ray.BlobHandle` objects, opened where they are used).
        blob_range: read only these bytes of each blob, as (offset, length); a negative offset counts from the end, and
            what lies beyond the end is left out.
        blob_batch_bytes: about how much payload of blobs a task reads (32 MiB), and more only for a larger blob by
            itself. The answer is in memory as a whole: for more than fits there, take handles.
        version: a version number or a tag; the newest by default.
        asof: the version of a time.
        branch: the branch to read.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        num_workers: tasks at once at most. Giving it, ``ray_remote_args`` or a pool sends the work to the cluster, as
            very many rows are anyway.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        pool: as for :func:`lance_ray.vector_search`.
        progress: True for a bar, a reporter of one's own, False for silence.

    Returns:
        A table of the columns, one row for each that was named. Nothing is written; others may do what they will
        meanwhile, but clean up the version that is read.

    Raises:
        InvalidArgumentError: none or several ways of naming rows, an unknown column, keys of another type.
        RowCoverageError: rows that the table does not have (``.missing``), or keys of several rows (``.duplicate``).
        TableNotFoundError, VersionNotFoundError, StorageError: as for ``read_lance``.
    """
    lookup, names = _fold(indices, row_ids, keys, on)
    check_choice("missing", missing, ("error", "null", "skip"))
    check_choice("blobs", blobs, BLOB_MODES)
    workers = SearchWorkers.fold(num_workers, ray_remote_args, pool, progress)
    scan_options = ScanOptions.fold(
        None, columns=columns, blobs=blobs, blob_range=blob_range, blob_batch_bytes=blob_batch_bytes
    )
    address = address_of(locals())
    table = TableRef.fold(uri, address, version=version, asof=asof, branch=branch).pin()
    schema = table_schema(table, scan_options)
    spec = ReadSpec(table, scan_options, schema, blobs=blobs_of(table, scan_options))
    if lookup.on is not None:
        names = _typed_keys(table.open(), lookup.on, names)
    return _ordered(spec, lookup, names, missing, workers)


def _fold(indices: Any, row_ids: Any, keys: Any, on: str | None) -> tuple[Lookup, pa.Array]:
    given = {"indices": indices, "row_ids": row_ids, "keys": keys}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise InvalidArgumentError("indices", chosen, "give one of indices, row_ids and keys")
    if (keys is None) != (on is None):
        raise InvalidArgumentError("on", on, "goes with keys: the column that holds them")
    kind: Any = chosen[0]
    value = given[kind]
    array = value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value
    if not isinstance(array, pa.Array):
        array = _array_of(kind, array)
    if kind != "keys":
        if (len(array) and not pa.types.is_integer(array.type)) or array.null_count:
            raise InvalidArgumentError(kind, str(array.type), "must be whole numbers")
        negative = pc.less(array, 0) if len(array) else pa.array([], pa.bool_())
        if len(array) and pc.any(negative).as_py():
            raise InvalidArgumentError(kind, array.filter(negative)[:_EXAMPLES].to_pylist(), "must be at least 0")
        array = array.cast(pa.uint64())
    return Lookup(kind, on), array


def _array_of(parameter: str, values: Any) -> pa.Array:
    try:
        if not isinstance(values, (str, bytes, Mapping)):
            return pa.array(values)
    except (TypeError, ValueError, OverflowError) as error:  # Arrow's own errors are of these types
        raise InvalidArgumentError(parameter, values, f"must be a list or an array of one type: {error}") from error
    raise InvalidArgumentError(parameter, values, "must be a list or an array")


def _typed_keys(dataset: lance.LanceDataset, on: str, keys: pa.Array) -> pa.Array:
    if on not in dataset.schema.names:
        raise InvalidArgumentError("on", on, f"must be a column of the table: {dataset.schema.names}")
    if keys.null_count:
        raise InvalidArgumentError("keys", None, "must not be null")
    field = dataset.schema.field(on).remove_metadata()
    schema = pa.schema([field.with_nullable(True)])
    aligned = align(to_arrow(pa.table({on: keys})), schema).column(0).combine_chunks()
    return aligned.chunk(0) if isinstance(aligned, pa.ChunkedArray) else aligned


def _ordered(spec: ReadSpec, lookup: Lookup, names: pa.Array, missing: Missing, workers: SearchWorkers) -> pa.Table:
    unique = pc.unique(names)
    payload = _payload_bytes(spec) if len(unique) else 0.0
    executor, slots = workers.choose(len(unique) * (_ROW_COST + payload))
    at_most = min(_TASK_ROWS, int(spec.scan.blob_batch_bytes / payload)) if payload else _TASK_ROWS
    size = max(1, min(at_most, -(-len(unique) // slots)))
    order = pc.sort_indices(unique) if lookup.kind != "keys" else pa.array(np.arange(len(unique)))
    unique = unique.take(order)
    tasks = [LookupTask(unique.slice(at, size)) for at in range(0, len(unique), size)]
    if not isinstance(executor, LocalExecutor):
        check_cluster([spec.table])
    options = RunOptions(max_in_flight=workers.num_workers, progress=workers.progress)
    run = run_tasks(look_up, tasks, shared=(spec, lookup), options=options, executor=executor, operation="take")
    with run:
        found = {outcome.index: outcome.unwrap() for outcome in run}
    parts = [found[index] for index in range(len(tasks))]
    schema = pa.schema([*spec.output_schema, pa.field(_NAME, unique.type)], spec.output_schema.metadata)
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    places = pc.index_in(names, value_set=table.column(_NAME).combine_chunks())
    _check(places, table, names, lookup, missing)
    if missing == "skip":
        places = places.drop_null()
    return engine_safe(table.drop_columns([_NAME]).take(places)).combine_chunks()


def _payload_bytes(spec: ReadSpec) -> float:
    """About how many bytes of blobs a row brings with it."""
    if spec.scan.blobs == "handles":
        return 0.0
    return sum(mean_bytes(spec.table, column.source, spec.scan.blob_range) for column in spec.blobs)


_NAME = "__lance_ray_name"


def _check(places: pa.Array, table: pa.Table, names: pa.Array, lookup: Lookup, missing: Missing) -> None:
    have = table.column(_NAME)
    counts = pc.value_counts(have) if lookup.kind == "keys" and table.num_rows else None
    twice = [item["values"].as_py() for item in counts if item["counts"].as_py() > 1] if counts is not None else []
    lost = pc.unique(names.filter(places.is_null())).to_pylist() if missing == "error" else []
    if twice or lost:
        examples = {"duplicate": twice[:_EXAMPLES], "missing": lost[:_EXAMPLES]}
        raise RowCoverageError(
            duplicate=len(twice), missing=len(lost), examples={name: some for name, some in examples.items() if some}
        )


def look_up(shared: tuple[ReadSpec, Lookup], task: LookupTask) -> pa.Table:
    """Runs on a worker: the rows that some names have, with the name of each."""
    spec, lookup = shared
    dataset = spec.retry.call(spec.table.open, retry_on=is_interruption, what="open")
    row_ids, named = _row_ids(spec, dataset, lookup, task.names)
    table, present = fetch(spec, row_ids)
    rows = pa.concat_tables(finish(part, spec) for part in filled(dataset, spec, table))
    return rows.append_column(_NAME, named.filter(pa.array(present)))


def _row_ids(
    spec: ReadSpec, dataset: lance.LanceDataset, lookup: Lookup, names: pa.Array
) -> tuple[np.ndarray, pa.Array]:
    """The ids of the rows that have these names, and the name of each; a name that no row has is left out."""
    if lookup.kind == "row_ids":
        return np.asarray(names), names
    if lookup.on is None:
        row_ids, present = _ids_at(spec, dataset, np.asarray(names).astype(np.int64))
        return row_ids, names.filter(pa.array(present))
    found = _scanned(spec, dataset, columns=[lookup.on], filter=key_condition(lookup.on, names))
    keys = found.column(0).cast(names.type).combine_chunks()
    return np.asarray(found.column(ROW_ID)), keys


def _ids_at(spec: ReadSpec, dataset: lance.LanceDataset, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the rows at these places of the table, and which places there are."""
    stats = fragment_stats(spec.table, 1.0, None)
    ends = np.cumsum(np.asarray(stats.rows, np.int64))
    present = places < (ends[-1] if len(ends) else 0)
    places = places[present]
    fragments = np.searchsorted(ends, places, side="right")
    row_ids = np.empty(len(places), np.uint64)
    for index in np.unique(fragments).tolist():
        chosen = fragments == index
        local = places[chosen] - (ends[index] - stats.rows[index])
        fragment: Any = dataset.get_fragment(stats.ids[index])
        if dataset.has_stable_row_ids or fragment.num_deletions:
            ids = np.asarray(_scanned(spec, dataset, columns=[], fragments=[fragment]).column(ROW_ID))
            row_ids[chosen] = ids[local]
        else:
            row_ids[chosen] = local.astype(np.uint64) | np.uint64(stats.ids[index] << 32)
    return row_ids, present


def _scanned(spec: ReadSpec, dataset: lance.LanceDataset, **scanner: Any) -> pa.Table:
    def once() -> pa.Table:
        with translate_errors("read", spec.table.uri, secrets=spec.table.secrets):
            return dataset.scanner(**scanner, with_row_id=True).to_table()

    table: pa.Table = spec.retry.call(once, retry_on=is_interruption, what="take")
    return table
