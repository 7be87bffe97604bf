"""Full text and hybrid search: scores are the engine's, many queries come as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.query import MatchQuery, PhraseQuery

import lance_ray
from lance_ray.errors import InvalidArgumentError
from tests.vectors import by_engine, random_vectors, vector_array

WORDS = ["lance", "table", "vector", "index", "column", "fragment", "commit", "segment"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 documents of distinct scores in three fragments, with deletions, two text columns, and rows added later."""
    random = np.random.default_rng(0)

    def rows(first: int, count: int) -> pa.Table:
        titles = [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(count)]
        bodies = [" ".join(random.choice(WORDS, random.integers(3, 40))) for _ in range(count)]
        vectors = vector_array(random_vectors(count, seed=first))
        ids = np.arange(first, first + count)
        return pa.table({"id": ids, "title": titles, "body": bodies, "group": ids % 3, "vector": vectors})

    path = str(tmp_path_factory.mktemp("texts") / "t")
    dataset = lance.write_dataset(rows(0, 300), path, max_rows_per_file=100)
    dataset.create_scalar_index("title", "INVERTED", with_position=True)
    dataset.create_scalar_index("body", "INVERTED", with_position=True)
    dataset.delete("id % 11 = 4")
    dataset.insert(rows(1000, 20))
    return path


def scores(uri: str, query: Any, **scanner: Any) -> dict[int, float]:
    """All rows that match, by the engine alone."""
    table = lance.dataset(uri).scanner(columns=["id", "_score"], full_text_query=query, **scanner).to_table()
    return dict(zip(table["id"].to_pylist(), table["_score"].to_pylist(), strict=True))


def assert_best(found: pa.Table, wanted: dict[int, float], limit: int) -> None:
    """The best rows with their scores, best first; between equal scores any may come."""
    have = found.column("_score").to_pylist()
    assert have == sorted(wanted.values(), reverse=True)[:limit]
    assert all(wanted[item] == score for item, score in zip(found.column("id").to_pylist(), have, strict=True))
    assert len(set(found.column("id").to_pylist())) == found.num_rows


@pytest.mark.parametrize(
    "query",
    [
        "lance commit",
        {"query": "lance", "columns": ["title"]},
        MatchQuery("lance", "body"),
        PhraseQuery("lance table", "body"),
    ],
    ids=lambda query: type(query).__name__,
)
def test_a_text_search_gives_the_best_rows_with_the_engine_s_scores(uri: str, query: Any):
    found = lance_ray.full_text_search(uri, query, columns=["id"], limit=12)
    assert found.schema.names == ["id", "_score"]
    assert_best(found, scores(uri, query), 12)


@pytest.mark.parametrize("columns", ["title", ["body"], ["title", "body"]])
def test_the_columns_to_search_can_be_chosen(uri: str, columns: Any):
    found = lance_ray.full_text_search(uri, "vector", text_columns=columns, columns=["id"], limit=None)
    names = [columns] if isinstance(columns, str) else columns
    texts = lance.dataset(uri).to_table(columns=["id", *names]).to_pylist()
    assert set(found.column("id").to_pylist()) == {
        row["id"] for row in texts if any("vector" in row[name].split() for name in names)
    }


def test_a_filter_and_an_index_alone_restrict_a_text_search(uri: str):
    found = lance_ray.full_text_search(uri, "lance", columns=["id"], filter="group = 1", limit=10)
    assert_best(found, scores(uri, "lance", filter="group = 1", prefilter=True), 10)
    known = lance_ray.full_text_search(uri, "lance", columns=["id"], fast_search=True, limit=None, with_row_id=True)
    assert max(known.column("id").to_pylist()) < 1000
    assert known.schema.names == ["id", "_score", "_rowid"]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 2])
def test_many_texts_give_one_table_sorted_by_query(ray_session: object, uri: str, workers: int | None):
    queries = ["lance", "nothing here", "commit segment", *WORDS]
    found = lance_ray.full_text_search(uri, queries, columns=["id"], limit=5, num_workers=workers)
    numbers = found.column("query_index").to_pylist()
    assert numbers == sorted(numbers)
    for index, query in enumerate(queries):
        part = found.filter(pa.array([item == index for item in numbers]))
        assert_best(part.drop_columns(["query_index"]), scores(uri, query), 5)


@pytest.mark.ray
def test_queries_that_cannot_be_sent_are_refused_where_they_would_have_to_be(ray_session: object, uri: str):
    with pytest.raises(InvalidArgumentError, match="partial"):
        lance_ray.full_text_search(uri, [MatchQuery("lance", "body")], num_workers=1)
    found = lance_ray.full_text_search(uri, [lambda: MatchQuery("lance", "body")], columns=["id"], num_workers=1)
    assert_best(found.drop_columns(["query_index"]), scores(uri, MatchQuery("lance", "body")), 10)
    near = {"column": "vector", "q": random_vectors(1)[0]}
    with pytest.raises(InvalidArgumentError, match="full_text_query"):
        lance_ray.hybrid_search(uri, nearest=near, full_text_query=MatchQuery("lance", "body"), num_workers=1)
    assert lance_ray.hybrid_search(uri, nearest=near, full_text_query=MatchQuery("lance", "body")).num_rows == 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"query": []}, "query"),
        ({"query": 3}, "query"),
        ({"query": "a", "limit": 0}, "limit"),
        ({"query": MatchQuery("a", "body"), "text_columns": "title"}, "text_columns"),
        ({"query": "a", "columns": ["nope"]}, "columns"),
        ({"query": "a", "filter": "nope > 1"}, "filter"),
        ({"query": "a", "text_columns": "nope"}, "full_text_query"),
        ({"query": "a", "text_columns": "id"}, "full_text_query"),
        ({"query": "a", "scanner_options": {"nearest": {}}}, "scanner_options"),
    ],
    ids=str,
)
def test_a_text_search_that_cannot_work_is_refused_by_name(uri: str, arguments: dict[str, Any], named: str):
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.full_text_search(uri, **arguments)
    assert caught.value.parameter == named


def test_a_table_without_a_text_index_says_so(tmp_path: Path):
    lance.write_dataset(pa.table({"text": ["a"]}), str(tmp_path / "t"))
    with pytest.raises(InvalidArgumentError, match="INVERTED"):
        lance_ray.full_text_search(str(tmp_path / "t"), "word")


# Hybrid


def ranks(table: pa.Table) -> dict[int, int]:
    return {item: place for place, item in enumerate(table.column("id").to_pylist(), 1)}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 3.0), (1.0, 0.0)])
def test_a_hybrid_search_fuses_the_ranks_of_both_and_keeps_their_scores(uri: str, weights: tuple[float, float]):
    spec = {"column": "vector", "q": random_vectors(1, seed=77)[0]}
    vectors = by_engine(uri, {**spec, "k": 300}, ["id"])
    texts = lance_ray.full_text_search(uri, "lance commit", columns=["id"], limit=300, with_row_id=True)
    texts = texts.sort_by([("_score", "descending"), ("_rowid", "ascending")])
    assert texts.num_rows < 300
    found = lance_ray.hybrid_search(
        uri,
        nearest=spec,
        full_text_query="lance commit",
        columns=["id"],
        limit=15,
        candidates=300,
        weights=weights,
        rrf_k=10,
    )
    assert found.schema.names == ["id", "_distance", "_score", "_relevance_score"]
    near, told = ranks(vectors), ranks(texts)
    wanted = {
        item: (weights[0] / (10 + near[item]) if item in near else 0)
        + (weights[1] / (10 + told[item]) if item in told else 0)
        for item in {*near, *told}
    }
    have = found.column("_relevance_score").to_pylist()
    assert have == pytest.approx(sorted(wanted.values(), reverse=True)[:15])
    assert have == pytest.approx([wanted[item] for item in found.column("id").to_pylist()])
    distances = dict(zip(vectors["id"].to_pylist(), vectors["_distance"].to_pylist(), strict=True))
    text_scores = dict(zip(texts["id"].to_pylist(), texts["_score"].to_pylist(), strict=True))
    for row in found.to_pylist():
        assert row["_distance"] == distances.get(row["id"])
        assert row["_score"] == text_scores.get(row["id"])


@pytest.mark.ray
def test_a_hybrid_search_on_the_cluster_is_the_same(ray_session: object, uri: str):
    arguments: dict[str, Any] = {
        "nearest": {"column": "vector", "q": random_vectors(1, seed=77)[0]},
        "full_text_query": {"query": "segment", "columns": ["body"]},
        "columns": ["id", "title"],
        "filter": "group > 0",
        "with_row_id": True,
        "candidates": 500,  # all that match
    }
    here = lance_ray.hybrid_search(uri, **arguments)
    there = lance_ray.hybrid_search(uri, num_workers=2, **arguments)
    assert there.schema.names == ["id", "title", "_rowid", "_distance", "_score", "_relevance_score"]
    assert there.column("_relevance_score").to_pylist() == here.column("_relevance_score").to_pylist()
    assert {item % 3 for item in there.column("id").to_pylist()} <= {1, 2}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": 0}, "limit"),
        ({"candidates": 3}, "candidates"),
        ({"weights": (1,)}, "weights"),
        ({"weights": (0, 0)}, "weights"),
        ({"weights": (-1, 2)}, "weights"),
        ({"rrf_k": -1}, "rrf_k"),
        ({"nearest": None}, "nearest"),
        ({"nearest": {"column": "vector", "q": np.zeros((2, 16), np.float32)}}, "nearest['q']"),
        ({"full_text_query": " "}, "full_text_query"),
    ],
    ids=str,
)
def test_a_hybrid_search_that_cannot_work_is_refused_by_name(uri: str, arguments: dict[str, Any], named: str):
    given = {"nearest": {"column": "vector", "q": np.zeros(16, np.float32)}, "full_text_query": "lance", **arguments}
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.hybrid_search(uri, **given)
    assert caught.value.parameter == named
