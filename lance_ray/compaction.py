"""Compaction: small and deleted-from fragments rewritten on Ray workers, committed on the driver as they finish."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, cast

import lance
from lance.fragment import FragmentMetadata
from lance.optimize import Compaction, CompactionOptions, CompactionTask

from lance_ray import commit
from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    OperationFailedError,
    TaskFailedError,
    WorkerEnvironmentError,
    tidy,
    translate_errors,
)
from lance_ray.executors import RayExecutor, check_ray_options, checked_ray_args
from lance_ray.ledger import JobRef, WrittenPath, cleanup_jobs
from lance_ray.options import (
    CommitOptions,
    check_choice,
    check_flag,
    check_mapping,
    check_positive,
    check_seconds,
    fold_dataset_options,
)
from lance_ray.planning.compaction import DEFAULT_TARGET_ROWS, Budget, CommitCadence, Rewrite, RewriteTask, Rewritten
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter, check_progress
from lance_ray.runner import RunOptions, TaskOutcome, run_tasks
from lance_ray.table import PinnedTable, TableRef, address_of, newest

logger = logging.getLogger(__name__)

OnFailure = Literal["raise", "report"]

_MISSPELT = {"materialize_deletions_threadhold": "materialize_deletions_threshold"}
_SCAN_KEYS = frozenset({"batch_size", "io_buffer_size"})
_TARGET_KEY = "lance.compaction.target_rows_per_fragment"
_MAX_REPLANS = 5


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction did. The first four counts are those of the engine's ``CompactionMetrics``, summed up."""

    target: str
    fragments_removed: int = 0
    fragments_added: int = 0
    files_removed: int = 0
    """Data files and deletion files that the newest version no longer has."""
    files_added: int = 0
    versions: tuple[int, ...] = ()
    """The versions that hold the commits, in order (the engine makes another one before each)."""
    done: int = 0
    """Rewrites in the table."""
    retried: int = 0
    """Attempts beyond each task's first."""
    replanned: int = 0
    """Rewrites lost to concurrent changes of their fragments, and planned again."""
    skipped: int = 0
    """Planned rewrites that the budget had no room for; a next run takes them up."""
    failures: tuple[CompactionFailure, ...] = ()
    rows: int = 0
    """Rows rewritten."""
    bytes: int = 0
    """Bytes of the files written."""
    seconds: float = 0.0
    job_id: str = ""

    @property
    def failed(self) -> int:
        """Tasks given up; their fragments are as they were."""
        return len(self.failures)

    @property
    def version(self) -> int | None:
        """The last version made, or None."""
        return self.versions[-1] if self.versions else None

    def __str__(self) -> str:
        text = (
            f"{self.target}: {self.fragments_removed} fragment(s) became {self.fragments_added}, {self.rows:,} rows,"
            f" {self.bytes / 1e6:,.1f} MB in {self.done} task(s) and {len(self.versions)} commit(s),"
            f" {self.seconds:.2f} s"
        )
        counts = {name: getattr(self, name) for name in ("retried", "replanned", "skipped", "failed")}
        text += "".join(f", {count} {name}" for name, count in counts.items() if count)
        return "\n".join([text, *(f"  {failure}" for failure in self.failures)])


@dataclass(frozen=True, slots=True)
class CompactionFailure:
    """A task that was given up. Its fragments are in the table as they were."""

    fragments: tuple[int, ...]
    rows: int
    error: TaskFailedError

    def __str__(self) -> str:
        return f"fragments {_brief(self.fragments)} ({self.rows:,} rows): {self.error}"


@dataclass(frozen=True, slots=True)
class PlannedRewrite:
    """One task of a plan: source fragments, their live rows and bytes, and how many fragments they will be."""

    fragments: tuple[int, ...]
    rows: int
    bytes: int
    fragments_after: int


@dataclass(frozen=True, slots=True)
class CompactionPreview:
    """What a compaction would do (``dry_run=True``)."""

    target: str
    version: int
    tasks: tuple[PlannedRewrite, ...]
    skipped: int
    """Rewrites that the budget has no room for."""
    fragments: int
    """Fragments of the table now."""

    @property
    def rows(self) -> int:
        """Rows to rewrite."""
        return sum(task.rows for task in self.tasks)

    @property
    def bytes(self) -> int:
        """Bytes of the files to read."""
        return sum(task.bytes for task in self.tasks)

    @property
    def fragments_after(self) -> int:
        """Fragments that the table is expected to have afterwards."""
        return self.fragments + sum(task.fragments_after - len(task.fragments) for task in self.tasks)

    def __str__(self) -> str:
        return (
            f"{self.target} version {self.version}: {len(self.tasks)} task(s) over {self.rows:,} rows"
            f" ({self.bytes / 1e6:,.1f} MB), {self.fragments} fragment(s) would become {self.fragments_after}"
            + (f"; {self.skipped} task(s) beyond the budget" if self.skipped else "")
        )


@dataclass(frozen=True, slots=True)
class CompactionJob:
    """A compaction, folded from the public keywords and checked."""

    ref: TableRef
    engine: Mapping[str, Any]
    micro: int | None
    budget: Budget
    workers: int | None
    """Tasks at once at most; None for what the cluster runs."""
    ray_remote_args: Mapping[str, Any] = field(repr=False)
    on_failure: OnFailure = "raise"
    progress: bool | Reporter | None = None
    max_replans: int = _MAX_REPLANS
    commit: CommitOptions = field(default_factory=CommitOptions)
    stop: threading.Event | None = None
    """Set by another thread to end the run as if its time were up."""


def compact_files(
    uri: Any = None,
    io_config: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    version: int | str | None = None,
    asof: Any = None,
    block_size: int | None = None,
    commit_lock: Any = None,
    index_cache_size: int | None = None,
    metadata_cache_size_bytes: int | None = None,
    default_scan_options: dict[str, Any] | None = None,
    compaction_options: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
    num_partitions: int | None = None,
    concurrency: int | None = None,
    micro_commit_batch_size: int | None = None,
    max_seconds: float | None = None,
    max_bytes: int | None = None,
    max_tasks: int | None = None,
    on_failure: OnFailure = "raise",
    max_replans: int = _MAX_REPLANS,
    dry_run: bool = False,
    progress: bool | Reporter | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> CompactionReport | CompactionPreview | None:
    """Rewrite small and deleted-from fragments on Ray workers, and commit on the driver while the rest still runs.

    Rows, stable row ids and indexes stay right; so does the order of rows when all is one commit, else later commits
    come last. Concurrent appends do not disturb it. A concurrent delete, update or index build costs only the rewrites
    that it concerns: they are planned again on the newest version.

    Args:
        uri: path or URI of the table, or an opened dataset.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        version: compact only fragments that this version has (number or tag); those changed since are left alone.
        asof: the same by time.
        block_size: how the table is opened.
        commit_lock: for stores without atomic commits.
        index_cache_size: how the table is opened.
        metadata_cache_size_bytes: how the table is opened.
        default_scan_options: ``batch_size`` and ``io_buffer_size`` of the rewriting scans, where
            ``compaction_options`` has none; a rewrite takes no other scan option.
        compaction_options: the engine's own (``lance.optimize.CompactionOptions``), for plan, tasks and commit.
            ``num_threads`` is 1 unless given: tasks are what runs in parallel.
        num_workers: tasks at once at most, times ``concurrency``; by default what the cluster runs.
        num_partitions: another name of ``num_workers``; 1 or less is the default, as it was where the name is from.
        concurrency: tasks at once for each worker's CPU: each task asks for that part of one.
        micro_commit_batch_size: commit each time so many tasks finished, in the order they finish. None, not positive
            or at least the number of tasks: one commit at the end.
        max_seconds: start no further task after this time; what has finished by then is committed.
        max_bytes: size of the source files of all tasks together; one that does not fit is passed over, and counted as
            skipped.
        max_tasks: number of tasks.
        on_failure: what to do about tasks that fail for good, after the others are committed: ``raise`` or ``report``.
        max_replans: how often rewrites lost to concurrent changes are planned again.
        dry_run: return the plan only.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        ray_remote_args: options of ``ray.remote`` for the tasks.

    Returns:
        A report with the summed metrics, the plan of a dry run, or None when there is nothing to do.

    Raises:
        InvalidArgumentError, TableNotFoundError, VersionNotFoundError, StorageError, WorkerEnvironmentError: before
            any task starts.
        OperationFailedError: tasks failed (``on_failure="raise"``); the others are committed.
        CommitConflictError, StorageError: a commit failed; earlier ones stay.
        CommitOutcomeUnknownError: a commit's answer was lost and the table cannot tell; no file was removed.

    Whatever ends the run, only what was not committed is lost, its files are removed (those of a killed driver by the
    next run, or by :func:`lance_ray.cleanup_orphans`), and the next run goes on from there.
    """
    job = fold_job(
        fold_ref(
            uri,
            address_of(locals()),
            version=version,
            asof=asof,
            block_size=block_size,
            commit_lock=commit_lock,
            index_cache_size=index_cache_size,
            metadata_cache_size_bytes=metadata_cache_size_bytes,
        ),
        fold_engine_options(compaction_options, default_scan_options),
        Budget(max_seconds, max_bytes, max_tasks),
        Workers(num_workers, num_partitions, concurrency, ray_remote_args),
        micro_commit_batch_size=micro_commit_batch_size,
        on_failure=on_failure,
        max_replans=max_replans,
        progress=progress,
    )
    check_flag("dry_run", dry_run)
    return preview(job) if dry_run else compact(job)


def fold_ref(uri: Any, address: dict[str, Any], **opening: Any) -> TableRef:
    """The table, and how it is opened."""
    check_positive("index_cache_size", opening.get("index_cache_size"), zero=True)
    entries = {"index_cache_size": opening.pop("index_cache_size", None)}
    version, asof, opened = fold_dataset_options(entries, index_cache_size_bytes=None, **opening)
    return TableRef.fold(uri, address, version=version, asof=asof, open_options=opened)


def fold_job(
    ref: TableRef,
    engine: Mapping[str, Any],
    budget: Budget,
    workers: Workers,
    *,
    micro_commit_batch_size: int | None,
    on_failure: Any,
    max_replans: int,
    progress: bool | Reporter | None,
) -> CompactionJob:
    """The job, checked as far as no table is needed."""
    check_seconds("max_seconds", budget.max_seconds)
    check_positive("max_bytes", budget.max_bytes)
    check_positive("max_tasks", budget.max_tasks)
    check_positive("max_replans", max_replans, optional=False, zero=True)
    micro = _unless_low(micro_commit_batch_size, 0)
    check_positive("micro_commit_batch_size", micro)
    check_progress(progress)
    check_choice("on_failure", on_failure, ("raise", "report"))
    at_once, remote_args = workers.fold()
    return CompactionJob(ref, engine, micro, budget, at_once, remote_args, on_failure, progress, max_replans)


def _unless_low(count: Any, low: int) -> Any:
    """A count that is as good as not given up to ``low``."""
    return None if isinstance(count, Integral) and int(count) <= low else count


@dataclass(frozen=True, slots=True)
class Workers:
    """How many tasks run at once, as the caller said it."""

    num_workers: int | None = None
    num_partitions: int | None = None
    concurrency: int | None = None
    ray_remote_args: Mapping[str, Any] | None = field(default=None, repr=False)

    def fold(self) -> tuple[int | None, dict[str, Any]]:
        """Tasks at once at most (None for what the cluster runs), and what Ray is told about each."""
        check_positive("num_workers", self.num_workers)
        check_positive("concurrency", self.concurrency)
        partitions = _unless_low(self.num_partitions, 1)
        check_positive("num_partitions", partitions)
        if self.num_workers is not None and partitions is not None and self.num_workers != partitions:
            raise InvalidArgumentError("num_partitions", partitions, f"contradicts num_workers={self.num_workers}")
        workers = self.num_workers or partitions
        remote_args = checked_ray_args({} if self.ray_remote_args is None else self.ray_remote_args)
        check_ray_options(remote_args)
        if self.concurrency is not None:
            remote_args.setdefault("num_cpus", 1 / self.concurrency)
        return None if workers is None else workers * (self.concurrency or 1), remote_args


_COUNTS = frozenset(
    {"target_rows_per_fragment", "max_rows_per_group", "max_bytes_per_file", "num_threads", "batch_size"}
)


def fold_engine_options(
    options: Mapping[str, Any] | None, scan_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The engine's compaction options: known, spelt right, one thread per task unless the caller says otherwise."""
    check_mapping("compaction_options", options)
    check_mapping("default_scan_options", scan_options)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for wrong, right in _MISSPELT.items():
        if wrong in given:
            warnings.warn(f"compaction option {wrong!r} is spelt {right!r}", UserWarning, stacklevel=3)
            if right in given:
                raise InvalidArgumentError("compaction_options", sorted(given), f"has {right!r} in two spellings")
            given[right] = given.pop(wrong)
    known = sorted(CompactionOptions.__annotations__)
    if unknown := sorted(set(given) - set(known), key=str):
        raise InvalidArgumentError("compaction_options", unknown, f"known keys are {known}")
    scan = {key: value for key, value in (scan_options or {}).items() if value is not None}
    if unknown := sorted(set(scan) - _SCAN_KEYS, key=str):
        raise InvalidArgumentError(
            "default_scan_options", unknown, f"a rewrite reads whole fragments; it takes {sorted(_SCAN_KEYS)}"
        )
    for key in sorted(_COUNTS & set(given)):
        if isinstance(given[key], bool) or not isinstance(given[key], int) or given[key] < 1:
            raise InvalidArgumentError("compaction_options", {key: given[key]}, "must be a whole number of at least 1")
    for key, value in scan.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgumentError("default_scan_options", {key: value}, "must be a whole number of at least 1")
    return {"num_threads": 1, **scan, **given}


@dataclass(frozen=True, slots=True)
class CompactionPlan:
    """The engine's plan on one version."""

    table: PinnedTable
    tasks: tuple[RewriteTask, ...]
    fragments: int
    indices: frozenset[str]


def plan_table(table: PinnedTable, engine: Mapping[str, Any]) -> CompactionPlan:
    """The engine's plan on that version; of a version that was asked for, only fragments that are the same today."""
    dataset = table.open()
    _refuse_deferred_remap(dataset, engine)
    with translate_errors("plan the compaction of", table.uri, secrets=table.secrets):
        try:
            plan = Compaction.plan(dataset, cast("CompactionOptions", dict(engine)))
        except (TypeError, OverflowError, ValueError) as error:
            if "LanceError" in str(error):
                raise
            raise _refused_option(dataset, engine, error) from error
        target = target_rows(dataset, engine)
        tasks = tuple(_task(task, target) for task in plan.tasks)
        if table.ref.version is not None or table.ref.asof is not None:
            tasks = _standing(table, tasks)
        return CompactionPlan(table, tasks, len(dataset.fragment_ids()), commit.index_names(dataset))


def _refused_option(dataset: lance.LanceDataset, engine: Mapping[str, Any], error: Exception) -> InvalidArgumentError:
    """The error for the option that the engine refuses; it does not say which, so each is tried by itself."""
    for key, value in engine.items():
        try:
            Compaction.plan(dataset, cast("CompactionOptions", {key: value}))
        except (TypeError, OverflowError, ValueError) as refused:
            return InvalidArgumentError("compaction_options", {key: value}, tidy(str(refused)))
    return InvalidArgumentError("compaction_options", sorted(engine), tidy(str(error)))


def target_rows(dataset: lance.LanceDataset, engine: Mapping[str, Any]) -> int:
    """Rows that a fragment shall have: by the options, the table's configuration, or the engine's default."""
    stored = dataset.config().get(_TARGET_KEY) or DEFAULT_TARGET_ROWS
    return int(engine.get("target_rows_per_fragment", stored))


def _standing(table: PinnedTable, tasks: Sequence[RewriteTask]) -> tuple[RewriteTask, ...]:
    """The tasks of a version asked for whose fragments are the same today."""
    planned, newest = commit.manifest_of(table.open()), commit.manifest_of(table.open_latest())
    return tuple(task for task in tasks if task.stands(planned, newest))


def _refuse_deferred_remap(dataset: lance.LanceDataset, engine: Mapping[str, Any]) -> None:
    if engine.get("defer_index_remap") and dataset.has_stable_row_ids:
        raise InvalidArgumentError(
            "defer_index_remap", True, "the table has stable row ids, whose indexes need no remap (the engine refuses)"
        )


def _task(task: CompactionTask, target: int) -> RewriteTask:
    text: str = task.json()  # type: ignore[attr-defined] # not in the stub
    fragments = json.loads(text)["task"]["fragments"]  # four times as quick as task.fragments
    size = sum(file["file_size_bytes"] or 0 for fragment in fragments for file in fragment["files"])
    deleted = sum((fragment.get("deletion_file") or {}).get("num_deleted_rows") or 0 for fragment in fragments)
    rows = sum(fragment["physical_rows"] for fragment in fragments) - deleted
    return RewriteTask(text, tuple(fragment["id"] for fragment in fragments), rows, size, target)


def preview(job: CompactionJob) -> CompactionPreview | None:
    """The plan, or None when there is nothing to do."""
    return preview_of(job, plan_table(job.ref.pin(), job.engine))


def preview_of(job: CompactionJob, plan: CompactionPlan) -> CompactionPreview | None:
    """What of the plan fits the budget, or None when there is nothing to do."""
    if not plan.tasks:
        return None
    chosen = job.budget.select(plan.tasks)
    tasks = tuple(PlannedRewrite(task.fragments, task.rows, task.bytes, task.fragments_after) for task in chosen)
    return CompactionPreview(
        job.ref.target, plan.table.version, tasks, len(plan.tasks) - len(tasks), fragments=plan.fragments
    )


@dataclass(frozen=True, slots=True)
class RewriteSpec:
    """What the tasks of one plan share."""

    table: PinnedTable
    job: JobRef


def rewrite(spec: RewriteSpec, task: str) -> Rewritten:
    """Runs on a worker: one of the engine's tasks, on the version of its plan. Notes the new files in the ledger."""
    dataset = spec.table.open()
    engine_task: CompactionTask = CompactionTask.from_json(task)  # type: ignore[attr-defined] # not in the stub
    with translate_errors("compact", spec.table.uri, secrets=spec.table.secrets):
        result = engine_task.execute(dataset)
    fragments = result.new_fragments
    spec.job.record(_paths(dataset, fragments))
    files = [file for fragment in fragments for file in fragment.files]
    counts = result.metrics
    return Rewritten(
        result.json(),  # type: ignore[attr-defined] # not in the stub
        tuple(str(file.path) for file in files),
        (counts.fragments_removed, counts.fragments_added, counts.files_removed, counts.files_added),
        sum(fragment.physical_rows for fragment in fragments),
        sum(file.file_size_bytes or 0 for file in files),
    )


def _paths(dataset: lance.LanceDataset, fragments: Sequence[FragmentMetadata]) -> list[WrittenPath]:
    return [
        WrittenPath(str(file.path), None if file.base_id is None else str(dataset.base_paths()[file.base_id].path))
        for fragment in fragments
        for file in fragment.files
    ]


def compact(job: CompactionJob) -> CompactionReport | None:
    """Plan, run and commit; None when there is nothing to do."""
    started = time.monotonic()
    table = job.ref.pin()
    _remove_leftovers(table, job.ref.target)
    plan = plan_table(table, job.engine)
    if not plan.tasks:
        return None
    check_cluster([table])
    ledger = JobRef(table, f"compact-{uuid.uuid4().hex}", table.version)
    run = _Run(job, ledger, started)
    with ledger.running("compact_files"):
        try:
            run.through(plan)
        finally:
            run.tidy()
    return run.report()


def _remove_leftovers(table: PinnedTable, target: str) -> None:
    """Remove what killed drivers left. What they committed stays: the table itself says which files it holds."""
    try:
        left = cleanup_jobs(table, target, dry_run=False, landed=lambda *_: False, keep_resumable=True)
    except LanceRayError as error:  # no reason not to compact
        logger.warning("leftovers of dead jobs beside %s stay for cleanup_orphans(): %s", target, error)
    else:
        if left.files:
            logger.info("%s", left)


class _Run:
    """One compaction on its way: rounds of tasks, each planned on the newest version of its time."""

    def __init__(self, job: CompactionJob, ledger: JobRef, started: float) -> None:
        self._job = job
        self._ledger = ledger
        self._started = started
        self._budget = job.budget
        self._report = CompactionReport(job.ref.target, job_id=ledger.job_id)
        self._overtaken: list[RewriteTask] = []
        self._unsettled = False

    def through(self, plan: CompactionPlan) -> None:
        """Run the plan, and plan again what concurrent changes overtook.

        Raises:
            OperationFailedError: tasks failed for good, and the job says to raise.
        """
        chosen = self._budget.select(plan.tasks)
        self._add(skipped=len(plan.tasks) - len(chosen))
        for replans in range(self._job.max_replans + 1):
            self._round(plan, chosen)
            if not self._overtaken or replans == self._job.max_replans:
                break
            if self._out_of_time():
                self._add(skipped=len(self._overtaken))
                self._overtaken = []
                break
            plan = plan_table(newest(plan.table), self._job.engine)
            self._add(replanned=len(self._overtaken))
            lost = {item for task in self._overtaken for item in task.fragments}
            chosen = tuple(task for task in plan.tasks if lost.intersection(task.fragments))
            self._overtaken = []
        self._give_up_overtaken()
        failures = self._report.failures
        if failures and self._job.on_failure == "raise":
            raise OperationFailedError(
                "\n".join([f"{len(failures)} task(s) failed, the others are committed", str(self.report())]),
                failures=[failure.error for failure in failures],
                completed=self._report.done,
            )

    def _round(self, plan: CompactionPlan, tasks: Sequence[RewriteTask]) -> None:
        if not tasks:
            return
        job = self._job
        cadence: CommitCadence[Rewrite] = CommitCadence(job.micro, len(tasks))
        run = run_tasks(
            rewrite,
            [task.json for task in tasks],
            shared=RewriteSpec(_for_workers(plan.table), self._ledger),
            options=RunOptions(max_in_flight=job.workers, progress=job.progress, on_failure="report"),
            executor=RayExecutor(job.ray_remote_args, name="compact_files"),
            operation="compact_files",
        )
        try:
            with run:
                self._drive(plan, tasks, run, cadence)
        except WorkerEnvironmentError:  # no resources for the rest; what has finished is kept
            self._commit(plan, cadence.drain())
            raise
        self._add(retried=run.report.retried)
        self._commit(plan, cadence.drain())

    def _drive(
        self,
        plan: CompactionPlan,
        tasks: Sequence[RewriteTask],
        outcomes: Iterable[TaskOutcome[str, Rewritten]],
        cadence: CommitCadence[Rewrite],
    ) -> None:
        for ended, outcome in enumerate(outcomes, 1):
            self._commit(plan, self._settle(cadence, tasks[outcome.index], outcome))
            if ended < len(tasks) and self._out_of_time():
                self._add(skipped=len(tasks) - ended)
                return

    def _settle(
        self, cadence: CommitCadence[Rewrite], task: RewriteTask, outcome: TaskOutcome[str, Rewritten]
    ) -> tuple[Rewrite, ...]:
        if outcome.error is not None:
            logger.warning("fragments %s are left as they are: %s", _brief(task.fragments), outcome.error)
            self._fail(task, outcome.error)
            return ()
        return cadence.offer(Rewrite(task, outcome.unwrap()))

    def _commit(self, plan: CompactionPlan, batch: tuple[Rewrite, ...]) -> None:
        if not batch:
            return
        self._ledger.check_open()
        batch = tuple(sorted(batch, key=lambda item: item.task.fragments))  # new fragments are numbered in this order
        options = dataclasses.replace(self._job.commit, job_id=self._ledger.job_id)
        self._unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.commit_rewrites(plan.table, batch, self._job.engine, plan.indices, options)
        except LanceRayError as error:
            self._unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self._unsettled = False
        self._overtaken += [item.task for item in receipt.overtaken]
        for item in receipt.committed:
            removed, added, files_removed, files_added = item.done.metrics
            self._add(
                fragments_removed=removed,
                fragments_added=added,
                files_removed=files_removed,
                files_added=files_added,
                done=1,
                rows=item.done.rows,
                bytes=item.done.bytes,
            )
        if receipt.committed:
            self._report = dataclasses.replace(self._report, versions=(*self._report.versions, receipt.version))

    def _give_up_overtaken(self) -> None:
        for task in self._overtaken:
            cause = CommitConflictError("others kept changing its fragments", retryable=True)
            error = TaskFailedError("compact_files", self._job.max_replans + 1, cause)
            error.__cause__ = cause
            self._fail(task, error)

    def _fail(self, task: RewriteTask, error: TaskFailedError) -> None:
        failure = CompactionFailure(task.fragments, task.rows, error)
        self._report = dataclasses.replace(self._report, failures=(*self._report.failures, failure))

    def _add(self, **counts: int) -> None:
        sums = {name: getattr(self._report, name) + count for name, count in counts.items()}
        self._report = dataclasses.replace(self._report, **sums)

    def _out_of_time(self) -> bool:
        if self._job.stop is not None and self._job.stop.is_set():
            return True
        limit = self._budget.max_seconds
        return limit is not None and time.monotonic() - self._started >= limit

    def tidy(self) -> None:
        """End the ledger and remove every file that is not in the table, unless a commit's outcome is unknown."""
        if not self._unsettled:
            self._ledger.end(self._report.done)

    def report(self) -> CompactionReport:
        """What was done so far."""
        return dataclasses.replace(self._report, seconds=time.monotonic() - self._started)


def _for_workers(table: PinnedTable) -> PinnedTable:
    """Workers commit nothing, and a lock need not survive the way to them."""
    options = dataclasses.replace(table.ref.open_options, commit_lock=None)
    return dataclasses.replace(table, ref=dataclasses.replace(table.ref, open_options=options))


def _brief(fragments: Sequence[int], limit: int = 10) -> str:
    shown = ", ".join(map(str, fragments[:limit]))
    return f"[{shown}]" if len(fragments) <= limit else f"[{shown}, ... {len(fragments)} in all]"


def __getattr__(name: str) -> Any:
    """``compact_database`` too, which lance-ray has in its module of this name; ours builds on this one."""
    if name == "compact_database":
        from lance_ray.maintenance import compact_database

        return compact_database
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
