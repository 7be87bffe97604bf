"""Vector search: one query, many queries, and neighbours for each row of a Ray Dataset.

python examples/neighbors.py
python examples/neighbors.py --rows 1000000
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

import lance_ray

DIMENSIONS, KINDS = 32, ("bird", "fish", "plant")


def main(argv: Sequence[str] | None = None) -> None:
    """Make a table of labelled vectors, search it, and label new vectors by a vote of their neighbours."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, metavar="N", help="vectors in the table")
    rows = parser.parse_args(argv).rows
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
        uri = str(Path(folder) / "vectors.lance")
        ray.data.range(rows).map_batches(labelled, batch_size=4096).write_lance(uri)
        search(uri)
        vote(uri, queries=200)


def search(uri: str) -> None:
    """The exact neighbours; a table this small is searched in this process, a large one by the cluster."""
    query = center("fish")
    nearest = {"column": "vector", "q": query, "k": 5}
    found = lance_ray.vector_search(uri, nearest=nearest, columns=["id", "kind"])
    print(f"nearest to a fish:    {Counter(found['kind'].to_pylist())}")

    # A filter comes before the ranking: the five nearest birds, not the birds among the five nearest.
    birds = lance_ray.vector_search(uri, nearest=nearest, columns=["id", "kind"], filter="kind = 'bird'")
    print(f"the nearest birds:    {birds.num_rows} at distances from {birds['_distance'][0].as_py():.1f}")

    # Many queries at once cost little more than one.
    many = {"column": "vector", "q": np.stack([center(kind) for kind in KINDS]), "k": 1}
    kinds = lance_ray.vector_search(uri, nearest=many, columns=["kind"])["kind"].to_pylist()
    print(f"nearest to each kind: {kinds}")

    # The same as the beginning of a Ray Data pipeline.
    best = lance_ray.read_lance(uri, nearest=nearest, columns=["id"])
    assert [row["id"] for row in best.take_all()] == found["id"].to_pylist()  # noqa: S101 - it shows that they agree


def vote(uri: str, queries: int) -> None:
    """Label rows by their neighbours: a join of a Ray Dataset with a table."""
    new = ray.data.range(queries).map_batches(lambda batch: labelled(batch, seed=1), batch_size=64)
    joined = lance_ray.nearest_join(new, uri, on="vector", column="vector", k=5, columns=["kind"])
    right = joined.map(is_right).sum("right")
    print(f"labelled by a vote:   {right} of {queries} right")


def is_right(row: dict[str, Any]) -> dict[str, int]:
    """Whether most neighbours have the kind of the row."""
    (kind, _), *_ = Counter(item["kind"] for item in row["neighbors"]).most_common(1)
    return {"right": int(kind == row["kind"])}


def labelled(batch: dict[str, np.ndarray[Any, Any]], seed: int = 0) -> pa.Table:
    """Vectors around the center of their kind. Runs on the workers."""
    ids = batch["id"]
    random = np.random.default_rng([seed, int(ids[0])])
    kinds = [KINDS[int(item) % len(KINDS)] for item in ids]
    vectors = np.stack([center(kind) for kind in kinds]) + random.normal(size=(len(ids), DIMENSIONS))
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    return pa.table({"id": ids, "kind": kinds, "vector": pa.FixedSizeListArray.from_arrays(flat, DIMENSIONS)})


def center(kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Where the vectors of a kind lie."""
    point = np.zeros(DIMENSIONS, np.float32)
    point[KINDS.index(kind)] = 8.0
    return point


if __name__ == "__main__":
    main()
