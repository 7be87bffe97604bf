"""Small changes of a table on the driver: columns dropped or altered, rows deleted, an old version restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa

from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import InvalidArgumentError, translate_errors
from lance_ray.options import check_flag, check_text, check_version, strings
from lance_ray.table import PinnedTable, TableRef, address_of, newest


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """What a change did: the version that has it."""

    target: str
    operation: str
    version: int
    rows: int = 0
    """Rows deleted."""
    columns: tuple[str, ...] = ()
    """The table's columns now."""

    def __str__(self) -> str:
        text = f"{self.target}: {self.operation}, version {self.version}, columns {', '.join(self.columns)}"
        return text + (f", {self.rows:,} row(s) deleted" if self.operation == "delete" else "")


def drop_columns(
    uri: Any = None,
    columns: Sequence[str] = (),
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> ChangeReport:
    """Drop columns (nested ones by path), by metadata alone; the values stay in the files until a compaction.

    Args:
        uri: path or URI of the table, or an opened dataset.
        columns: names of the columns.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        A :class:`ChangeReport`: the version that has the change.

    Raises:
        InvalidArgumentError: the table lacks one of them, or would have none left.
        CommitConflictError, StorageError: nothing is changed.

    Appends, deletes, updates and compactions by others meanwhile land beside it; changes of the schema conflict.
    """
    names = list(strings("columns", [columns] if isinstance(columns, str) else columns))
    if not names:
        raise InvalidArgumentError("columns", names, "must name at least one column")
    table, ref = _newest(uri, locals())
    dataset = table.open_latest()
    paths = set(_paths(dataset.schema))
    if unknown := [name for name in names if name not in paths]:
        raise InvalidArgumentError("columns", unknown, f"must be columns of the table: {sorted(paths)}")
    if set(names) >= set(dataset.schema.names):
        raise InvalidArgumentError("columns", names, "a table keeps at least one column")
    with translate_errors("drop columns of", table.uri, secrets=table.secrets):
        dataset.drop_columns(names)
    return _report(ref, "drop_columns", dataset)


def alter_columns(
    uri: Any = None,
    *alterations: Mapping[str, Any],
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> ChangeReport:
    """Rename columns, cast them, or change whether they may be null. A cast writes the column anew, on the driver.

    Args:
        uri: path or URI of the table, or an opened dataset.
        alterations: dicts with ``path`` (the column), and any of ``name``, ``data_type`` and ``nullable``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        A :class:`ChangeReport`: the version that has the change.

    Raises:
        InvalidArgumentError: an alteration is not of this form, or the engine refuses it.
        CommitConflictError, StorageError: nothing is changed.

    Appends, deletes, updates and compactions by others meanwhile land beside a new name or nullability; changes of the
    schema conflict. A cast conflicts with every other commit: run it again.
    """
    if not alterations:
        raise InvalidArgumentError("alterations", (), "must name at least one column")
    for item in alterations:
        known = {"path", "name", "data_type", "nullable"}
        if not isinstance(item, Mapping) or "path" not in item or len(item) < 2 or not set(item) <= known:
            raise InvalidArgumentError("alterations", item, f"must have 'path' and another of {sorted(known)}")
        if not isinstance(item.get("data_type", pa.null()), pa.DataType):
            raise InvalidArgumentError("data_type", item["data_type"], "must be a pyarrow type")
        check_text("path", item["path"], optional=False)
        check_text("name", item.get("name"))
        check_flag("nullable", item.get("nullable", True))
    table, ref = _newest(uri, locals())
    dataset = table.open_latest()
    _refuse_taken_names(dataset.schema, alterations)
    with translate_errors("alter columns of", table.uri, secrets=table.secrets):
        alter: Any = dataset.alter_columns  # pylance declares one of each, and takes many
        alter(*map(dict, alterations))
    return _report(ref, "alter_columns", dataset)


def delete(
    uri: Any = None,
    predicate: str = "",
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> ChangeReport:
    """Delete the rows for which the predicate (SQL) is true.

    Args:
        uri: path or URI of the table, or an opened dataset.
        predicate: SQL; ``true`` deletes every row.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        A :class:`ChangeReport`: the version that has the change.

    Raises:
        InvalidArgumentError: the predicate does not parse, or names an unknown column.
        CommitConflictError, StorageError: nothing is deleted.

    Rows that others append meanwhile are not deleted. Deletes, updates and compactions of the same rows by others are
    rebased or repeated by the engine; an overwrite conflicts.
    """
    if not isinstance(predicate, str) or not predicate.strip():
        raise InvalidArgumentError("predicate", predicate, "must be a SQL expression; 'true' deletes every row")
    table, ref = _newest(uri, locals())
    dataset = table.open_latest()
    try:
        with translate_errors("delete from", table.uri, secrets=table.secrets):
            result = dataset.delete(predicate)
    except InvalidArgumentError as error:
        raise InvalidArgumentError("predicate", predicate, str(error)) from error
    return _report(ref, "delete", dataset, rows=int(result["num_deleted_rows"]))


def restore(
    uri: Any = None,
    version: int | str | None = None,
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> ChangeReport:
    """Make an old version (number or tag) the newest one, as a new version; those between stay readable.

    Args:
        uri: path or URI of the table.
        version: the version to have again.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        A :class:`ChangeReport`: the version that has the change.

    Raises:
        VersionNotFoundError: there is no such version.
        CommitConflictError, StorageError: the newest version is as it was.

    Nothing conflicts with it: what others commit meanwhile is undone with the rest, and stays readable as a version.
    """
    if version is None:
        raise InvalidArgumentError("version", None, "must be a number or a tag")
    check_version("version", version)
    table, ref = _newest(uri, locals())
    dataset = table.open_at(version)
    with translate_errors("restore", table.uri, secrets=table.secrets):
        dataset.restore()  # type: ignore[no-untyped-call] # pylance declares nothing here
    return _report(ref, "restore", table.open_latest())


def _paths(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[str]:
    """The names of columns, and of what is nested in structs by its path."""
    for field in fields:
        yield prefix + field.name
        if pa.types.is_struct(field.type):
            yield from _paths(field.type, f"{prefix}{field.name}.")


def _refuse_taken_names(schema: pa.Schema, alterations: Sequence[Mapping[str, Any]]) -> None:
    paths = list(_paths(schema))
    for item in alterations:
        folder, dot, own = item["path"].rpartition(".")
        if item["path"].partition(".")[0] not in schema.names:
            raise InvalidArgumentError("alterations", item, f"its path must be a column of the table: {paths}")
        name = item.get("name", own)
        if name != own and f"{folder}{dot}{name}" in paths:
            raise InvalidArgumentError("name", name, f"the table has such a column already: {paths}")


def _newest(uri: Any, given: Mapping[str, Any]) -> tuple[PinnedTable, TableRef]:
    ref = TableRef.fold(uri, address_of(given))
    return newest(ref.pin()), ref


def _report(ref: TableRef, operation: str, dataset: lance.LanceDataset, *, rows: int = 0) -> ChangeReport:
    names: Iterable[str] = dataset.schema.names
    return ChangeReport(ref.target, operation, dataset.version, rows, tuple(names))
