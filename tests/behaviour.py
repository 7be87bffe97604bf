"""What a user does with a table, in one order, whatever names the table: the behaviour suite over all addresses.

``OPERATIONS`` are run one after the other on one table by ``tests/integration/test_catalogs.py``; each leaves what the
next one expects. ``ADDRESSES`` says how the table is named, and what really is behind the name. The table of both in
``docs/catalogs.md`` is written by ``python -m tests.behaviour`` and compared by a test.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray

import lance_ray
from lance_ray import LanceFragmentCommitter, LanceFragmentWriter, TableExistsError, TableNotFoundError
from tests.vectors import vector_array

Address = Callable[[], dict[str, Any]]
"""The keywords that name the table, asked for before each call."""

LEFT = [item for item in range(50) if item % 10 != 9]
"""The ids after everything that changes rows."""


def numbers(first: int, count: int) -> pa.Table:
    """Rows with an id, a text and a vector that follows from the id."""
    ids = np.arange(first, first + count)
    vectors = np.stack([ids, ids * 2], axis=1).astype(np.float32)
    return pa.table({"id": ids, "text": [f"row {item}" for item in ids], "vector": vector_array(vectors)})


def ids(table: Any) -> list[int]:
    """The sorted ids of a table of any kind."""
    rows = table.take_all() if isinstance(table, ray.data.Dataset) else table.to_pylist()
    return sorted(row["id"] for row in rows)


def create(at: Address) -> None:
    with pytest.raises(TableNotFoundError):
        lance_ray.read_lance(**at())
    lance_ray.write_lance(ray.data.from_arrow(numbers(0, 40)), mode="create", max_rows_per_file=20, **at())
    with pytest.raises(TableExistsError):
        lance_ray.write_lance(ray.data.from_arrow(numbers(0, 1)), mode="create", **at())


def append(at: Address) -> None:
    assert lance_ray.write_lance(ray.data.from_arrow(numbers(40, 5)), mode="append", **at()).version == 2
    committer = LanceFragmentCommitter(mode="append", **at())
    writer = LanceFragmentWriter(mode="append", **at())
    ray.data.from_arrow(numbers(45, 5)).map_batches(writer, batch_size=None, batch_format="pyarrow").write_datasink(
        committer
    )


def read(at: Address) -> None:
    assert ids(lance_ray.read_lance(**at(), filter="id >= 5", columns=["id"])) == list(range(5, 50))
    assert lance_ray.read_lance(**at(), version=1).count() == 40


def columns(at: Address) -> None:
    assert lance_ray.add_columns(**at(), transform={"twice": "id * 2"}, progress=False).rows == 50
    values = ray.data.from_arrow(pa.table({"id": range(50), "thrice": [item * 3 for item in range(50)]}))
    lance_ray.merge_columns_from(**at(), ds=values, on="id", progress=False)
    lance_ray.add_columns_from(**at(), transform={"spare": "id + 1"})
    lance_ray.drop_columns(**at(), columns=["spare"])
    address = at()
    lance_ray.alter_columns(address.pop("uri", None), {"path": "thrice", "name": "triple"}, **address)
    names = lance_ray.read_lance(**at()).schema().names
    assert sorted(names) == ["id", "text", "triple", "twice", "vector"]


def rows(at: Address) -> None:
    lance_ray.update_columns(**at(), columns=["text"], transform={"text": "'new'"}, filter="id < 2", progress=False)
    third = ray.data.from_arrow(pa.table({"id": [2], "text": ["new"]}))
    lance_ray.update_columns_from(**at(), ds=third, columns=["text"], on="id", progress=False)
    lance_ray.merge_into(lance_ray.take(**at(), indices=[5, 30]), **at(), on="id", progress=False)
    assert lance_ray.delete(**at(), predicate="id % 10 = 9").rows == 5


def compact(at: Address) -> None:
    options = {"materialize_deletions_threshold": 0.0}
    assert lance_ray.compact_files(**at(), compaction_options=options, progress=False) is not None
    assert ids(lance_ray.read_lance(**at(), columns=["id"])) == LEFT


def take(at: Address) -> None:
    found = lance_ray.take(**at(), indices=range(45)).to_pylist()
    assert sorted(row["id"] for row in found) == LEFT
    assert all((row["twice"], row["triple"]) == (2 * row["id"], 3 * row["id"]) for row in found)
    assert all((row["text"] == "new") == (row["id"] < 3) for row in found)


def search(at: Address) -> None:
    nearest = {"column": "vector", "q": np.array([20, 40], np.float32), "k": 3}
    assert lance_ray.vector_search(**at(), nearest=nearest, columns=["id"]).column("id")[0].as_py() == 20
    queries = ray.data.from_arrow(numbers(30, 2).select(["vector"]))
    joined = lance_ray.nearest_join(queries, **at(), on="vector", k=1, columns=["id"], concurrency=1).take_all()
    assert sorted(row["neighbors"][0]["id"] for row in joined) == [30, 31]


def search_text(at: Address) -> None:
    assert ids(lance_ray.full_text_search(**at(), query="new", columns=["id"])) == [0, 1, 2]
    nearest = {"column": "vector", "q": np.array([1, 2], np.float32), "k": 5}
    found = lance_ray.hybrid_search(**at(), nearest=nearest, full_text_query="new", limit=3, columns=["id"])
    assert ids(found) == [0, 1, 2]  # of the five nearest, those that have the word as well


def index(at: Address) -> None:
    small: dict[str, Any] = {"num_workers": 1, "progress": False}
    lance_ray.create_index(**at(), column="vector", index_type="IVF_FLAT", name="near", num_partitions=1, **small)
    lance_ray.create_scalar_index(**at(), column="text", index_type="INVERTED", name="words", **small)
    assert unindexed(at) == {"near": 0, "words": 0}
    more = lance_ray.take(**at(), indices=[0])
    more = more.set_column(more.schema.get_field_index("id"), "id", pa.array([1000], pa.int64()))
    lance_ray.write_lance(ray.data.from_arrow(more), mode="append", **at())
    assert unindexed(at) == {"near": 1, "words": 1}
    lance_ray.refresh_index(**at(), name="words", progress=False)
    lance_ray.optimize_indices(**at(), indices=["near"])
    assert unindexed(at) == {"near": 0, "words": 0}
    lance_ray.prewarm(**at(), name="words")
    lance_ray.drop_index(**at(), name="near")
    assert set(unindexed(at)) == {"words"}
    lance_ray.delete(**at(), predicate="id = 1000")


def unindexed(at: Address) -> dict[str, int]:
    """How many rows each index does not know."""
    return {item.name: item.unindexed_rows for item in lance_ray.list_indices(**at())}


def restore(at: Address) -> None:
    newest = lance_ray.describe_table(**at()).version
    lance_ray.restore(**at(), version=1)
    assert lance_ray.read_lance(**at()).count() == 40
    lance_ray.restore(**at(), version=newest)


def describe(at: Address) -> None:
    assert lance_ray.table_health(**at()).rows == 45
    described = lance_ray.describe_table(**at())
    assert (described.rows, described.version is not None) == (45, True)


def clean_up(at: Address) -> None:
    lance_ray.cleanup_orphans(**at())
    lance_ray.cleanup_old_versions(**at(), older_than=dt.timedelta(0))
    assert ids(lance_ray.read_lance(**at(), columns=["id"])) == LEFT


def overwrite(at: Address) -> None:
    lance_ray.write_lance(ray.data.from_items([{"other": 1}]), mode="overwrite", **at())
    assert lance_ray.read_lance(**at()).take_all() == [{"other": 1}]
    lance_ray.create_table(**at(), data=numbers(0, 2), mode="overwrite")
    assert ids(lance_ray.read_lance(**at())) == [0, 1]


def blobs(at: Address) -> None:
    given = pa.table({"id": [0, 1, 2], "data": pa.array([b"one" * 99, None, b""], pa.large_binary())})
    schema = pa.schema([pa.field("id", pa.int64()), lance.blob_field("data", inline_size_threshold=8)])
    lance_ray.write_lance(ray.data.from_arrow(given), schema=schema, mode="overwrite", **at())
    found = lance_ray.read_lance(**at(), blob_range=(0, 3)).take_all()
    assert [row["data"] for row in found] == [b"one", None, b""]
    large, missing, empty = lance_ray.open_blobs(**at(), column="data", indices=[0, 1, 2])
    assert missing is None
    assert [handle and handle.read() for handle in (large, empty)] == [b"one" * 99, b""]
    ended = lance_ray.read_lance(**at(), blobs="handles", filter="id = 0").map(
        lambda row: {"end": row["data"].read_range(-1, 1)}
    )
    assert ended.take_all() == [{"end": b"e"}]


OPERATIONS: dict[str, Callable[[Address], None]] = {
    "create": create,
    "append": append,
    "read": read,
    "columns": columns,
    "update, delete": rows,
    "compact": compact,
    "take": take,
    "vector search": search,
    "index": index,
    "text search": search_text,
    "restore": restore,
    "describe": describe,
    "clean up": clean_up,
    "overwrite": overwrite,
    "blobs": blobs,
}

QUICK = {
    "path": "local disk",
    "relative": "local disk",
    "dir": "local disk",
    "rest": "pylance's REST server over a folder",
    "rest uri": "pylance's REST server over a folder",
    "connected": "an object that the tests define",
}
SLOW = {
    "pathlib": "local disk",
    "file uri": "local disk",
    "opened": "local disk",
    "multi-level dir": "local disk",
    "native object": "local disk",
    "class path": "a class that the tests define",
    "s3": "moto's S3 server",
    "s3 io_config": "moto's S3 server",
    "s3 fsspec": "moto's S3 server",
    "rest over s3": "pylance's REST server over moto's S3 server",
    "azure": "Azurite",
    "glue": "the plugin; moto's Glue and S3 server",
    "dlf": "the plugin; a stand-in of DLF, and moto's S3 server spoken to as OSS",
    "unity": "the plugin; a stand-in of Unity Catalog",
    "polaris": "the plugin; a stand-in of Polaris",
    "hive2": "the plugin; a stand-in of a metastore, by thrift",
    "hive3": "the plugin; a stand-in of a metastore, by thrift",
}
ADDRESSES = {**QUICK, **SLOW}
"""How a table is named, and what is behind the name in the tests."""

BEGIN, END = "<!-- behaviour -->", "<!-- /behaviour -->"


def table() -> str:
    """The table of addresses and operations, in Markdown."""
    head = ["address", "in the tests", *OPERATIONS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 2}{':-:|' * len(OPERATIONS)}"]
    for name, behind in ADDRESSES.items():
        lines.append(f"| {name} | {behind} |{' ✓ |' * len(OPERATIONS)}")
    return "\n".join(lines)


def documented(text: str) -> str:
    """The documentation with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


DOCUMENT = Path(__file__).parents[1] / "docs" / "catalogs.md"


def opened(path: str) -> Address:
    """An opened dataset, as soon as there is a table."""
    return lambda: {"uri": lance.dataset(path) if Path(path, "_versions").exists() else path}


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text("utf-8")), "utf-8")
