"""The worker side of reading, and what the driver asks the engine once per plan.

:class:`ReadSpec` is what every task of a read shares; :func:`scan` turns one task into Arrow tables. Both sides work on
the pinned version alone, so any process can run any task again.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pyarrow as pa
from lance.dataset import serialize_row_addrs

from lance_ray.arrow import pickled_columns, row_width
from lance_ray.blobs import BlobColumn, blob_columns, filled, has_blobs, shown
from lance_ray.errors import InvalidArgumentError, tidy, translate_errors
from lance_ray.options import ScanOptions, as_matrix
from lance_ray.planning.reads import FragmentStats, Piece, batch_rows, positions_of
from lance_ray.predicates import apply_residual, columns_of
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import PinnedTable

if TYPE_CHECKING:
    from ray.data.expressions import Expr

ROW_ID, ROW_ADDRESS, FRAGMENT_ID = "_rowid", "_rowaddr", "_fragid"
META_COLUMNS = (ROW_ID, ROW_ADDRESS, "_row_created_at_version", "_row_last_updated_at_version", "_rowoffset")

GATHER_BYTES = 32 * 1024**2
"""Small batches are gathered to tables of this size before Ray sees them."""

INDEX_ANSWER_ROWS = 1_000_000
"""Above so many matches the answer of an index is not shipped to the tasks; they filter themselves."""

# Ray gives a block without columns no rows. Its own readers keep the count of an empty projection in a null column of
# this name, which consumers drop.
ROW_COUNT_COLUMN = "__bsp_stub"

_SAMPLED_FRAGMENTS = 128
_WEIGHED_FRAGMENTS = 2048
_EXACT_INDICES = {"BTree", "Bitmap", "LabelList"}
_SEARCH_COLUMNS = ("_distance", "_score")
_RANKINGS = ("nearest", "full_text_query", "order_by")
_ROW_MASKS = ("row_addr_allowlist", "row_addr_blocklist", "include_deleted_rows")


@dataclass(frozen=True, slots=True)
class ReadSpec:
    """What the tasks of one read share: the snapshot, the scan, and what Ray pushed down into it."""

    table: PinnedTable
    scan: ScanOptions
    schema: pa.Schema
    """Of the rows that come out: the scan's, or for several tables their union."""
    sql: str | None = None
    residual: Expr | None = None
    projection: tuple[str, ...] | None = None
    batch_size: int | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    blobs: tuple[BlobColumn, ...] = ()
    """Columns that the scan gives as descriptors and that come out as bytes or handles."""

    @property
    def read_blobs(self) -> tuple[BlobColumn, ...]:
        """Those of them that come out, or that the residual looks at."""
        if self.projection is None:
            return self.blobs
        wanted = {*self.projection, *self._residual_columns()}
        return tuple(column for column in self.blobs if column.path[0] in wanted)

    @property
    def is_masked(self) -> bool:
        """Whether a scanner option decides which rows there are, so that the rows of a fragment cannot be numbered."""
        return any(self.scan.scanner.get(name) for name in _ROW_MASKS)

    @property
    def has_filter(self) -> bool:
        """Whether the number of rows is not known before the scan."""
        return self.filter is not None or self.residual is not None or self.is_masked

    @property
    def output_schema(self) -> pa.Schema:
        """The schema after the pushed projection."""
        if self.projection is None:
            return self.schema
        return pa.schema([self.schema.field(name) for name in self.projection], self.schema.metadata)

    @property
    def filter(self) -> Any:
        """What the scanner filters by: the caller's filter, and what Ray pushed."""
        if self.scan.filter is None or self.sql is None:
            return self.sql if self.scan.filter is None else self.scan.filter
        return f"({self.scan.filter}\n) AND ({self.sql})"  # the line may end in a comment

    def scanned_columns(self, available: pa.Schema) -> Any:
        """The scanner's ``columns``: those that come out of this table, and those that the residual looks at."""
        if self.scan.expressions:
            wanted = None if self.projection is None else {*self.projection, *self._residual_columns()}
            return {name: sql for name, sql in self.scan.expressions if wanted is None or name in wanted}
        names = self.projection if self.projection is not None else self.scan.names
        if names is None:
            return None
        wanted_names = dict.fromkeys((*names, *self._residual_columns()))
        known = {*available.names, *META_COLUMNS, *(_SEARCH_COLUMNS if self.scan.is_search else ())}
        return [name for name in wanted_names if name.partition(".")[0] in known]

    def _residual_columns(self) -> tuple[str, ...]:
        return () if self.residual is None else tuple(sorted(columns_of(self.residual)))

    def wants(self, name: str, *, asked: bool) -> bool:
        """Whether a row id or address column comes out."""
        if self.projection is not None:
            return name in self.projection or name in self._residual_columns()
        return asked or name in (self.scan.names or ())

    def scanner_kwargs(self, dataset: lance.LanceDataset) -> dict[str, Any]:
        """Keywords of ``LanceDataset.scanner`` but for which rows it sees."""
        kwargs = dict(self.scan.scanner)
        if "full_text_query" in kwargs:
            kwargs["full_text_query"] = _made(kwargs["full_text_query"])
        if self.batch_size is not None and not {"batch_size", "batch_size_bytes"} & set(kwargs):
            kwargs["batch_size"] = self.batch_size
        columns = self.scanned_columns(dataset.schema)
        if self.scan.is_search and columns is not None:
            # The engine adds the score by itself only for now, and warns of that.
            if not kwargs.get("disable_scoring_autoprojection") and self.projection is None:
                columns = _with_score(columns, "_distance" if kwargs.get("nearest") is not None else "_score")
            kwargs["disable_scoring_autoprojection"] = True
        fragment_id = self.wants(FRAGMENT_ID, asked=self.scan.with_fragment_id)
        return {
            **kwargs,
            "columns": columns,
            "filter": _made(self.filter),
            "with_row_id": self.wants(ROW_ID, asked=self.scan.with_row_id) or None,
            "with_row_address": fragment_id
            or bool(self.read_blobs)
            or self.wants(ROW_ADDRESS, asked=self.scan.with_row_address)
            or None,
        }


def _made(query: Any) -> Any:
    """A query, also where a function makes it: the engine's own query objects cannot be sent to other processes."""
    return query() if callable(query) else query


def _with_score(columns: Any, score: str) -> Any:
    if score in columns:
        return columns
    return {**columns, score: score} if isinstance(columns, Mapping) else [*columns, score]


@dataclass(frozen=True, slots=True)
class ReadTaskRows:
    """Which rows a task reads: pieces of the table, the rows of an index's answer, or (neither) the whole scan."""

    pieces: tuple[Piece, ...] | None = None
    row_ids: bytes | None = None
    fragment_ids: tuple[int, ...] = ()


def table_schema(table: PinnedTable, scan: ScanOptions) -> pa.Schema:
    """The schema of a scan's rows; checks columns and filter against the table without reading any data.

    Raises:
        InvalidArgumentError: unknown column, a filter that does not parse or fit the types, an unknown option.
    """
    dataset = table.open()
    scan = _with_few_queries(scan)
    _check_columns(dataset, scan)
    for name, value in scan.scanner.items():  # each by itself: the engine does not say which one it refuses
        with _argument_errors(name, value):
            dataset.scanner(**{name: value})
    fragments = _fragments(dataset, scan.fragment_ids)
    if scan.has_condition:
        with _argument_errors("filter", scan.filter):
            dataset.scanner(columns=[], with_row_id=True, filter=scan.filter).explain_plan()
    spec = ReadSpec(table, scan, pa.schema([]))
    kwargs = spec.scanner_kwargs(dataset)
    ranking = next((name for name in _RANKINGS if scan.scanner.get(name) is not None), None)
    with _argument_errors(ranking or "columns", scan.scanner[ranking] if ranking else scan.names):
        schema = dataset.scanner(**{**kwargs, "filter": None, "order_by": None}).projected_schema
        if ranking:
            dataset.scanner(**{**kwargs, "with_row_id": True, "fragments": fragments}).explain_plan()
    _refuse_pickled(schema)
    if spec.wants(FRAGMENT_ID, asked=scan.with_fragment_id):
        hidden = set() if spec.wants(ROW_ADDRESS, asked=scan.with_row_address) else {ROW_ADDRESS}
        fields = [item for item in schema if item.name not in hidden]
        schema = pa.schema([*fields, pa.field(FRAGMENT_ID, pa.uint64())], schema.metadata)
    return shown(schema, dataset, blob_columns(dataset, schema, scan), scan.blobs)


def blobs_of(table: PinnedTable, scan: ScanOptions) -> tuple[BlobColumn, ...]:
    """The blob columns of a scan that come out as bytes or handles."""
    dataset = table.open()
    if scan.blobs == "descriptors" or scan.is_search or not has_blobs(dataset.schema):
        return ()
    kwargs = ReadSpec(table, scan, pa.schema([])).scanner_kwargs(dataset)
    described = dataset.scanner(**{**kwargs, "filter": None, "order_by": None}).projected_schema
    return blob_columns(dataset, described, scan)


_TRUST = "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR"
"""Ray's own switch for all of its readers."""


def _refuse_pickled(schema: pa.Schema) -> None:
    found = pickled_columns(schema)
    if found and os.environ.get(_TRUST, "").lower() not in ("1", "true"):
        why = "hold pickled Python objects, which run code of whoever wrote them; choose others, or trust it by"
        raise InvalidArgumentError("columns", found, f"{why} the environment variable {_TRUST}=1")


def _with_few_queries(scan: ScanOptions) -> ScanOptions:
    """Of many query vectors only two: the engine plans each, and they differ in nothing that is checked."""
    nearest: Any = scan.scanner.get("nearest")
    queries = as_matrix(nearest["q"]) if isinstance(nearest, Mapping) else None
    if queries is None or len(queries) <= 2:
        return scan
    return dataclasses.replace(scan, scanner={**scan.scanner, "nearest": {**nearest, "q": queries[:2]}})


def _check_columns(dataset: lance.LanceDataset, scan: ScanOptions) -> None:
    known = {*dataset.schema.names, *META_COLUMNS, FRAGMENT_ID}
    if scan.is_search:
        known |= set(_SEARCH_COLUMNS)
    unknown = [name for name in scan.columns or () if name not in known and name.partition(".")[0] not in known]
    if unknown:
        raise InvalidArgumentError(
            "columns", unknown, f"are not columns of the table, which has {dataset.schema.names}"
        )


class _argument_errors:  # noqa: N801 - a context manager, used as a function
    """Turns what the engine says of one argument into an InvalidArgumentError that names it."""

    def __init__(self, parameter: str, value: Any) -> None:
        self._parameter, self._value = parameter, value

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, TypeError, KeyError, OverflowError, RuntimeError, pa.ArrowException)):
            raise InvalidArgumentError(self._parameter, self._value, tidy(str(error))) from None


def bytes_per_row(table: PinnedTable, schema: pa.Schema) -> float:
    """About how many bytes a row of these columns takes in memory.

    Fixed-width columns count exactly. Variable ones share what the sizes of the data files in the manifest leave for
    them, sampled over the table; nothing is read but the manifest.
    """
    dataset = table.open()
    fixed, variable = row_width(schema)
    if variable == 0:
        return float(fixed)
    all_fixed, all_variable = row_width(dataset.schema)
    ids = list(dataset.fragment_ids())
    step = max(1, len(ids) // _SAMPLED_FRAGMENTS)
    size = rows = 0
    for fragment_id in ids[::step]:
        metadata = _fragment(dataset, fragment_id).metadata
        size += sum(file.file_size_bytes or 0 for file in metadata.files)
        rows += metadata.physical_rows
    on_disk = size / rows if rows else 0.0
    per_column = max(16.0, (on_disk - 0.5 * all_fixed) / max(all_variable, 1))
    return fixed + variable * per_column


def fragment_stats(
    table: PinnedTable, row_bytes: float, fragment_ids: Sequence[int] | None, *, varies: bool = False
) -> FragmentStats:
    """The fragments of the snapshot in table order, from the manifest alone.

    Args:
        table: the snapshot.
        row_bytes: see :func:`bytes_per_row`.
        fragment_ids: only these.
        varies: whether rows are of varying width; then fragments weigh by the sizes of their files, unless there are
            so many that an average does as well.
    """
    fragments = table.open().get_fragments()
    ids = [fragment.fragment_id for fragment in fragments]
    rows = [fragment.physical_rows - fragment.num_deletions for fragment in fragments]
    widths = _disk_widths(fragments) if varies and 1 < len(fragments) <= _WEIGHED_FRAGMENTS else [1.0] * len(rows)
    mean = sum(width * count for width, count in zip(widths, rows, strict=True)) / max(sum(rows), 1) or 1.0
    weights = [row_bytes * count * width / mean for width, count in zip(widths, rows, strict=True)]
    stats = FragmentStats(ids, rows, weights)
    return stats if fragment_ids is None else stats.select(positions_of(ids, fragment_ids))


def _disk_widths(fragments: Sequence[Any]) -> list[float]:
    """Bytes of each fragment's files for a row."""
    metadata = [fragment.metadata for fragment in fragments]
    sizes = [sum(file.file_size_bytes or 0 for file in item.files) for item in metadata]
    return [size / max(item.physical_rows, 1) for size, item in zip(sizes, metadata, strict=True)]


def index_answer(spec: ReadSpec) -> np.ndarray | None:
    """Row ids and addresses of the rows that match, if scalar indices alone can say so; else None.

    Returns:
        A (2, n) uint64 array in table order: row ids, row addresses. None where an index does not cover every fragment,
        is not exact, or matches more than :data:`INDEX_ANSWER_ROWS` rows.
    """
    dataset = spec.table.open()
    if spec.filter is None or spec.is_masked or spec.scan.scanner.get("use_scalar_index") is False:
        return None
    if not dataset.describe_indices():
        return None
    fragments = _fragments(dataset, spec.scan.fragment_ids)
    kwargs = {
        "columns": [],
        "with_row_id": True,
        "with_row_address": True,
        "filter": spec.filter,
        "fragments": fragments,
    }
    plan = dataset.scanner(**kwargs).explain_plan()
    if not _is_answered_by_indices(dataset, plan):
        return None
    with translate_errors("read an index of", spec.table.uri, secrets=spec.table.secrets):
        rows = dataset.scanner(**kwargs, limit=INDEX_ANSWER_ROWS + 1).to_table()
    if rows.num_rows > INDEX_ANSWER_ROWS:
        return None
    answer = np.stack([rows[ROW_ID].to_numpy(), rows[ROW_ADDRESS].to_numpy()]).astype(np.uint64)
    return answer[:, np.argsort(answer[1], kind="stable")]


def _is_answered_by_indices(dataset: lance.LanceDataset, plan: str) -> bool:
    used = re.findall(r"@(\S+?)\((\w+)\)", plan)
    reads = re.findall(r"refine_filter=(.*)", plan)
    if not used or "ScalarIndexQuery" not in plan or reads != ["--"]:
        return False
    if any(kind not in _EXACT_INDICES for _, kind in used):
        return False
    everything = set(dataset.fragment_ids())
    return all(everything <= covered_fragments(dataset, name) for name, _ in used)


def covered_fragments(dataset: lance.LanceDataset, name: str) -> set[int]:
    """The fragments that the segments of an index cover together; none where there is no such index."""
    segments = [segment for item in dataset.describe_indices() if item.name == name for segment in item.segments]
    return {fragment for segment in segments for fragment in segment.fragment_ids}


def _fragments(dataset: lance.LanceDataset, ids: Sequence[int] | None) -> list[Any] | None:
    """The fragments in table order, in which a scanner would not put them. InvalidArgumentError for unknown ids."""
    if ids is None:
        return None
    known = list(dataset.fragment_ids())
    return [_fragment(dataset, known[position]) for position in positions_of(known, ids)]


def _fragment(dataset: lance.LanceDataset, fragment_id: int) -> Any:
    """A fragment of the pinned version, where a planned id always exists."""
    return dataset.get_fragment(fragment_id)


def scan(spec: ReadSpec, rows: ReadTaskRows) -> Iterator[pa.Table]:
    """The rows of one task as tables of a sensible size, in table order.

    A transient storage error in mid-scan is retried from the row reached. What Ray pushed and Lance cannot decide
    exactly is filtered here by Ray's own code.
    """
    dataset = spec.retry.call(spec.table.open, retry_on=is_interruption, what="open")
    if not spec.output_schema.names and spec.residual is None:
        yield from _count_only(dataset, spec, rows)
        return
    for table in _gathered(batches(dataset, spec, rows)):
        for part in filled(dataset, spec, _passing(table, spec)):
            finished = finish(part, spec)
            if finished.num_rows:
                yield finished


def _passing(table: pa.Table, spec: ReadSpec) -> pa.Table:
    """The rows whose blobs are worth reading, where that can be told without them."""
    if spec.residual is None or not spec.read_blobs:
        return table
    looked_at = columns_of(spec.residual)
    if any(column.path[0] in looked_at for column in spec.blobs) or not looked_at <= set(table.schema.names):
        return table
    return apply_residual(table, spec.residual)


def _count_only(dataset: lance.LanceDataset, spec: ReadSpec, rows: ReadTaskRows) -> Iterator[pa.Table]:
    bare = dataclasses.replace(spec, projection=(ROW_ID,), scan=dataclasses.replace(spec.scan, expressions=()))
    count = sum(batch.num_rows for batch in batches(dataset, bare, rows))
    if count:
        yield pa.table({ROW_COUNT_COLUMN: pa.nulls(count)})


def batches(dataset: lance.LanceDataset, spec: ReadSpec, rows: ReadTaskRows) -> Iterator[pa.RecordBatch]:
    """The rows of one task as the scanner gives them; retried from the row reached."""
    kwargs = spec.scanner_kwargs(dataset)
    for selection in selections(dataset, spec, rows):

        def open_stream(done: int, selection: dict[str, Any] = selection) -> Iterator[pa.RecordBatch]:
            return _stream(dataset, spec, {**kwargs, **_after(selection, done)})

        if kwargs.get("scan_in_order") is False:
            yield from open_stream(0)  # the rows that came so far would not be the first ones of another scan
        else:
            yield from spec.retry.iterate(
                open_stream, size=lambda batch: int(batch.num_rows), retry_on=is_interruption, what="scan"
            )


def _stream(dataset: lance.LanceDataset, spec: ReadSpec, kwargs: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    if kwargs.get("limit") == 0:
        return
    with translate_errors("scan", spec.table.uri, secrets=spec.table.secrets):
        yield from dataset.scanner(**kwargs).to_batches()


def _after(selection: dict[str, Any], done: int) -> dict[str, Any]:
    """The same rows without the first ``done``. Lance counts offset and limit in rows that pass, in table order."""
    if done == 0:
        return selection
    limit = selection.get("limit")
    return {
        **selection,
        "offset": (selection.get("offset") or 0) + done,
        "limit": None if limit is None else limit - done,
    }


def selections(
    dataset: lance.LanceDataset, spec: ReadSpec, rows: ReadTaskRows, *, masked: bool | None = None
) -> Iterator[dict[str, Any]]:
    """The scanners of a task: one for each run of whole fragments, one for each row range.

    A range is a window of rows, or (``masked``, as with a filter) a mask of row ids.
    """
    masked = spec.filter is not None if masked is None else masked
    if rows.row_ids is not None:
        ids = np.frombuffer(rows.row_ids, dtype=np.uint64)
        fragments = _fragments(dataset, rows.fragment_ids)
        yield {"fragments": fragments, "row_addr_allowlist": serialize_row_addrs(ids.tolist()), "filter": None}
        return
    if rows.pieces is None:
        limit, offset = spec.scan.limit, spec.scan.offset or None
        selection = {"fragments": _fragments(dataset, spec.scan.fragment_ids), "limit": limit, "offset": offset}
        # The engine sorts by a column that does not come out only where it can take the rows by their ids.
        by_id = {"with_row_id": True} if spec.scan.scanner.get("order_by") is not None else {}
        yield {**selection, **by_id}
        return
    whole: list[Any] = []
    for piece in rows.pieces:
        if piece.is_whole:
            whole.extend(_fragment(dataset, item) for item in range(piece.first, piece.last + 1))
            continue
        if whole:
            yield {"fragments": whole}
            whole = []
        yield _row_range(dataset, spec, piece, masked=masked)
    if whole:
        yield {"fragments": whole}


def _row_range(dataset: lance.LanceDataset, spec: ReadSpec, piece: Piece, *, masked: bool) -> dict[str, Any]:
    assert piece.stop is not None  # noqa: S101 - only called for pieces that are not whole
    fragments = [_fragment(dataset, piece.first)]
    window: dict[str, Any] = {"offset": piece.start or None, "limit": piece.stop - piece.start}
    if not masked:
        return {"fragments": fragments, **window}

    # With a filter or a ranking, offset and limit would count the rows that pass: mask the range by row id instead.
    def row_ids() -> list[int]:
        with translate_errors("scan", spec.table.uri, secrets=spec.table.secrets):
            scanner = dataset.scanner(fragments=fragments, columns=[], with_row_id=True, **window)
            ids: list[int] = scanner.to_table()[ROW_ID].to_pylist()
            return ids

    return {
        "fragments": fragments,
        "row_addr_allowlist": serialize_row_addrs(spec.retry.call(row_ids, retry_on=is_interruption)),
    }


def _gathered(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= GATHER_BYTES:
            yield _as_table(held, size)
            held, size = [], 0
    if held:
        yield _as_table(held, size)


def _as_table(batches: list[pa.RecordBatch], size: int) -> pa.Table:
    table = pa.Table.from_batches(batches)
    # A copy of tiny chunks costs less than what every consumer pays for each chunk.
    return table.combine_chunks() if len(batches) > 1 and size < len(batches) * 256 * 1024 else table


def finish(table: pa.Table, spec: ReadSpec) -> pa.Table:
    """The table as it comes out: fragment ids computed, the residual applied, columns as the schema says."""
    wanted = spec.output_schema
    looked_at = () if spec.residual is None else columns_of(spec.residual)
    if FRAGMENT_ID in wanted.names or FRAGMENT_ID in looked_at:
        addresses = table[ROW_ADDRESS].to_numpy()
        table = table.append_column(FRAGMENT_ID, pa.array(addresses >> np.uint64(32), pa.uint64()))
    if spec.residual is not None:
        present = set(table.schema.names)
        for item in (item for item in spec.schema if item.name in looked_at and item.name not in present):
            table = table.append_column(item, pa.nulls(table.num_rows, item.type))
        table = apply_residual(table, spec.residual)
    if not wanted.names:
        return pa.table({ROW_COUNT_COLUMN: pa.nulls(table.num_rows)})
    if table.schema.names == wanted.names and table.schema.types == wanted.types:
        return table
    return pa.table([_column(table, item) for item in wanted], schema=wanted)


def _column(table: pa.Table, wanted: pa.Field) -> Any:
    """A column as the schema has it: several tables may lack it, or have a narrower form of its type."""
    if wanted.name not in table.schema.names:
        return pa.nulls(table.num_rows, wanted.type)
    column = table[wanted.name]
    return column if column.type == wanted.type else column.cast(wanted.type)


def read_batch_rows(schema: pa.Schema, row_bytes: float) -> int:
    """Rows of a scan batch for these columns."""
    return batch_rows(row_bytes if len(schema) else 8.0)
