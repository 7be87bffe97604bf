"""What the segments of a vector index share: centroids, a codebook, a rotation. Trained from samples on workers.

Centroids are trained as the engine trains them, by its k-means on :data:`~lance_ray.planning.indexes.SAMPLE_RATE` rows
for each. Where that sample is too large for one task, each task trains centroids of its own share, one task clusters
those, and further passes move the result towards the means of all shares (Lloyd's algorithm), of which the driver sees
sums only. A codebook is trained from the same kind of sample, its sub-vectors dealt out to the nodes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.indices import IndicesBuilder, IvfModel
from lance.lance import indices as engine_indices

from lance_ray.errors import InvalidArgumentError, translate_errors
from lance_ray.planning.indexes import SAMPLE_RATE, Share, runs_needed, sample_offsets
from lance_ray.planning.reads import FragmentStats
from lance_ray.table import PinnedTable, in_memory

REFINING_PASSES = 3
"""Passes over all shares after the centroids of the shares were clustered; further ones changed recall by less than the
noise of it."""

CENTROID_ITERATIONS = 50
"""Of k-means at most, as in the engine."""

CODEBOOK_ITERATIONS = 25
"""The same for a codebook, as in Faiss (``ClusteringParameters.niter``): half the time of the engine's 50, and codes
whose error is within 1 % of theirs (``python -m benchmarks.codebook``)."""

_ROWS_OF_A_LOCAL_CENTROID = 8
_BLOCK_BYTES = 64 * 1024**2
_VECTOR = "vector"


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """What is given to every segment. Arrays are fixed-size lists, as the engine takes them."""

    centroids: pa.Array | None = None
    codebook: pa.Array | None = None
    rotation: str | None = None

    def keywords(self) -> dict[str, Any]:
        """As keywords of the engine's build."""
        given = {"ivf_centroids": self.centroids, "pq_codebook": self.codebook, "rabitq_model": self.rotation}
        return {name: value for name, value in given.items() if value is not None}

    def same_as(self, other: Models) -> bool:
        """Whether segments of both can be one."""
        arrays = zip((self.centroids, self.codebook), (other.centroids, other.codebook), strict=True)
        alike = all(a is b or (a is not None and b is not None and a.equals(b)) for a, b in arrays)
        return alike and _signs(self.rotation) == _signs(other.rotation)


def _signs(rotation: str | None) -> Any:
    return None if rotation is None else json.loads(rotation).get("fast_rotation_signs", rotation)


@dataclass(frozen=True, slots=True)
class Training:
    """What the training tasks share."""

    table: PinnedTable
    column: str
    metric: str
    partitions: int
    max_iterations: int | None = None
    num_bits: int = 8
    sub_vectors: int = 0
    accelerator: Any = None
    sample_rate: int = SAMPLE_RATE


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Of the rows of a share that are nearest to each centroid: their sum, and how many they are."""

    sums: np.ndarray
    counts: np.ndarray
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class CodebookTask:
    """Sub-vectors ``first`` to ``last`` (exclusive) of a codebook, trained from all the shares."""

    shares: tuple[Share, ...]
    centroids: np.ndarray
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """A share to be compared with centroids."""

    share: Share
    centroids: np.ndarray


def train_centroids(training: Training, share: Share) -> np.ndarray:
    """Runs on a worker: centroids of a share, of shape (partitions, dimension); fewer where the share is small."""
    vectors = read_sample(training.table, training.column, share)
    if share.count < training.partitions * training.sample_rate:  # one of several shares
        most = max(1, len(vectors) // _ROWS_OF_A_LOCAL_CENTROID)
        training = dataclasses.replace(training, partitions=min(training.partitions, most))
    return _cluster(training, vectors) if len(vectors) > 1 else _matrix(vectors)


def cluster_centroids(training: Training, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Runs on a worker: the centroids of shares become those of all."""
    return _cluster(training, _as_list(np.concatenate(list(parts))))


def sum_up(training: Training, task: Assignment) -> Sums:
    """Runs on a worker: one pass of Lloyd's algorithm over a share."""
    vectors = _prepared(read_sample(training.table, training.column, task.share), training.metric)
    nearest = nearest_centroids(vectors, task.centroids, training.metric)
    order = np.argsort(nearest, kind="stable")
    found, starts = np.unique(nearest[order], return_index=True)
    sums = np.zeros(task.centroids.shape, np.float32)
    if len(found):
        sums[found] = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
    return Sums(sums, np.bincount(nearest, minlength=len(task.centroids)), len(vectors))


def train_codebook(training: Training, task: CodebookTask) -> np.ndarray:
    """Runs on a worker: the codes of some sub-vectors, of shape (sub-vectors * codes, dimension of a sub-vector)."""
    samples = [read_sample(training.table, training.column, share) for share in task.shares]
    vectors = _prepared(pa.concat_arrays(samples), training.metric)
    vectors -= task.centroids[nearest_centroids(vectors, task.centroids, training.metric)]
    width = vectors.shape[1] // training.sub_vectors
    part = np.ascontiguousarray(vectors[:, task.first * width : task.last * width])
    origin = _as_list(np.zeros((1, part.shape[1]), np.float32))
    codes = 2**training.num_bits
    rate = min(training.sample_rate, len(part) // codes)
    if rate < 2:
        raise InvalidArgumentError("num_bits", training.num_bits, f"needs {2 * codes} vectors, there are {len(part)}")
    with translate_errors("train a codebook of", training.table.uri, secrets=training.table.secrets):
        model = _builder(_as_list(part)).train_pq(
            IvfModel(origin, "l2"),
            task.last - task.first,
            sample_rate=rate,
            max_iters=training.max_iterations or CODEBOOK_ITERATIONS,
            num_bits=training.num_bits,
        )
    return np.asarray(model.codebook.flatten()).reshape(-1, width)


def _cluster(training: Training, vectors: pa.Array) -> np.ndarray:
    partitions = min(training.partitions, len(vectors) // 2)
    if partitions < 1:
        raise InvalidArgumentError(
            "num_partitions", training.partitions, f"needs two vectors for each, there are {len(vectors)}"
        )
    with translate_errors("train centroids of", training.table.uri, secrets=training.table.secrets):
        model = _builder(vectors).train_ivf(
            partitions,
            distance_type=training.metric,
            sample_rate=max(2, min(training.sample_rate, len(vectors) // partitions)),
            max_iters=training.max_iterations or CENTROID_ITERATIONS,
            accelerator=training.accelerator,
        )
    return _matrix(model.centroids)


def _builder(vectors: pa.Array) -> IndicesBuilder:
    return IndicesBuilder(in_memory(pa.table({_VECTOR: vectors})), _VECTOR)


def _matrix(vectors: Any) -> np.ndarray:
    """The rows of a fixed-size list as a matrix of their own type."""
    array = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    return np.asarray(array.flatten()).reshape(len(array), array.type.list_size)


def _as_list(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).ravel()), matrix.shape[1])


def _prepared(vectors: pa.Array, metric: str) -> np.ndarray:
    """As float32, and of length 1 for the cosine, whose index is one of l2 over such vectors."""
    matrix = _matrix(vectors).astype(np.float32)
    if metric == "cosine":
        lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix /= np.where(lengths > 0, lengths, 1)
    return matrix


def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, metric: str) -> np.ndarray:
    """For each vector (float32) the number of its nearest centroid."""
    centroids = centroids.astype(np.float32)
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and the first term is the same for all centroids
    constant = np.zeros(len(centroids), np.float32) if metric == "dot" else 0.5 * (centroids**2).sum(axis=1)
    block = max(1, _BLOCK_BYTES // (4 * len(centroids)))
    parts = [
        np.argmax(vectors[start : start + block] @ centroids.T - constant, axis=1)
        for start in range(0, len(vectors), block)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def read_sample(table: PinnedTable, column: str, share: Share) -> pa.Array:
    """The rows of a share that hold a usable vector: neither null, nor with a value that is not finite. Maybe none."""
    dataset = table.open()
    random = np.random.default_rng(share.seed)
    rows = dict(zip(share.fragments, share.rows, strict=True))
    parts = []
    for fragment, count in share.runs():
        starts = random.integers(0, rows[fragment], runs_needed(count)).tolist()
        offsets = sample_offsets(rows[fragment], count, starts)
        with translate_errors("sample", table.uri, secrets=table.secrets):
            found = dataset.get_fragment(fragment)
            if found is not None and offsets:
                parts.append(_vectors_of(found.take(offsets, columns=[column]), column))
    if not parts:
        schema = dataset.scanner(columns=[column], limit=0).to_table()
        return _vectors_of(schema, column)
    return pa.concat_arrays(parts)


def _vectors_of(table: pa.Table, column: str) -> pa.Array:
    values = table.column(0).combine_chunks()
    for name in () if column in table.column_names else column.split(".")[1:]:
        values = pc.struct_field(values, name)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if not pa.types.is_fixed_size_list(values.type):  # several vectors in a row
        values = pc.list_flatten(values)
    values = values.drop_null()
    matrix = _matrix(values)
    usable = np.isfinite(matrix).all(axis=1) if matrix.dtype.kind == "f" else np.ones(len(matrix), bool)
    return _as_list(matrix if usable.all() else matrix[usable])


Run = Callable[[Callable[[Training, Any], Any], Sequence[Any]], list[Any]]
"""Runs a worker function over tasks, and returns the results in their order."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which models a build needs beyond those that it was given."""

    training: Training
    codebook: bool
    rotation: bool
    dimension: int
    nodes: int = 1
    values: pa.DataType | None = None
    """The type of a vector's values, which that of centroids and codes must be."""


def train(wanted: Wanted, given: Models, sample: Callable[[int], list[Share]], run: Run) -> Models:
    """The models of a build: those given, and the others trained on workers.

    Args:
        wanted: which.
        given: those that the caller has.
        sample: the shares of a sample of so many rows.
        run: where training tasks run.
    """
    training = wanted.training
    centroids = given.centroids
    kind = None if wanted.values is None else wanted.values.to_pandas_dtype()
    if centroids is None:
        matrix = _train_partitions(training, sample(training.sample_rate * training.partitions), run)
        centroids = _as_list(matrix if kind is None else matrix.astype(kind))
    codebook = given.codebook
    if wanted.codebook and codebook is None:
        shares = tuple(sample(training.sample_rate * 2**training.num_bits))
        groups = min(max(1, wanted.nodes), training.sub_vectors)
        edges = [training.sub_vectors * place // groups for place in range(groups + 1)]
        matrix = _matrix(centroids).astype(np.float32)
        tasks = [CodebookTask(shares, matrix, *pair) for pair in itertools.pairwise(edges)]
        codes = np.concatenate(run(train_codebook, tasks))
        codebook = _as_list(codes if kind is None else codes.astype(kind))
    rotation = given.rotation
    if wanted.rotation and rotation is None:
        rotation = engine_indices.build_rq_model(wanted.dimension, training.num_bits)
    return Models(centroids, codebook, rotation)


def _train_partitions(training: Training, shares: Sequence[Share], run: Run) -> np.ndarray:
    parts: list[np.ndarray] = [part for part in run(train_centroids, shares) if len(part)]
    if not parts:
        raise InvalidArgumentError("column", training.column, "has no vector to train an index from")
    if len(shares) == 1:
        return parts[0]
    centroids: np.ndarray = run(cluster_centroids, [parts])[0]
    if training.metric == "hamming":
        return centroids  # the mean of bits is no vector of bits
    for _ in range(REFINING_PASSES):
        moved = run(sum_up, [Assignment(share, centroids) for share in shares])
        sums, counts = sum(item.sums for item in moved), sum(item.counts for item in moved)
        means = sums / np.maximum(counts, 1)[:, None]
        if training.metric == "dot":
            lengths = np.linalg.norm(means, axis=1, keepdims=True)
            means = means / np.where(lengths > 0, lengths, 1)  # as the engine does: a long one would attract all
        centroids = np.where(counts[:, None] > 0, means, centroids).astype(centroids.dtype)
    return centroids


# What a segment was built with is in its files: a Lance file whose schema metadata names the buffers, and in these the
# messages of the format's index.proto and index_old.proto (Tensor: 1 type, 2 shape, 3 data; IVF: 4 centroids).

_TENSOR_TYPES = {1: np.float16, 2: np.float32, 3: np.float64, 4: np.uint8}


def stored_models(dataset: lance.LanceDataset, uuid: str, kind: str) -> Models | None:
    """The models of a committed segment, or None where its files are not of the form that is known."""
    try:
        session: Any = dataset.new_file_session()  # type: ignore[no-untyped-call] # pylance declares nothing here
        index, storage = (session.open_reader(f"_indices/{uuid}/{name}") for name in ("index.idx", "auxiliary.idx"))
        centroids = _centroids(index)
        details = json.loads(json.loads(storage.metadata().schema.metadata[b"storage_metadata"])[0])
        codebook = rotation = None
        if kind.endswith("_PQ"):
            codes = _tensor(storage.read_global_buffer(details["codebook_position"]))
            width = details["dimension"] // details["num_sub_vectors"]
            codebook = _as_list(codes.reshape(-1, width))
        if kind.endswith("_RQ"):
            rotation = json.dumps({**details, "packed": False})
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # another form of the files: nothing is lost by it
        return None
    return Models(_as_list(centroids), codebook, rotation)


def _centroids(reader: Any) -> np.ndarray:
    place = int(reader.metadata().schema.metadata[b"lance:ivf"])
    return _tensor(dict(_fields(bytes(reader.read_global_buffer(place))))[4])


def _tensor(message: bytes) -> np.ndarray:
    found = dict(_fields(bytes(message)))
    shape = list(_varints(found[2]))
    values = np.frombuffer(found[3], _TENSOR_TYPES[found[1]])
    return values.reshape(shape) if math.prod(shape) == len(values) else values.reshape(-1, shape[-1])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers, and values as they are stored."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        size, place = _varint(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
        yield key >> 3, message[place : place + size]
        place += size


def _varints(message: bytes) -> Iterator[int]:
    place = 0
    while place < len(message):
        value, place = _varint(message, place)
        yield value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def checked_models(
    given: Mapping[str, Any], dimension: int, sub_vectors: int | None, num_bits: int, values: pa.DataType
) -> Models:
    """The caller's ``ivf_centroids``, ``pq_codebook`` and ``rabitq_model``, as the engine takes them.

    Raises:
        InvalidArgumentError: one is of another shape than the index.
    """
    centroids = _given_list("ivf_centroids", given.get("ivf_centroids"), values)
    codebook = _given_list("pq_codebook", given.get("pq_codebook"), values)
    rotation = given.get("rabitq_model")
    if centroids is not None and centroids.type.list_size != dimension:
        raise InvalidArgumentError(
            "ivf_centroids", str(centroids.type), f"must be vectors of {dimension} values like those of the column"
        )
    if codebook is not None:
        codes = (sub_vectors or 0) * 2**num_bits
        width = dimension // sub_vectors if sub_vectors else 0
        if width and len(codebook.flatten()) == codes * width:
            codebook = _as_list(np.asarray(codebook.flatten()).reshape(-1, width))
        else:
            raise InvalidArgumentError(
                "pq_codebook",
                f"{len(codebook)} x {codebook.type}",
                f"must hold num_sub_vectors * 2^num_bits = {codes} codes of {width} values",
            )
        if centroids is None:
            raise InvalidArgumentError("pq_codebook", "given", "needs the ivf_centroids that it was trained with")
    if rotation is not None and not isinstance(rotation, str):
        raise InvalidArgumentError("rabitq_model", type(rotation).__name__, "must be a JSON string")
    return Models(centroids, codebook, rotation)


def _given_list(name: str, value: Any, values: pa.DataType) -> pa.Array | None:
    if value is None:
        return None
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
    if isinstance(value, pa.ExtensionArray):
        value = value.storage
    if isinstance(value, pa.Array) and pa.types.is_fixed_size_list(value.type) and len(value):
        value = _matrix(value)
    matrix = np.asarray(value)
    if matrix.ndim >= 2 and matrix.dtype.kind in "fu" and matrix.size:
        return _as_list(matrix.reshape(-1, matrix.shape[-1]).astype(values.to_pandas_dtype()))
    raise InvalidArgumentError(name, type(value).__name__, "must be a matrix of floats or a fixed-size list array")


def sample_stats(stats: FragmentStats) -> FragmentStats:
    """The fragments with rows."""
    return stats.select([place for place, rows in enumerate(stats.rows) if rows])
