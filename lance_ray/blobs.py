"""Blob columns: read as bytes within a bound on memory, as ranges, as descriptors or as lazy handles.

A scan gives descriptors (position, size, address), which are small. :func:`filled` turns them into what the caller
asked for, a run of rows at a time whose payload stays under a number of bytes, so that a task holds no more of a table
of videos than of a table of numbers. Columns of both kinds count as blobs: those with the older ``lance-encoding:blob``
metadata, and those of the type of ``lance.blob``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lance_ray.errors import InvalidArgumentError, LanceRayError, translate_errors
from lance_ray.options import ScanOptions, check_text
from lance_ray.retry import is_interruption
from lance_ray.table import PinnedTable, TableRef, address_of

if TYPE_CHECKING:
    from lance_ray.read import ReadSpec

_MARK = b"lance-encoding:blob"
_PACKED = b"lance-encoding:packed"
_EXTENSION = "lance.blob.v2"
_EXTERNAL = 3  # the kind of a descriptor that only refers to an address
_SAMPLED_FRAGMENTS, _SAMPLED_ROWS = 8, 64


@dataclass(frozen=True, slots=True)
class BlobColumn:
    """A blob column of a read: where it is in the rows, and which column of the table it comes from."""

    path: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class BlobHandle:
    """One blob of a pinned version, opened where it is used: pickles small, holds no file and no bytes.

    A blob larger than memory is read through :meth:`open` or in :meth:`read_range` pieces. Comes from
    ``read_lance(..., blobs="handles")`` and :func:`open_blobs`.
    """

    table: PinnedTable = field(repr=False)
    column: str
    address: int
    known_size: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the blob. Asks the store only for one that lies outside the table and was given whole."""
        if self.known_size is not None:
            return self.known_size
        with self.open() as opened:
            return int(opened.size())

    def open(self, buffer_size: int = 512 * 1024) -> Any:
        """A readable, seekable binary file (``lance.BlobFile``) of the blob.

        Args:
            buffer_size: bytes read ahead.

        Raises:
            StorageError: the table or the blob cannot be reached.
        """
        with translate_errors("open a blob of", self.table.uri, secrets=self.table.secrets):
            (opened,) = self.table.open().take_blobs(self.column, addresses=[self.address], buffer_size=buffer_size)
        return opened

    def read(self) -> bytes:
        """All bytes of the blob.

        Raises:
            StorageError: the table or the blob cannot be reached.
        """
        with translate_errors("read a blob of", self.table.uri, secrets=self.table.secrets):
            ((_, found),) = self.table.open().read_blobs(self.column, addresses=[self.address])
        return cast("bytes", found)

    def read_range(self, offset: int, length: int) -> bytes:
        """The bytes from ``offset`` on, ``length`` at most; a negative offset counts from the end.

        Raises:
            StorageError: the table or the blob cannot be reached.
        """
        (start,), (count,) = clipped(np.array([self.size]), (offset, length))
        with translate_errors("read a blob of", self.table.uri, secrets=self.table.secrets):
            requests = [(self.address, int(start), int(count))]
            ((_, _, found),) = self.table.open().read_blob_ranges(self.column, requests, selector="addresses")
        return cast("bytes", found)


def _row_numbers(parameter: str, given: Any) -> list[int]:
    items = [None] if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__") else list(given)
    try:
        numbers = [operator.index(cast("Any", None if isinstance(item, bool) else item)) for item in items]
    except TypeError:  # also of an array in the place of a number
        raise InvalidArgumentError(parameter, given, "must be a list of whole numbers") from None
    if low := [item for item in numbers if not 0 <= item < 2**64]:
        raise InvalidArgumentError(parameter, low, "must be whole numbers from 0 to 2^64 - 1")
    return numbers


def open_blobs(
    uri: Any = None,
    column: str = "",
    *,
    indices: Sequence[int] | None = None,
    row_ids: Sequence[int] | None = None,
    addresses: Sequence[int] | None = None,
    version: int | str | None = None,
    asof: Any = None,
    branch: str | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: Any = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
) -> list[BlobHandle | None]:
    """Lazy handles of some blobs of a table, in the order asked for; None for a null. No payload is read.

    Args:
        uri: path or URI of the table, or an opened ``lance.LanceDataset``.
        column: the blob column; one inside a struct as ``struct.column``.
        indices: positions of rows in the table.
        row_ids: values of ``_rowid``.
        addresses: values of ``_rowaddr``. One of the three is needed.
        version: a version number or a tag; the newest by default.
        asof: the newest version that existed at this time.
        branch: the branch to read.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases, by base URI.
        namespace_impl: ``dir``, ``rest`` or another Lance Namespace implementation.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in the namespace.

    Returns:
        :class:`BlobHandle` objects, which may be sent to workers.

    Raises:
        InvalidArgumentError: no such blob column, no such row, or not exactly one way to name the rows.
        TableNotFoundError, VersionNotFoundError, StorageError: the table cannot be opened.

    Nothing is written, so nothing is left behind and nothing conflicts; only ``cleanup_old_versions`` of the version
    that was opened takes the blobs away.
    """
    address = address_of(locals())
    check_text("column", column, optional=False)
    chosen = {"indices": indices, "row_ids": row_ids, "addresses": addresses}
    given = {name: _row_numbers(name, values) for name, values in chosen.items() if values is not None}
    if len(given) != 1:
        raise InvalidArgumentError("indices", sorted(given), "give exactly one of indices, row_ids and addresses")
    table = TableRef.fold(uri, address, version=version, asof=asof, branch=branch).pin()
    dataset = table.open()
    known = list(_paths(dataset.schema))
    if tuple(column.split(".")) not in known:
        raise InvalidArgumentError("column", column, f"blob columns are {['.'.join(path) for path in known]}")
    ((named, rows),) = given.items()
    selector: Any = {"row_ids": "ids"}.get(named, named)
    if not rows:
        return []
    with translate_errors("open blobs of", table.uri, secrets=table.secrets):
        try:
            # A range of no bytes names the row without reading it.
            found = dataset.read_blob_ranges(
                column, [(row, 0, 0) for row in rows], selector=selector, preserve_order=True
            )
        except ValueError as error:
            raise InvalidArgumentError(selector, rows, str(error).partition(", /")[0]) from None
    return [None if data is None else BlobHandle(table, column, place) for _, place, data in found]


def _paths(schema: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The blob columns of a schema, those inside structs too."""
    for item in schema:
        path = (*prefix, item.name)
        if getattr(item.type, "extension_name", "") == _EXTENSION or (item.metadata or {}).get(_MARK) == b"true":
            yield path
        elif pa.types.is_struct(item.type):
            yield from _paths(item.type, path)


def has_blobs(schema: pa.Schema) -> bool:
    """Whether a table has a blob column at any depth."""
    return any(True for _ in _paths(schema))


def blob_columns(dataset: lance.LanceDataset, described: pa.Schema, scan: ScanOptions) -> tuple[BlobColumn, ...]:
    """The blob columns of a scan that shall come out as bytes or handles.

    Args:
        dataset: the table.
        described: the scan's schema, with descriptors.
        scan: what is read.

    Raises:
        InvalidArgumentError: handles of a column inside a struct, which Arrow cannot hold.
    """
    if scan.blobs == "descriptors" or scan.is_search:
        return ()
    expressions = dict(scan.expressions)
    known = set(_paths(dataset.schema))
    found = []
    for path in _paths(described):
        first = expressions.get(path[0], path[0]).strip().strip("`")
        for source in ((first, *path[1:]), (*first.split("."), *path[1:])):  # a dot may be part of a name
            if source in known:
                found.append(BlobColumn(path, ".".join(map(_quoted, source))))
                break
    nested = [".".join(item.path) for item in found if len(item.path) > 1]
    if nested and scan.blobs == "handles":
        raise InvalidArgumentError("blobs", "handles", f"columns inside structs cannot be handles: {nested}")
    return tuple(found)


def shown(described: pa.Schema, dataset: lance.LanceDataset, columns: Sequence[BlobColumn], mode: str) -> pa.Schema:
    """The schema as it comes out: bytes are marked as blobs, so that they become blobs again where they are written."""
    fields = list(described)
    for column in columns:
        index = described.get_field_index(column.path[0])
        if mode == "handles":
            from ray.data.extensions import ArrowPythonObjectType

            fields[index] = pa.field(column.path[0], ArrowPythonObjectType())
        else:
            stored = _field_at(dataset.schema, column.source)
            fields[index] = _with_bytes(fields[index], column.path[1:], stored)
    return pa.schema(fields, described.metadata)


def _quoted(name: str) -> str:
    return name if name.isidentifier() else f"`{name}`"


def _field_at(schema: pa.Schema, source: str) -> pa.Field:
    path = next(path for path in _paths(schema) if ".".join(map(_quoted, path)) == source)
    found = schema.field(path[0])
    for name in path[1:]:
        found = found.type.field(name)
    return found


def _with_bytes(given: pa.Field, path: tuple[str, ...], stored: pa.Field) -> pa.Field:
    if path:
        inner = [_with_bytes(item, path[1:], stored) if item.name == path[0] else item for item in given.type]
        return given.with_type(pa.struct(inner))
    kept = {key: value for key, value in (stored.metadata or {}).items() if key.startswith(_MARK)}
    return pa.field(given.name, pa.large_binary(), stored.nullable, {**kept, _MARK: b"true"})


def filled(dataset: lance.LanceDataset, spec: ReadSpec, table: pa.Table) -> Iterator[pa.Table]:
    """The rows with their blobs, in parts whose payload stays under ``blob_batch_bytes`` (but for a single blob).

    Args:
        dataset: the pinned version.
        spec: the read; says which columns, and how they come out.
        table: rows with descriptors and row addresses.

    Raises:
        StorageError: a blob cannot be read, after the retries of the spec.
    """
    columns = spec.read_blobs
    if not columns:
        yield table
        return
    parts = [_Part.of(dataset, spec, column, table) for column in columns]
    lengths = np.sum([part.lengths for part in parts], axis=0)
    handles = spec.scan.blobs == "handles"
    whole = handles or not table.num_rows  # no rows, too, come out with the types that were asked for
    for start, stop in [(0, table.num_rows)] if whole else _cuts(lengths, spec.scan.blob_batch_bytes):
        rows = table.slice(start, stop - start)
        for part in parts:
            values = part.handles(spec, start, stop) if handles else part.payload(dataset, spec, start, stop)
            rows = _replaced(rows, part.column.path, values, spec)
        yield rows


def _cuts(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most so many bytes; a larger one by itself."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield start, stop
        start = stop


@dataclass(frozen=True, slots=True)
class _Part:
    """One blob column of a table of rows: where each payload is, and how long."""

    column: BlobColumn
    addresses: np.ndarray
    present: np.ndarray
    """Whether a row has a value."""
    sizes: np.ndarray
    """Bytes of each blob; -1 where only the store knows."""
    starts: np.ndarray
    lengths: np.ndarray
    """Bytes of each that are read."""

    @classmethod
    def of(cls, dataset: lance.LanceDataset, spec: ReadSpec, column: BlobColumn, table: pa.Table) -> _Part:
        described = _at(table[column.path[0]].combine_chunks(), column.path[1:])
        addresses = table["_rowaddr"].to_numpy()
        present, sizes = _sizes(described)
        wanted = spec.scan.blob_range
        unknown = np.flatnonzero(sizes < 0) if spec.scan.blobs == "bytes" else np.array([], np.int64)
        if len(unknown):

            def ask() -> list[int]:
                with translate_errors("open blobs of", spec.table.uri, secrets=spec.table.secrets):
                    files = dataset.take_blobs(column.source, addresses=addresses[unknown].tolist())
                    return [0 if item is None else int(item.size()) for item in files]

            sizes[unknown] = spec.retry.call(ask, retry_on=is_interruption, what="open blobs")
        starts, lengths = (np.zeros_like(sizes), sizes) if wanted is None else clipped(sizes, wanted)
        return cls(column, addresses, present, sizes, starts, np.where(present, lengths, 0))

    def payload(self, dataset: lance.LanceDataset, spec: ReadSpec, start: int, stop: int) -> pa.Array:
        """The bytes of some rows."""
        places = start + np.flatnonzero(self.present[start:stop])
        values: list[bytes | None] = [None] * (stop - start)
        for place, data in zip(places - start, self._read(dataset, spec, places), strict=True):
            values[place] = data
        return pa.array(values, pa.large_binary())

    def _read(self, dataset: lance.LanceDataset, spec: ReadSpec, places: np.ndarray) -> list[bytes | None]:
        if not len(places):
            return []
        addresses = self.addresses[places].tolist()

        def read() -> list[bytes | None]:
            with translate_errors("read blobs of", spec.table.uri, secrets=spec.table.secrets):
                if spec.scan.blob_range is None:
                    found = dataset.read_blobs(self.column.source, addresses=addresses, preserve_order=True)
                    return [data for _, data in found]
                requests = list(
                    zip(addresses, self.starts[places].tolist(), self.lengths[places].tolist(), strict=True)
                )
                ranges = dataset.read_blob_ranges(
                    self.column.source, requests, selector="addresses", preserve_order=True
                )
                return [data for _, _, data in ranges]

        found = spec.retry.call(read, retry_on=is_interruption, what="read blobs")
        if len(found) != len(places) or any(data is None for data in found):
            raise LanceRayError(f"{spec.table.uri}: the engine gave {len(found)} blobs for {len(places)} rows")
        return found

    def handles(self, spec: ReadSpec, start: int, stop: int) -> pa.Array:
        """Lazy handles of some rows."""
        from ray.data.extensions import ArrowPythonObjectArray

        made = [
            BlobHandle(spec.table, self.column.source, int(address), int(size) if size >= 0 else None)
            if there
            else None
            for address, size, there in zip(
                self.addresses[start:stop], self.sizes[start:stop], self.present[start:stop], strict=True
            )
        ]
        return ArrowPythonObjectArray.from_objects(made)


def _at(array: pa.Array, path: tuple[str, ...]) -> pa.Array:
    for name in path:
        names = [item.name for item in array.type]
        array = array.flatten()[names.index(name)]  # unlike field(), which shows what lies under a null
    return array


def _sizes(described: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of descriptors, which rows have a value, and its bytes (-1 for a whole object outside the table)."""
    parts = dict(zip((item.name for item in described.type), described.flatten(), strict=True))
    sizes = pc.fill_null(parts["size"], 0).to_numpy(zero_copy_only=False).astype(np.int64)
    present = described.is_valid().to_numpy(zero_copy_only=False)
    if "kind" in parts:
        external = pc.fill_null(parts["kind"], 0).to_numpy(zero_copy_only=False) == _EXTERNAL
        return present, np.where(external & present & (sizes == 0), -1, sizes)
    # The older files have no nulls here, but a position that nothing else has.
    positions = pc.fill_null(parts["position"], 0).to_numpy(zero_copy_only=False)
    return present & ~((positions == 1) & (sizes == 0)), sizes


def clipped(sizes: np.ndarray, wanted: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a range begins in blobs of these sizes, and how many bytes of it there are."""
    offset, length = wanted
    starts = np.clip(sizes + offset, 0, None) if offset < 0 else np.minimum(sizes, offset)
    return starts, np.minimum(length, sizes - starts)


def _replaced(rows: pa.Table, path: tuple[str, ...], values: pa.Array, spec: ReadSpec) -> pa.Table:
    index = rows.schema.get_field_index(path[0])
    if len(path) > 1:
        values = _rebuilt(rows[path[0]].combine_chunks(), path[1:], values)
    told = spec.schema.field(path[0]) if path[0] in spec.schema.names else None
    fitting = told is not None and told.type == values.type
    return rows.set_column(index, told if fitting else pa.field(path[0], values.type), values)


def _rebuilt(array: pa.Array, path: tuple[str, ...], values: pa.Array) -> pa.Array:
    if not path:
        return values
    names = [item.name for item in array.type]
    parts = array.flatten()
    place = names.index(path[0])
    parts[place] = _rebuilt(parts[place], path[1:], values)
    fields = [item.with_type(part.type) for item, part in zip(array.type, parts, strict=True)]
    fields[place] = fields[place].with_nullable(True)
    return pa.StructArray.from_arrays(parts, fields=fields, mask=array.is_null())


@functools.lru_cache(maxsize=256)
def mean_bytes(table: PinnedTable, source: str, wanted: tuple[int, int] | None) -> float:
    """About how many bytes of payload a row of a blob column has, from the descriptors of a few rows."""
    dataset = table.open()
    fragments = dataset.get_fragments()
    step = max(1, len(fragments) // _SAMPLED_FRAGMENTS)
    total = rows = 0
    for fragment in fragments[::step]:
        with translate_errors("read descriptors of", table.uri, secrets=table.secrets):
            scanner = dataset.scanner(columns={"blob": source}, fragments=[fragment], limit=_SAMPLED_ROWS)
            described = scanner.to_table()["blob"].combine_chunks()
        present, sizes = _sizes(described)
        sizes = np.where(present & (sizes > 0), sizes, 0)
        total += int((sizes if wanted is None else clipped(sizes, wanted)[1]).sum())
        rows += len(sizes)
    return total / rows if rows else 0.0
