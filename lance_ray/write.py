"""The worker side of writing: blocks of a Ray Dataset become data files, each noted in the job ledger.

Lance binds batches to a schema by position, so every block is aligned by name and type first. One output file at a time
is held as (mostly zero-copy) tables and handed to the engine as a fresh reader on every attempt: a retry replays the
whole file, and can neither lose nor repeat a row.

Memory of a write task: its bundle (Ray's, in the object store), one output file, and one input block.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
from lance.fragment import FragmentMetadata, write_fragments

from lance_ray.arrow import align, in_file, to_arrow, unify
from lance_ray.errors import InvalidArgumentError, LanceRayError, TableExistsError, translate_errors
from lance_ray.ledger import JobRef, WrittenPath
from lance_ray.options import WriteOptions, normalize_uri
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import WriteTarget

logger = logging.getLogger(__name__)

SMALL_BYTES = 1024**2
"""Blocks below this size are joined before they are aligned and written."""

JOINED_BYTES = 64 * 1024**2
"""No more is joined than this."""

PART_BYTES = 16 * 1024**2
"""How much the engine gets at a time: it holds two copies of a batch while it encodes it."""


@dataclass(frozen=True, slots=True)
class WriteSpec:
    """What the tasks of one write share."""

    target: WriteTarget
    options: WriteOptions
    schema: pa.Schema | None
    """What every file must have; None when each file takes the schema of its rows, to be unified at the commit."""
    job: JobRef | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One finished file, or (``fragment`` None) rows that need none: no rows, or only columns of unknown type."""

    rows: int
    size_bytes: int
    schema: bytes
    fragment: str | None = None

    @property
    def arrow_schema(self) -> pa.Schema:
        """The schema of the rows, columns of unknown type included."""
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    def metadata(self) -> FragmentMetadata:
        """The fragment for the commit."""
        assert self.fragment is not None  # noqa: S101 - callers ask only where there is one
        return FragmentMetadata.from_json(self.fragment)


def write_blocks(spec: WriteSpec, blocks: Iterable[Any]) -> list[WrittenFile]:
    """Write blocks to files and note each in the ledger.

    Raises:
        SchemaMismatchError: a block does not fit. Files finished before stay noted in the ledger.
        StorageError: the store failed for good, or longer than the retry policy allows.
    """
    written: list[WrittenFile] = []
    empty: pa.Schema | None = None
    for chunks in _files(map(to_arrow, _joined(blocks)), spec.options):
        if sum(chunk.num_rows for chunk in chunks):
            written.append(write_file(spec, chunks))
        elif not empty:
            empty = chunks[0].schema
    if not written and empty is not None:
        written.append(WrittenFile(0, 0, empty.serialize().to_pybytes()))
    return written


def _joined(blocks: Iterable[Any]) -> Iterator[Any]:
    """The same rows, with runs of small Arrow blocks of one schema joined: what follows has a price for each block."""
    held: list[pa.Table] = []
    size = 0
    for block in blocks:
        small = isinstance(block, pa.Table) and 0 < block.nbytes < SMALL_BYTES
        if held and not (small and size < JOINED_BYTES and block.schema.equals(held[0].schema, check_metadata=True)):
            yield _join(held)
            held, size = [], 0
        if small:
            held.append(block)
            size += block.nbytes
        else:
            yield block
    if held:
        yield _join(held)


def _join(tables: list[pa.Table]) -> pa.Table:
    # Columns of extension types are left in chunks: not every one of them can be concatenated.
    extended = any(isinstance(kind, pa.BaseExtensionType) for kind in tables[0].schema.types)
    table = pa.concat_tables(tables)
    return table if extended or len(tables) == 1 else table.combine_chunks()


def _files(tables: Iterable[pa.Table], options: WriteOptions) -> Iterator[list[pa.Table]]:
    """Rows grouped to files, which end at the row limit or the byte limit (where rows decide, one that was asked for).

    Variable widths make the bytes an estimate: a table is cut as if all its rows were of one size.
    """
    limit = options.max_bytes_per_file if options.rows_decide else options.file_bytes
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        rest = table
        while rest.num_rows:
            count = min(_fitting(rest, limit, size), options.max_rows_per_file - rows)
            if count <= 0 and held:
                yield held
                held, rows, size = [], 0, 0
                continue
            taken = rest.slice(0, max(count, 1))
            rest = rest.slice(taken.num_rows)
            held.append(taken)
            rows, size = rows + taken.num_rows, size + taken.nbytes
        if not table.num_rows and not held:
            yield [table]
    if held:
        yield held


def _fitting(table: pa.Table, limit: int | None, used: int) -> int:
    size: int = table.nbytes
    rows: int = table.num_rows
    return rows if limit is None or used + size <= limit else rows * (limit - used) // size


def write_file(spec: WriteSpec, chunks: Sequence[pa.Table]) -> WrittenFile:
    """Write one file, replaying it on transient errors, and note it in the ledger before returning."""
    schema = spec.schema or unify([chunk.schema for chunk in chunks], stored=False)
    typed = schema if spec.schema is not None else in_file(schema)
    parts = [part for chunk in chunks for part in _parts(chunk.select(_present(chunk, typed, spec)))]
    aligned = [align(part, typed) for part in parts]
    rows, size = sum(chunk.num_rows for chunk in chunks), sum(chunk.nbytes for chunk in aligned)
    serialized = schema.serialize().to_pybytes()
    if len(typed) == 0:
        return WrittenFile(rows, 0, serialized)
    attempt = functools.partial(write_table_file, spec, aligned, typed, rows)
    fragment = spec.retry.call(attempt, retry_on=is_interruption, what="write")
    if spec.job is not None:
        spec.job.record(paths_of(spec, [fragment]))
    return WrittenFile(rows, size, serialized, json.dumps(fragment.to_json()))


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    step = max(1, table.num_rows * PART_BYTES // max(table.nbytes, PART_BYTES))
    return (table.slice(start, step) for start in range(0, table.num_rows, step))


def rewrite_file(spec: WriteSpec, file: WrittenFile) -> WrittenFile:
    """Write the rows of a finished file again, with the schema that is known by now. The old file is left over."""
    schema = spec.schema
    assert schema is not None  # noqa: S101 - this is what a file is written again for
    if file.fragment is None:  # its columns had no type, so all that there was to know is how many rows it has
        return write_file(spec, [pa.table([pa.nulls(file.rows, item.type) for item in schema], schema=schema)])
    path = paths_of(spec, [file.metadata()])[0]
    table = spec.target.table

    def read() -> pa.Table:
        with translate_errors("read back", table.uri, secrets=table.secrets):
            return table.file_session(path.base).open_reader(path.path).read_all().to_table()

    return write_file(spec, [spec.retry.call(read, retry_on=is_interruption, what="read back")])


def _present(chunk: pa.Table, typed: pa.Schema, spec: WriteSpec) -> list[str]:
    if spec.schema is not None:
        return list(chunk.schema.names)  # what the schema does not have is an error, and align() says so
    return [name for name in chunk.schema.names if name in typed.names]


def write_table_file(spec: WriteSpec, tables: Sequence[pa.Table], schema: pa.Schema, rows: int) -> FragmentMetadata:
    """One attempt: a new reader over the tables, one file, and a check that it holds what was given."""
    fragments = _attempt(spec, tables, schema, rows)
    found = sum(fragment.physical_rows for fragment in fragments)
    if len(fragments) != 1 or found != rows:
        raise LanceRayError(f"the engine wrote {found} rows in {len(fragments)} files instead of {rows} in one")
    return fragments[0]


def _attempt(spec: WriteSpec, tables: Sequence[pa.Table], schema: pa.Schema, rows: int) -> list[FragmentMetadata]:
    kwargs = _engine_kwargs(spec)
    try:
        return _write(spec, tables, {**kwargs, "schema": schema, "max_rows_per_file": max(rows, 1)})
    except TableExistsError:
        if spec.target.mode != "overwrite":
            raise
        # Somebody created the table meanwhile; this job is going to replace it.
        return _write(spec, tables, {**kwargs, "schema": schema, "max_rows_per_file": rows, "mode": "overwrite"})


def _write(spec: WriteSpec, tables: Sequence[pa.Table], kwargs: dict[str, Any]) -> list[FragmentMetadata]:
    batches = (batch for table in tables for batch in table.to_batches())
    reader = pa.RecordBatchReader.from_batches(kwargs["schema"], batches)
    with translate_errors("write", spec.target.table.uri, secrets=spec.target.table.secrets):
        return cast("list[FragmentMetadata]", write_fragments(reader, **kwargs))


def _engine_kwargs(spec: WriteSpec) -> dict[str, Any]:
    options, target = spec.options, spec.target
    kwargs: dict[str, Any] = {
        "external_blob_mode": options.external_blob_mode,
        "allow_external_blob_outside_bases": options.allow_external_blob_outside_bases,
        "target_bases": _next_place(spec),
    }
    if options.max_rows_per_group is not None:
        kwargs["max_rows_per_group"] = options.max_rows_per_group
    if target.mode == "append" and target.base is not None:
        return {**kwargs, "dataset_uri": target.base.open(), "mode": "append"}
    version = options.data_storage_version
    if version is None and target.base is not None:
        version = target.base.open().data_storage_version
    new = target.base is None
    return {
        **kwargs,
        **target.table.write_kwargs(),
        "dataset_uri": target.table.uri,
        "mode": "create" if new else "overwrite",
        "data_storage_version": version,
        "initial_bases": [base.engine() for base in options.initial_bases or ()] or None,
    }


def places_of(target: WriteTarget, options: WriteOptions) -> tuple[str | None, ...]:
    """The bases that files go to in turn, as the table knows them; None is the table's own folder.

    Raises:
        InvalidArgumentError: the table has no such base, or none at all.
    """
    dataset = None if target.base is None else target.base.open()
    bases: list[Any] = list(options.initial_bases or ()) if dataset is None else list(dataset.base_paths().values())
    known: dict[str, str] = {}
    for base in bases:
        told = base.name or base.path
        known |= dict.fromkeys(filter(None, (base.name, base.path, normalize_uri(base.path))), told)
    if options.target_all_bases is not None:
        own = (None,) if options.target_all_bases else ()
        if not known and not own:
            raise InvalidArgumentError("target_all_bases", False, "the table has no base but its own folder")
        return (*own, *dict.fromkeys(known.values()))
    wanted = {place: known.get(place) for place in options.target_bases or ()}
    if unknown := [place for place, found in wanted.items() if found is None]:
        raise InvalidArgumentError("target_bases", unknown, f"the bases of the table are {sorted(known)}")
    return tuple(wanted.values()) or (None,)


_turns = itertools.count(random.randrange(2**16))
"""Whose turn it is: workers begin at different bases, so that also tasks of one file each are spread."""


def _next_place(spec: WriteSpec) -> list[str] | None:
    places = places_of(spec.target, spec.options)
    place = places[next(_turns) % len(places)]
    return None if place is None else [place]


def format_of(version: str) -> str:
    """The file format that ``data_storage_version`` stands for, asked of the engine, which alone knows all names."""
    try:
        fragments = write_fragments(pa.table({"a": [0]}), "memory://", mode="create", data_storage_version=version)
    except ValueError:
        raise InvalidArgumentError(
            "data_storage_version", version, "the engine does not know it; use '2.0', '2.1', '2.2' or 'stable'"
        ) from None
    file = fragments[0].files[0]
    found = f"{file.file_major_version}.{file.file_minor_version}"
    return "0.1" if found == "0.2" else found  # what files of the legacy format call themselves


def paths_of(spec: WriteSpec, fragments: Iterable[FragmentMetadata]) -> list[WrittenPath]:
    """The names of the fragments' files as the ledger keeps them."""
    files = [file for fragment in fragments for file in fragment.files]
    if all(file.base_id is None for file in files):
        return [WrittenPath(str(file.path)) for file in files]
    known = {base.id: base for base in spec.options.initial_bases or ()}
    if spec.target.base is not None:
        known = spec.target.base.open().base_paths()
    return [_path_in(known.get(file.base_id), str(file.path)) for file in files]


def _path_in(base: Any, name: str) -> WrittenPath:
    if base is None:
        return WrittenPath(name)
    return WrittenPath(name, str(base.path), "data" if base.is_dataset_root else "")
