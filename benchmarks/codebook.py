"""What iterations of k-means are worth for a codebook: ``python -m benchmarks.codebook``.

A codebook of 16 sub-vectors of 8 bits is trained from 65,536 residuals, as an index build does it; what is printed is
the CPU seconds, and the mean squared error of the codes of as many other vectors.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from lance.indices import IndicesBuilder, IvfModel

from lance_ray.index_models import nearest_centroids
from lance_ray.table import in_memory

DIMENSION, PARTS, COUNT, PARTITIONS = 128, 16, 65_536, 250


def as_list(matrix: np.ndarray) -> pa.Array:
    """As the engine takes it."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).ravel()), matrix.shape[1])


def data() -> Iterator[tuple[str, np.ndarray]]:
    """Vectors of three kinds."""
    random = np.random.default_rng(0)
    size = (2 * COUNT, DIMENSION)
    centres = random.standard_normal((2000, DIMENSION), dtype=np.float32)
    noise = 0.5 * random.standard_normal(size, dtype=np.float32)
    yield "around 2,000 centres", centres[random.integers(0, len(centres), size[0])] + noise
    scale = np.exp(random.standard_normal((1, DIMENSION), dtype=np.float32))
    near = 0.3 * scale * random.standard_normal(size, dtype=np.float32)
    yield "clusters, values of unlike scale", scale * centres[random.integers(0, 300, size[0])] + near
    yield "uniform", random.random(size, dtype=np.float32)


def error(codes: np.ndarray, vectors: np.ndarray) -> float:
    """Mean squared distance of vectors to their codes."""
    total = 0.0
    for part, book in enumerate(codes):
        width = book.shape[1]
        values = vectors[:, part * width : (part + 1) * width]
        distances = (values**2).sum(1)[:, None] - 2 * values @ book.T + (book**2).sum(1)
        total += float(distances.min(1).mean())
    return total


def main() -> None:
    """Print a row for each kind of data and number of iterations."""
    print("| vectors | iterations | CPU s | error |\n|---|---:|---:|---:|")
    for name, vectors in data():
        seen, unseen = vectors[:COUNT], vectors[COUNT:]
        trained = IndicesBuilder(in_memory(pa.table({"vector": as_list(seen)})), "vector").train_ivf(PARTITIONS)
        centroids = np.asarray(trained.centroids.flatten()).reshape(-1, DIMENSION)
        seen, unseen = (rows - centroids[nearest_centroids(rows, centroids, "l2")] for rows in (seen, unseen))
        builder = IndicesBuilder(in_memory(pa.table({"vector": as_list(seen)})), "vector")
        origin = IvfModel(as_list(np.zeros((1, DIMENSION), np.float32)), "l2")
        for iterations in (5, 10, 15, 25, 35, 50):
            began = resource.getrusage(resource.RUSAGE_SELF)
            model = builder.train_pq(origin, PARTS, max_iters=iterations)
            ended = resource.getrusage(resource.RUSAGE_SELF)
            cpu = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
            codes = np.asarray(model.codebook.flatten()).reshape(PARTS, 256, DIMENSION // PARTS)
            print(f"| {name} | {iterations} | {cpu:.1f} | {error(codes, unseen):.4f} |", flush=True)


if __name__ == "__main__":
    main()
