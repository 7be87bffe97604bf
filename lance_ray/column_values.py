"""The worker side of computed columns: the values of one fragment, written as one new file beside the old ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from lance_ray.arrow import engine_safe, row_width
from lance_ray.column_commits import added_fields, as_dict, live_rows, schema_digest
from lance_ray.errors import translate_errors
from lance_ray.ledger import JobRef, WrittenPath
from lance_ray.planning.columns import ColumnResult
from lance_ray.planning.reads import batch_rows
from lance_ray.table import PinnedTable
from lance_ray.transforms import Transform, aligned, output_of

SYSTEM = ("_rowid", "_rowaddr")

_SAMPLE_ROWS = 16


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """What the tasks of one job share."""

    transform: Transform
    job: JobRef
    columns: tuple[str, ...] | None
    """Columns that the transform reads; None for all."""
    filter: str | None
    batch_size: int | None
    output: pa.Schema | None = None
    """The columns of an update; on the driver, all columns once they are found out."""
    update: bool = False


@dataclass(frozen=True, slots=True)
class ColumnTask:
    """One fragment of one version."""

    table: PinnedTable
    fragment: int
    output: pa.Schema | None = None
    """The columns to write. Here, so that what all tasks share stays one object, and a model is loaded once."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The state of a worker: the spec, and its transform ready for use."""

    spec: ColumnSpec
    transform: Transform


def load(spec: ColumnSpec) -> Loaded:
    """Runs on a worker, once where workers keep state."""
    return Loaded(spec, spec.transform.load())


def sample(state: Any, task: ColumnTask) -> bytes:
    """Runs on a worker: the schema of the new columns, from some rows."""
    loaded = state if isinstance(state, Loaded) else load(state)
    spec, dataset = loaded.spec, task.table.open()
    with reading(task.table):
        table = dataset.scanner(filter=spec.filter, limit=_SAMPLE_ROWS, **projection(spec)).to_table()
    given = table.combine_chunks().to_batches()
    batch = given[0] if given else pa.RecordBatch.from_pylist([], schema=table.schema)
    found = output_of(loaded.transform(batch), spec.transform, dataset.schema)
    serialized: bytes = found.serialize().to_pybytes()
    return serialized


def compute(state: Any, task: ColumnTask) -> ColumnResult:
    """Runs on a worker: the values of one fragment, written as one new file that the ledger knows."""
    loaded = state if isinstance(state, Loaded) else load(state)
    dataset = task.table.open()
    planned = fragments_of_one(dataset, task.fragment)
    values = _Values(loaded, task, dataset)
    writing: Any = dataset.get_fragment(task.fragment)
    write = _update if loaded.spec.update else _add
    with translate_errors("write columns of", task.table.uri, secrets=task.table.secrets):
        try:
            result = write(values, writing, planned)
        except Exception:
            if values.error is not None:  # the engine tells only its text
                raise values.error from None
            raise
    return result


def fragments_of_one(dataset: lance.LanceDataset, fragment: int) -> dict[str, Any]:
    """What the manifest says of one fragment."""
    found: Any = dataset.get_fragment(fragment)
    return dict(json.loads(json.dumps(found.metadata.to_json())))


def reading(table: PinnedTable) -> Any:
    """Errors of a scan in the package's own types."""
    return translate_errors("read", table.uri, secrets=table.secrets)


def projection(spec: ColumnSpec) -> dict[str, Any]:
    """What the scanner is told about columns."""
    if spec.transform.sql:
        # The engine scans for constants alone only beside something that it has to read.
        return {"columns": dict(spec.transform.sql), "with_row_address": True}
    if spec.columns is None:
        return {}
    return {
        "columns": [name for name in spec.columns if name not in SYSTEM],
        "with_row_id": "_rowid" in spec.columns,
        "with_row_address": "_rowaddr" in spec.columns,
    }


class _Values:
    """The new values of one fragment, batch by batch, computed as they are asked for."""

    def __init__(self, loaded: Loaded, task: ColumnTask, dataset: lance.LanceDataset) -> None:
        assert task.output is not None  # noqa: S101 - found out before the first of these tasks
        self.spec = loaded.spec
        self.output = task.output
        self.dataset = dataset
        self.error: Exception | None = None
        """Why the computation ended early; what reads it from the engine's side is told a text only."""
        self.rows = 0
        self._loaded = loaded
        self._task = task

    def __iter__(self) -> Iterator[tuple[np.ndarray | None, pa.Table]]:
        """The addresses of some rows, where they are needed, and their values."""
        addressed = self.spec.update or self.spec.filter is not None
        try:
            for batch in self._scan(addressed=addressed):
                addresses = np.asarray(batch.column("_rowaddr")) if addressed else None
                self.rows += batch.num_rows
                yield addresses, values_of(self._loaded, batch, self.output)
        except Exception as error:  # kept for compute(), which raises it again with its own type
            self.error = error
            raise

    def tables(self) -> Iterator[pa.RecordBatch]:
        """The values alone."""
        for _, table in self:
            yield from table.to_batches()

    def _scan(self, *, addressed: bool) -> Iterator[pa.RecordBatch]:
        fragment: Any = self.dataset.get_fragment(self._task.fragment)
        kwargs = projection(self.spec)
        kwargs["with_row_address"] = addressed or kwargs.get("with_row_address", False)
        with reading(self._task.table):
            scanner = self.dataset.scanner(
                fragments=[fragment], filter=self.spec.filter, batch_size=self.batch_rows(), **kwargs
            )
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield batch

    def batch_rows(self) -> int:
        """Rows of a batch."""
        return rows_of_batch(self.spec, self.dataset, self.output)


def values_of(loaded: Loaded, batch: pa.RecordBatch, output: pa.Schema) -> pa.Table:
    """The new values of a batch that was read for them.

    Raises:
        SchemaMismatchError: they are not the columns of the output.
    """
    spec = loaded.spec
    if spec.transform.sql:
        return aligned(pa.Table.from_batches([batch]), output, SYSTEM)
    hidden = [name for name in SYSTEM if name not in (spec.columns or ())]
    batch = batch.select([name for name in batch.schema.names if name not in hidden])
    if spec.update:
        return aligned(loaded.transform(batch), output, None)
    return aligned(loaded.transform(batch), output, batch.schema.names if spec.transform.keeps_input else ())


def rows_of_batch(spec: ColumnSpec, dataset: lance.LanceDataset, output: pa.Schema) -> int:
    """Rows of a batch: as asked, or some 4 MiB of the wider of what is read and what is written."""
    if spec.batch_size is not None:
        return spec.batch_size
    widths = map(row_width, (dataset.scanner(**projection(spec)).projected_schema, output))
    return batch_rows(max(fixed + _VARYING_BYTES * varying for fixed, varying in widths))


_VARYING_BYTES = 64


def _add(values: _Values, writing: Any, planned: dict[str, Any]) -> ColumnResult:
    if values.spec.filter is None:
        batches = values.tables()
    else:
        held = [(addresses, table) for addresses, table in values if addresses is not None]
        if not held:
            return unchanged(values.dataset, planned)
        batches = iter(_spread(values, planned["id"], held).to_batches())
    reader = pa.RecordBatchReader.from_batches(values.output, batches)
    # The engine cuts what it reads to its own batches: small ones cost three times as much as those of the reader.
    metadata, schema = writing.merge_columns(reader, batch_size=values.batch_rows())
    return _record(values, planned, metadata, added=added_fields(schema, values.dataset.lance_schema))


def _spread(values: _Values, fragment: int, held: Sequence[tuple[np.ndarray, pa.Table]]) -> pa.Table:
    """Values for all rows of the fragment: those computed, and null for the others."""
    computed = np.concatenate([addresses for addresses, _ in held])
    return spread(pa.concat_tables([table for _, table in held]), computed, live_rows(values.dataset, fragment))


def spread(table: pa.Table, addresses: np.ndarray, live: np.ndarray) -> pa.Table:
    """The rows of a table, which are for ``addresses``, in the order of ``live``; null where there is none."""
    order = np.argsort(addresses, kind="stable")
    places = np.searchsorted(addresses[order], live)
    places[places == len(order)] = 0
    found = addresses[order][places] == live
    indices = pa.array(order[places], mask=~found)
    return engine_safe(table.take(indices))


def _update(values: _Values, writing: Any, planned: dict[str, Any]) -> ColumnResult:
    held = [_with_addresses(table, addresses) for addresses, table in values if addresses is not None]
    if not held:
        return unchanged(values.dataset, planned)
    table = pa.concat_tables(held)
    metadata, fields, offsets = writing.update_columns(table.to_reader(), "_rowaddr", "_rowaddr", with_offsets=True)
    return _record(values, planned, metadata, fields=tuple(fields), offsets=bytes(offsets).hex())


def _with_addresses(table: pa.Table, addresses: np.ndarray) -> pa.Table:
    return table.append_column(pa.field("_rowaddr", pa.uint64()), pa.array(addresses, pa.uint64()))


def _record(values: _Values, planned: dict[str, Any], metadata: Any, **engine: Any) -> ColumnResult:
    return record_result(values.spec.job, values.dataset, planned, metadata, rows=values.rows, **engine)


def unchanged(dataset: lance.LanceDataset, planned: dict[str, Any]) -> ColumnResult:
    """The result for a fragment of which no row is concerned."""
    return ColumnResult(planned["id"], dataset.version, planned, planned, digest=schema_digest(dataset))


def record_result(
    job: JobRef, dataset: lance.LanceDataset, planned: dict[str, Any], metadata: Any, **engine: Any
) -> ColumnResult:
    """The result for a fragment with a new file, which the ledger knows from now on.

    Args:
        job: whose ledger.
        dataset: the version that was read.
        planned: the fragment there.
        metadata: the fragment with the file, as the engine returned it.
        engine: what else belongs to the result.
    """
    result = unchanged(dataset, planned)
    result = dataclasses.replace(result, updated=json.loads(json.dumps(metadata.to_json())), **engine)
    files = result.new_files
    result = dataclasses.replace(result, bytes=sum(file["file_size_bytes"] or 0 for file in files))
    bases = dataset.base_paths()
    paths = [
        WrittenPath(file["path"], None if file["base_id"] is None else str(bases[file["base_id"]].path))
        for file in files
    ]
    job.record(paths, as_dict(result))
    return result
