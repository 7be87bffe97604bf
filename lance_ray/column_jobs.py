"""A job that computes columns, from plan to commit: rounds of tasks, each for fragments without values that fit.

What others commit meanwhile is settled by metadata: a fragment that was appended or changed is computed on the newest
version and the commit repeated, everything else is kept. So is what an earlier run of the same job has finished.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from lance_ray import commit
from lance_ray.column_commits import AddColumns, ColumnsOperation, UpdateColumns
from lance_ray.column_values import SYSTEM, ColumnSpec, ColumnTask, compute, load, projection, reading, sample
from lance_ray.errors import CommitOutcomeUnknownError, InvalidArgumentError, LanceRayError, SnapshotChangedError
from lance_ray.executors import ActorExecutor, Executor, RayExecutor, check_ray_options, checked_ray_args, connect_ray
from lance_ray.options import CommitOptions, check_positive
from lance_ray.planning.columns import ColumnResult
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, newest
from lance_ray.transforms import require_names

logger = logging.getLogger(__name__)

MAX_REPLANS = 5


@dataclass(frozen=True, slots=True)
class ColumnsReport:
    """What a change of columns did."""

    target: str
    version: int
    """The version that holds the columns."""
    columns: tuple[str, ...] = ()
    rows: int = 0
    """Rows computed."""
    bytes: int = 0
    """Bytes of the files written."""
    files: int = 0
    """Data files written."""
    fragments: int = 0
    """Fragments of the table now."""
    resumed: int = 0
    """Fragments whose values an earlier run of the job had written."""
    recomputed: int = 0
    """Fragments computed after the first plan, because others added or changed them meanwhile."""
    retried: int = 0
    """Attempts beyond each fragment's first."""
    seconds: float = 0.0
    job_id: str = ""
    skipped: bool = False
    """Nothing was done: there was nothing to do, or the job of this id had committed before."""

    @property
    def rows_updated(self) -> int:
        """The same as ``rows``, by the name that other connectors have."""
        return self.rows

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.target}: nothing to do, version {self.version}"
        text = (
            f"{self.target}: {', '.join(self.columns)}: {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB in {self.files}"
            f" file(s), {self.seconds:.2f} s, version {self.version}, {self.fragments} fragment(s)"
        )
        counts = {name: getattr(self, name) for name in ("resumed", "recomputed", "retried")}
        return text + "".join(f", {count} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True, slots=True)
class ColumnJob:
    """A job, folded from the public keywords and checked."""

    operation: str
    table: PinnedTable
    """At the version to compute on."""
    spec: ColumnSpec
    workers: ColumnWorkers
    commit: CommitOptions
    progress: bool | Reporter | None = None
    max_replans: int = MAX_REPLANS

    @property
    def asked(self) -> int | str | None:
        """The version that the caller asked for; an opened dataset only says where to start."""
        return None if self.table.ref.opened else self.table.ref.version


@dataclass(frozen=True, slots=True)
class ColumnWorkers:
    """Where the tasks run."""

    concurrency: int | None = None
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fold(cls, concurrency: Any, ray_remote_args: Mapping[str, Any] | None, **resources: Any) -> ColumnWorkers:
        """The workers; ``num_cpus``, ``num_gpus`` and ``memory`` are for each."""
        check_positive("concurrency", concurrency)
        given = {key: value for key, value in resources.items() if value is not None}
        for name, value in given.items():
            check_ray_options({name: value}, name)
        return cls(concurrency, {**checked_ray_args(ray_remote_args), **given})

    @property
    def tasks(self) -> TaskPoolStrategy:
        """The same for a step of Ray Data."""
        return TaskPoolStrategy(self.concurrency)

    def executor(self, operation: str, *, stateful: bool) -> Executor:
        """Ray tasks; actors for a transform with state."""
        if not stateful:
            return RayExecutor(self.ray_remote_args, name=operation)
        return ActorExecutor(self.slots(), load, self.ray_remote_args)

    def slots(self) -> int:
        """How many workers with state: as asked, or what the cluster runs at once."""
        if self.concurrency is not None:
            return self.concurrency
        connect_ray()
        have, args = ray.cluster_resources(), self.ray_remote_args
        cpus, gpus = args.get("num_cpus", 1), args.get("num_gpus")
        slots = [have.get("CPU", 1.0) / cpus] if cpus else []
        slots += [have.get("GPU", 0.0) / gpus] if gpus else []
        return max(1, int(min(slots, default=1)))


def refuse_existing(names: Sequence[str], schema: pa.Schema) -> None:
    """Raise InvalidArgumentError if the table has such columns already."""
    if existing := sorted(set(names) & set(schema.names)):
        raise InvalidArgumentError("transform", existing, "the table has columns of these names; see update_columns()")


FirstRound = Callable[[ColumnJob, ColumnSpec, Sequence[int]], Sequence[ColumnResult]]
"""What computes the fragments of a job's first plan, where that is not one task for each."""


def run_job(job: ColumnJob, first_round: FirstRound | None = None) -> ColumnsReport:
    """Plan, run, commit, and end the ledger."""
    started = time.monotonic()
    table, ref = job.table, job.spec.job
    if (landed := landed_in(table, job.commit)) is not None:
        return ColumnsReport(table.ref.target, landed, job_id=ref.job_id, skipped=True)
    plan = None if job.commit.job_id is None else _plan_of(job)
    earlier = [] if plan is None else _earlier_plans(job, plan)
    since = min([table.version, *(int(item["read_version"]) for item in earlier)])
    ref = dataclasses.replace(ref, since=since)
    job = dataclasses.replace(job, spec=dataclasses.replace(job.spec, job=ref))
    check_cluster([table])
    with ref.running(job.operation, exclusive=plan is not None, plan=plan):
        run = _Run(job, started, first_round)
        try:
            if earlier:
                run.take_over()
            return run.through()
        finally:
            run.tidy()


def landed_in(table: PinnedTable, options: CommitOptions) -> int | None:
    """The version that a job which the caller gave an id committed before, or None."""
    if options.job_id is None:
        return None
    latest = table.open_latest()
    since = max(0, latest.version - commit.HISTORY)
    return commit.find_operation(latest, options.job_id, since, table.secrets)


def _earlier_plans(job: ColumnJob, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of earlier runs of the same job, which must have had the same arguments.

    The version that they read may differ: a result goes with its own, and counts while its fragment is the same.
    """
    earlier = job.spec.job.earlier_plans()
    for other in earlier:
        differing = sorted(key for key in plan if key != "read_version" and other.get(key) != plan[key])
        if differing:
            raise InvalidArgumentError(
                "job_id",
                job.commit.job_id,
                f"an unfinished run of this job differs in {differing}; use its arguments, another id, or remove it"
                " with cleanup_orphans(). A transform that uses what changes by itself needs a transform_version",
            )
    return earlier


def _plan_of(job: ColumnJob) -> dict[str, Any]:
    spec = job.spec
    return {
        "operation": job.operation,
        "version": job.asked,
        "read_version": job.table.version,
        "columns": None if spec.columns is None else list(spec.columns),
        "filter": spec.filter,
        "output": None if spec.output is None else str(spec.output),
        "transform": spec.transform.fingerprint(),
    }


class _Run:
    """One job on its way: rounds of tasks, each for the fragments that have no values which fit."""

    def __init__(self, job: ColumnJob, started: float, first_round: FirstRound | None) -> None:
        self._job = job
        self._spec = job.spec
        """With all columns of the output, once they are found out. What tasks share stays the job's own, one object."""
        self._table = job.table
        self._started = started
        self._first_round = first_round
        self._results: dict[int, ColumnResult] = {}
        self._report = ColumnsReport(job.table.ref.target, job.table.version, job_id=job.spec.job.job_id)
        self._workers: Executor | None = None
        self._committed: int | None = None
        self._unsettled = False

    def take_over(self) -> None:
        """What an earlier run of the job has finished."""
        found = map(ColumnResult.read, self._job.spec.job.take_over())
        self._results = {result.fragment: result for result in sorted(found, key=lambda result: result.version)}

    def through(self) -> ColumnsReport:
        """Compute and commit, again for what others changed meanwhile.

        Raises:
            SnapshotChangedError: they did not stop changing it.
        """
        try:
            self._spec = dataclasses.replace(self._spec, output=self._output())
            self._round(first=True)
            for _ in range(self._job.max_replans):
                if (report := self._try_commit()) is not None:
                    return report
                self._follow()
                self._round(first=False)
            return self._commit()
        finally:
            self._release()

    def _try_commit(self) -> ColumnsReport | None:
        try:
            return self._commit()
        except SnapshotChangedError as changed:
            logger.info("%s: %s; computing these", self._job.table.ref.target, changed)
            return None

    def _executor(self) -> Executor:
        if self._workers is None:
            stateful = self._spec.transform.is_stateful
            self._workers = self._job.workers.executor(self._job.operation, stateful=stateful)
        return self._workers

    def _release(self) -> None:
        if isinstance(self._workers, ActorExecutor):
            self._workers.close()
        self._workers = None

    def _output(self) -> pa.Schema:
        spec, dataset = self._job.spec, self._table.open()
        schema = spec.transform.schema
        if spec.update:
            schema = spec.output
        elif schema is None and spec.transform.sql:
            with reading(self._table):
                found = dataset.scanner(**projection(spec)).projected_schema
                schema = pa.schema([item for item in found if item.name not in SYSTEM])
        elif schema is None:
            task = ColumnTask(self._table, -1)
            with run_tasks(sample, [task], shared=spec, options=self._options(), executor=self._executor()) as run:
                schema = pa.ipc.read_schema(pa.py_buffer(next(run).unwrap()))
        assert schema is not None  # noqa: S101 - each branch gave one
        if spec.transform.sql:
            require_names([name for name, _ in spec.transform.sql], schema.names)
        if not spec.update:
            refuse_existing(schema.names, dataset.schema)
        nullable = spec.filter is not None
        return pa.schema([item.with_nullable(True) if nullable else item for item in schema])

    def _options(self) -> RunOptions:
        return RunOptions(max_in_flight=self._job.workers.concurrency, progress=self._job.progress)

    def _round(self, *, first: bool) -> None:
        todo = self._operation().stale(self._table.open())
        if first:
            self._report = dataclasses.replace(self._report, resumed=len(set(self._results) - set(todo)))
        if not todo:
            return
        if first and self._first_round is not None:
            self._release()  # or the workers that tried some rows would hold what the first round needs
            for result in self._first_round(self._job, self._spec, todo):
                self._keep(result)
            return
        if not first:
            self._report = dataclasses.replace(self._report, recomputed=self._report.recomputed + len(todo))
        tasks = [ColumnTask(self._table, item, self._spec.output) for item in todo]
        options = dataclasses.replace(self._options(), on_failure="report")
        run = run_tasks(
            compute,
            tasks,
            shared=self._job.spec,
            options=options,
            executor=self._executor(),
            operation=self._job.operation,
        )
        failed = None
        with run:
            for outcome in run:
                if outcome.error is None:
                    self._keep(outcome.unwrap())
                failed = failed or outcome.error
        self._report = dataclasses.replace(self._report, retried=self._report.retried + run.report.retried)
        if failed is not None:
            raise failed

    def _keep(self, result: ColumnResult) -> None:
        self._results[result.fragment] = result
        self._report = dataclasses.replace(
            self._report,
            rows=self._report.rows + result.rows,
            bytes=self._report.bytes + result.bytes,
            files=self._report.files + result.has_file,
        )

    def _operation(self) -> ColumnsOperation:
        assert self._spec.output is not None  # noqa: S101 - through() has found it out
        kind = UpdateColumns if self._spec.update else AddColumns
        return kind(self._table, self._spec.output, self._results)

    def _commit(self) -> ColumnsReport:
        job, operation = self._spec.job, self._operation()
        if self._spec.update and not any(result.has_file for result in self._results.values()):
            latest = self._table.open_latest()
            operation.fitting(latest)
            return dataclasses.replace(self._done(latest.version), skipped=True)
        job.check_open()
        self._unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.apply(self._table, operation, self._job.commit, commit.Landing(job.job_id, job.since))
        except LanceRayError as error:
            self._unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self._unsettled = False
        return self._done(receipt.version)

    def _done(self, version: int) -> ColumnsReport:
        ids = set(self._table.open_at(version).fragment_ids())
        self._committed = sum(result.has_file for item, result in self._results.items() if item in ids)
        return dataclasses.replace(
            self._report,
            version=version,
            columns=tuple(self._operation().output.names),
            fragments=len(ids),
            seconds=time.monotonic() - self._started,
        )

    def _follow(self) -> None:
        """Go on from the newest version, if its columns let that be."""
        self._table = newest(self._table)
        self._operation().refuse(self._table.open())

    def tidy(self) -> None:
        """End the ledger. What failed for certain goes, or waits for the next run of a job that has a name."""
        job = self._job.spec.job
        if self._unsettled:
            return
        if self._committed is None and self._job.commit.job_id is not None and self._results:
            logger.warning("%d finished fragment(s) wait for the next run of %s", len(self._results), job.job_id)
        else:
            job.end(self._committed)  # the files of fragments that are gone are nobody's
