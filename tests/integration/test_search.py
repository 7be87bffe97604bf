"""Nearest neighbours: what comes out of shards is what one search of the engine finds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lance.dataset import serialize_row_addrs
from lance.query import MinHashQuery

import lance_ray
from lance_ray import nearest
from lance_ray.errors import InvalidArgumentError
from tests.tables import read_here
from tests.vectors import append_vectors, by_engine, cut_small, random_vectors, vector_array, write_vectors

METRICS = ["l2", "cosine", "dot"]
DIMENSION = 16


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.fixture(params=[False, True], ids=["addresses", "stable row ids"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Four fragments with deletions and an update, and a fifth that was appended."""
    dataset = write_vectors(tmp_path / "t", random_vectors(400), enable_stable_row_ids=request.param)
    dataset.delete("id % 7 = 3")
    dataset.update({"name": "'moved'"}, where="id < 20")
    append_vectors(dataset, random_vectors(30, seed=1))
    return str(tmp_path / "t")


number = st.one_of(
    st.integers(-3, 3).map(float), st.sampled_from([float("nan"), float("inf"), -0.0, 1e20, -1e20, 1e-20, 0.5])
)
vector = st.one_of(
    st.none(), st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=3), st.lists(number, min_size=3, max_size=3)
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(vector, min_size=1, max_size=40),
    asked=st.lists(st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=3), min_size=1, max_size=6),
    k=st.integers(1, 9),
    metric=st.sampled_from(METRICS),
    condition=st.sampled_from([None, "group = 1", "id > 3 AND group < 4"]),
    prefilter=st.booleans(),
    stable=st.booleans(),
)
def test_rows_without_an_index_are_those_of_one_process_ties_nulls_and_odd_numbers_included(
    sharded, *, rows, asked, k, metric, condition, prefilter, stable
):
    dataset = write_vectors("memory://", vector_array(rows, 3), fragments=3, enable_stable_row_ids=stable)
    if len(rows) > 4:
        dataset.delete("id = 2")
    queries: Any = np.array(asked, np.float32)
    spec = {"column": "vector", "q": queries if len(asked) > 1 else queries[0], "k": k, "metric": metric}
    wanted = dataset.scanner(
        columns=["id", "group", "_distance"],
        nearest=spec,
        filter=condition,
        prefilter=prefilter,
        disable_scoring_autoprojection=True,
    ).to_table()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lance_ray.table.PinnedTable.open_at", lambda self, version: dataset)
        found = lance_ray.vector_search(
            "memory://", nearest=spec, columns=["id", "group"], filter=condition, prefilter=prefilter
        )
    assert found.to_pylist() == wanted.to_pylist()
    assert found.schema.names == wanted.schema.names


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("filter", [None, "group = 2"])
def test_a_flat_search_in_shards_equals_one_process(sharded, uri: str, metric: str, count: int, filter: str | None):
    queries = random_vectors(count, seed=3)
    spec = {"column": "vector", "q": queries if count > 1 else queries[0], "k": 8, "metric": metric}
    found = lance_ray.vector_search(uri, nearest=spec, columns=["id", "name"], filter=filter)
    assert found.equals(by_engine(uri, spec, ["id", "name"], filter=filter))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.uint8()])
def test_other_types_and_nested_columns_are_searched_as_the_engine_does_it(sharded, tmp_path: Path, kind, nested):
    values = np.random.default_rng(0).integers(0, 50, (300, 8))
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1), pa.int64()).cast(kind if kind != pa.float16() else pa.float32()).cast(kind), 8
    )
    data: Any = pa.StructArray.from_arrays([column], ["vector"]) if nested else column
    table = pa.table({"id": np.arange(300), "data": data})
    lance.write_dataset(table, str(tmp_path / "t"), max_rows_per_file=90)
    queries = [values[5].astype(kind.to_pandas_dtype()), values[200].astype(kind.to_pandas_dtype())]
    for q in (queries[0], np.stack(queries)):
        spec = {"column": "data.vector" if nested else "data", "q": q, "k": 4}
        if kind == pa.uint8():
            spec["metric"] = "hamming"
        found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"])
        assert found.equals(by_engine(tmp_path / "t", spec, ["id"]))


@pytest.mark.parametrize("form", [list, tuple, pa.array, np.array])
def test_a_list_of_vectors_is_as_many_queries(uri: str, form):
    queries = random_vectors(3, seed=4)
    q = (
        pa.array([row.tolist() for row in queries], pa.list_(pa.float32(), 16))
        if form is pa.array
        else form(list(queries))
    )
    found = lance_ray.vector_search(uri, nearest={"column": "vector", "q": q, "k": 2}, columns=["id"])
    assert found.equals(by_engine(uri, {"column": "vector", "q": queries, "k": 2}, ["id"]))
    assert found.column("query_index").to_pylist() == [0, 0, 1, 1, 2, 2]


def test_a_distance_range_is_kept(sharded, uri: str):
    for q in (random_vectors(1)[0], random_vectors(5)):
        spec = {"column": "vector", "q": q, "k": 5, "distance_range": (9.0, 20.0)}
        found = lance_ray.vector_search(uri, nearest=spec, columns=["id"])
        assert found.equals(by_engine(uri, spec, ["id"]))
        assert found.num_rows


def test_one_large_fragment_is_searched_in_row_ranges(sharded, tmp_path: Path):
    write_vectors(tmp_path / "t", random_vectors(3000), fragments=1)
    spec = {"column": "vector", "q": random_vectors(1, seed=9)[0], "k": 5}
    plan = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, analyze_plan=True)
    assert isinstance(plan, str)
    assert plan.count("== queries") > 1
    assert lance_ray.vector_search(str(tmp_path / "t"), nearest=spec).equals(
        by_engine(tmp_path / "t", spec, ["id", "group", "name", "vector"])
    )


def test_a_table_of_equal_rows_is_searched_by_the_engine_alone(
    sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lance_ray.vectors._MAX_HELD", 50)
    write_vectors(tmp_path / "t", np.ones((300, 4)))
    spec = {"column": "vector", "q": np.zeros((4, 4), np.float32), "k": 3}
    assert lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"]).equals(
        by_engine(tmp_path / "t", spec, ["id"])
    )


QUERY = {"query": "7 11 13", "columns": ["name"]}
ONE_CALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "many vectors in a row": ({"column": "many", "q": random_vectors(2, 8), "k": 4}, {}),
    "text by MinHash": ({"minhash": "row 7 of the table with a few words more"}, {}),
    "an allowlist": ({"q": random_vectors(1)[0], "k": 4}, {"row_addr_allowlist": [1, 5, 8, 60, 90]}),
    "a blocklist": ({"q": random_vectors(1)[0], "k": 4}, {"row_addr_blocklist": [*range(80)]}),
    "a query as the filter": (
        {"q": random_vectors(1)[0], "k": 4},
        {"filter": {"query": "7 11 13", "columns": ["name"]}},
    ),
}


@pytest.mark.parametrize("what", ONE_CALL)
def test_what_cannot_be_cut_is_one_call_of_the_engine(sharded, tmp_path: Path, what: str, monkeypatch):
    vectors = pa.array([random_vectors(1 + item % 3, 8, seed=item).tolist() for item in range(200)], MANY)
    texts = [f"row {item} of the table with a few words more" for item in range(200)]
    table = pa.table(
        {"id": np.arange(200), "name": texts, "many": vectors, "vector": vector_array(random_vectors(200))}
    )
    dataset = lance.write_dataset(table, str(tmp_path / "t"), max_rows_per_file=70)
    dataset.create_scalar_index("name", "INVERTED")
    dataset.create_scalar_index("name", "MINHASHLSH", name="minhash")
    spec, options = ONE_CALL[what]
    nearest: Any = MinHashQuery(spec["minhash"], "name") if "minhash" in spec else {"column": "vector", **spec}
    options = {key: serialize_row_addrs(value) if "list" in key else value for key, value in options.items()}
    monkeypatch.setattr("lance_ray.search.run_tasks", None)
    found = lance_ray.vector_search(
        str(tmp_path / "t"),
        nearest=nearest,
        columns=["id"],
        filter=options.get("filter"),
        scanner_options={key: value for key, value in options.items() if key != "filter"},
    )
    assert found.num_rows > 2
    assert found.equals(by_engine(tmp_path / "t", nearest, ["id"], **options))
    if "minhash" in spec:
        assert read_here(tmp_path / "t", nearest=nearest, columns=["id"], limit=15).num_rows == 15


MANY = pa.list_(pa.list_(pa.float32(), 8))


def test_fragment_ids_of_a_ranked_read_are_one_call_of_the_engine(sharded, uri: str, monkeypatch):
    monkeypatch.setattr("lance_ray.search.run_tasks", None)
    spec = {"column": "vector", "q": random_vectors(1)[0], "k": 5}
    dataset = lance.dataset(uri)
    found = read_here(uri, nearest=spec, columns=["id"], fragment_ids=[1, 4])
    wanted = by_engine(uri, spec, ["id"], fragments=[dataset.get_fragment(1), dataset.get_fragment(4)])
    assert found.column("id").to_pylist() == wanted.column("id").to_pylist()


def test_all_columns_row_ids_and_expressions_come_as_asked(sharded, uri: str):
    spec = {"column": "vector", "q": random_vectors(1)[0], "k": 3}
    everything = lance_ray.vector_search(uri, nearest=spec, with_row_id=True)
    assert everything.schema.names == ["id", "group", "name", "vector", "_distance", "_rowid"]
    computed = lance_ray.vector_search(uri, nearest=spec, columns={"twice": "id * 2", "near": "_distance < 1"})
    assert computed.column("twice").to_pylist() == [2 * item for item in everything.column("id").to_pylist()]
    assert computed.column("near").to_pylist()[0] is (everything.column("_distance")[0].as_py() < 1)


def test_limit_and_offset_of_a_read_count_after_the_ranking(uri: str):
    spec = {"column": "vector", "q": random_vectors(1)[0], "k": 6}

    rows = read_here(uri, nearest=spec, columns=["id"], limit=2, offset=1)
    assert rows.column("id").to_pylist() == by_engine(uri, spec, ["id"]).column("id").to_pylist()[1:3]


# With an index


def indexed(uri: Path, *, segments: int = 1, appended: int = 0, kind: str = "IVF_PQ", metric: str = "l2") -> np.ndarray:
    """2,000 clustered vectors with an index of so many segments, and rows that it does not know; returns queries."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((20, DIMENSION)) * 3
    values = (centres[random.integers(0, 20, 2000)] + random.standard_normal((2000, DIMENSION))).astype(np.float32)
    dataset = write_vectors(uri, values[:1000])
    options: dict[str, Any] = {"num_partitions": 4, "metric": metric}
    if kind == "IVF_PQ":
        options["num_sub_vectors"] = 4
    dataset.create_index("vector", kind, name="v", **options)
    append_vectors(dataset, values[1000:], first=1000)
    if segments > 1:
        dataset.optimize.optimize_indices(num_indices_to_merge=0)
    else:
        dataset.create_index("vector", kind, name="v", replace=True, **options)
    dataset.delete("id % 11 = 4")
    if appended:
        append_vectors(dataset, values[:appended] + np.float32(0.01), first=5000)
    assert len(lance.dataset(str(uri)).describe_indices()[0].segments) == segments
    return (values[random.integers(0, 2000, 40)] + 0.1 * random.standard_normal((40, DIMENSION))).astype(np.float32)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("options", [{}, {"nprobes": 3}, {"nprobes": 4, "refine_factor": 5}], ids=str)
def test_an_index_in_shards_gives_what_one_process_gives(sharded, tmp_path: Path, segments, metric, options):
    queries = indexed(tmp_path / "t", segments=segments, metric=metric)
    for q in (queries[0], queries):
        spec = {"column": "vector", "q": q, "k": 7, **options}
        found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"])
        wanted = by_engine(tmp_path / "t", spec, ["id"])
        if "refine_factor" in options:  # of equal estimates one process refines some, a shard all of them
            assert np.all(np.asarray(found.column("_distance")) <= np.asarray(wanted.column("_distance")))
        else:
            assert found.equals(wanted)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("options", [{"refine_factor": 3}, {"refine_factor": 1, "nprobes": 2}], ids=str)
def test_many_queries_refine_what_each_refines_alone(sharded, tmp_path: Path, metric, options, monkeypatch):
    queries = indexed(tmp_path / "t", metric=metric)
    monkeypatch.setattr("lance_ray.nearest._RESCORED_QUERIES", 7)
    spec = {"column": "vector", "k": 6, **options}
    together = lance_ray.vector_search(
        str(tmp_path / "t"), nearest={**spec, "q": queries}, columns=["id"], filter="id % 3 > 0"
    )
    exact = by_engine(tmp_path / "t", {**spec, "q": queries, "use_index": False, "metric": metric, "k": 2000}, ["id"])
    distances = {(row["query_index"], row["id"]): row["_distance"] for row in exact.to_pylist()}
    for number, query in enumerate(queries):
        alone = by_engine(tmp_path / "t", {**spec, "q": query}, ["id"], filter="id % 3 > 0")
        some = together.filter(pc.field("query_index") == number)
        assert np.all(np.asarray(some.column("_distance")) <= np.asarray(alone.column("_distance")))
        for row in some.to_pylist():
            assert row["_distance"] == distances[number, row["id"]]
            assert row["id"] % 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["IVF_PQ", "IVF_FLAT", "IVF_HNSW_SQ"])
def test_appended_rows_are_ranked_among_indexed_ones_by_the_same_distance(sharded, tmp_path: Path, kind, metric):
    queries = indexed(tmp_path / "t", segments=2, appended=40, kind=kind, metric=metric)
    spec = {"column": "vector", "q": queries, "k": 10, "nprobes": 4}
    found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"])
    exact = by_engine(tmp_path / "t", {**spec, "use_index": False, "metric": metric, "k": 2040}, ["id"])
    distances = {(row["query_index"], row["id"]): row["_distance"] for row in exact.to_pylist()}
    for row in found.to_pylist():
        assert row["_distance"] == distances[row["query_index"], row["id"]]
    ours, engine = (recall(table, exact, 10) for table in (found, by_engine(tmp_path / "t", spec, ["id"])))
    assert ours >= engine
    assert any(item >= 5000 for item in found.column("id").to_pylist())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["IVF_PQ", "IVF_FLAT", "IVF_HNSW_SQ"]),
    metric=st.sampled_from(METRICS),
    segments=st.integers(1, 2),
    appended=st.sampled_from([0, 30]),
    nprobes=st.integers(1, 4),
    refine=st.sampled_from([None, 1, 4]),
    count=st.sampled_from([1, 3, 17, 40]),
    k=st.integers(1, 12),
)
def test_with_any_index_distances_are_the_engine_s_and_no_neighbour_is_lost(
    sharded, *, kind, metric, segments, appended, nprobes, refine, count, k
):
    with tempfile.TemporaryDirectory() as folder:
        queries = indexed(Path(folder) / "t", segments=segments, appended=appended, kind=kind, metric=metric)[:count]
        spec: dict[str, Any] = {"column": "vector", "q": queries if count > 1 else queries[0], "k": k}
        probes = {"nprobes": nprobes} | ({} if refine is None else {"refine_factor": refine})
        found = lance_ray.vector_search(str(Path(folder) / "t"), nearest={**spec, **probes}, columns=["id"])
        engine = by_engine(Path(folder) / "t", {**spec, **probes}, ["id"])
        exact = by_engine(Path(folder) / "t", {**spec, "k": 2100, "use_index": False, "metric": metric}, ["id"])
    have, wanted = (np.asarray(table.column("_distance")) for table in (found, engine))
    if refine is None and not appended:  # estimates: of equal ones either may come
        assert np.array_equal(have, wanted)
        return
    assert len(have) == len(wanted)
    assert np.all(have <= wanted)  # so that recall is not below, either
    distances = {(row.get("query_index"), row["id"]): row["_distance"] for row in exact.to_pylist()}
    assert all(row["_distance"] == distances[row.get("query_index"), row["id"]] for row in found.to_pylist())


def recall(found: pa.Table, exact: pa.Table, k: int) -> float:
    def sets(table: pa.Table) -> dict[int, set[int]]:
        grouped: dict[int, list[int]] = {}
        for query, item in zip(table["query_index"].to_pylist(), table["id"].to_pylist(), strict=True):
            grouped.setdefault(query, []).append(item)
        return {query: set(items[:k]) for query, items in grouped.items()}

    have, wanted = sets(found), sets(exact)
    return sum(len(have[query] & wanted[query]) for query in wanted) / (k * len(wanted))


def test_recall_of_ivf_pq_rises_with_probes_and_refinement(sharded, tmp_path: Path):
    queries = indexed(tmp_path / "t", segments=2, appended=40)
    exact = by_engine(tmp_path / "t", {"column": "vector", "q": queries, "k": 10, "use_index": False}, ["id"])
    steps: list[dict[str, Any]] = [
        {"nprobes": 1},
        {"nprobes": 1, "refine_factor": 10},
        {"nprobes": 4, "refine_factor": 10},
    ]
    figures = []
    for options in steps:
        spec = {"column": "vector", "q": queries, **options}
        figures.append(recall(lance_ray.vector_search(str(tmp_path / "t"), nearest=spec), exact, 10))
    assert figures[0] < figures[1] <= figures[2]
    assert figures[2] > 0.98


def test_a_filter_comes_before_the_ranking_unless_told_otherwise(sharded, tmp_path: Path):
    queries = indexed(tmp_path / "t", segments=2, appended=40)
    spec = {"column": "vector", "q": queries, "k": 5, "nprobes": 4}
    before = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"], filter="group = 1")
    assert before.num_rows == 5 * len(queries)
    after = lance_ray.vector_search(
        str(tmp_path / "t"), nearest=spec, columns=["id"], filter="group = 1", prefilter=False
    )
    everything = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id", "group"])
    passing = [row["id"] for row in everything.to_pylist() if row["group"] == 1]
    assert after.column("id").to_pylist() == passing
    more = lance_ray.vector_search(
        str(tmp_path / "t"), nearest=spec, columns=["id"], filter="group = 1", prefilter=False, oversample_factor=8
    )
    assert after.num_rows < more.num_rows <= 5 * len(queries)
    assert {item % 5 for item in more.column("id").to_pylist()} == {1}


@pytest.mark.parametrize("option", [{"fast_search": True}, {"include_unindexed": False}], ids=str)
def test_rows_that_the_index_does_not_know_can_be_left_out(sharded, tmp_path: Path, option: dict[str, Any]):
    queries = indexed(tmp_path / "t", segments=2, appended=40)
    spec = {"column": "vector", "q": queries, "k": 10, "nprobes": 4}
    found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"], **option)
    assert found.equals(by_engine(tmp_path / "t", spec, ["id"], fast_search=True))
    assert max(found.column("id").to_pylist()) < 5000


def test_another_metric_than_the_index_s_is_searched_without_it(sharded, tmp_path: Path):
    queries = indexed(tmp_path / "t", segments=2)
    spec = {"column": "vector", "q": queries, "k": 5, "metric": "cosine"}
    found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"])
    assert found.equals(by_engine(tmp_path / "t", {**spec, "use_index": False}, ["id"]))


def test_the_index_can_be_named(sharded, tmp_path: Path):
    queries = indexed(tmp_path / "t")
    dataset = lance.dataset(str(tmp_path / "t"))
    dataset.create_index("vector", "IVF_FLAT", name="flat", num_partitions=2, metric="l2")
    spec = {"column": "vector", "q": queries[:3], "k": 4, "nprobes": 2}
    segments = {item.name: [segment.uuid for segment in item.segments] for item in dataset.describe_indices()}
    for name in ("flat", "v"):
        found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec, columns=["id"], index_name=name)
        assert found.equals(by_engine(tmp_path / "t", spec, ["id"], index_segments=segments[name]))


def test_a_search_of_an_old_version_a_tag_and_an_opened_dataset(uri: str):
    dataset = lance.dataset(uri)
    dataset.tags.create("first", 1)
    spec = {"column": "vector", "q": random_vectors(1)[0], "k": 500}
    assert lance_ray.vector_search(uri, nearest=spec, version="first").num_rows == 400
    assert lance_ray.vector_search(lance.dataset(uri, 1), nearest=spec).num_rows == 400
    assert lance_ray.vector_search(uri, nearest=spec).num_rows == dataset.count_rows()


def test_an_empty_table_gives_an_empty_result_of_the_right_schema(tmp_path: Path):
    write_vectors(tmp_path / "t", vector_array([], 4))
    for q in (np.zeros(4, np.float32), np.zeros((6, 4), np.float32)):
        spec = {"column": "vector", "q": q, "k": 3}
        found = lance_ray.vector_search(str(tmp_path / "t"), nearest=spec)
        assert found.num_rows == 0
        assert found.schema.equals(by_engine(tmp_path / "t", spec, ["id", "group", "name", "vector"]).schema)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"column": "nope"}, "nearest"),
        ({"column": "id"}, "nearest"),
        ({"q": np.zeros(3, np.float32)}, "nearest"),
        ({"q": np.zeros((2, 3), np.float32)}, "nearest"),
        ({"q": "text"}, "nearest"),
        ({"q": []}, "nearest['q']"),
        ({"k": 0}, "nearest['k']"),
        ({"k": 1.5}, "nearest['k']"),
        ({"probes": 3}, "nearest"),
        ({"metric": "euclid"}, "nearest"),
    ],
    ids=str,
)
def test_a_search_that_cannot_work_is_refused_by_name(uri: str, arguments: dict[str, Any], named: str):
    spec = {"column": "vector", "q": np.zeros(16, np.float32), "k": 3, **arguments}
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.vector_search(uri, nearest=spec)
    assert caught.value.parameter == named


@pytest.mark.parametrize(
    "options",
    [
        {"columns": ["nope"]},
        {"filter": "nope = 1"},
        {"index_name": "nope"},
        {"fast_search": True},
        {"include_unindexed": False},
        {"oversample_factor": 0.5},
        {"num_workers": 0},
        {"scanner_options": {"limit": 3}},
        {"scanner_options": {"nope": 3}},
        {"pool": object()},
        {"prefilter": True, "nearest": {"q": [1.0]}},
    ],
    ids=str,
)
def test_bad_options_of_a_search_are_refused(uri: str, options: dict[str, Any]):
    spec = {"column": "vector", "q": np.zeros(16, np.float32)}
    with pytest.raises(InvalidArgumentError):
        lance_ray.vector_search(uri, **{"nearest": spec, **options})


def test_a_storage_error_in_a_shard_is_tried_again(sharded, uri: str, monkeypatch: pytest.MonkeyPatch):
    real, failures = nearest.scanner, [OSError("LanceError(IO): connection reset by peer")] * 2

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(nearest, "scanner", flaky)
    spec = {"column": "vector", "q": random_vectors(1)[0], "k": 5}
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))
    assert not failures
