"""The command line ``lance-ray`` (extra ``cli``): a thin face on the public functions, for people and for cron.

Standard output has the result, as text or (``--json``) as one JSON document; progress, logs and errors go to standard
error. Exit codes:

====  ====================================================================================================
0     done
1     failed for another reason
2     a bad argument; nothing was started
3     there is no such table, version, tag, branch or file
4     the target exists, or others kept winning; nothing was committed
5     the store failed: credentials, network, a full disk
6     the outcome of a commit is unknown; no file was removed
7     done in part: some tasks or tables failed and are named
8     ``health --check``: the table needs care
130   interrupted
====  ====================================================================================================
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
import typer
import typer.core
from ray.data import DataContext
from ray.data.exceptions import SystemException

import lance_ray
from lance_ray.catalog import NamespaceRef
from lance_ray.cli_cluster import call_there
from lance_ray.cli_copy import Files, Source, check_options, format_of, no_empty_folder
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    OperationFailedError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    VersionNotFoundError,
    unwrap,
)
from lance_ray.options import normalize_uri

FAILED, BAD_ARGUMENT, NOT_FOUND, CONFLICT, STORAGE, UNKNOWN, PARTIAL, NEEDS_CARE, INTERRUPTED = *range(1, 9), 130
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (InvalidArgumentError, BAD_ARGUMENT),
    (TableNotFoundError, NOT_FOUND),
    (VersionNotFoundError, NOT_FOUND),
    (TableExistsError, CONFLICT),
    (CommitConflictError, CONFLICT),
    (StorageError, STORAGE),
    (CommitOutcomeUnknownError, UNKNOWN),
    (OperationFailedError, PARTIAL),
    (FileNotFoundError, NOT_FOUND),  # of Ray: a file to copy
)
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_SPELLED = {
    "uri": "table",
    "nearest": "vector",
    "q": "vector",
    "query": "text",
    "full_text_query": "text",
    "limit": "k",
    "index_type": "type",
    "indices": "name",
    "compaction_options": "compaction_option",
    "storage_options": "storage_option",
    "namespace_properties": "namespace_property",
}
"""Parameters of the functions whose options have other names."""


_RUNNING: ContextVar[typer.Context | None] = ContextVar("running", default=None)


class _Command(typer.core.TyperCommand):
    """A command whose options can be looked up while it runs, for messages."""

    def invoke(self, ctx: Any) -> Any:
        token = _RUNNING.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _RUNNING.reset(token)


app = typer.Typer(
    name="lance-ray",
    help="Lance tables from the command line, with Ray where there is work to share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Table = Annotated[str | None, typer.Argument(help="Path or URI of the table; left out with --table-id.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster: 'auto', host:port or ray://host:port. By default a local one is made.")
]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="For the store; env:NAME takes a secret from there."),
]
NamespaceImpl = Annotated[str | None, typer.Option(help="Catalog: dir, rest, glue, hive2, unity, ...")]
NamespaceProperties = Annotated[
    list[str] | None,
    typer.Option("--namespace-property", metavar="KEY=VALUE", help="For the catalog; env:NAME as for the store."),
]
TableId = Annotated[str | None, typer.Option(help="Name of the table in the catalog, parts joined by dots.")]
Version = Annotated[str | None, typer.Option(help="Version number or tag; the newest by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Workers = Annotated[int | None, typer.Option(help="Workers at most; decided by the cluster by default.")]
Columns = Annotated[str | None, typer.Option(help="Columns, joined by commas.")]
Filter = Annotated[str | None, typer.Option("--filter", help="SQL filter, before the ranking of a search.")]


@app.command(cls=_Command)
def info(
    table: Table = None,
    *,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Show where a table is, its newest version, its columns and its indices."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id)
        found = _called(address, lance_ray.describe_table, where)
        lines = [str(found)]
        told = _plain(found) | {"fragments": 0, "bytes": 0, "indices": []}
        if table_id is None:
            del told["table_id"]
        if found.version is not None:
            health = _called(address, lance_ray.table_health, where)
            told |= {"fragments": len(health.fragments), "bytes": health.bytes, "indices": _plain(health.indices)}
            lines += [f"  {item.name}: {item.type}" for item in found.schema or ()]
            lines += [f"  {len(health.fragments):,} fragment(s), {health.bytes / 1e6:,.1f} MB"]
            lines += [f"  index {index}" for index in health.indices]
        _print(told, "\n".join(lines), as_json)


@app.command(cls=_Command)
def health(
    table: Table = None,
    *,
    version: Version = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 8 if there is something to compact.")] = False,
    compaction_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Such as target_rows_per_fragment=1000000.")
    ] = None,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Show fragments, deleted rows and index coverage, and what a compaction would do."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id)
        asked = {"version": _version(version), "compaction_options": _values("--compaction-option", compaction_option)}
        found = _called(address, lance_ray.table_health, where | asked)
        totals = {"rows": found.rows, "deleted_rows": found.deleted_rows, "bytes": found.bytes}
        _print(_plain(found) | totals | {"small_files": found.small_files}, str(found), as_json)
    if check and found.compaction is not None:
        raise typer.Exit(NEEDS_CARE)


@app.command(cls=_Command)
def compact(
    table: Table = None,
    *,
    compaction_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Such as target_rows_per_fragment=1000000.")
    ] = None,
    micro_commit_batch_size: Annotated[int | None, typer.Option(help="Commit after so many rewrites.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Start no rewrite later than this.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Rewrite no more than this.")] = None,
    max_tasks: Annotated[int | None, typer.Option(help="No more rewrites than this.")] = None,
    num_workers: Workers = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Merge small fragments and drop deleted rows. What fails costs only itself (exit code 7)."""
    with _told(as_json), _ray(address, quiet=quiet or as_json):
        report: Any = lance_ray.compact_files(
            **_address(table, storage_option, namespace_impl, namespace_property, table_id),
            compaction_options=_values("--compaction-option", compaction_option),
            micro_commit_batch_size=micro_commit_batch_size,
            max_seconds=max_seconds,
            max_bytes=max_bytes,
            max_tasks=max_tasks,
            num_workers=num_workers,
            dry_run=dry_run,
            on_failure="report",
            progress=False if quiet or as_json else None,
        )
        _print(_plain(report), "nothing to do" if report is None else str(report), as_json)
    if getattr(report, "failures", ()):
        raise typer.Exit(PARTIAL)


@app.command(cls=_Command)
def cleanup(
    table: Table = None,
    *,
    older_than: Annotated[str | None, typer.Option(help="Age of versions to remove, such as 36h or 14d.")] = None,
    retain_versions: Annotated[int | None, typer.Option(help="Versions to keep, the newest ones.")] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Remove what killed jobs left, instead of old versions.")
    ] = False,
    dry_run: DryRun = False,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Remove old versions with the files that only they need, or (--orphans) the files of killed jobs."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id) | {"dry_run": dry_run}
        if orphans and (older_than is not None or retain_versions is not None):
            raise InvalidArgumentError("--orphans", True, "has nothing to do with --older-than and --retain-versions")
        chosen = {} if orphans else {"older_than": _age(older_than), "retain_versions": retain_versions}
        function = lance_ray.cleanup_orphans if orphans else lance_ray.cleanup_old_versions
        report = _called(address, function, where | chosen)
        _print(_plain(report), str(report), as_json)


index_app = typer.Typer(
    help="Build, refresh, merge, drop and list indexes.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(index_app, name="index")
Name = Annotated[str | None, typer.Option(help="Name of the index.")]
Segments = Annotated[int | None, typer.Option(help="Segments; decided by the size of the table by default.")]


@index_app.command("create", cls=_Command)
def index_create(
    table: Table = None,
    *,
    column: Annotated[str, typer.Option(help="Column; a nested one by its path.")],
    type_: Annotated[str, typer.Option("--type", help="BTREE, BITMAP, INVERTED, IVF_PQ, IVF_HNSW_SQ, ...")],
    name: Name = None,
    replace: Annotated[bool, typer.Option(help="Whether an index of this name may be there already.")] = True,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Such as metric=cosine or num_partitions=256.")
    ] = None,
    num_segments: Segments = None,
    num_workers: Workers = None,
    quiet: Quiet = False,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Build an index on the workers; it becomes visible in one commit."""
    with _told(as_json), _ray(address, quiet=quiet or as_json):
        is_vector = type_.upper().startswith("IVF_")
        build: Callable[..., Any] = lance_ray.create_index if is_vector else lance_ray.create_scalar_index
        report = build(
            **_address(table, storage_option, namespace_impl, namespace_property, table_id),
            column=column,
            index_type=type_.upper(),
            name=name,
            replace=replace,
            num_segments=num_segments,
            num_workers=num_workers,
            progress=False if quiet or as_json else None,
            return_report=True,
            **_values("--option", option) or {},
        )
        _print(_plain(report), str(report), as_json)


@index_app.command("refresh", cls=_Command)
def index_refresh(
    table: Table = None,
    *,
    name: Name = None,
    num_workers: Workers = None,
    quiet: Quiet = False,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Index the rows that an index (by default each) does not know yet."""
    with _told(as_json), _ray(address, quiet=quiet or as_json):
        reports: Any = lance_ray.refresh_index(
            **_address(table, storage_option, namespace_impl, namespace_property, table_id),
            name=name,
            num_workers=num_workers,
            progress=False if quiet or as_json else None,
            return_report=True,
        )
        _print(_plain(reports), "\n".join(map(str, reports)) or "nothing to do", as_json)


@index_app.command("optimize", cls=_Command)
def index_optimize(
    table: Table = None,
    *,
    name: Name = None,
    num_segments: Segments = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Build anew, with newly trained models.")] = False,
    num_workers: Workers = None,
    quiet: Quiet = False,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Take in new rows and merge segments of an index, by default of each."""
    with _told(as_json), _ray(address, quiet=quiet or as_json):
        reports: Any = lance_ray.optimize_indices(
            **_address(table, storage_option, namespace_impl, namespace_property, table_id),
            indices=None if name is None else [name],
            num_segments=num_segments,
            retrain=retrain,
            num_workers=num_workers,
            progress=False if quiet or as_json else None,
            return_report=True,
        )
        _print(_plain(reports), "\n".join(map(str, reports)) or "nothing to do", as_json)


@index_app.command("drop", cls=_Command)
def index_drop(
    table: Table = None,
    *,
    name: Annotated[str, typer.Option(help="Name of the index.")],
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Drop an index; older versions keep it."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id)
        version = _called(address, lance_ray.drop_index, where | {"name": name}).version
        _print({"name": name, "version": version}, f"{name}: dropped in version {version}", as_json)


@index_app.command("list", cls=_Command)
def index_list(
    table: Table = None,
    *,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """List indexes, and how many rows each knows."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id)
        found = _called(address, lance_ray.list_indices, where)
        _print(_plain(found), "\n".join(map(str, found)) or "no indexes", as_json)


@app.command(cls=_Command)
def search(
    table: Table = None,
    *,
    vector: Annotated[
        str | None, typer.Option(help="Numbers as a JSON list, or @file with such a list or in NumPy's format.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Words to look for; with --vector both rankings are fused.")] = None,
    column: Annotated[str | None, typer.Option(help="Vector column.")] = None,
    text_columns: Annotated[str | None, typer.Option(help="Text columns, joined by commas.")] = None,
    k: Annotated[int, typer.Option("-k", help="Rows to find.")] = 10,
    nearest_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Such as nprobes=20 or refine_factor=4.")
    ] = None,
    columns: Columns = None,
    filter_: Filter = None,
    version: Version = None,
    num_workers: Workers = None,
    address: Address = None,
    storage_option: StorageOptions = None,
    namespace_impl: NamespaceImpl = None,
    namespace_property: NamespaceProperties = None,
    table_id: TableId = None,
    as_json: Json = False,
) -> None:
    """Find the rows nearest to a vector, the best for a text, or both."""
    with _told(as_json):
        where = _address(table, storage_option, namespace_impl, namespace_property, table_id)
        nearest = None
        if vector is not None:
            options = _values("--nearest-option", nearest_option) or {}
            nearest = {"column": column or "vector", "q": _vector(vector), "k": k, **options}
        asked = {
            "columns": _names(columns),
            "filter": filter_,
            "version": _version(version),
            "num_workers": num_workers,
        }
        with _ray(address, quiet=True, start=num_workers is not None):
            found = _searched(where, nearest, text, _names(text_columns), k, asked)
        _print(found.to_pylist(), _rows(found), as_json)


def _searched(
    where: dict[str, Any],
    nearest: dict[str, Any] | None,
    text: str | None,
    text_columns: list[str] | None,
    k: int,
    asked: dict[str, Any],
) -> pa.Table:
    if nearest is not None and text is not None:
        return lance_ray.hybrid_search(
            **where, **asked, nearest=nearest, full_text_query=text, text_columns=text_columns, limit=k
        )
    if nearest is not None:
        found: pa.Table = lance_ray.vector_search(**where, **asked, nearest=nearest)
        return found
    if text is None:
        raise InvalidArgumentError("--vector", None, "give --vector, --text or both")
    uri = where.pop("uri")
    return lance_ray.full_text_search(uri, text, **where, **asked, text_columns=text_columns, limit=k)


@app.command(cls=_Command)
def copy(
    source: Annotated[str, typer.Argument(help="What to read: a Lance table, or anything that Ray reads.")],
    target: Annotated[str, typer.Argument(help="Where to write: a Lance table, or what Ray writes.")],
    *,
    from_: Annotated[
        str | None, typer.Option("--from", help="Format, as in ray.data.read_FORMAT; by default by the name's end.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Format, as in Dataset.write_FORMAT; by default by the name's end.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="create, append, overwrite or ignore. To overwrite files removes the old ones before it writes."
        ),
    ] = "create",
    columns: Columns = None,
    filter_: Filter = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most.")] = None,
    job_id: Annotated[str | None, typer.Option(help="Makes the copy to a Lance table repeatable.")] = None,
    read_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Further arguments of the reader, as JSON.")
    ] = None,
    write_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Further arguments of the writer, as JSON.")
    ] = None,
    storage_option: StorageOptions = None,
    quiet: Quiet = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Copy between a Lance table and any format that Ray reads and writes. --filter and --columns go into the scan."""
    with _told(as_json):
        source, target = normalize_uri(source, "source"), normalize_uri(target, "target")  # workers may be elsewhere
        store = _pairs("--storage-option", storage_option)
        chosen = {"columns": _names(columns), "filter": filter_, "limit": limit, "storage_options": store}
        asked = Source(
            source, from_ or format_of(source, "--from"), chosen, _values("--read-option", read_option) or {}
        )
        options = _values("--write-option", write_option) or {}
        format_ = to or format_of(target, "--to")
        if store and "lance" not in (asked.format, format_):
            raise InvalidArgumentError("--storage-option", sorted(store), "is for a Lance table")
        if format_ == "lance":
            check_options(
                "--write-option", options, lance_ray.write_lance, ("ds", "uri", "mode", "job_id", "storage_options")
            )
            with _ray(address, quiet=quiet or as_json), no_empty_folder(target):
                report = lance_ray.write_lance(
                    asked.read(), target, mode=mode, job_id=job_id, storage_options=store, **options
                )
            _print(_plain(report), str(report), as_json)
            return
        if job_id is not None:
            raise InvalidArgumentError("--job-id", job_id, "is for a Lance table as the target")
        files = Files(target, format_, mode, options)
        files.check(source)
        with _ray(address, quiet=quiet or as_json):
            rows = files.write(asked.read())
        what = "left as it is" if rows is None and mode == "ignore" else "written"
        what += "" if rows is None else f", {rows:,} rows"
        _print({"target": target, "rows": rows}, f"{target}: {what}", as_json)


# Arguments


def _address(
    table: str | None,
    storage_option: Sequence[str] | None,
    namespace_impl: str | None,
    namespace_property: Sequence[str] | None,
    table_id: str | None,
) -> dict[str, Any]:
    return {
        "uri": table,
        "storage_options": _pairs("--storage-option", storage_option),
        "namespace_impl": namespace_impl,
        "namespace_properties": _pairs("--namespace-property", namespace_property),
        "table_id": None if table_id is None else table_id.split("."),
    }


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str] | None:
    """KEY=VALUE pairs; a value env:NAME is read from the environment, so that no secret is in a list of processes."""
    found = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise InvalidArgumentError(option, key, "must be KEY=VALUE")
        if value.startswith("env:"):
            name = value.removeprefix("env:")
            if name not in os.environ:
                raise InvalidArgumentError(option, f"{key}={value}", f"the environment has no {name}")
            value = os.environ[name]
        found[key] = value
    return found or None


def _values(option: str, given: Sequence[str] | None) -> dict[str, Any] | None:
    """The same with values read as JSON where they are JSON."""
    return {key: _value(value) for key, value in (_pairs(option, given) or {}).items()} or None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _version(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _age(text: str | None) -> dt.timedelta | None:
    if text is None:
        return None
    found = _AGE.fullmatch(text)
    if found is None:
        raise InvalidArgumentError("--older-than", text, "must be a number and one of s, m, h, d, w, such as 14d")
    return dt.timedelta(**{_UNITS[found[2]]: float(found[1])})


def _vector(text: str) -> Any:
    if not text.startswith("@"):
        return _numbers(text)
    path = Path(text[1:])
    try:
        if path.suffix == ".npy":
            import numpy as np

            return np.load(path, allow_pickle=False)
        return _numbers(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("--vector", text, str(error)) from None


def _numbers(text: str) -> Any:
    found = _value(text)
    if not isinstance(found, list):
        raise InvalidArgumentError("--vector", text, "must be a JSON list of numbers")
    return found


# What runs around a command


@contextmanager
def _ray(address: str | None, *, quiet: bool, start: bool = True) -> Iterator[None]:
    """Ray for the time of a command: the cluster at the address, or one of this process."""
    started = not ray.is_initialized() and (start or address is not None)
    if started:
        _start(address)
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.raise_original_map_exception
    context.enable_progress_bars = not quiet and sys.stderr.isatty()
    context.raise_original_map_exception = True  # or an error of a worker would come without its type
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what fails is told here, once
    try:
        yield
    finally:
        log.setLevel(level)
        context.enable_progress_bars, context.raise_original_map_exception = before
        if started:
            ray.shutdown()


def _called(address: str | None, function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    """What a function returns that needs no Ray: run here, or with an address by a task of that cluster."""
    if address is None:
        return function(**keywords)
    there = dict(keywords)  # relative paths mean those of this process
    if there["uri"] is not None:
        there["uri"] = normalize_uri(there["uri"])
    if there["namespace_impl"] is not None:
        properties = there.pop("namespace_properties")
        there["namespace_impl"] = NamespaceRef.fold(there["namespace_impl"], properties)
    with _ray(address, quiet=True):
        return call_there(function, there)


def _start(address: str | None) -> None:
    _check_answers(*(("--address", address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS") or "auto")))
    options: dict[str, Any] = {"address": address} if address else {}
    if not address and "RAY_ADDRESS" not in os.environ:
        options = {"address": "local", "include_dashboard": False}  # not one that others have started here
    warnings.filterwarnings("ignore", "lance is not fork-safe")  # Ray starts processes by fork and exec, which is safe
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError("--address", address, str(error)) from None


def _check_answers(option: str, address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for minutes."""
    place = address.removeprefix("ray://")
    if place in ("auto", "local") or "://" in place:
        return
    host, _, port = place.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise InvalidArgumentError(option, address, "must be auto, local, host:port or ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise InvalidArgumentError(option, address, f"no Ray cluster answers ({error})") from None


@contextmanager
def _told(as_json: bool) -> Iterator[None]:
    """Turns errors into one line (or JSON document) on standard error and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller of a command hears it in one way
        found = _root(error)
        code = next((code for kind, code in _CODES if isinstance(found, kind)), FAILED)
        text = _line(found)
        if as_json:
            told = {"error": type(found).__name__, "message": text, "exit_code": code}
            typer.echo(json.dumps(told), err=True)
        else:
            typer.echo(f"lance-ray: {text}", err=True)
        raise typer.Exit(code) from None


def _root(error: BaseException) -> BaseException:
    """The error of the package in it, or what failed below all that Ray put around it."""
    found = unwrap(error)
    while not isinstance(found, LanceRayError):
        below = getattr(found, "cause", None)
        if below is None and isinstance(found, (ray.exceptions.RayError, SystemException)):
            below = found.__cause__
        if not isinstance(below, BaseException):
            break
        found = below
    return found


def _line(error: BaseException) -> str:
    """What an error says, in one line and with the option that was typed."""
    text = str(error).partition("\nFailed to apply UDF")[0]  # Ray adds advice of its own
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at = next((at for at, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if at is not None:
        lines = [*lines[:at], lines[-1]]
    text = " ".join(lines)
    if isinstance(error, InvalidArgumentError):
        typed = _typed(error)
        return text if typed is None else text.replace(f"{error.parameter}=", typed, 1)
    return text if isinstance(error, LanceRayError) else f"{type(error).__name__}: {text}"


def _typed(error: InvalidArgumentError) -> str | None:
    """What was typed in front of the value of a parameter: an option, an argument, or an option and its key."""
    context = _RUNNING.get()
    if context is None or error.parameter.startswith("-"):
        return f"{error.parameter} "
    name = _SPELLED.get(error.parameter, error.parameter)
    if name == "table" and "source" in context.params:
        name = "source" if error.value == repr(context.params["source"]) else "target"
    for item in context.command.params:
        if item.name in (name, f"{name}_"):
            return f"{item.opts[0] if item.param_type_name == 'option' else str(item.name).upper()} "
        given = context.params.get(str(item.name))
        if isinstance(given, (list, tuple)) and any(str(pair).startswith(f"{error.parameter}=") for pair in given):
            return f"{item.opts[0]} {error.parameter}="
    return None


def _print(told: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(told, default=_plain) if as_json else text)


def _plain(value: Any) -> Any:
    """Reports, and what Arrow holds, as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, pa.Schema):
        return {item.name: str(item.type) for item in value}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _rows(found: pa.Table) -> str:
    """Rows as text, one line each; long values are cut."""
    lines = ["\t".join(found.schema.names)]
    lines += ["\t".join(_cell(value) for value in row.values()) for row in found.to_pylist()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = str(_plain(value)).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def main() -> None:
    """The entry point of ``lance-ray``."""
    app()


if __name__ == "__main__":
    main()
