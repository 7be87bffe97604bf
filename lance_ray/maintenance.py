"""Care for tables: old versions removed, and all tables of a database compacted or cleaned up."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lance_ray import catalog
from lance_ray.catalog import LanceRestConfig
from lance_ray.compaction import (
    CompactionJob,
    CompactionPreview,
    CompactionReport,
    OnFailure,
    Workers,
    compact,
    fold_engine_options,
    fold_job,
    preview,
)
from lance_ray.errors import (
    InvalidArgumentError,
    LanceRayError,
    OperationFailedError,
    TaskFailedError,
    translate_errors,
)
from lance_ray.executors import Executor, RayExecutor
from lance_ray.ledger import cleanup_jobs
from lance_ray.namespaces import connect
from lance_ray.options import check_choice, check_flag, check_positive
from lance_ray.planning.compaction import Budget
from lance_ray.preflight import check_cluster
from lance_ray.progress import Progress, Reporter, reporter_for
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, TableRef, address_of, newest

logger = logging.getLogger(__name__)

_TABLES_AT_ONCE = 4


class _ByName:
    """Values that lance-ray's code asks a dict for."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined] # of the classes that have this
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True, slots=True)
class VersionCleanupReport(_ByName):
    """What :func:`cleanup_old_versions` removed, or would remove (``dry_run``); also ``report["bytes_removed"]``."""

    target: str
    dry_run: bool
    old_versions: int
    bytes_removed: int
    data_files_removed: int
    deletion_files_removed: int
    index_files_removed: int
    transaction_files_removed: int
    failed_deletes: int
    warnings: tuple[str, ...] = ()
    """What the engine has to say about a dry run, such as branches that need a version."""

    def __str__(self) -> str:
        files = self.data_files_removed + self.deletion_files_removed + self.index_files_removed
        text = (
            f"{self.target}: {'would remove' if self.dry_run else 'removed'} {self.old_versions} version(s),"
            f" {files} file(s), {self.bytes_removed / 1e6:,.1f} MB"
        )
        text += f", {self.failed_deletes} could not be deleted" if self.failed_deletes else ""
        return "\n".join([text, *(f"  {warning}" for warning in self.warnings)])


def cleanup_old_versions(
    uri: Any = None,
    *,
    older_than: dt.timedelta | None = None,
    retain_versions: int | None = None,
    versions: Sequence[int] | None = None,
    delete_unverified: bool = False,
    error_if_tagged_old_versions: bool = True,
    delete_rate_limit: int | None = None,
    dry_run: bool = False,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> VersionCleanupReport:
    """Remove old versions and the files that only they refer to. They can no longer be read or restored afterwards.

    Args:
        uri: path or URI of the table.
        older_than: only versions older than this; two weeks if nothing else says which.
        retain_versions: keep this many of the newest.
        versions: only these.
        delete_unverified: also files that no version refers to and that are younger than a week. Refused while a job
            of this package writes to the table, whose files these may be; others' writers must be known to be idle.
        error_if_tagged_old_versions: whether tagged versions in the way are an error, or are kept silently.
        delete_rate_limit: deletions per second at most.
        dry_run: report only.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        A :class:`VersionCleanupReport`: versions, files and bytes that are gone, or that a dry run would remove.

    Raises:
        InvalidArgumentError, TableNotFoundError, StorageError: what is gone by then is gone; calling again goes on.

    Writers beside it are safe: files that no version refers to are kept for a week. Readers of a version that is
    removed fail; tag what must stay.
    """
    choice = _Choice(
        older_than,
        retain_versions,
        _fold_versions(versions),
        delete_unverified,
        error_if_tagged_old_versions,
        delete_rate_limit,
        dry_run,
    )
    return clean(choice, TableRef.fold(uri, address_of(locals())).pin())


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which versions go, and how."""

    older_than: dt.timedelta | None
    retain_versions: int | None
    versions: list[int] | None
    delete_unverified: bool
    error_if_tagged_old_versions: bool
    delete_rate_limit: int | None
    dry_run: bool

    def __post_init__(self) -> None:
        check_positive("retain_versions", self.retain_versions)
        check_positive("delete_rate_limit", self.delete_rate_limit)
        for name in ("delete_unverified", "error_if_tagged_old_versions", "dry_run"):
            check_flag(name, getattr(self, name))
        given = self.older_than
        if given is not None and not (isinstance(given, dt.timedelta) and given >= dt.timedelta(0)):
            raise InvalidArgumentError("older_than", given, "must be a timedelta, not negative")

    def engine(self) -> dict[str, Any]:
        """As the engine's functions take it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "dry_run"}


def _fold_versions(versions: Any) -> list[int] | None:
    if versions is None:
        return None
    if not isinstance(versions, Iterable) or isinstance(versions, (str, bytes)):
        raise InvalidArgumentError("versions", versions, "must be a list of version numbers")
    found = list(versions)
    for version in found:
        check_positive("versions", version, optional=False)
    return [int(version) for version in found]


def clean(choice: _Choice, table: PinnedTable) -> VersionCleanupReport:
    """Remove the versions of one table; of a database's tables this runs on workers."""
    target = table.ref.target
    table = newest(table)  # an opened dataset may show an old version
    if choice.delete_unverified:
        _refuse_beside_jobs(table, target)
    dataset = table.open()
    with translate_errors("clean up old versions of", table.uri, secrets=table.secrets):
        if choice.dry_run:
            explained = dataset.explain_cleanup_old_versions(**choice.engine())
            stats, warnings = explained.stats, tuple(explained.warnings)
        else:
            stats, warnings = dataset.cleanup_old_versions(**choice.engine()), ()
    return VersionCleanupReport(
        target,
        choice.dry_run,
        stats.old_versions,
        stats.bytes_removed,
        stats.data_files_removed,
        stats.deletion_files_removed,
        stats.index_files_removed,
        stats.transaction_files_removed,
        stats.failed_deletes,
        warnings,
    )


def _refuse_beside_jobs(table: PinnedTable, target: str) -> None:
    jobs = cleanup_jobs(table, target, dry_run=True, landed=lambda *_: False).jobs
    if running := [job.job_id for job in jobs if job.state == "running"]:
        raise InvalidArgumentError("delete_unverified", True, f"jobs {running} are writing to the table")


@dataclass(frozen=True, slots=True)
class TableCleanup(_ByName):
    """What became of one table of a database; also ``item["table_id"]`` and ``item["stats"]``."""

    table_id: list[str]
    stats: VersionCleanupReport | None = None
    """What is gone; None with an ``error``."""
    error: LanceRayError | None = None

    def __str__(self) -> str:
        name = ".".join(self.table_id)
        return f"{name}: {type(self.error).__name__}: {self.error}" if self.error is not None else str(self.stats)


def cleanup_database_old_versions(
    *,
    database: Sequence[str],
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    older_than: dt.timedelta | None = None,
    retain_versions: int | None = None,
    delete_unverified: bool = False,
    error_if_tagged_old_versions: bool = True,
    delete_rate_limit: int | None = None,
    num_workers: int | None = None,
    on_failure: OnFailure = "raise",
    dry_run: bool = False,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> list[TableCleanup]:
    """Remove old versions of all tables directly in a namespace, several at once, going on past a table that fails.

    Args:
        database: name of the namespace, as a list of its parts; empty for the root.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: a REST server instead.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        older_than: as for :func:`lance_ray.cleanup_old_versions`, for each table.
        retain_versions: the same.
        delete_unverified: the same.
        error_if_tagged_old_versions: the same.
        delete_rate_limit: the same; deletions per second of each table.
        num_workers: tables at once at most; by default what the cluster runs.
        on_failure: ``raise`` after all tables were tried, or ``report`` failures in the items.
        dry_run: report only.
        progress: tables done: False for silence, a reporter, or by default a bar on a terminal, else log lines.
        ray_remote_args: options of ``ray.remote`` for the tasks, one for each table.

    Returns:
        One item for each table, in the order of the namespace.

    Raises:
        InvalidArgumentError, StorageError: an argument is wrong, or the namespace cannot be listed.
        OperationFailedError: tables failed; its ``failures`` name them. What others had to remove is gone.

    What is said of writers and readers beside it at :func:`lance_ray.cleanup_old_versions` holds for each table.
    """
    choice = _Choice(
        older_than,
        retain_versions,
        None,
        delete_unverified,
        error_if_tagged_old_versions,
        delete_rate_limit,
        dry_run,
    )
    check_choice("on_failure", on_failure, ("raise", "report"))
    at_once, remote_args = Workers(num_workers, None, None, ray_remote_args).fold()
    options = RunOptions(at_once, progress=progress, on_failure="report")
    executor = RayExecutor(remote_args, name="cleanup_database")
    namespace = connect(namespace_impl, namespace_properties, rest_config=rest_config).ref
    ref = _ref_in(database, namespace, {"storage_options": storage_options, "io_config": io_config})
    refs = [dataclasses.replace(ref, table_id=name) for name in catalog.list_tables(namespace, tuple(database))]
    items = _cleaned(refs, choice, options, executor)
    if on_failure == "raise":
        _raise_failed([(item, item.error) for item in items if item.error is not None], len(items))
    return items


def _cleaned(refs: Sequence[TableRef], choice: _Choice, options: RunOptions, executor: Executor) -> list[TableCleanup]:
    """Each table as a task, but for those that the namespace does not find."""
    items: dict[tuple[str, ...], TableCleanup] = {}
    tables: list[PinnedTable] = []
    for ref in refs:
        try:
            tables.append(ref.unpinned())
        except LanceRayError as refused:
            items[ref.table_id] = TableCleanup(list(ref.table_id), error=refused)
    if tables:
        check_cluster(tables)
        with run_tasks(clean, tables, shared=choice, options=options, executor=executor) as run:
            for outcome in run:
                name, cause = outcome.task.ref.table_id, outcome.error and outcome.error.__cause__
                error = cause if isinstance(cause, LanceRayError) else outcome.error
                items[name] = TableCleanup(list(name), outcome.result, error)
    return [items[ref.table_id] for ref in refs]


def _ref_in(database: Any, namespace: catalog.NamespaceRef, address: dict[str, Any]) -> TableRef:
    """What all tables of a namespace have in common, without a name."""
    names = isinstance(database, Sequence) and not isinstance(database, str)
    if not names or not all(isinstance(part, str) and part for part in database):
        raise InvalidArgumentError("database", database, "must be a list of names")
    ref = TableRef.fold(None, {**address, "namespace_impl": namespace, "table_id": _ANY_TABLE})
    return dataclasses.replace(ref, table_id=())


def _raise_failed(failed: Sequence[tuple[Any, Any]], tables: int) -> None:
    """Raise OperationFailedError if tables failed, given with what was wrong."""
    if failed:
        failures = [TaskFailedError(".".join(item.table_id), 1, why) for item, why in failed]
        text = "\n".join([f"{len(failed)} of {tables} table(s) failed", *(str(item) for item, _ in failed)])
        raise OperationFailedError(text, failures=failures, completed=tables - len(failed))


@dataclass(frozen=True, slots=True)
class TableCompaction(_ByName):
    """What became of one table of a database; also ``item["table_id"]`` and ``item["metrics"]``."""

    table_id: list[str]
    metrics: CompactionReport | CompactionPreview | None = None
    """The report (or the plan of a dry run); None when there was nothing to do, or with an ``error``."""
    error: LanceRayError | None = None
    skipped: bool = False
    """Not begun: time was up."""

    @property
    def failed(self) -> bool:
        """Whether the table, or a task of it, failed."""
        return self.error is not None or bool(getattr(self.metrics, "failed", 0))

    def __str__(self) -> str:
        name = ".".join(self.table_id)
        if self.error is not None:
            return f"{name}: {type(self.error).__name__}: {self.error}"
        return f"{name}: {'not begun' if self.skipped else self.metrics or 'nothing to do'}"


_ANY_TABLE = ("any",)  # which one, each item says


def compact_database(
    *,
    database: Sequence[str],
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    compaction_options: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
    concurrency: int | None = None,
    micro_commit_batch_size: int | None = None,
    tables_at_once: int = _TABLES_AT_ONCE,
    max_seconds: float | None = None,
    on_failure: OnFailure = "report",
    dry_run: bool = False,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> list[TableCompaction]:
    """Compact all tables directly in a namespace, several at once, going on past a table that fails.

    Args:
        database: name of the namespace, as a list of its parts; empty for the root.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: a REST server instead.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        compaction_options: as for :func:`lance_ray.compact_files`.
        num_workers: tasks at once at most, of all tables together; by default what the cluster runs.
        concurrency: as for :func:`lance_ray.compact_files`.
        micro_commit_batch_size: the same.
        tables_at_once: tables at most that are worked on at the same time.
        max_seconds: begin no further table or task after this time.
        on_failure: ``report`` failures in the items, or ``raise`` after all tables were tried.
        dry_run: plans only.
        progress: tables done: False for silence, a reporter, or by default a bar on a terminal, else log lines.
        ray_remote_args: options of ``ray.remote`` for the tasks.

    Returns:
        One item for each table, in the order of the namespace.

    Raises:
        InvalidArgumentError, StorageError: an argument is wrong, or the namespace cannot be listed.
        OperationFailedError: something failed (``on_failure="raise"``); its ``failures`` name the tables.

    A table that fails is as it was, but for rewrites that were committed; the others go on. What is said of concurrent
    changes at :func:`lance_ray.compact_files` holds for each table.
    """
    check_positive("tables_at_once", tables_at_once, optional=False)
    check_flag("dry_run", dry_run)
    namespace = connect(namespace_impl, namespace_properties, rest_config=rest_config).ref
    ref = _ref_in(database, namespace, {"storage_options": storage_options, "io_config": io_config})
    job = fold_job(
        ref,
        fold_engine_options(compaction_options),
        Budget(max_seconds),
        Workers(num_workers, None, concurrency, ray_remote_args),
        micro_commit_batch_size=micro_commit_batch_size,
        on_failure=on_failure,
        max_replans=5,
        progress=progress,
    )
    items = _Database(job, catalog.list_tables(namespace, tuple(database)), dry_run).run(tables_at_once)
    if on_failure == "raise":
        _raise_failed([(item, item.error or str(item.metrics)) for item in items if item.failed], len(items))
    return items


@dataclass(frozen=True, slots=True)
class _Database:
    """The compaction of some tables."""

    job: CompactionJob
    tables: Sequence[tuple[str, ...]]
    dry_run: bool
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)

    def run(self, at_once: int) -> list[TableCompaction]:
        """One item for each table. An interrupt ends all, each after the commit of what it has finished."""
        if not self.tables:
            return []
        shares = _shares(self.job.workers, min(at_once, len(self.tables)))
        reporter = reporter_for("compact_database", len(self.tables), self.job.progress)
        done: dict[tuple[str, ...], TableCompaction] = {}
        with _closing(reporter), ThreadPoolExecutor(shares.qsize(), "lance-ray-compact") as pool:
            futures: dict[Future[TableCompaction], tuple[str, ...]] = {
                pool.submit(self._one, table_id, shares): table_id for table_id in self.tables
            }
            try:
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    failed = sum(item.failed for item in done.values())
                    state = Progress("compact_database", len(done) - failed, len(futures), "tables", failed=failed)
                    reporter.report(dataclasses.replace(state, seconds=time.monotonic() - self.started))
            finally:
                self.stop.set()
        return [done[table_id] for table_id in self.tables]

    def _one(self, table_id: tuple[str, ...], shares: queue.SimpleQueue[int | None]) -> TableCompaction:
        share = shares.get()
        try:
            return self._compact(table_id, share)
        except LanceRayError as error:
            logger.warning("%s is not compacted: %s", ".".join(table_id), error)
            return TableCompaction(list(table_id), error=error)
        finally:
            shares.put(share)

    def _compact(self, table_id: tuple[str, ...], share: int | None) -> TableCompaction:
        budget, limit = self.job.budget, self.job.budget.max_seconds
        if limit is not None:
            budget = dataclasses.replace(budget, max_seconds=limit - (time.monotonic() - self.started))
        if self.stop.is_set() or (budget.max_seconds is not None and budget.max_seconds <= 0):
            return TableCompaction(list(table_id), skipped=True)
        job = dataclasses.replace(
            self.job,
            ref=dataclasses.replace(self.job.ref, table_id=table_id),
            budget=budget,
            workers=share,
            on_failure="report",
            progress=False,
            stop=self.stop,
        )
        return TableCompaction(list(table_id), preview(job) if self.dry_run else compact(job))


def _shares(workers: int | None, tables: int) -> queue.SimpleQueue[int | None]:
    """The workers divided among the tables at work; None each when the cluster alone is the limit."""
    shares: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    tables = tables if workers is None else min(tables, workers)
    for number in range(tables):
        shares.put(None if workers is None else (workers + number) // tables)
    return shares


@contextmanager
def _closing(reporter: Reporter) -> Iterator[None]:
    try:
        yield
    finally:
        reporter.close()
