"""Indexes built by segments on Ray workers, and put into the table by one commit.

Every kind goes one way: fragments are dealt out by bytes (:mod:`lance_ray.planning.indexes`), what segments share is
trained from samples (:mod:`lance_ray.index_models`), workers build segments of one pinned version, and the driver
commits them (:mod:`lance_ray.index_build`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lance
from lance.indices import IndexConfig

from lance_ray import commit
from lance_ray.catalog import LanceRestConfig
from lance_ray.commit import described_indices
from lance_ray.errors import InvalidArgumentError
from lance_ray.executors import check_ray_options, checked_ray_args
from lance_ray.index_build import (
    Build,
    BuildOptions,
    Built,
    Column,
    IndexDef,
    IndexReport,
    Tasks,
    TheseFragments,
    Wish,
    all_fragments,
    index_column,
    probe,
    taken,
)
from lance_ray.index_models import checked_models
from lance_ray.ledger import JobRef, segment_exists
from lance_ray.options import CommitOptions, OpenOptions, check_flag, check_positive, pairs
from lance_ray.planning.indexes import ALIASES, KINDS, IndexKind
from lance_ray.progress import Reporter, check_progress
from lance_ray.read import bytes_per_row
from lance_ray.table import PinnedTable, TableRef, newest

logger = logging.getLogger(__name__)

_TRAINED = ("num_partitions", "target_partition_size", "ivf_centroids", "pq_codebook", "rabitq_model")

METRICS = {"l2": "l2", "euclidean": "l2", "cosine": "cosine", "dot": "dot", "hamming": "hamming"}


@dataclass(frozen=True, slots=True)
class IndexJob:
    """An index to be made, folded from the public keywords and checked as far as no table is needed."""

    ref: TableRef
    name: str
    column: str
    kind: IndexKind
    train: bool
    options: BuildOptions
    parameters: Mapping[str, Any]
    """Of the engine: those of scalar kinds, and what vector kinds take beyond the keywords."""
    vector: Mapping[str, Any]
    """``metric``, ``num_partitions``, ``num_sub_vectors`` and the models; empty for scalar kinds."""


def create_scalar_index(
    uri: Any = None,
    *,
    column: str,
    index_type: Any,
    table_id: Sequence[str] | None = None,
    name: str | None = None,
    replace: bool = True,
    train: bool = True,
    fragment_ids: Sequence[int] | None = None,
    index_uuid: str | None = None,
    num_workers: int | None = None,
    num_segments: int | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    block_size: int | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    ray_remote_args: dict[str, Any] | None = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    progress: bool | Reporter | None = None,
    return_report: bool = False,
    **kwargs: Any,
) -> lance.LanceDataset | IndexReport:
    """Build a scalar index on Ray workers, each a segment of it, and make it visible in one commit.

    An index of the same name serves until then. Rows that others append meanwhile are not in it: searches and filters
    read them without it, and :func:`lance_ray.refresh_index` adds them. Deletes and updates do not disturb the build.
    Where others compacted fragments meanwhile, or rebuilt an index of this name, what still stands is kept and the rest
    is built again on the newest version.

    Args:
        uri: path or URI of the table, or an opened dataset.
        column: the column, a nested one by its path (``meta.lang``).
        index_type: ``BTREE``, ``BITMAP``, ``LABEL_LIST``, ``INVERTED`` (or ``FTS``), ``NGRAM``, ``ZONEMAP``,
            ``BLOOMFILTER``, ``RTREE``, ``MINHASHLSH``, or a ``lance.indices.IndexConfig`` of one. The engine decides
            which column types each takes.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        name: of the index; ``{column}_idx`` by default.
        replace: whether an index of this name may be there already.
        train: False makes an index that knows no row yet; ``refresh_index`` fills it.
        fragment_ids: index only these fragments.
        index_uuid: the UUID of the segment; the index is one segment then.
        num_workers: tasks at once at most; by default what the cluster runs.
        num_segments: segments that the index has; by default one for each task, where each has enough to do.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        block_size: bytes of the smallest I/O request.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        commit_message: of the version that has the index.
        transaction_properties: of its transaction.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        return_report: return the report instead of the dataset.
        **kwargs: the engine's options of the kind: ``zone_size`` (BTREE), ``rows_per_zone`` (ZONEMAP),
            ``number_of_items`` and ``probability`` (BLOOMFILTER), ``page_size`` (RTREE), ``num_hashes``, ``num_bands``,
            ``shingle_size`` and ``tokenizer`` (MINHASHLSH), and those of ``INVERTED`` (``with_position``,
            ``base_tokenizer``, ``language``, ``stem``...).

    Returns:
        The dataset at the version that has the index, or an :class:`IndexReport`.

    Raises:
        InvalidArgumentError: unknown column, kind, option or fragment, or a type that the kind does not take; before
            any task starts.
        TableNotFoundError, StorageError, WorkerEnvironmentError: before any task starts.
        TaskFailedError: a segment could not be built.
        CommitConflictError: others rewrote the given fragments, or rewrote fragments faster than they are indexed.
        SchemaMismatchError: others dropped or cast the column meanwhile.
        CommitOutcomeUnknownError: a commit's answer was lost and the table cannot tell; no file was removed.

    On failure the table is as it was, and the files of the job are removed (those of a killed driver by
    :func:`lance_ray.cleanup_orphans`).
    """
    ref = fold_index_ref(uri, locals())
    workers = _Workers(num_workers, num_segments, fragment_ids, index_uuid, ray_remote_args, progress)
    kind, parameters = fold_kind(index_type, kwargs, vector=False)
    job = fold_index_job(
        ref,
        _Named(column, name, kind, replace, train),
        workers.fold(fold_commit(commit_message, transaction_properties)),
        parameters,
        {},
    )
    check_flag("return_report", return_report)
    return _answer(create(job), return_report)


def create_index(
    uri: Any = None,
    column: str = "",
    index_type: Any = "",
    name: str | None = None,
    *,
    replace: bool = True,
    train: bool = True,
    fragment_ids: Sequence[int] | None = None,
    index_uuid: str | None = None,
    num_workers: int | None = None,
    num_segments: int | None = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    block_size: int | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    table_id: Sequence[str] | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    metric: str = "l2",
    num_partitions: int | None = None,
    target_partition_size: int | None = None,
    num_sub_vectors: int | None = None,
    sample_rate: int = 256,
    max_iters: int | None = None,
    ivf_centroids: Any = None,
    pq_codebook: Any = None,
    rabitq_model: str | None = None,
    accelerator: Any = None,
    commit_message: str | None = None,
    transaction_properties: Mapping[str, str] | None = None,
    progress: bool | Reporter | None = None,
    return_report: bool = False,
    **kwargs: Any,
) -> lance.LanceDataset | IndexReport:
    """Build a vector index on Ray workers, each a segment of it, and make it visible in one commit.

    All segments share their centroids, and their codebook or rotation: trained on workers from samples, unless given.
    ``IVF_SQ``, ``IVF_HNSW_SQ`` and codebooks for dot products are one segment, because the engine's distances would be
    wrong in several. What is said of concurrent changes at :func:`create_scalar_index` holds here, too.

    Args:
        uri: path or URI of the table, or an opened dataset.
        column: the column of vectors (fixed-size lists, or lists of them), a nested one by its path.
        index_type: ``IVF_FLAT``, ``IVF_PQ``, ``IVF_SQ``, ``IVF_RQ``, ``IVF_HNSW_FLAT``, ``IVF_HNSW_PQ`` or
            ``IVF_HNSW_SQ``.
        name: of the index; ``{column}_idx`` by default.
        replace: whether an index of this name may be there already.
        train: False makes an index that knows no row yet; ``refresh_index`` fills it.
        fragment_ids: index only these fragments.
        index_uuid: the UUID of the segment; the index is one segment then.
        num_workers: tasks at once at most; by default what the cluster runs.
        num_segments: segments that the index has; by default one for each task, where each has enough to do.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        block_size: bytes of the smallest I/O request.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        ray_remote_args: options of ``ray.remote`` for the tasks.
        metric: ``l2`` (or ``euclidean``), ``cosine``, ``dot``, or ``hamming`` (for vectors of uint8).
        num_partitions: by default the rows by ``target_partition_size``, at most 4,096.
        target_partition_size: rows of a partition; by default the engine's: 8,192, for ``IVF_FLAT`` and ``IVF_RQ``
            4,096, for graphs 1,048,576.
        num_sub_vectors: of a code; it must divide the dimension. For ``*_PQ``, by default a sixteenth of the dimension,
            or an eighth.
        sample_rate: vectors that a centroid is trained from.
        max_iters: iterations of k-means at most; by default 50 for centroids, as in the engine, and for a codebook that
            segments share 25, where the error of its codes is within 1 % of that after 50.
        ivf_centroids: centroids to use: a matrix, or a fixed-size list array.
        pq_codebook: codes to use, with ``ivf_centroids``.
        rabitq_model: the rotation of ``IVF_RQ``, as JSON.
        accelerator: ``cuda`` or ``mps`` for the training of centroids, with torch on the workers.
        commit_message: of the version that has the index.
        transaction_properties: of its transaction.
        progress: False for silence, a reporter of one's own, or by default a bar on a terminal, else log lines.
        return_report: return the report instead of the dataset.
        **kwargs: the engine's options: ``num_bits``, ``index_file_version``, ``filter_nan``, ``skip_transpose``,
            ``shuffle_partition_batches``, ``shuffle_partition_concurrency``, and for graphs ``max_level``, ``m``,
            ``ef_construction``.

    Returns:
        As :func:`create_scalar_index`.

    Raises:
        LanceRayError: as :func:`create_scalar_index`; the table is as it was.
    """
    ref = fold_index_ref(uri, locals())
    workers = _Workers(num_workers, num_segments, fragment_ids, index_uuid, ray_remote_args, progress)
    kind, parameters = fold_kind(index_type, kwargs, vector=True)
    vector = {
        "metric": metric,
        "num_partitions": num_partitions,
        "target_partition_size": target_partition_size,
        "num_sub_vectors": num_sub_vectors,
        "sample_rate": sample_rate,
        "max_iters": max_iters,
        "ivf_centroids": ivf_centroids,
        "pq_codebook": pq_codebook,
        "rabitq_model": rabitq_model,
        "accelerator": accelerator,
    }
    job = fold_index_job(
        ref,
        _Named(column, name, kind, replace, train),
        workers.fold(fold_commit(commit_message, transaction_properties)),
        parameters,
        vector,
    )
    check_flag("return_report", return_report)
    return _answer(create(job), return_report)


_ADDRESS = (
    "table_id",
    "namespace_impl",
    "namespace_properties",
    "rest_config",
    "io_config",
    "storage_options",
    "base_store_params",
)


def fold_index_ref(uri: Any, given: Mapping[str, Any]) -> TableRef:
    """The table of a public call, from its keywords."""
    address = {name: given[name] for name in _ADDRESS}
    return TableRef.fold(uri, address, open_options=OpenOptions(given.get("block_size")))


def fold_commit(message: str | None, properties: Mapping[str, str] | None) -> CommitOptions:
    """What the commit carries."""
    return CommitOptions(message, pairs(properties, "transaction_properties") or ())


@dataclass(frozen=True, slots=True)
class _Named:
    column: Any
    name: Any
    kind: IndexKind
    replace: Any
    train: Any


@dataclass(frozen=True, slots=True)
class _Workers:
    """How the work is shared out, as the caller said it."""

    num_workers: Any
    num_segments: Any
    fragment_ids: Any
    index_uuid: Any
    ray_remote_args: Any
    progress: Any

    def fold(self, commit_options: CommitOptions) -> BuildOptions:
        check_positive("num_workers", self.num_workers)
        check_positive("num_segments", self.num_segments)
        check_progress(self.progress)
        if self.index_uuid is not None:
            self._check_uuid()
        remote = checked_ray_args({} if self.ray_remote_args is None else self.ray_remote_args)
        check_ray_options(remote)
        return BuildOptions(
            self.num_workers,
            self.num_segments,
            _fold_fragments(self.fragment_ids),
            self.index_uuid,
            remote,
            self.progress,
            commit_options,
        )

    def _check_uuid(self) -> None:
        try:
            good = str(uuid.UUID(self.index_uuid)) == self.index_uuid
        except (ValueError, AttributeError, TypeError):
            good = False
        if not good:
            raise InvalidArgumentError("index_uuid", self.index_uuid, "must be a UUID in lower case with dashes")
        if self.num_segments not in (None, 1):
            raise InvalidArgumentError("num_segments", self.num_segments, "must be 1 with an index_uuid")


def _fold_fragments(given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise InvalidArgumentError("fragment_ids", given, "must be a list of whole numbers")
    found = list(given)
    if not found:
        raise InvalidArgumentError("fragment_ids", found, "must name at least one")
    for item in found:
        check_positive("fragment_ids", item, optional=False, zero=True)
    return tuple(sorted({int(item) for item in found}))


def fold_kind(index_type: Any, options: Mapping[str, Any], *, vector: bool) -> tuple[IndexKind, dict[str, Any]]:
    """The kind of index, and its options.

    Raises:
        InvalidArgumentError: there is no such kind, it is made by the other function, or takes no such option.
    """
    parameters = dict(options)
    if isinstance(index_type, IndexConfig):
        parameters = {**index_type.parameters, **parameters}
        index_type = index_type.index_type
    have = sorted(name for name, kind in KINDS.items() if kind.is_vector == vector)
    name = index_type.upper().replace("LABELLIST", "LABEL_LIST") if isinstance(index_type, str) else index_type
    kind = KINDS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if kind is None:
        raise InvalidArgumentError("index_type", index_type, f"must be one of {have}")
    if kind.is_vector != vector:
        other = "create_index" if kind.is_vector else "create_scalar_index"
        raise InvalidArgumentError("index_type", index_type, f"is made by {other}; here are {have}")
    if kind.parameters is not None and (unknown := sorted(set(parameters) - kind.parameters)):
        raise InvalidArgumentError(unknown[0], parameters[unknown[0]], f"{kind.name} takes {sorted(kind.parameters)}")
    return kind, {key: value for key, value in parameters.items() if value is not None}


def fold_index_job(
    ref: TableRef, named: _Named, options: BuildOptions, parameters: Mapping[str, Any], vector: Mapping[str, Any]
) -> IndexJob:
    """The job, checked as far as no table is needed."""
    if not isinstance(named.column, str) or not named.column:
        raise InvalidArgumentError("column", named.column, "must be the name of a column")
    if named.name is not None and (not isinstance(named.name, str) or not named.name):
        raise InvalidArgumentError("name", named.name, "must be text")
    check_flag("replace", named.replace)
    check_flag("train", named.train)
    if vector:
        vector = _fold_vector(named.kind, vector)
    if options.index_uuid and not named.kind.named:
        raise InvalidArgumentError("index_uuid", options.index_uuid, f"the engine chooses that of {named.kind.name}")
    if not named.train and options.fragment_ids is not None:
        raise InvalidArgumentError("fragment_ids", options.fragment_ids, "an index with train=False knows no fragment")
    decided = [item for item in _TRAINED if not named.train and vector.get(item) is not None]
    if decided:
        raise InvalidArgumentError(decided[0], "given", "belongs to the training, which train=False leaves for later")
    options = dataclasses.replace(options, replace=named.replace)
    name = f"{named.column}_idx" if named.name is None else named.name
    return IndexJob(ref, name, named.column, named.kind, named.train, options, parameters, vector)


def _fold_vector(kind: IndexKind, given: Mapping[str, Any]) -> dict[str, Any]:
    vector = dict(given)
    metric = vector["metric"]
    if not isinstance(metric, str) or metric.lower() not in METRICS:
        raise InvalidArgumentError("metric", metric, f"must be one of {sorted(METRICS)}")
    vector["metric"] = METRICS[metric.lower()]
    for name in ("num_partitions", "target_partition_size", "num_sub_vectors", "max_iters"):
        check_positive(name, vector[name])
    check_positive("sample_rate", vector["sample_rate"], optional=False)
    if vector["num_partitions"] is not None and vector["target_partition_size"] is not None:
        raise InvalidArgumentError("target_partition_size", vector["target_partition_size"], "num_partitions is given")
    if vector["sample_rate"] < 2:
        raise InvalidArgumentError("sample_rate", vector["sample_rate"], "must be at least 2")
    for name, wanted in (("pq_codebook", "_PQ"), ("num_sub_vectors", "_PQ"), ("rabitq_model", "_RQ")):
        if vector[name] is not None and not kind.name.endswith(wanted):
            raise InvalidArgumentError(name, "given", f"{kind.name} has none")
    return vector


def create(job: IndexJob) -> tuple[PinnedTable, IndexReport]:
    """Build the index, commit it, and say what was done."""
    began = time.monotonic()
    table = job.ref.pin()
    column = index_column(table, job.column, lambda schema: bytes_per_row(table, schema))
    definition = define(job, column)
    _check_against(table, job, column)
    probe(table, definition)
    wanted = _wish(job)
    ledger = JobRef(table, f"index-{uuid.uuid4().hex}", table.version)
    tasks = Tasks(table, job.options, "create_index")
    build = Build(table, definition, column, ledger, job.options)
    with settled(ledger, build, "create_index"):
        receipt = build.through(tasks, wanted)
    return build.table, report_of(build, receipt, tasks, "create_index", time.monotonic() - began)


def _wish(job: IndexJob) -> Wish:
    if not job.train:
        return lambda _: frozenset()
    given = job.options.fragment_ids
    return all_fragments if given is None else TheseFragments(frozenset(given))


@contextmanager
def settled(ledger: JobRef, build: Build, operation: str) -> Iterator[None]:
    """Keep the ledger of a build open, and end it: files that are not in the table go, unless that is not known."""
    try:
        with ledger.running(operation):
            yield
    finally:
        if not build.unsettled:
            ledger.end(build.landed)


def define(job: IndexJob, column: Column) -> IndexDef:
    """The index that is asked for, checked against the column.

    Raises:
        InvalidArgumentError: the column holds no vectors, or a model has another shape than they.
    """
    if not job.kind.is_vector:
        return IndexDef(job.name, column.path, job.kind, options=job.parameters)
    vector = job.vector
    if column.dimension is None:
        raise InvalidArgumentError("column", job.column, f"holds no vectors of a fixed size, but {column.type}")
    sub_vectors = vector["num_sub_vectors"]
    if job.kind.is_product_quantized:
        sub_vectors = sub_vectors or _default_sub_vectors(column.dimension)
        if column.dimension % sub_vectors:
            raise InvalidArgumentError("num_sub_vectors", sub_vectors, f"must divide the dimension {column.dimension}")
    bits = int(job.parameters.get("num_bits") or 8)
    models = checked_models(vector, column.dimension, sub_vectors, bits, column.values)
    accelerator = vector["accelerator"]
    if accelerator is not None and str(accelerator).partition(":")[0] not in ("cuda", "mps"):
        raise InvalidArgumentError("accelerator", accelerator, "must be 'cuda' or 'mps'")
    if models.centroids is not None and vector["num_partitions"] not in (None, len(models.centroids)):
        raise InvalidArgumentError(
            "num_partitions", vector["num_partitions"], f"there are {len(models.centroids)} ivf_centroids"
        )
    return IndexDef(
        job.name,
        column.path,
        job.kind,
        vector["metric"],
        job.parameters,
        vector["num_partitions"],
        vector["target_partition_size"],
        sub_vectors,
        models,
        vector["max_iters"],
        accelerator,
        vector["sample_rate"],
    )


def _default_sub_vectors(dimension: int) -> int:
    for width in (16, 8):
        if dimension % width == 0:
            return dimension // width
    raise InvalidArgumentError("num_sub_vectors", None, f"must be given: 16 and 8 do not divide {dimension}")


def _check_against(table: PinnedTable, job: IndexJob, column: Column) -> None:
    dataset = table.open()
    there = next((item for item in described_indices(newest(table).open()) if item.name == job.name), None)
    if there is not None and not job.options.replace:
        raise taken(job.name)
    if there is not None and list(there.fields) != [column.id]:
        raise InvalidArgumentError("name", job.name, f"is the name of an index on {', '.join(there.field_names)}")
    if job.options.index_uuid and segment_exists(table, job.options.index_uuid):
        raise InvalidArgumentError("index_uuid", job.options.index_uuid, "the table has such a segment, or had one")
    have = set(dataset.fragment_ids())
    if unknown := sorted(set(job.options.fragment_ids or ()) - have):
        raise InvalidArgumentError("fragment_ids", unknown, f"must be among the table's {len(have)} fragments")


def report_of(
    build: Build, receipt: commit.CommitReceipt | None, tasks: Tasks, what: str, seconds: float
) -> IndexReport:
    """What a build did, and what the index knows now."""
    table = build.table
    dataset = table.open() if receipt is None else table.open_at(receipt.version)
    described = next((item for item in described_indices(dataset) if item.name == build.index.name), None)
    have = set(dataset.fragment_ids())
    known = {item for segment in (described.segments if described else ()) for item in segment.fragment_ids} & have
    done: list[Built] = build.built
    return IndexReport(
        table.ref.target,
        what,
        build.index.name,
        build.index.column,
        build.index.kind.name,
        None if receipt is None else receipt.version,
        len(described.segments) if described else 0,
        len(done),
        len(known),
        len(have - known),
        sum(item.rows for item in done),
        sum(item.bytes for item in done),
        tasks.retried,
        build.rebuilt,
        bool(receipt and receipt.recovered),
        seconds,
        build.job.job_id,
    )


def _answer(done: tuple[PinnedTable, IndexReport], return_report: bool) -> lance.LanceDataset | IndexReport:
    table, report = done
    return report if return_report else dataset_at(table, report.version)


def dataset_at(table: PinnedTable, version: int | None) -> lance.LanceDataset:
    """The table at a version, the newest for None."""
    return table.open_latest() if version is None else table.open_at(version)


def __getattr__(name: str) -> Any:
    """``optimize_indices`` too, which lance-ray has in its module of this name; ours builds on this one."""
    if name == "optimize_indices":
        from lance_ray.index_upkeep import optimize_indices

        return optimize_indices
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
