"""Tables for the tests of indexes, what each kind of index is asked there, and what plain pylance answers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

import lance_ray
from tests.vectors import vector_array

DIMENSION = 16
CLUSTERS = 12


def rows(count: int, first: int = 0, seed: int = 0) -> pa.Table:
    """Rows with a column for each kind of index; vectors lie in clusters, as embeddings do."""
    random = np.random.default_rng(seed + first)
    ids = np.arange(first, first + count)
    centers = np.random.default_rng(99).normal(size=(CLUSTERS, DIMENSION)) * 4
    vectors = centers[random.integers(0, CLUSTERS, count)] + random.normal(size=(count, DIMENSION))
    points = pa.StructArray.from_arrays(
        [pa.array(random.random(count)), pa.array(random.random(count))],
        fields=[pa.field("x", pa.float64(), False), pa.field("y", pa.float64(), False)],
    )
    point = {"ARROW:extension:name": "geoarrow.point", "ARROW:extension:metadata": "{}"}
    columns: list[tuple[pa.Field, Any]] = [
        (pa.field("id", pa.int64()), pa.array(ids)),
        (pa.field("day", pa.date32()), pa.array((ids % 400).astype("int32")).cast(pa.date32())),
        (pa.field("group", pa.string()), pa.array([f"g{item % 7}" for item in ids])),
        (pa.field("tags", pa.list_(pa.string())), pa.array([[f"t{item % 5}", f"u{item % 3}"] for item in ids])),
        (pa.field("text", pa.string()), pa.array([f"word{item % 50} shared doc{item}" for item in ids])),
        (pa.field("point", points.type, metadata=point), points),
        (pa.field("vector", pa.list_(pa.float32(), DIMENSION)), vector_array(vectors)),
        (
            pa.field("meta", pa.struct([pa.field("lang", pa.string())])),
            pa.array([{"lang": f"l{item % 4}"} for item in ids]),
        ),
    ]
    return pa.table([array for _, array in columns], schema=pa.schema([item for item, _ in columns]))


def make(uri: Path | str, count: int = 2000, fragments: int = 4, **options: Any) -> str:
    lance.write_dataset(rows(count), str(uri), max_rows_per_file=-(-count // fragments), **options)
    return str(uri)


def append(uri: str, count: int = 500, first: int = 100_000) -> None:
    lance.write_dataset(rows(count, first), uri, mode="append")


def copy(uri: str, to: Path) -> str:
    shutil.copytree(uri, to)
    return str(to)


@dataclass(frozen=True)
class Asked:
    """A kind of index on a column, its options, and filters that it answers."""

    kind: Any
    column: str
    filters: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.column}_idx"

    def build(self, uri: str, **options: Any) -> lance_ray.IndexReport:
        arguments = {"num_segments": 3, "progress": False, **self.options, **options, "return_report": True}
        if str(self.kind).startswith("IVF"):
            report = lance_ray.create_index(uri, self.column, self.kind, **arguments)
        else:
            report = lance_ray.create_scalar_index(uri, column=self.column, index_type=self.kind, **arguments)
        assert isinstance(report, lance_ray.IndexReport)
        return report

    def build_in_one_process(self, uri: str) -> None:
        dataset = lance.dataset(uri)
        if self.kind.startswith("IVF"):
            options = {"num_partitions": 4, **self.options}
            if "PQ" in self.kind:
                options.setdefault("num_sub_vectors", 4)
            dataset.create_index(self.column, self.kind, name=self.name, replace=True, **options)
        else:
            dataset.create_scalar_index(self.column, self.kind, name=self.name)


SCALARS = [
    Asked("BTREE", "id", ("id = 17", "id IN (3, 900, 100100)", "id >= 1990 AND id < 100020", "id < 0")),
    Asked("BTREE", "day", ("day = date '1970-02-01'", "day > date '1971-01-20'")),
    Asked("BTREE", "meta.lang", ("meta.lang = 'l2'",)),
    Asked("BITMAP", "group", ("`group` = 'g3'", "`group` IN ('g0', 'g6', 'none')")),
    Asked("LABEL_LIST", "tags", ("array_has_any(tags, ['t1', 'u2'])", "array_has_all(tags, ['t1', 'u2'])")),
    Asked("NGRAM", "text", ("contains(text, 'doc123')", "contains(text, 'word7 ')")),
    Asked("ZONEMAP", "id", ("id = 17", "id >= 1990 AND id < 100020"), {"rows_per_zone": 64}),
    Asked("BLOOMFILTER", "group", ("`group` = 'g3'",), {"number_of_items": 512, "probability": 0.01}),
    Asked("RTREE", "point", ("st_intersects(point, st_geomfromtext('POLYGON((0 0, .2 0, .2 .3, 0 .3, 0 0))'))",)),
]
TEXTS = [Asked("INVERTED", "text"), Asked("FTS", "text", options={"with_position": True, "stem": False})]
VECTORS = [
    Asked(kind, "vector", options={"metric": metric, "num_partitions": 4})
    for kind in ("IVF_FLAT", "IVF_PQ", "IVF_SQ", "IVF_RQ", "IVF_HNSW_FLAT", "IVF_HNSW_PQ", "IVF_HNSW_SQ")
    for metric in ("l2", "cosine", "dot")
]


def assert_filters_agree(uri: str, asked: Asked) -> None:
    """With the index come the rows that come without it, and the engine does use it."""
    dataset = lance.dataset(uri)
    for text in asked.filters:
        scan = dataset.scanner(columns=["id"], filter=text)
        assert "ScalarIndexQuery" in scan.explain_plan(), text
        without = dataset.scanner(columns=["id"], filter=text, use_scalar_index=False)
        assert sorted(scan.to_table()["id"].to_pylist()) == sorted(without.to_table()["id"].to_pylist()), text


def words_found(uri: str, query: str, limit: int = 10_000) -> dict[int, float]:
    """Ids and scores of a text search."""
    scan = lance.dataset(uri).scanner(
        columns=["id", "_score"], full_text_query=query, limit=limit, disable_scoring_autoprojection=True
    )
    found = scan.to_table()
    return dict(zip(found["id"].to_pylist(), found["_score"].to_pylist(), strict=True))


def recall(uri: str, metric: str, queries: int = 20, k: int = 10, **nearest: Any) -> float:
    """Of the k nearest, what part the index finds."""
    dataset = lance.dataset(uri)
    vectors = np.stack(dataset.to_table(columns=["vector"])["vector"].to_numpy())
    step = max(1, len(vectors) // queries)
    hits = 0
    for query in vectors[::step][:queries]:
        common = {"column": "vector", "q": query, "k": k, "metric": metric}
        exact = _nearest(dataset, {**common, "use_index": False})
        hits += len(exact & _nearest(dataset, {**common, "nprobes": 3, **nearest}))
    return hits / (k * len(vectors[::step][:queries]))


def _nearest(dataset: lance.LanceDataset, nearest: dict[str, Any]) -> set[int]:
    scan = dataset.scanner(columns=["id"], nearest=nearest, disable_scoring_autoprojection=True)
    return set(scan.to_table()["id"].to_pylist())


def covered(uri: str, name: str) -> set[int]:
    """The fragments that an index knows, of those that the table has."""
    dataset = lance.dataset(uri)
    have = set(dataset.fragment_ids())
    segments = [item for found in dataset.describe_indices() if found.name == name for item in found.segments]
    listed = [item for segment in segments for item in segment.fragment_ids if item in have]
    assert len(listed) == len(set(listed)), "a fragment is in two segments"
    return set(listed)


def segments_on_disk(uri: str) -> set[str]:
    folder = Path(uri) / "_indices"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def segments_referred_to(uri: str) -> set[str]:
    """By any version."""
    dataset = lance.dataset(uri)
    found: set[str] = set()
    for batch in dataset.tracked_files():
        for path in batch.column("path").to_pylist():
            if str(path).startswith("_indices/"):
                found.add(str(path).split("/")[1])
    return found


def assert_nothing_left(uri: str) -> None:
    """No segment that no version has, and no ledger."""
    assert segments_on_disk(uri) == segments_referred_to(uri)
    assert not (Path(uri) / "_lance_ray").exists()
