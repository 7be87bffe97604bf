"""Operations on a Ray whose object store is full: ``python -m tests.faults.full_store FOLDER``.

In a process of its own, since a process has one Ray only. The store has 80 MB, of which this driver holds all but a few
in objects that it needs until the end; every operation works on more than twice the store. The last line that it prints
is what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
import ray.data

import lance_ray
from lance_ray import LanceRayError
from tests.faults.stores import Place

STORE = 80 * 1024**2
HELD, PIECE = 64 * 1024**2, 4 * 1024**2
BLOCKS, ROWS, WIDTH = 48, 8192, 128
"""Blocks of 4 MiB: 192 MiB of vectors."""
DATA = BLOCKS * ROWS * WIDTH * 4
ARROW: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}


def block(batch: dict[str, Any]) -> pa.Table:
    """The rows of one block; each vector begins with its id."""
    first = int(batch["id"][0]) * ROWS
    ids = np.arange(first, first + ROWS)
    vectors = np.random.default_rng(first).standard_normal((ROWS, WIDTH), dtype=np.float32)
    vectors[:, 0] = ids
    return pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), WIDTH)})


def blocks(count: int = BLOCKS) -> ray.data.Dataset:
    """So many of them, made on the workers."""
    return ray.data.range(count, override_num_blocks=count).map_batches(block, batch_size=None)


def state(uri: str, columns: tuple[str, ...] = ()) -> dict[str, Any]:
    """What is in a table, and what lies beside it, by plain pylance."""
    place = Place(uri)
    lance_ray.cleanup_orphans(uri)
    table = place.open().to_table(columns=["id", *columns])
    ids = np.sort(np.asarray(table["id"]))
    values = {name: bool((np.asarray(table[name]) == 2 * np.asarray(table["id"])).all()) for name in columns}
    once = len(ids) % ROWS == 0 and bool((ids == np.arange(len(ids))).all())
    left = {"orphans": sorted(place.orphans()), "ledger": sorted(place.ledger())}
    return {"blocks": len(ids) // ROWS, "each once": once, "values": values, **left}


def read(uri: str) -> dict[str, Any]:
    """All rows through the object store; each must be what was written."""
    seen: list[np.ndarray] = []
    right = True
    for batch in lance_ray.read_lance(uri).iter_batches(batch_size=None, batch_format="pyarrow"):
        ids = np.asarray(batch["id"])
        column: Any = batch["vector"]
        first = column.combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)[:, 0]
        right = right and bool((first == ids).all())
        seen.append(ids.copy())
    ids = np.sort(np.concatenate(seen))
    return {"each once": bool((ids == np.arange(BLOCKS * ROWS)).all()), "values": right}


def twice(batch: pa.RecordBatch) -> pa.Table:
    """A column that needs the vectors to be computed."""
    first = batch["vector"].flatten().to_numpy().reshape(-1, WIDTH)[:, 0]
    return pa.table({"twice": (2 * first).astype(np.int64)})


def more(table: pa.Table) -> pa.Table:
    """Two columns more, one of them as wide as the vectors."""
    merged = pa.array(2 * np.asarray(table["id"]))
    return pa.table({"id": table["id"], "merged": merged, "again": table["vector"]})


def search(uri: str) -> dict[str, Any]:
    """The nearest of known rows, with every shard on a worker."""
    wanted = [7, 100_000, BLOCKS * ROWS - 1]
    queries = np.stack([vector_of(item) for item in wanted])
    nearest = {"column": "vector", "q": queries, "k": 1, "use_index": False}
    found = lance_ray.vector_search(uri, nearest=nearest, columns=["id"], num_workers=2)
    return {"found": found.sort_by("query_index")["id"].to_pylist() == wanted}


def vector_of(item: int) -> np.ndarray:
    """The vector of a row."""
    column: Any = block({"id": [item // ROWS]})["vector"]
    vectors = column.combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
    return np.asarray(vectors[item % ROWS])


def joined(uri: str) -> dict[str, Any]:
    """Neighbours for rows of a dataset that is twice the store itself."""
    given = lance_ray.read_lance(uri, columns=["id", "vector"], filter="id % 2048 = 0")
    options = {"use_index": False}
    found = lance_ray.nearest_join(given, uri, on="vector", k=1, columns=["id"], nearest=options).take_all()
    return {"found": all(row["neighbors"][0]["id"] == row["id"] for row in found), "rows": len(found)}


def operations(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """In an order in which each finds what it needs."""
    uri, other = str(folder / "table"), str(folder / "other")
    small: dict[str, Any] = {"min_rows_per_file": ROWS, "max_rows_per_file": ROWS}

    def done(action: Callable[[], Any], target: str = uri, *columns: str) -> dict[str, Any]:
        action()
        return state(target, columns)

    return {
        "create": lambda: done(lambda: lance_ray.write_lance(blocks(), uri, **small)),
        "read": lambda: read(uri),
        "append": lambda: done(
            lambda: lance_ray.write_lance(shifted(blocks(), BLOCKS), shifted_copy(uri, other), mode="append", **small),
            other,
        ),
        "overwrite": lambda: done(lambda: lance_ray.write_lance(blocks(), other, mode="overwrite", **small), other),
        "stream": lambda: done(
            lambda: lance_ray.write_lance(shifted(blocks(), BLOCKS), other, mode="append", stream=True), other
        ),
        "compaction": lambda: done(
            lambda: lance_ray.compact_files(
                uri, compaction_options={"target_rows_per_fragment": 8 * ROWS}, progress=False
            )
        ),
        "columns": lambda: done(lambda: lance_ray.add_columns(uri, transform=twice, progress=False), uri, "twice"),
        "columns from a dataset": lambda: done(
            lambda: lance_ray.merge_columns_from(uri, blocks().map_batches(more, **ARROW), on="id", progress=False),
            uri,
            "twice",
            "merged",
        ),
        "index": lambda: (
            done(
                lambda: lance_ray.create_index(
                    uri, "vector", "IVF_FLAT", num_partitions=8, num_segments=4, progress=False
                )
            )
            | {"indexes": [item.name for item in lance_ray.list_indices(uri)]}
        ),
        "search": lambda: search(uri),
        "join": lambda: joined(uri),
    }


def shifted(given: ray.data.Dataset, by: int) -> ray.data.Dataset:
    """The same rows with other ids."""

    def shift(table: pa.Table) -> pa.Table:
        return table.set_column(0, "id", pa.array(np.asarray(table["id"]) + by * ROWS))

    return given.map_batches(shift, **ARROW)


def shifted_copy(uri: str, other: str) -> str:
    """A second table with the same rows."""
    lance.write_dataset(lance.dataset(uri).to_table(), other, max_rows_per_file=ROWS)
    return other


def main(folder: Path) -> dict[str, Any]:
    """Every operation, one after the other."""
    spilled = folder / "spilled"
    spilled.mkdir()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=40,
        object_store_memory=STORE,
        object_spilling_directory=str(spilled),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    found: dict[str, Any] = {}
    try:
        held = [ray.put(np.full(PIECE // 8, number)) for number in range(HELD // PIECE)]
        for name, operation in operations(folder).items():
            started = time.monotonic()
            try:
                found[name] = operation()
            except LanceRayError as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["seconds"] = time.monotonic() - started
        found["held"] = all(int(ray.get(item)[-1]) == number for number, item in enumerate(held))
        found["bytes"], found["store"] = DATA, STORE
    finally:
        ray.shutdown()
    return found


if __name__ == "__main__":
    os.environ.setdefault("LANCE_RAY_NO_BACKOFF", "1")
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
