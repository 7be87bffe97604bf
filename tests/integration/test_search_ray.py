"""Searching on real Ray workers: reads that rank, shards on the cluster, warm workers, joins, workers that die."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray
from lance.query import MatchQuery
from ray.exceptions import RayTaskError
from ray.util.multiprocessing import Pool

import lance_ray
from lance_ray import nearest, pools
from lance_ray.errors import InvalidArgumentError, TaskFailedError, WorkerEnvironmentError
from lance_ray.executors import PoolExecutor
from lance_ray.runner import RunOptions, run_tasks
from tests.vectors import append_vectors, by_engine, cut_small, random_vectors, vector_array, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(autouse=True)
def no_global_pool():
    yield
    lance_ray.clear_global_pool(close=True)


@pytest.fixture
def on_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, cluster=True)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Four fragments with deletions, and a fifth that was appended; with an index of two segments under ``v``."""
    dataset = write_vectors(tmp_path / "t", random_vectors(600))
    dataset.create_index("vector", "IVF_FLAT", name="v", num_partitions=2)
    append_vectors(dataset, random_vectors(300, seed=1))
    dataset.optimize.optimize_indices(num_indices_to_merge=0)
    append_vectors(dataset, random_vectors(50, seed=2), first=20_000)
    dataset.delete("id % 7 = 3")
    return str(tmp_path / "t")


def spec_of(*queries: int, k: int = 6, **options: Any) -> dict[str, Any]:
    vectors = random_vectors(900, seed=5)[list(queries)]
    return {"column": "vector", "q": vectors if len(queries) > 1 else vectors[0], "k": k, **options}


# Reads


@pytest.mark.parametrize("how", ["nearest", "scanner_options", "default_scan_options"])
@pytest.mark.parametrize("place", ["one process", "shards"])
def test_a_read_gives_exactly_the_nearest_rows_in_one_ordered_block(
    uri: str, how: str, place: str, monkeypatch: pytest.MonkeyPatch
):
    if place == "shards":
        cut_small(monkeypatch, cluster=True)
    spec = spec_of(3, use_index=False)
    options: Any = {how: spec if how == "nearest" else {"nearest": spec}}
    ds = lance_ray.read_lance(uri, columns=["id", "name"], **options)
    assert ds.schema().names == ["id", "name", "_distance"]
    blocks = ray.get(ds.to_arrow_refs())
    assert [block.num_rows for block in blocks] == [6]
    assert blocks[0].to_pylist() == by_engine(uri, spec, ["id", "name"]).to_pylist()


@pytest.mark.parametrize("prefilter", [None, True, False])
def test_the_filter_of_a_ranked_read_comes_first_unless_told_otherwise(on_cluster, uri: str, prefilter: bool | None):
    spec = spec_of(3, k=30, use_index=False)
    ds = lance_ray.read_lance(uri, nearest=spec, filter="group = 1", prefilter=prefilter, columns=["id"])
    wanted = by_engine(uri, spec, ["id"], filter="group = 1", prefilter=prefilter is not False)
    assert [row["id"] for row in ds.take_all()] == wanted.column("id").to_pylist()


def test_later_columns_filters_and_limits_see_the_nearest_rows_only(on_cluster, uri: str):
    spec = spec_of(3, k=20, use_index=False)
    wanted = by_engine(uri, spec, ["id", "group"]).to_pylist()
    ds = lance_ray.read_lance(uri, nearest=spec)
    assert [row["_distance"] for row in ds.select_columns(["_distance"]).take_all()] == [
        row["_distance"] for row in wanted
    ]
    some = ds.filter(expr=ray.data.expressions.col("group") == 1).select_columns(["id"]).take_all()
    assert [row["id"] for row in some] == [row["id"] for row in wanted if row["group"] == 1]
    assert [row["id"] for row in ds.limit(3).take_all()] == [row["id"] for row in wanted[:3]]
    assert ds.count() == 20


def test_nothing_is_searched_before_the_read_is_consumed_and_nothing_twice(uri: str, tmp_path: Path):
    log = tmp_path / "searches"
    ds = lance_ray.read_lance(uri, nearest=spec_of(3), columns=["id"])
    ds = ds.map_batches(partial(_note, str(log)), batch_format="pyarrow")
    assert not log.exists()
    ds.take_all()
    assert log.read_text() == "6\n"


def _note(log: str, table: pa.Table) -> pa.Table:
    with open(log, "a") as file:
        file.write(f"{table.num_rows}\n")
    return table


def test_a_text_read_gives_the_best_rows_with_their_scores(tmp_path: Path):
    texts = [" ".join(["lance"] * (item % 4) + ["table", "row"]) for item in range(60)]
    dataset = lance.write_dataset(
        pa.table({"id": np.arange(60), "text": texts}), str(tmp_path / "t"), max_rows_per_file=20
    )
    dataset.create_scalar_index("text", "INVERTED")
    wanted = {item for item in range(60) if item % 4 == 3}
    queries: list[Any] = ["lance", {"query": "lance", "columns": ["text"]}, partial(MatchQuery, "lance", "text")]
    for query in (*queries, lambda: MatchQuery("lance", "text", boost=2.0)):
        ds = lance_ray.read_lance(str(tmp_path / "t"), full_text_query=query, columns=["id"], limit=15)
        assert ds.schema().names == ["id", "_score"]
        rows = ds.take_all()
        assert {row["id"] for row in rows} == wanted
        assert [row["_score"] for row in rows] == sorted((row["_score"] for row in rows), reverse=True)


def test_the_nearest_of_the_rows_that_match_a_text_are_read(tmp_path: Path):
    dataset = write_vectors(tmp_path / "t", random_vectors(200))
    dataset.create_scalar_index("name", "INVERTED")
    spec = {"column": "vector", "q": random_vectors(1, seed=3)[0], "k": 9}
    query = partial(MatchQuery, "7 11 13 19 101", "name")
    wanted = by_engine(tmp_path / "t", spec, ["id"], filter=query())
    assert sorted(wanted.column("id").to_pylist()) == [7, 11, 13, 19, 101]
    assert lance_ray.read_lance(tmp_path / "t", nearest=spec, filter=query, columns=["id"]).take_all() == (
        wanted.to_pylist()
    )
    for found in (query, query()):  # in this process the engine's own objects work, too
        assert lance_ray.vector_search(tmp_path / "t", nearest=spec, filter=found, columns=["id"]).equals(wanted)


# Shards on the cluster


@pytest.mark.parametrize("queries", [(3,), (3, 77, 140, 9, 10)])
@pytest.mark.parametrize("index", [True, False])
def test_shards_on_the_cluster_find_what_one_process_finds(on_cluster, uri: str, queries: tuple[int, ...], index: bool):
    spec = spec_of(*queries, use_index=index, nprobes=2)
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))


def test_asking_for_workers_uses_the_cluster_however_small_the_search(uri: str):
    spec = spec_of(3, use_index=False)
    found = lance_ray.vector_search(uri, nearest=spec, columns=["id"], num_workers=2, ray_remote_args={"num_cpus": 0.5})
    assert found.equals(by_engine(uri, spec, ["id"]))


def dies_once(marker: str, spec: Any, shard: Any) -> Any:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return nearest.search_shard(spec, shard)
    os._exit(1)


def test_a_worker_that_dies_in_the_middle_costs_an_attempt(
    on_cluster, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    marker = str(tmp_path / "died")
    monkeypatch.setattr("lance_ray.search.search_shard", partial(dies_once, marker))
    spec = spec_of(3, 77, 140, 9, 10, use_index=False)
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))
    assert Path(marker).exists()


# Warm workers


def process_of(shared: Any, task: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_warm_workers_stay_the_same_processes_between_calls(uri: str):
    spec = spec_of(3, use_index=False)
    with lance_ray.WarmWorkers(1) as workers:
        for _ in range(2):
            assert lance_ray.vector_search(uri, nearest=spec, columns=["id"], pool=workers).equals(
                by_engine(uri, spec, ["id"])
            )
        runs = [
            [outcome.unwrap() for outcome in run_tasks(process_of, range(3), shared=None, executor=workers.executor())]
            for _ in range(2)
        ]
        assert len({process for run in runs for process in run}) == 1
    with pytest.raises(InvalidArgumentError):
        lance_ray.vector_search(uri, nearest=spec, pool=workers)


@pytest.mark.slow
def test_the_global_pool_is_made_once_used_by_searches_and_forgotten(uri: str, caplog: pytest.LogCaptureFixture):
    assert lance_ray.get_global_pool() is None
    made = lance_ray.init_global_pool(1)
    assert lance_ray.init_global_pool(2) is made
    assert "2 workers are not started" in caplog.text
    assert lance_ray.get_global_pool() is made
    spec = spec_of(3, use_index=False)
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))
    lance_ray.clear_global_pool()
    assert lance_ray.get_global_pool() is None
    lance_ray.set_global_pool(made)  # it was forgotten, not closed
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))
    lance_ray.clear_global_pool(close=True)
    assert made is not None
    with pytest.raises(InvalidArgumentError):
        made.executor()


@pytest.fixture(scope="module")
def ray_pool(ray_session: object):
    pool = Pool(1)
    yield pool
    pool.terminate()
    pool.join()


def test_a_pool_of_ray_s_own_is_used_through_an_adapter_and_stays_open(uri: str, ray_pool: Pool):
    lance_ray.set_global_pool(ray_pool)
    spec = spec_of(3, 50, use_index=False)
    assert lance_ray.vector_search(uri, nearest=spec, columns=["id"]).equals(by_engine(uri, spec, ["id"]))
    lance_ray.clear_global_pool()
    assert ray_pool.apply(abs, (-3,)) == 3


def fails(shared: Any, task: int) -> int:
    raise ValueError(f"task {task}")


def test_what_a_task_in_a_pool_raises_comes_with_its_own_type(ray_pool: Pool):
    run = run_tasks(fails, [1], shared=None, options=RunOptions(progress=False), executor=PoolExecutor(ray_pool))
    with pytest.raises(TaskFailedError) as caught:
        list(run)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_process_of_a_pool_that_dies_costs_an_attempt_and_is_replaced(
    uri: str, tmp_path: Path, ray_pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    marker = str(tmp_path / "died")
    monkeypatch.setattr("lance_ray.search.search_shard", partial(dies_once, marker))
    before = ray_pool.apply(os.getpid)
    spec = spec_of(3, 50, use_index=False)
    found = lance_ray.vector_search(uri, nearest=spec, columns=["id"], pool=ray_pool)
    assert found.equals(by_engine(uri, spec, ["id"]))
    assert Path(marker).exists()
    assert ray_pool.apply(os.getpid) != before


def dies(shared: Any, task: int) -> int:
    os._exit(1)


@pytest.mark.slow
def test_a_task_that_ends_each_process_of_a_pool_ends_with_an_error_and_the_pool_stays_usable(ray_pool: Pool):
    run = run_tasks(dies, [1], shared=None, options=RunOptions(progress=False), executor=PoolExecutor(ray_pool))
    with pytest.raises(TaskFailedError, match="3 attempt"):
        list(run)
    assert ray_pool.apply(abs, (-3,)) == 3


def sleeps(seconds: float, task: int) -> int:
    time.sleep(seconds)
    return task


@pytest.mark.slow
def test_a_pool_that_gives_no_result_ends_the_run_after_the_stated_time(ray_pool: Pool):
    list(run_tasks(sleeps, [0], shared=0.0, executor=PoolExecutor(ray_pool)))  # a new process imports first
    started = time.perf_counter()
    executor = PoolExecutor(ray_pool, silent_seconds=0.5)
    run = run_tasks(sleeps, [1], shared=2.0, options=RunOptions(progress=False), executor=executor)
    with pytest.raises(TaskFailedError) as caught:
        list(run)
    assert isinstance(caught.value.__cause__, WorkerEnvironmentError)
    assert 0.5 <= time.perf_counter() - started < 1.5
    executor = PoolExecutor(ray_pool, silent_seconds=4.0)  # the abandoned task still runs for a while
    quick = run_tasks(sleeps, range(6), shared=0.8, options=RunOptions(progress=False), executor=executor)
    assert sorted(outcome.unwrap() for outcome in quick) == [*range(6)]  # the limit counts from the last result


def test_a_pool_that_repeats_for_ever_what_kills_it_is_refused():
    pool = SimpleNamespace(apply_async=print, _ray_remote_args={"max_task_retries": -1})
    with pytest.raises(InvalidArgumentError, match="max_task_retries"):
        lance_ray.set_global_pool(pool)


@pytest.mark.parametrize("pool", [3, object(), "pool"])
def test_what_is_no_pool_is_refused(pool: Any):
    with pytest.raises(InvalidArgumentError):
        lance_ray.set_global_pool(pool)
    with pytest.raises(InvalidArgumentError):
        lance_ray.init_global_pool(0)
    assert pools.get_global_pool() is None


# Joins


def queries_of(count: int, *, missing: bool = False) -> pa.Table:
    vectors: list[Any] = random_vectors(count, seed=8).tolist()
    if missing:
        vectors[1], vectors[3] = None, [float("nan")] * 16
    return pa.table({"q": np.arange(count), "embedding": vector_array(vectors, 16)})


def neighbours(uri: str, queries: pa.Table, **options: Any) -> list[list[int]]:
    rows = []
    for vector in queries.column("embedding").to_pylist():
        usable = vector is not None and not np.isnan(vector).any()
        spec = {"column": "vector", "q": np.array(vector, np.float32), "k": 4, "use_index": False} if usable else None
        rows.append([] if spec is None else by_engine(uri, spec, ["id"], **options).column("id").to_pylist())
    return rows


@pytest.mark.parametrize("missing", [False, True])
def test_a_join_adds_the_neighbours_of_each_row(uri: str, missing: bool):
    queries = queries_of(20, missing=missing)
    ds = ray.data.from_arrow([queries.slice(0, 7), queries.slice(7)])
    joined = lance_ray.nearest_join(
        ds, uri, on="embedding", k=4, columns=["id", "name"], nearest={"use_index": False}, concurrency=1
    )
    rows = sorted(joined.take_all(), key=lambda row: row["q"])
    assert [[item["id"] for item in row["neighbors"]] for row in rows] == neighbours(uri, queries)
    assert set(rows[0]["neighbors"][0]) == {"id", "name", "_distance"}


def test_vectors_of_a_join_may_be_tensors_and_of_more_bits(uri: str):
    vectors = random_vectors(3, seed=8)
    kinds = [
        ray.data.from_numpy(vectors.astype(np.float64)),
        ray.data.from_arrow(pa.table({"data": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)})),
        ray.data.from_arrow(pa.table({"data": vectors.tolist()})),
    ]
    found = [
        [
            [item["id"] for item in row["neighbors"]]
            for row in lance_ray.nearest_join(ds, uri, on="data", k=4, nearest={"use_index": False}).take_all()
        ]
        for ds in kinds
    ]
    assert found == [neighbours(uri, queries_of(3))] * 3


def test_an_exploded_join_has_a_row_for_each_neighbour(uri: str):
    queries = queries_of(6, missing=True)
    joined = lance_ray.nearest_join(
        ray.data.from_arrow(queries),
        uri,
        on="embedding",
        k=4,
        columns=["id"],
        filter="group = 2",
        nearest={"use_index": False},
        explode=True,
        prefix="near_",
        concurrency=1,
    )
    rows = joined.take_all()
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row["q"], []).append(row["near_id"])
    wanted = neighbours(uri, queries, filter="group = 2")
    assert found == {index: ids for index, ids in enumerate(wanted) if ids}
    assert set(rows[0]) == {"q", "embedding", "near_id", "near__distance"}


def test_a_join_through_an_index_finds_what_single_searches_find(uri: str):
    queries = queries_of(10)
    joined = lance_ray.nearest_join(
        ray.data.from_arrow(queries), uri, on="embedding", k=4, columns=["id"], nearest={"nprobes": 2}, concurrency=1
    )
    rows = sorted(joined.take_all(), key=lambda row: row["q"])
    singles = [
        lance_ray.vector_search(uri, nearest={"column": "vector", "q": vector, "k": 4, "nprobes": 2}, columns=["id"])
        for vector in queries.column("embedding").to_pylist()
    ]
    assert [[item["id"] for item in row["neighbors"]] for row in rows] == [
        one.column("id").to_pylist() for one in singles
    ]


@pytest.mark.parametrize(
    "vectors",
    [
        vector_array(random_vectors(2, 7)),
        ["a", "b"],
        pa.array([["a"], ["b"]]),
        pa.FixedShapeTensorArray.from_numpy_ndarray(random_vectors(2, 7)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(random_vectors(2, 16).reshape(2, 4, 4)),
    ],
    ids=lambda item: str(getattr(item, "type", "string")),
)
def test_a_join_by_what_are_no_vectors_of_the_table_s_dimension_is_refused_before_anything_runs(uri: str, vectors: Any):
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.nearest_join(ray.data.from_arrow(pa.table({"embedding": vectors})), uri, on="embedding")
    assert caught.value.parameter == "on"


def test_a_vector_of_another_dimension_that_only_its_row_shows_ends_the_join(uri: str):
    ds = ray.data.from_arrow(pa.table({"embedding": [[0.5] * 16, [0.5] * 7]}))
    joined = lance_ray.nearest_join(ds, uri, on="embedding", k=2, concurrency=1)
    with pytest.raises(RayTaskError, match=r"has vectors of \[7\] numbers; the table's have 16"):
        joined.take_all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"on": "nope"}, "on"),
        ({"column": "nope"}, "column"),
        ({"column": "id"}, "column"),
        ({"k": 0}, "k"),
        ({"batch_size": 0}, "batch_size"),
        ({"concurrency": 0}, "concurrency"),
        ({"columns": ["nope"]}, "columns"),
        ({"filter": "nope = 1"}, "filter"),
        ({"filter": MatchQuery("row", "name")}, "filter"),
        ({"nearest": {"k": 3}}, "nearest"),
        ({"nearest": {"probes": 3}}, "nearest"),
        ({"output": "q"}, "output"),
        ({"explode": True, "columns": {"q": "id"}}, "prefix"),
    ],
    ids=str,
)
def test_a_join_that_cannot_work_is_refused_before_anything_runs(uri: str, options: dict[str, Any], named: str):
    ds = ray.data.from_arrow(queries_of(3))
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.nearest_join(ds, uri, **{"on": "embedding", **options})
    assert caught.value.parameter == named
