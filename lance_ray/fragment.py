"""Writers made by hand: :class:`LanceFragmentWriter` in ``map_batches``, :func:`write_fragment` anywhere.

For pipelines that want to write files in the middle of their own stages and commit at the end::

    writer = LanceFragmentWriter(uri, schema=schema, mode="append")
    ds.map_batches(writer, batch_size=None).write_datasink(LanceFragmentCommitter(uri, schema=schema, mode="append"))

The same worker function and the same commit as in :func:`lance_ray.write_lance`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
from lance.fragment import FragmentMetadata

from lance_ray.catalog import LanceRestConfig
from lance_ray.datasink import (
    FRAGMENT_COLUMNS,
    LanceFragmentCommitter,
    files_schema,
    resolve_target,
    row_of_file,
)
from lance_ray.errors import InvalidArgumentError
from lance_ray.options import WriteOptions, check_flag, check_mapping
from lance_ray.retry import RetryPolicy
from lance_ray.table import TableRef, address_of
from lance_ray.write import WriteSpec, WrittenFile, write_blocks

__all__ = ["LanceFragmentCommitter", "LanceFragmentWriter", "write_fragment"]

logger = logging.getLogger(__name__)

_ROWS = pa.schema(
    [
        pa.field(name, kind)
        for name, kind in zip(
            FRAGMENT_COLUMNS, (pa.binary(), pa.binary(), pa.int64(), pa.int64(), pa.string()), strict=True
        )
    ]
)


class LanceFragmentWriter:
    """A callable for ``map_batches``: writes a batch to files and returns one row for each, which
    :class:`LanceFragmentCommitter` commits.

    Columns of the rows: ``fragment`` (a pickled ``lance.FragmentMetadata``) and ``schema`` (a pickled Arrow schema),
    for code that commits by itself; ``rows``, ``bytes``; and ``metadata`` (JSON), which is what the committer reads.

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
        use_legacy_format: bool | None = False,
        storage_options: Any = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        initial_bases: Sequence[Any] | None = None,
        target_bases: Sequence[str] | None = None,
        target_all_bases: bool | None = None,
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
            max_rows_per_group: rows of a group in the legacy file format; the other formats have no groups.
            data_storage_version: file format.
            enable_stable_row_ids: of a new table; decided by the committer.
            use_legacy_format: older name of ``data_storage_version="legacy"``, which wins over it.
            storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
            base_store_params: storage options of further bases.
            initial_bases: bases to register with a new table.
            target_bases: bases that the files go to, in turn.
            target_all_bases: all bases of the table in turn: with its own folder (True), or without it (False).
            external_blob_mode: ``reference`` or ``ingest``.
            allow_external_blob_outside_bases: allow references outside the bases.
            namespace_impl: the namespace implementation, or a connected namespace.
            namespace_properties: what the namespace is connected with.
            rest_config: the server of a ``rest://`` address.
            io_config: another name of ``storage_options``.
            table_id: the table's name in the namespace.
            retry_params: fields of :class:`lance_ray.retry.RetryPolicy`, or lance-ray's ``max_attempts``,
                ``max_backoff_s``, ``match`` (texts of errors to retry besides transient ones) and ``description``.
        """
        if transform is not None and not callable(transform):
            raise InvalidArgumentError("transform", transform, "must be callable")
        address = address_of(locals())
        check_flag("use_legacy_format", use_legacy_format is not None and use_legacy_format)
        if use_legacy_format and data_storage_version is None:
            data_storage_version = "legacy"
        options = WriteOptions(
            "overwrite" if mode is None else mode,
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
            max_rows_per_group,
            target_all_bases,
        )
        self._spec = _spec(TableRef.fold(uri, address), options, retry_params, mode)
        self._transform = transform

    def __call__(self, batch: Any) -> pa.Table:
        """Write one batch; returns a row for each file."""
        produced = self._transform(batch) if self._transform is not None else batch
        is_block = isinstance(produced, (pa.Table, pa.RecordBatch, dict)) or hasattr(produced, "columns")
        blocks: Iterable[Any] = [produced] if is_block else produced
        return _as_rows(write_blocks(self._spec, blocks))


def write_fragment(
    stream: Iterable[Any],
    uri: Any = None,
    *,
    schema: pa.Schema | None = None,
    mode: str | None = None,
    max_rows_per_file: int = 64 * 1024 * 1024,
    max_bytes_per_file: int | None = None,
    max_rows_per_group: int = 1024,
    data_storage_version: str | None = None,
    enable_stable_row_ids: bool = False,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    initial_bases: Sequence[Any] | None = None,
    target_bases: Sequence[str] | None = None,
    target_all_bases: bool | None = None,
    external_blob_mode: str = "reference",
    allow_external_blob_outside_bases: bool = False,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
    retry_params: dict[str, Any] | None = None,
) -> list[tuple[FragmentMetadata, pa.Schema]]:
    """Files with the rows of a stream, written in this process and in no table yet.

    Args:
        stream: Arrow tables, pandas frames or dicts of columns.
        uri: path or URI of the table that the files are for; it need not exist.
        schema: what every file shall have; for an append the table's own.
        mode: what the commit is going to do; by default ``append`` where there is a table, else ``create``.
        max_rows_per_file: rows of a file at most.
        max_bytes_per_file: bytes in memory of a file at most.
        max_rows_per_group: rows of a group in the legacy file format; the other formats have no groups.
        data_storage_version: file format of a new table.
        enable_stable_row_ids: of a new table; decided by the commit.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases, by base URI.
        initial_bases: base paths to register with a new table.
        target_bases: names or paths of bases that the files go to, in turn.
        target_all_bases: all bases of the table in turn: with its own folder (True), or without it (False).
        external_blob_mode: ``reference`` or ``ingest`` for blobs given by URI.
        allow_external_blob_outside_bases: allow references to blobs outside the registered bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in the namespace.
        retry_params: see :class:`LanceFragmentWriter`.

    Returns:
        For each file its metadata and its Arrow schema, as ``LanceDataset.commit`` takes them; nothing for no rows.

    Raises:
        InvalidArgumentError, TableNotFoundError, StorageError: before anything is written.
        SchemaMismatchError: the rows do not fit.

    The files of a stream that failed half-way, and those that are never committed, are left behind, in no ledger:
    ``lance_ray.cleanup_old_versions`` removes them in time. Nothing conflicts with what others do before the commit.
    """
    address = address_of(locals())
    options = WriteOptions(
        "overwrite" if mode is None else mode,
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
        max_rows_per_group,
        target_all_bases,
    )
    files = write_blocks(_spec(TableRef.fold(uri, address), options, retry_params, mode), stream)
    return [(file.metadata(), file.arrow_schema) for file in files if file.fragment is not None]


def _spec(ref: TableRef, options: WriteOptions, retry_params: Any, mode: str | None) -> WriteSpec:
    target = resolve_target(ref, options)
    if mode is None and target.base is not None:
        target = dataclasses.replace(target, mode="append")
    return WriteSpec(target, options, files_schema(target, options), None, _retry(retry_params))


def _retry(given: dict[str, Any] | None) -> RetryPolicy:
    check_mapping("retry_params", given)
    told = dict(given or {})
    told.pop("description", None)  # names the step in lance-ray's log; here each step names itself
    if "max_backoff_s" in told:
        told.setdefault("max_delay", told.pop("max_backoff_s"))
    if "match" in told:
        told["texts"] = tuple(told.pop("match") or ())
    known = [item.name for item in dataclasses.fields(RetryPolicy)]
    unknown = sorted(set(told) - set(known), key=str)
    if unknown:
        raise InvalidArgumentError("retry_params", unknown, f"known are {[*known, 'match', 'max_backoff_s']}")
    return RetryPolicy(**told)


def _as_rows(files: Sequence[WrittenFile]) -> pa.Table:
    return pa.Table.from_pylist([row_of_file(file) for file in files], schema=_ROWS)
