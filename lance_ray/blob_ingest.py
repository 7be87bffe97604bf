"""Payloads of blobs taken in from URLs on the workers: :func:`ingest_blobs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
from ray.data import Dataset, TaskPoolStrategy

from lance_ray.errors import InvalidArgumentError, StorageError, redact, storage_error_kind
from lance_ray.executors import check_dataset, check_ray_options, unnamed_options
from lance_ray.full_start import start_in_full
from lance_ray.options import BLOB_BATCH_BYTES, check_choice, check_mapping, check_positive
from lance_ray.retry import RetryPolicy, is_interruption

_ROWS_AT_ONCE = 256
_BLOB_METADATA = {"lance-encoding:blob": "true"}
ON_ERROR = ("raise", "null")


@dataclass(frozen=True, slots=True)
class Ingest:
    """What the workers of an ingestion share."""

    column: str
    into: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    on_error: str = "raise"
    batch_bytes: int = BLOB_BATCH_BYTES
    threads: int = 8
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        for name in ("column", "into"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value):
                raise InvalidArgumentError(name, value, "must be the name of a column")
        check_mapping("fsspec_options", self.options)
        check_choice("on_error", self.on_error, ON_ERROR)
        check_positive("blob_batch_bytes", self.batch_bytes, optional=False)
        check_positive("threads", self.threads, optional=False)


def ingest_blobs(
    ds: Dataset,
    column: str,
    *,
    into: str | None = None,
    fsspec_options: Mapping[str, Any] | None = None,
    on_error: str = "raise",
    blob_batch_bytes: int = BLOB_BATCH_BYTES,
    threads: int = 8,
    concurrency: int | None = None,
    num_cpus: float | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
) -> Dataset:
    """The same dataset with the bytes behind a column of URLs, fetched in parallel on the workers.

    ``write_lance(ingest_blobs(ds, "url", into="image"), uri)`` makes a table with a blob column ``image``: the new
    column is marked as one. Nothing is fetched before the dataset is consumed.

    Args:
        ds: the rows.
        column: strings that fsspec can open: ``https://``, ``s3://``, ``gs://``, ``file://``, ``zip://...::...`` and
            whatever else is installed; a null stays null.
        into: the name of the new column; by default the URLs are replaced.
        fsspec_options: what ``fsspec.core.url_to_fs`` takes besides the URL, such as credentials.
        on_error: ``raise``, or ``null`` for a null where an object cannot be read. An error of the configuration (a
            scheme that fsspec does not know, a driver that is not installed, a bad option) is raised all the same.
        blob_batch_bytes: payload that a task gathers before it hands a block on (32 MiB); a larger blob is a block by
            itself. At most so much, and what ``threads`` fetches are under way, is in memory.
        threads: fetches at once in each task.
        concurrency: tasks at once at most.
        num_cpus: CPUs of each task; it wins over ``ray_remote_args``.
        ray_remote_args: further options of ``ray.remote``.

    Returns:
        A lazy Ray Dataset; ``into`` is ``large_binary``.

    Raises:
        InvalidArgumentError: before anything starts: a bad argument. While the dataset is consumed: no such column,
            one without strings, a URL of an unknown scheme or without its driver, a bad option for fsspec.
        StorageError: while the dataset is consumed: a URL cannot be read, after retries of what may pass. The message
            has the URL without credentials. Ray wraps it in an error of its own, unless
            ``DataContext.raise_original_map_exception`` is set.

    Nothing is written here, so nothing is left behind; the write that consumes the dataset cleans up after itself.
    """
    check_mapping("fsspec_options", fsspec_options)
    asked = Ingest(
        column, column if into is None else into, dict(fsspec_options or {}), on_error, blob_batch_bytes, threads
    )
    check_ray_options(ray_remote_args)
    check_ray_options(None if num_cpus is None else {"num_cpus": num_cpus}, "num_cpus")
    check_positive("concurrency", concurrency)
    check_dataset(ds)
    with unnamed_options():
        return start_in_full(ds).map_batches(
            _Fetch(asked),
            batch_format="pyarrow",
            batch_size=_ROWS_AT_ONCE,
            zero_copy_batch=True,
            compute=TaskPoolStrategy(concurrency),
            **{**(ray_remote_args or {}), **({} if num_cpus is None else {"num_cpus": num_cpus})},
        )


@dataclass(frozen=True)
class _Fetch:
    """The worker side: one table in, tables of bounded size out."""

    asked: Ingest

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return fetched(table, self.asked)


def fetched(table: pa.Table, asked: Ingest) -> Iterator[pa.Table]:
    """The rows with their payloads, in tables of about ``batch_bytes``."""
    if asked.column not in table.schema.names:
        raise InvalidArgumentError("column", asked.column, f"the dataset has {table.schema.names}")
    kind = table.schema.field(asked.column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise InvalidArgumentError("column", asked.column, f"must hold URLs as strings, not {kind}")
    held: list[bytes | None] = []
    size = start = 0
    for data in _payloads(table[asked.column].to_pylist(), asked):
        if held and size + len(data or b"") > asked.batch_bytes:
            yield _with_payload(table.slice(start, len(held)), held, asked)
            start, held, size = start + len(held), [], 0
        held.append(data)
        size += len(data or b"")
    if held or not table.num_rows:
        yield _with_payload(table.slice(start, len(held)), held, asked)


def _payloads(urls: list[str | None], asked: Ingest) -> Iterator[bytes | None]:
    """In order; no more than ``threads`` are fetched before they are asked for."""
    with ThreadPoolExecutor(asked.threads) as pool:
        for first in range(0, len(urls), asked.threads):
            yield from pool.map(lambda url: _fetch(url, asked), urls[first : first + asked.threads])


def _with_payload(rows: pa.Table, payload: list[bytes | None], asked: Ingest) -> pa.Table:
    made = pa.field(asked.into, pa.large_binary(), metadata=_BLOB_METADATA)
    values = pa.array(payload, pa.large_binary())
    if asked.into in rows.schema.names:
        return rows.set_column(rows.schema.get_field_index(asked.into), made, values)
    return rows.append_column(made, values)


def _fetch(url: str | None, asked: Ingest) -> bytes | None:
    if url is None:
        return None
    try:
        return asked.retry.call(lambda: _read(url, asked), retry_on=is_interruption, what="fetch")
    except StorageError:
        if asked.on_error == "null":
            return None
        raise


def _read(url: str, asked: Ingest) -> bytes:
    import fsspec

    opened = False
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **asked.options)
        opened = True
        return cast("bytes", filesystem.cat_file(path))
    except Exception as error:  # noqa: BLE001 - every implementation of fsspec has errors of its own
        secrets = [str(value) for value in asked.options.values() if isinstance(value, str)]
        shown = redact(url, secrets).partition("?")[0]
        reason = redact(f"{type(error).__name__}: {error}".replace(url, shown), secrets)
        if isinstance(error, TypeError):  # also from the first request: some drivers hand options on only then
            raise InvalidArgumentError("fsspec_options", sorted(asked.options), f"for {shown}: {reason}") from None
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and not opened):
            raise InvalidArgumentError("column", asked.column, f"cannot open {shown}: {reason}") from None
        kind = "missing" if isinstance(error, FileNotFoundError) else storage_error_kind(str(error))
        if isinstance(error, (ConnectionError, TimeoutError)):
            kind = "transient"
        if isinstance(error, ValueError):
            kind = "invalid"
        raise StorageError(f"cannot read {shown}: {reason}", kind=kind, target=shown) from None
