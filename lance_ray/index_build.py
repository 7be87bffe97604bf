"""Segments of an index: built and merged on workers, put into the table by one commit."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
import ray
from lance.indices import IndexConfig

from lance_ray import commit
from lance_ray.commit import FRAGMENT_REUSE, described_indices
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    SchemaMismatchError,
    StorageError,
    tidy,
    translate_errors,
)
from lance_ray.executors import Executor, RayExecutor, connect_ray
from lance_ray.index_models import Models, Training, Wanted, sample_stats, train
from lance_ray.ledger import JobRef, WrittenPath, delete_files, trim_segment
from lance_ray.options import CommitOptions
from lance_ray.planning.indexes import (
    KINDS,
    SAMPLE_RATE,
    SEGMENT_BYTES,
    IndexKind,
    SegmentTask,
    Share,
    default_partitions,
    plan_sample,
    plan_segments,
    standing,
)
from lance_ray.planning.reads import FragmentStats
from lance_ray.preflight import check_cluster
from lance_ray.progress import Reporter
from lance_ray.read import fragment_stats
from lance_ray.runner import RunOptions, run_tasks
from lance_ray.table import PinnedTable, in_memory, newest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class IndexDef:
    """What an index is, apart from the rows that it knows."""

    name: str
    column: str
    kind: IndexKind
    metric: str = "l2"
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's further options."""
    partitions: int | None = None
    target_rows: int | None = None
    sub_vectors: int | None = None
    models: Models = field(default_factory=Models)
    max_iterations: int | None = None
    accelerator: Any = None
    sample_rate: int = SAMPLE_RATE

    def keywords(self) -> dict[str, Any]:
        """What the engine's build is told, apart from rows."""
        given: dict[str, Any] = {"column": self.column, "name": self.name, "replace": True}
        if not self.kind.is_vector:
            if self.kind.config and self.options:
                return {**given, "index_type": IndexConfig(self.kind.config, dict(self.options))}
            return {**given, "index_type": self.kind.name, **self.options}
        given |= {"index_type": self.kind.name, "metric": self.metric, **self.options, **self.models.keywords()}
        if self.models.centroids is not None:
            given["num_partitions"] = len(self.models.centroids)
        elif self.partitions is not None:
            given["num_partitions"] = self.partitions
        elif self.target_rows is not None:
            given["target_partition_size"] = self.target_rows
        if self.kind.is_product_quantized:
            given["num_sub_vectors"] = self.sub_vectors
        given["sample_rate"] = self.sample_rate
        if self.max_iterations is not None:
            given["max_iters"] = self.max_iterations
        if self.accelerator is not None:
            given["accelerator"] = self.accelerator
        return given

    @property
    def one_segment(self) -> bool:
        """Whether it must be one segment for its distances to be right."""
        return self.kind.needs_one_segment(self.metric)

    @property
    def num_bits(self) -> int:
        """Of a code."""
        return int(self.options.get("num_bits") or (5 if self.kind.name == "IVF_RQ" else 8))


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What the tasks of a build share."""

    table: PinnedTable
    job: JobRef
    index: IndexDef


@dataclass(frozen=True, slots=True, eq=False)
class MergeTask:
    """Segments (the engine's ``Index``) that become one, and what to build anew where the engine cannot merge them."""

    segments: tuple[Any, ...]
    fragments: tuple[int, ...]
    """Those that the table has, of all that they know."""
    rows: int = 0
    alike: bool = True
    """Whether they share their models, without which the engine would put together what does not compare."""


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A segment, not yet in the table."""

    segment: Any
    rows: int
    bytes: int


def build_segment(spec: BuildSpec, task: SegmentTask) -> Built:
    """Runs on a worker: the segment of some fragments.

    Its files are noted in the ledger before they are begun, where the engine lets us choose their folder, else as soon
    as they are known.
    """
    return _build(spec, task, str(uuid.uuid4()) if spec.index.kind.named else None)


def build_named_segment(spec: BuildSpec, task: tuple[str, SegmentTask]) -> Built:
    """The same with a UUID that the caller chose; a repeated attempt replaces the files of the first."""
    return _build(spec, task[1], task[0])


def merge_segments(spec: BuildSpec, task: MergeTask) -> Built:
    """Runs on a worker: several segments as one. What the engine cannot merge is built anew from the rows."""
    merged = None
    if task.alike and not spec.index.one_segment:
        try:
            with _translated(spec):
                merged = _own_handle(spec.table).merge_existing_index_segments(list(task.segments))
        except StorageError:
            raise
        except LanceRayError as error:
            logger.info("segments of %s are built anew: %s", spec.index.name, tidy(str(error)))
    if merged is None:
        return build_segment(spec, SegmentTask(task.fragments, task.rows))
    written = WrittenPath.segment(str(merged.uuid))
    spec.job.record([written])
    # The engine leaves out fragments that a compaction moved into a segment of stable row ids, and their rows.
    if not set(task.fragments) <= set(merged.fragment_ids):
        delete_files(spec.table, [written])
        return build_segment(spec, SegmentTask(task.fragments, task.rows))
    made: Any = merged
    made = dataclasses.replace(made, name=spec.index.name, fragment_ids=set(task.fragments))
    return _checked(spec, made, task.rows)


def _build(spec: BuildSpec, task: SegmentTask, name: str | None) -> Built:
    dataset = _own_handle(spec.table)
    given = spec.index.keywords()
    if name is not None:
        spec.job.record([WrittenPath.segment(name)])
        given["index_uuid"] = name
    # Nothing to train from makes an index that knows no row. The engine refuses train=False for some scalar kinds, and
    # does without it.
    given["train"] = bool(task.fragments) or not spec.index.kind.is_vector
    with _translated(spec):
        segment = dataset.create_index_uncommitted(**given, fragment_ids=list(task.fragments))
        if not spec.index.kind.finished:  # in its folder, beside what it is made from
            segment = dataset.merge_existing_index_segments([segment])
            trim_segment(spec.table, str(segment.uuid), [str(file.path) for file in segment.files or ()])
    if str(segment.uuid) != name:
        spec.job.record([WrittenPath.segment(str(segment.uuid))])
    return _checked(spec, segment, task.rows)


def _own_handle(table: PinnedTable) -> lance.LanceDataset:
    """The snapshot as an object that no other thread uses: the engine builds one index at a time with each."""
    return table.open_at(table.version)


def _translated(spec: BuildSpec) -> Any:
    return translate_errors(f"build index {spec.index.name!r} of", spec.table.uri, secrets=spec.table.secrets)


def _checked(spec: BuildSpec, segment: Any, rows: int) -> Built:
    if not spec.job.is_open():
        delete_files(spec.table, [WrittenPath.segment(str(segment.uuid))])
        raise LanceRayError(f"job {spec.job.job_id} was ended while this task was still building")
    size = sum(file.size_bytes or 0 for file in segment.files or ())
    return Built(segment, rows, size)


# The driver's side.


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an index is built."""

    workers: int | None = None
    num_segments: int | None = None
    fragment_ids: tuple[int, ...] | None = None
    index_uuid: str | None = None
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    progress: bool | Reporter | None = None
    commit: CommitOptions = field(default_factory=CommitOptions)
    max_rebuilds: int = 5
    replace: bool = True
    """Whether an index of the name may be there already."""
    segment_bytes: int = field(default_factory=lambda: SEGMENT_BYTES)


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an index operation did."""

    target: str
    operation: str
    name: str
    column: str
    kind: str
    version: int | None = None
    """The version that has it; None when nothing was to be done."""
    segments: int = 0
    """Segments of the index now."""
    built: int = 0
    """Segments built or merged by this operation."""
    fragments: int = 0
    """Fragments that the index knows now."""
    unindexed: int = 0
    """Fragments that it does not know."""
    rows: int = 0
    """Rows indexed by this operation."""
    bytes: int = 0
    """Size of the files written."""
    retried: int = 0
    rebuilt: int = 0
    """Segments built again because other commits had rewritten their fragments."""
    recovered: bool = False
    """Whether the commit's answer was lost, and the commit found by its id."""
    seconds: float = 0.0
    job_id: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.target}: {self.operation} {self.kind} {self.name!r} on {self.column}: {self.built} segment(s)"
            f" built, {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB, {self.segments} segment(s) over {self.fragments}"
            f" fragment(s), {self.seconds:.2f} s"
        )
        for name in ("unindexed", "retried", "rebuilt"):
            text += f", {getattr(self, name)} {name}" if getattr(self, name) else ""
        return text + (f", version {self.version}" if self.version is not None else ", nothing to do")


@dataclass(frozen=True, slots=True)
class Where:
    """Where tasks run: on what, how many at once, on how many nodes."""

    executor: Executor
    slots: int
    nodes: int = 1


def on_cluster(table: PinnedTable, options: BuildOptions, operation: str) -> Where:
    """On Ray, which is started if it is not running.

    Raises:
        WorkerEnvironmentError: a node cannot do the work.
    """
    connect_ray()
    check_cluster([table])
    nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    slots = options.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    return Where(RayExecutor(options.ray_remote_args, name=operation), slots, max(1, nodes))


class Tasks:
    """The runs of one operation: the same executor, the sums of their reports."""

    def __init__(self, table: PinnedTable, options: BuildOptions, operation: str) -> None:
        self._options, self._operation = options, operation
        self._where = on_cluster(table, options, operation)
        self.retried = 0

    @property
    def slots(self) -> int:
        """Tasks at once."""
        return self._where.slots

    @property
    def nodes(self) -> int:
        """Nodes that run tasks."""
        return self._where.nodes

    def run(self, fn: Callable[..., Any], tasks: Sequence[Any], shared: object, what: str = "") -> list[Any]:
        """The results, in the order of the tasks; the first that fails for good ends the run."""
        run = run_tasks(
            fn,
            tasks,
            shared=shared,
            options=RunOptions(max_in_flight=self._options.workers, progress=self._options.progress),
            executor=self._where.executor,
            operation=what or self._operation,
        )
        results: list[Any] = [None] * len(tasks)
        with run:
            for outcome in run:
                results[outcome.index] = outcome.unwrap()
        self.retried += run.report.retried
        return results


@dataclass(frozen=True, slots=True)
class Column:
    """The indexed column of a version: its path, the field's id and type, and what a row of it weighs."""

    path: str
    id: int
    type: str
    arrow: pa.DataType | None
    row_bytes: float

    @property
    def dimension(self) -> int | None:
        """Of the vectors; None where it holds none."""
        kind = self._vector
        return None if kind is None else kind.list_size

    @property
    def values(self) -> pa.DataType | None:
        """The type of a vector's values."""
        kind = self._vector
        return None if kind is None else kind.value_type

    @property
    def _vector(self) -> Any:
        kind: Any = self.arrow.storage_type if isinstance(self.arrow, pa.BaseExtensionType) else self.arrow
        if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            kind = kind.value_type
        return kind if kind is not None and pa.types.is_fixed_size_list(kind) else None


def column_files(dataset: lance.LanceDataset, column: int) -> dict[int, tuple[str, ...]]:
    """For each fragment the data files that hold the column."""
    return {
        fragment.fragment_id: tuple(
            sorted(str(file.path) for file in fragment.metadata.files if column in tuple(file.fields))
        )
        for fragment in dataset.get_fragments()
    }


def segments_of(dataset: lance.LanceDataset, name: str, template: Any) -> list[Any]:
    """The committed segments of an index in the engine's form; a segment of the same index says what they share."""
    return [
        dataclasses.replace(
            template,
            name=name,
            uuid=str(item.uuid),
            fragment_ids=set(item.fragment_ids),
            dataset_version=item.dataset_version_at_last_update,
            index_version=item.index_version,
            created_at=item.created_at,
            base_id=item.base_id,
            files=None,
        )
        for item in described_segments(dataset, name)
    ]


class Build:
    """One change of one index: segments are built on a version, and committed as of it, or rebuilt where others won."""

    def __init__(self, table: PinnedTable, index: IndexDef, column: Column, job: JobRef, options: BuildOptions) -> None:
        self.table, self.index, self.column = table, index, column
        self.job, self.options = job, options
        self.built: list[Built] = []
        self.landed = 0
        """How many of those built are in the table."""
        self.rebuilt = 0
        self.unsettled = False
        """Whether it is not known what became of a commit."""
        self.outrun = False
        """Whether the commit landed, and others had made some of it worthless by then."""

    def through(self, tasks: Tasks, wanted: Wish) -> commit.CommitReceipt:
        """Build segments over the fragments that are wanted, and put them in the place of all that the index has.

        Args:
            tasks: where.
            wanted: which fragments of a version.

        Raises:
            CommitConflictError: others rewrote the caller's fragments, or rewrote fragments faster than they are built.
            SchemaMismatchError: the column is gone.
            TaskFailedError: a segment could not be built.
        """
        fragments = wanted(self.table.open())
        self.train(tasks, fragments)
        segments = self.segments_for(tasks, self.stats(fragments))
        for round_ in range(self.options.max_rebuilds + 1):
            last = round_ == self.options.max_rebuilds
            try:
                receipt = self.put(segments, lambda _: True)
                if last or not self.has_lost(receipt, segments, wanted):
                    return receipt
                logger.info("others rewrote what the index %s knew; it is built again", self.index.name)
                segments = self._rebuilt(tasks, wanted)
            except CommitConflictError as conflict:
                if last or not conflict.retryable:
                    raise
                logger.info("the index %s is adapted to other commits: %s", self.index.name, conflict)
                segments = self._adapted(tasks, segments, wanted)
        raise AssertionError  # pragma: no cover - the loop returns or raises

    def has_lost(self, receipt: commit.CommitReceipt, segments: Sequence[Any], wanted: Wish) -> bool:
        """Whether the engine took fragments out of the segments as they landed, whose rows the table still has.

        Whoever rewrites the column of a fragment meanwhile makes what the segments know of it worthless, and so does a
        compaction that leaves the indexes for later.
        """
        asked = frozenset().union(*(item.fragment_ids for item in segments))
        made = {str(item.uuid) for item in segments}
        landed = described_segments(self.table.open_at(receipt.version), self.index.name)
        known = frozenset().union(*(item.fragment_ids for item in landed if str(item.uuid) in made))
        now = newest(self.table).open()
        if (asked - known) & all_fragments(now):
            return True
        deferred = any(item.name == FRAGMENT_REUSE for item in described_indices(now))
        others = frozenset().union(*(item.fragment_ids for item in described_segments(now, self.index.name)))
        return bool(asked - known and deferred and wanted(now) - others)

    def _rebuilt(self, tasks: Tasks, wanted: Wish) -> list[Any]:
        self.table = newest(self.table)
        self._refuse_a_newcomer()
        self.options = dataclasses.replace(self.options, index_uuid=None)  # that name is taken
        segments = self.segments_for(tasks, self.stats(wanted(self.table.open())))
        self.rebuilt += len(segments)
        return segments

    def put(self, segments: Sequence[Any], replaces: Callable[[Any], bool]) -> commit.CommitReceipt:
        """Commit the segments as of the version that they were built on, in the place of those that they replace."""
        self.job.check_open()
        have = segments_of(self.table.open(), self.index.name, segments[0])
        replaced = [item for item in have if replaces(item)]
        operation = commit.PutIndex((self.column.id, self.column.type), tuple(segments), tuple(replaced))
        options = dataclasses.replace(self.options.commit, job_id=self.job.job_id, max_attempts=1)
        landing = commit.Landing(self.job.job_id, self.table.version)
        self.unsettled = True  # an interrupt leaves the outcome open, and so does an error that says so
        try:
            receipt = commit.apply(self.table, operation, options, landing)
        except LanceRayError as error:
            self.unsettled = isinstance(error, CommitOutcomeUnknownError)
            raise
        self.unsettled = False
        made = {str(item.segment.uuid) for item in self.built}
        self.landed += sum(1 for item in segments if str(item.uuid) in made)
        self._withdraw_without_column(operation, segments)
        return receipt

    def _withdraw_without_column(self, operation: commit.PutIndex, segments: Sequence[Any]) -> None:
        # The engine lets an index land after a commit that dropped or cast its column, and such a table cannot be read.
        now = newest(self.table)
        try:
            operation.check(now.open())
        except SchemaMismatchError:
            self.landed = 0
            withdrawal = commit.DropIndex(self.index.name, frozenset(str(item.uuid) for item in segments))
            name = f"{self.job.job_id}-withdrawn"
            options = dataclasses.replace(self.options.commit, job_id=name)
            commit.apply(now, withdrawal, options, commit.Landing(name, now.version))
            raise

    def share(self, stored: Mapping[str, Models | None]) -> None:
        """Build further segments with the newest model that is known, so that all of them compare."""
        known = [item for item in stored.values() if item is not None]
        if known:
            self.index = dataclasses.replace(self.index, models=known[-1])

    def stats(self, fragments: Iterable[int]) -> FragmentStats:
        """What the manifest says of these fragments."""
        varies = self.column.dimension is None
        return fragment_stats(self.table, self.column.row_bytes, sorted(fragments), varies=varies)

    def segments_for(self, tasks: Tasks, stats: FragmentStats) -> list[Any]:
        """Segments that know these fragments."""
        planned = self._planned(tasks, stats)
        if not planned and not self.index.kind.without_rows:
            return self._without_rows(tasks)
        planned = planned or [SegmentTask(())]
        spec = BuildSpec(self.table, self.job, self.index)
        if self.options.index_uuid:
            built = tasks.run(build_named_segment, [(self.options.index_uuid, planned[0])], spec)
        else:
            built = tasks.run(build_segment, planned, spec)
        self.built += built
        return [item.segment for item in built]

    def _planned(self, tasks: Tasks, stats: FragmentStats) -> list[SegmentTask]:
        count = 1 if self.index.one_segment or self.options.index_uuid else self.options.num_segments
        return plan_segments(stats, tasks.slots, count=count, segment_bytes=self.options.segment_bytes)

    def _without_rows(self, tasks: Tasks) -> list[Any]:
        # Built from some fragment, which it then does not know.
        some = list(self.table.open().fragment_ids())[:1]
        if not some:
            raise InvalidArgumentError(
                "column", self.index.column, f"the engine makes no {self.index.kind.name} index of a table without rows"
            )
        segments = self.segments_for(tasks, self.stats(some))
        self.built = [dataclasses.replace(item, rows=0) for item in self.built]
        return [dataclasses.replace(item, fragment_ids=set()) for item in segments]

    def merged(self, tasks: Tasks, groups: Sequence[MergeTask]) -> list[Any]:
        """Each group as one segment."""
        built = tasks.run(merge_segments, groups, BuildSpec(self.table, self.job, self.index))
        self.built += built
        return [item.segment for item in built]

    def train(self, tasks: Tasks, fragments: Iterable[int]) -> None:
        """Train what the segments share, where there will be several; a single one is trained as it is built."""
        index, stats = self.index, sample_stats(self.stats(fragments))
        if not index.kind.is_vector or len(self._planned(tasks, stats)) < 2:
            return
        dimension = self.column.dimension or 0
        training = Training(
            self.table,
            index.column,
            index.metric,
            index.partitions or default_partitions(index.kind, sum(stats.rows), index.target_rows),
            index.max_iterations,
            index.num_bits,
            index.sub_vectors or 0,
            index.accelerator,
            index.sample_rate,
        )

        def sample(count: int) -> list[Share]:
            return plan_sample(stats, count, self.column.row_bytes, seed=self.table.version)

        wanted = Wanted(
            training,
            index.kind.is_product_quantized,
            index.kind.name == "IVF_RQ",
            dimension,
            nodes=tasks.nodes,
            values=self.column.values,
        )
        models = train(wanted, index.models, sample, lambda fn, work: tasks.run(fn, work, training, fn.__name__))
        self.index = dataclasses.replace(index, models=models, accelerator=None)

    def _adapted(self, tasks: Tasks, segments: Sequence[Any], wanted: Wish) -> list[Any]:
        """The segments for the newest version: those that still stand, and new ones for the other fragments.

        A segment stands while nobody has rewritten the column in one of its fragments: the engine reads what a segment
        holds of a fragment as soon as any segment is said to know it. Where row ids are stable, rows come to other
        fragments under their ids, and no segment stands.
        """
        planned = column_files(self.table.open(), self.column.id)
        self.table = newest(self.table)
        self._refuse_a_newcomer()
        dataset = self.table.open()
        now, wish = column_files(dataset, self.column.id), wanted(dataset)
        rewritten = frozenset(now) & frozenset(planned) - standing(planned, now)
        alone = self.index.one_segment or self.options.index_uuid or dataset.has_stable_row_ids
        self.options = dataclasses.replace(self.options, index_uuid=None)
        kept = [] if alone else [item for item in segments if not rewritten & set(item.fragment_ids)]
        kept = [dataclasses.replace(item, fragment_ids=set(item.fragment_ids) & wish & set(now)) for item in kept]
        kept = [item for item in kept if item.fragment_ids]
        missing = wish.difference(*(item.fragment_ids for item in kept))
        if kept and not missing:
            return kept
        added = self.segments_for(tasks, self.stats(missing))
        self.rebuilt += len(added)
        return [*kept, *added]

    def _refuse_a_newcomer(self) -> None:
        if not self.options.replace and self.index.name in commit.index_names(self.table.open()):
            raise taken(self.index.name)


def taken(name: str) -> InvalidArgumentError:
    """The error for an index that must not be replaced."""
    return InvalidArgumentError("name", name, "there is an index of this name; replace=True replaces it")


def outdated(dataset: lance.LanceDataset, segments: Sequence[Any], missing: Iterable[int]) -> frozenset[str]:
    """Segments that hold rows of fragments that they are not said to know, by their UUIDs.

    They are right only as long as no other segment knows these fragments. A fragment of which a column was rewritten
    may be in any; rows with stable ids may be in those that were built when there were such rows.
    """
    useful = [item for item in segments if item.fragment_ids]
    fragments = [dataset.get_fragment(item) for item in sorted(missing)]
    found = [item for item in fragments if item is not None]
    if any(_REWRITTEN in tuple(file.fields) for item in found for file in item.metadata.files):
        return frozenset(str(item.uuid) for item in useful)
    if not dataset.has_stable_row_ids or not found:
        return frozenset()
    with translate_errors("read the row versions of", dataset.uri):
        created = dataset.scanner(columns=[_CREATED], fragments=found).to_table().column(0)
    oldest = pc.min(created).as_py()
    if oldest is None:
        return frozenset()
    return frozenset(str(item.uuid) for item in useful if item.dataset_version_at_last_update >= oldest)


_REWRITTEN = -2  # what the format has in the place of a field whose values are in another file now
_CREATED = "_row_created_at_version"


Wish = Callable[[lance.LanceDataset], frozenset[int]]
"""Which fragments of a version are to be indexed."""


def all_fragments(dataset: lance.LanceDataset) -> frozenset[int]:
    """Every one."""
    return frozenset(dataset.fragment_ids())


@dataclass(frozen=True, slots=True)
class TheseFragments:
    """Those of the caller.

    Raises:
        CommitConflictError: the version lacks one.
    """

    fragments: frozenset[int]

    def __call__(self, dataset: lance.LanceDataset) -> frozenset[int]:
        """They must all be there."""
        if gone := sorted(self.fragments - all_fragments(dataset)):
            raise CommitConflictError(
                f"fragments {gone} of {dataset.uri} were rewritten by others while the index was built;"
                " ask for those that the table has now",
                retryable=True,
                read_version=dataset.version,
            )
        return self.fragments


@dataclass(frozen=True, slots=True)
class UnknownFragments:
    """Those that no segment of the index knows."""

    name: str

    def __call__(self, dataset: lance.LanceDataset) -> frozenset[int]:
        """As the version says."""
        known = {item for segment in described_segments(dataset, self.name) for item in segment.fragment_ids}
        return all_fragments(dataset) - known


def described_segments(dataset: lance.LanceDataset, name: str) -> list[Any]:
    """What the manifest says of the segments of an index."""
    return [item for found in described_indices(dataset) if found.name == name for item in found.segments]


def index_column(table: PinnedTable, path: str, row_bytes: Callable[[pa.Schema], float]) -> Column:
    """The column at a path.

    Raises:
        InvalidArgumentError: there is none.
    """
    dataset = table.open()
    paths = {name: (number, kind) for name, number, kind in commit.field_paths(dataset)}
    wanted = path.replace("`", "")
    found = path if path in paths else next((name for name in paths if name.replace("`", "") == wanted), None)
    found = found or next((name for name in paths if name.lower() == path.lower()), None)
    if found is None:
        raise InvalidArgumentError("column", path, f"must be a column of the table: {sorted(paths)}")
    number, kind = paths[found]
    arrow: Any = dataset.lance_schema.field(found)
    arrow_type = arrow.to_arrow().type if arrow is not None else None
    top = dataset.schema.field(top_of(found))
    width = row_bytes(pa.schema([pa.field("column", arrow_type) if arrow_type is not None else top]))
    return Column(found, number, kind, arrow_type, width)


def top_of(path: str) -> str:
    """The top-level column of a path, whose parts may be in backticks."""
    return path[1:].partition("`")[0] if path.startswith("`") else path.partition(".")[0]


def probe(table: PinnedTable, index: IndexDef) -> None:
    """Let the engine say, on a table of the column with one null in it, whether it can build such an index.

    Raises:
        InvalidArgumentError: the column is of a type that the kind does not take, or an option is refused.
    """
    found = table.open().schema.field(top_of(index.column))
    row = in_memory(pa.table([pa.nulls(1, found.type)], schema=pa.schema([found.with_nullable(True)])))
    given = dataclasses.replace(index, models=Models(), accelerator=None).keywords()
    vector = index.kind.is_vector  # with rows it would be trained
    try:
        with translate_errors(f"build index {index.name!r} of", table.uri, secrets=table.secrets):
            row.create_index_uncommitted(**given, train=not vector, fragment_ids=[] if vector else [0])
    except (LanceRayError, TypeError, KeyError, ValueError) as error:  # what the engine says of a type or an option
        text = str(error) if isinstance(error, LanceRayError) else " ".join(map(str, error.args))
        raise InvalidArgumentError("index_type", f"{index.kind.name} on {index.column}", tidy(text)) from error


def kind_of(described: Any) -> IndexKind:
    """The kind of an index of the table.

    Raises:
        InvalidArgumentError: it is of a kind that is not built by segments.
    """
    name = str(described.index_type).upper().replace("LABELLIST", "LABEL_LIST")
    if name not in KINDS:
        raise InvalidArgumentError("name", described.name, f"is a {name} index; known are {sorted(KINDS)}")
    return KINDS[name]


def kind_name(described: Any) -> str:
    """Its kind as ``create_index`` takes it; as the engine says it, where it is of a kind that is not built here."""
    try:
        return kind_of(described).name
    except InvalidArgumentError:  # which is listed all the same
        return str(described.index_type)
