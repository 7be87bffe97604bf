"""Writers made by hand: :class:`LanceFragmentWriter` in ``map_batches``, :class:`LanceFragmentCommitter` as the sink.

For pipelines that want to write files in the middle of their own stages and commit at the end::

    writer = LanceFragmentWriter(uri, schema=schema, mode="append")
    ds.map_batches(writer, batch_size=None).write_datasink(LanceFragmentCommitter(uri, schema=schema, mode="append"))

The same worker function and the same commit as in :func:`lance_ray.write_lance`. Fragments travel as JSON.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
from lance.schema import LanceSchema
from ray.data.block import BlockAccessor
from ray.data.datasource import WriteResult

from lance_ray.arrow import unify
from lance_ray.catalog import LanceRestConfig
from lance_ray.datasink import LanceDatasink, check_target, field_ids, files_schema, written_schema
from lance_ray.errors import InvalidArgumentError, SchemaMismatchError
from lance_ray.ledger import delete_files, untracked
from lance_ray.options import CommitOptions, WriteOptions, check_mapping, pairs
from lance_ray.retry import RetryPolicy
from lance_ray.table import TableRef, WriteTarget
from lance_ray.write import WriteSpec, WrittenFile, paths_of, write_blocks

logger = logging.getLogger(__name__)

_COLUMNS = ("fragment", "schema", "rows", "bytes")


class LanceFragmentWriter:
    """A callable for ``map_batches``: writes a batch to files and returns one row for each (columns ``fragment`` JSON,
    ``schema`` serialized Arrow schema, ``rows``, ``bytes``), which :class:`LanceFragmentCommitter` commits.

    Files of a job that never commits are not in any ledger; ``dataset.cleanup_old_versions`` removes them in time.
    """

    def __init__(
        self,
        uri: Any = None,
        *,
        transform: Callable[[pa.Table], Any] | None = None,
        schema: pa.Schema | None = None,
        mode: str | None = None,
        max_rows_per_file: int = 1024 * 1024,
        max_bytes_per_file: int | None = None,
        max_rows_per_group: int | None = None,
        data_storage_version: str | None = None,
        enable_stable_row_ids: bool = False,
        use_legacy_format: bool | None = None,
        storage_options: Any = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        initial_bases: Sequence[Any] | None = None,
        target_bases: Sequence[str] | None = None,
        external_blob_mode: str = "reference",
        allow_external_blob_outside_bases: bool = False,
        namespace_impl: Any = None,
        namespace_properties: dict[str, str] | None = None,
        rest_config: LanceRestConfig | None = None,
        io_config: Any = None,
        table_id: Sequence[str] | None = None,
        retry_params: dict[str, Any] | None = None,
    ) -> None:
        """See :func:`lance_ray.write_lance` for the arguments that both have.

        Args:
            uri: path or URI of the table.
            transform: applied to each batch (a ``pyarrow.Table``) before it is written; may return anything that a
                Ray block can be, or an iterable of such, to write more than fits into memory.
            schema: what every file shall have; for an append the table's own.
            mode: what the committer is going to do; by default ``append`` where there is a table, else ``create``. The
                table is looked at once, here.
            max_rows_per_file: rows of a file at most.
            max_bytes_per_file: bytes in memory of a file at most.
            max_rows_per_group: of the legacy file format only, which this writer does not write.
            data_storage_version: file format.
            enable_stable_row_ids: of a new table; decided by the committer.
            use_legacy_format: refused when true; the current format is the only one written.
            storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
            base_store_params: storage options of further bases.
            initial_bases: bases to register with a new table.
            target_bases: bases that the files go to.
            external_blob_mode: ``reference`` or ``ingest``.
            allow_external_blob_outside_bases: allow references outside the bases.
            namespace_impl: the namespace implementation, or a connected namespace.
            namespace_properties: what the namespace is connected with.
            rest_config: the server of a ``rest://`` address.
            io_config: another name of ``storage_options``.
            table_id: the table's name in the namespace.
            retry_params: fields of :class:`lance_ray.retry.RetryPolicy`.
        """
        if use_legacy_format or max_rows_per_group is not None:
            name = "use_legacy_format" if use_legacy_format else "max_rows_per_group"
            raise InvalidArgumentError(
                name, True if use_legacy_format else max_rows_per_group, "is of the legacy file format"
            )
        if transform is not None and not callable(transform):
            raise InvalidArgumentError("transform", transform, "must be callable")
        address = {
            "table_id": table_id,
            "namespace_impl": namespace_impl,
            "namespace_properties": namespace_properties,
            "rest_config": rest_config,
            "io_config": io_config,
            "storage_options": storage_options,
            "base_store_params": base_store_params,
        }
        ref = TableRef.fold(uri, address)
        options = WriteOptions(
            mode or "overwrite",
            schema,
            1024 * 1024,
            max_rows_per_file,
            max_bytes_per_file,
            data_storage_version,
            enable_stable_row_ids,
            initial_bases,
            target_bases,
            external_blob_mode,
            allow_external_blob_outside_bases,
        )
        target = _target(ref, options)
        if mode is None and target.base is not None:
            target = dataclasses.replace(target, mode="append")
        self._spec = WriteSpec(target, options, files_schema(target, options), None, _retry(retry_params))
        self._transform = transform

    def __call__(self, batch: Any) -> pa.Table:
        """Write one batch; returns a row for each file."""
        produced = self._transform(batch) if self._transform is not None else batch
        is_block = isinstance(produced, (pa.Table, pa.RecordBatch, dict)) or hasattr(produced, "columns")
        blocks: Iterable[Any] = [produced] if is_block else produced
        return _as_rows(write_blocks(self._spec, blocks))


def _target(ref: TableRef, options: WriteOptions) -> WriteTarget:
    if options.mode == "ignore":
        raise InvalidArgumentError("mode", options.mode, "must be 'create', 'append' or 'overwrite' for these two")
    target = WriteTarget.resolve(ref, options.mode)
    check_target(target, options)
    return target


def _retry(given: dict[str, Any] | None) -> RetryPolicy:
    check_mapping("retry_params", given)
    known = [item.name for item in dataclasses.fields(RetryPolicy)]
    unknown = sorted(set(given or {}) - set(known), key=str)
    if unknown:
        raise InvalidArgumentError("retry_params", unknown, f"known are {known}")
    return RetryPolicy(**(given or {}))


def _as_rows(files: Sequence[WrittenFile]) -> pa.Table:
    return pa.table(
        {
            "fragment": pa.array([file.fragment for file in files], pa.string()),
            "schema": pa.array([file.schema for file in files], pa.binary()),
            "rows": pa.array([file.rows for file in files], pa.int64()),
            "bytes": pa.array([file.size_bytes for file in files], pa.int64()),
        }
    )


class LanceFragmentCommitter(LanceDatasink):
    """The sink for rows that :class:`LanceFragmentWriter` returned: collects them and commits once on the driver.

    After a failure of the job, the files that reached the committer are removed when it is certain that they were not
    committed.
    """

    def __init__(
        self,
        uri: Any = None,
        table_id: Sequence[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        mode: Any = "create",
        enable_stable_row_ids: bool = False,
        storage_options: Any = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        initial_bases: Sequence[Any] | None = None,
        target_bases: Sequence[str] | None = None,
        namespace_impl: Any = None,
        namespace_properties: dict[str, str] | None = None,
        rest_config: LanceRestConfig | None = None,
        io_config: Any = None,
        commit_message: str | None = None,
        transaction_properties: dict[str, str] | None = None,
    ) -> None:
        """See :func:`lance_ray.write_lance`. Resolves and checks the table at once, on the driver."""
        address = {
            "table_id": table_id,
            "namespace_impl": namespace_impl,
            "namespace_properties": namespace_properties,
            "rest_config": rest_config,
            "io_config": io_config,
            "storage_options": storage_options,
            "base_store_params": base_store_params,
        }
        ref = TableRef.fold(uri, address)
        options = WriteOptions(
            mode,
            schema,
            enable_stable_row_ids=enable_stable_row_ids,
            initial_bases=initial_bases,
            target_bases=target_bases,
        )
        target = _target(ref, options)
        commit = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or ())
        spec = WriteSpec(target, options, files_schema(target, options))
        super().__init__(spec, dataclasses.replace(commit, job_id=commit.operation_id))

    @property
    def min_rows_per_write(self) -> int | None:
        """None: the rows are few and small."""
        return None

    @property
    def min_bytes_per_write(self) -> int | None:
        """None: as above."""
        return None

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:  # noqa: ARG002 - Ray's signature
        """Runs on a worker: hands the rows on to the driver."""
        return [file for block in blocks for file in _from_rows(BlockAccessor.for_block(block).to_arrow())]

    def on_write_complete(self, write_result: WriteResult[list[WrittenFile]]) -> None:
        """Runs on the driver: one commit, after a look at whether the files were written for it."""
        self._written = tuple(file for files in write_result.write_returns for file in files or ())
        for file in self._written:
            if file.rows:
                _check_file(self._spec, file)
        super().on_write_complete(write_result)

    def on_write_failed(self, error: Exception) -> None:
        """Runs on the driver. Removes what reached the committer, if it is certain that it was not committed."""
        super().on_write_failed(error)
        spec = self._spec
        if self._receipt is None and not self._keep_files:
            metadata = [file.metadata() for file in self._written if file.fragment]
            table = spec.target.table
            delete_files(table, untracked(table, paths_of(spec, metadata), spec.target.base_version))


def _check_file(spec: WriteSpec, file: WrittenFile) -> None:
    """Refuse a file that its writer made for another target: the engine would read other columns than it has.

    Raises:
        SchemaMismatchError: the file does not have the columns of the table, or of the committer's schema.
        InvalidArgumentError: the mode of the writer was another one, or the table has changed since.
    """
    base = spec.target.base if spec.target.mode == "append" else None
    schema = file.arrow_schema
    if spec.schema is not None:
        fitting = schema if base is not None else unify([spec.schema, schema])
        if not fitting.equals(spec.schema):
            differing = [item for item in schema if item not in list(spec.schema)]
            raise SchemaMismatchError(
                f"the writer's files do not have the schema of the committer: {[str(item) for item in differing]}"
                f" instead of {[str(item) for item in spec.schema]}",
                columns=[item.name for item in differing],
                expected=str(spec.schema),
                actual=str(schema),
            )
    if file.fragment is None:
        return
    numbered = LanceSchema.from_pyarrow(written_schema(spec, file)) if base is None else base.open().lance_schema
    found = [item for part in file.metadata().files for item in part.fields]
    if found != [item for item in field_ids(numbered).values() if item in set(found)]:
        raise InvalidArgumentError(
            "mode", spec.target.mode, "the files were written for another mode, or for another version of the table"
        )


def _from_rows(rows: pa.Table) -> list[WrittenFile]:
    missing = [name for name in _COLUMNS if name not in rows.schema.names]
    if missing and rows.num_rows:
        raise InvalidArgumentError(
            "ds", rows.schema.names, f"must be what LanceFragmentWriter returns; lacks {missing}"
        )
    return [WrittenFile(item["rows"], item["bytes"], item["schema"], item["fragment"]) for item in rows.to_pylist()]
