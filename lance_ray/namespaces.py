"""Catalogs as a user sees them: connect, create, register, list, describe and drop tables of a Lance Namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lance_ray import catalog
from lance_ray.arrow import unify
from lance_ray.catalog import CatalogClient, LanceRestConfig, NamespaceRef
from lance_ray.errors import InvalidArgumentError, TableNotFoundError
from lance_ray.options import CommitOptions, WriteOptions, check_flag, check_schema, check_text, pairs, strings
from lance_ray.table import TableRef, address_of, check_rest_config, fold_table_id
from lance_ray.writing import WriteJob, WriteReport, write_here


@dataclass(frozen=True, slots=True)
class TableDescription:
    """What a catalog says of a table, and what lies there."""

    table_id: tuple[str, ...]
    location: str
    version: int | None = None
    """The newest version; None where nothing was written yet."""
    schema: pa.Schema | None = None
    rows: int | None = None
    storage_option_names: tuple[str, ...] = ()
    """Which options the catalog vends for it. Their values are secrets."""
    managed_versioning: bool = False
    """Whether the catalog, not the store, decides which version is the newest."""

    def __str__(self) -> str:
        what = "declared, not written" if self.version is None else f"version {self.version}, {self.rows:,} rows"
        names = [] if self.schema is None else self.schema.names
        return f"{'.'.join(self.table_id)} at {self.location}: {what}" + (
            f", columns {', '.join(names)}" if names else ""
        )


def connect(
    namespace_impl: Any = None,
    namespace_properties: Mapping[str, Any] | None = None,
    *,
    rest_config: LanceRestConfig | None = None,
) -> CatalogClient:
    """A connected namespace, which every function takes as ``namespace_impl`` and workers connect for themselves.

    Args:
        namespace_impl: ``dir``, ``rest``, ``glue``, ``hive2``, ``hive3``, ``unity``, ``polaris``, ``dlf``, the
            class path of another ``lance_namespace.LanceNamespace``, or a namespace object.
        namespace_properties: what it is connected with.
        rest_config: a REST server instead.

    Returns:
        A ``lance_namespace.LanceNamespace`` whose calls have a time limit and whose errors hold no secret.

    Raises:
        InvalidArgumentError: there is no such implementation, its package is missing, or it refuses the properties.
        StorageError: the server did not answer.
    """
    if (namespace_impl is None) == (rest_config is None):
        raise InvalidArgumentError("namespace_impl", namespace_impl, "give either namespace_impl or rest_config")
    if rest_config is not None:
        check_rest_config(rest_config)
    ref = (
        rest_config.namespace() if rest_config is not None else NamespaceRef.fold(namespace_impl, namespace_properties)
    )
    client = ref.client()
    assert client is not None  # noqa: S101 - only a worker may lack one
    return client


def create_table(
    uri: Any = None,
    data: Any = None,
    *,
    schema: pa.Schema | None = None,
    mode: Any = "create",
    data_storage_version: str | None = None,
    enable_stable_row_ids: bool = False,
    commit_message: str | None = None,
    transaction_properties: dict[str, str] | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    table_id: Sequence[str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
) -> WriteReport:
    """Create a table from a schema alone, or from Arrow data that this process holds. Needs no Ray.

    Args:
        uri: path or URI of the table, or ``rest://namespace/table``.
        data: a ``pa.Table``, ``pa.RecordBatch`` or ``pa.RecordBatchReader``, or a list of tables and batches.
        schema: of the table; that of the data by default.
        mode: ``create``, ``overwrite``, ``append`` or ``ignore``, as for ``write_lance``.
        data_storage_version: the file format.
        enable_stable_row_ids: give rows ids that compaction and updates keep.
        commit_message: kept with the version.
        transaction_properties: kept with the version.
        storage_options: for the object store, in any form: see :func:`lance_ray.stores.storage_options_of`.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.

    Returns:
        What was written.

    Raises:
        TableExistsError: there is such a table (mode ``create``). It is as it was.
        InvalidArgumentError: neither data nor a schema.
        SchemaMismatchError: the data does not fit the schema. Nothing was committed.
        StorageError: the catalog or the store failed.

    The rows are committed at once or not at all, and files of a failure are removed. Of several callers that create the
    same table at once, one succeeds; the others get TableExistsError, as from any other conflict over the name.
    """
    ref = TableRef.fold(
        uri,
        address_of(locals()),
    )
    tables = _tables(data, schema)
    options = WriteOptions(
        mode,
        unify([table.schema for table in tables]) if schema is None else schema,
        data_storage_version=data_storage_version,
        enable_stable_row_ids=enable_stable_row_ids,
    )
    commit = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or ())
    return write_here(WriteJob(ref, options, commit), tables)


def _tables(data: Any, schema: pa.Schema | None) -> list[Any]:
    check_schema("schema", schema)
    if data is None and schema is None:
        raise InvalidArgumentError("schema", None, "give data, a schema, or both")
    if data is None:
        assert schema is not None  # noqa: S101 - checked above
        return [schema.empty_table()]
    if isinstance(data, pa.RecordBatchReader):
        return [data.read_all()]
    tables = list(data) if isinstance(data, (list, tuple)) else [data]
    if not tables or not all(isinstance(item, (pa.Table, pa.RecordBatch)) for item in tables):
        raise InvalidArgumentError("data", type(data).__name__, "must be an Arrow table, batch or reader, or a list")
    return tables


def register_table(
    location: str,
    *,
    table_id: Sequence[str],
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
) -> TableDescription:
    """Enter a table that exists into a catalog. Nothing of it is read, moved or changed.

    Args:
        location: its URI; some catalogs take only a path below their root.
        table_id: its name there.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: a REST server instead.

    Returns:
        What the catalog says of it now.

    Raises:
        TableExistsError: the catalog has a table of this name.
        InvalidArgumentError: the catalog does not take this location.
        StorageError: it did not answer, or refused.

    After an error the catalog is as it was. Of concurrent callers with the same name, one succeeds.
    """
    check_text("location", location, optional=False)
    client = connect(namespace_impl, namespace_properties, rest_config=rest_config)
    name = fold_table_id(table_id)
    catalog.register(client.ref, name, location)
    return _described(TableRef.fold(None, {"namespace_impl": client, "table_id": name}))


def list_tables(
    namespace_id: Sequence[str] = (),
    *,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
) -> list[tuple[str, ...]]:
    """The ids of the tables directly in a namespace, in the catalog's order.

    Args:
        namespace_id: the namespace; empty for the root.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: a REST server instead.

    Returns:
        A list of ids, each a tuple of its levels.

    Raises:
        StorageError: the catalog did not answer, refused, or has no such namespace.
    """
    parts = strings("namespace_id", (namespace_id,) if isinstance(namespace_id, str) else namespace_id)
    client = connect(namespace_impl, namespace_properties, rest_config=rest_config)
    return catalog.list_tables(client.ref, parts)


def describe_table(
    uri: Any = None,
    *,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    table_id: Sequence[str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
) -> TableDescription:
    """Where a table lies, and what is there: version, rows, schema, and which credentials the catalog vends.

    Args:
        uri: path or URI of the table, or ``rest://namespace/table``.
        storage_options: for the object store.
        base_store_params: storage options of further bases.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.

    Returns:
        A :class:`TableDescription`.

    Raises:
        TableNotFoundError: the catalog has no such table. One that is declared and not written has no version.
        StorageError: the catalog or the store failed.
    """
    address = address_of(locals())
    return _described(TableRef.fold(uri, address))


def _described(ref: TableRef) -> TableDescription:
    location = ref.locate()
    vended = {} if ref.namespace is None else dict(catalog.describe(ref.namespace, ref.table_id).storage_options or ())
    names = tuple(sorted(vended))
    name = ref.table_id or (location.uri,)
    try:
        dataset = ref.at(location).open()
    except TableNotFoundError:
        if ref.namespace is None:
            raise
        return TableDescription(name, location.uri, None, None, None, names, location.managed_versioning)
    return TableDescription(
        name,
        location.uri,
        dataset.version,
        dataset.schema,
        dataset.count_rows(),
        names,
        location.managed_versioning,
    )


def drop_table(
    table_id: Sequence[str],
    *,
    keep_files: bool = False,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
) -> None:
    """Remove a table from its catalog, with its files.

    Args:
        table_id: the table.
        keep_files: only take it out of the catalog; its files stay where they are.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: a REST server instead.

    Raises:
        TableNotFoundError: there is no such table.
        UnsupportedCallError: the catalog cannot; many of those that store no files can only ``keep_files``.
        StorageError: the catalog did not answer, or refused.

    A catalog that forgot the table and could not delete all its files leaves the rest behind. Jobs that read or write
    the table meanwhile fail.
    """
    client = connect(namespace_impl, namespace_properties, rest_config=rest_config)
    check_flag("keep_files", keep_files)
    remove = catalog.deregister if keep_files else catalog.drop
    remove(client.ref, fold_table_id(table_id))


def create_lance_table_rest(
    rest_config: LanceRestConfig, namespace: str | Sequence[str], table_name: str, schema: pa.Schema
) -> WriteReport:
    """Create an empty table through a REST server: :func:`create_table` by the name that other connectors have.

    Args:
        rest_config: the server.
        namespace: the namespace of the table; empty for the root.
        table_name: its name.
        schema: its columns.

    Returns:
        What was written.

    Raises:
        LanceRayError: as :func:`create_table`. A table that exists is as it was.

    What is said of failures and of concurrent callers at :func:`create_table` holds here, too.
    """
    check_rest_config(rest_config)
    return create_table(namespace_impl=rest_config.namespace(), table_id=_in(namespace, table_name), schema=schema)


def register_lance_table_rest(
    rest_config: LanceRestConfig, namespace: str | Sequence[str], table_name: str, table_uri: str
) -> TableDescription:
    """Enter a table that exists into a REST server: :func:`register_table` by the name that other connectors have.

    Args:
        rest_config: the server.
        namespace: the namespace of the table; empty for the root.
        table_name: its name.
        table_uri: where it lies.

    Returns:
        What the catalog says of it now.

    Raises:
        LanceRayError: as :func:`register_table`. The catalog is as it was, also where others took the name first.

    What is said of concurrent callers at :func:`register_table` holds here, too.
    """
    check_rest_config(rest_config)
    check_text("table_uri", table_uri, optional=False)
    return register_table(table_uri, table_id=_in(namespace, table_name), rest_config=rest_config)


def _in(namespace: str | Sequence[str], name: str) -> tuple[str, ...]:
    given = [part for part in namespace.split("/") if part] if isinstance(namespace, str) else namespace
    check_text("table_name", name, optional=False)
    return fold_table_id((*strings("namespace", given), name))
