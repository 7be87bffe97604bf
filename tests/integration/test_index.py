"""Indexes of every kind: what they answer is what one process answers, whatever became of the table since."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.indices import IndexConfig

import lance_ray
from lance_ray import commit, index_build, index_models
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    SchemaMismatchError,
    TaskFailedError,
)
from lance_ray.executors import LocalExecutor
from tests import indexes
from tests.indexes import SCALARS, TEXTS, VECTORS, Asked
from tests.vectors import vector_array


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in two threads of this process."""
    monkeypatch.setattr(index_build, "on_cluster", lambda *args: index_build.Where(LocalExecutor(2), 2))
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def _slow(*items: Any) -> list[Any]:
    return [pytest.param(item, marks=pytest.mark.slow) for item in items]


def _quick(items: list[Asked], *chosen: tuple[str, str]) -> list[Any]:
    """The items, those not chosen as slow ones."""
    return [
        pytest.param(
            item,
            id=f"{item.kind} {item.options.get('metric', item.column)}",
            marks=() if (item.kind, item.options.get("metric", item.column)) in chosen else pytest.mark.slow,
        )
        for item in items
    ]


QUICK_VECTORS = [
    ("IVF_FLAT", "l2"),
    ("IVF_PQ", "l2"),
    ("IVF_PQ", "cosine"),
    ("IVF_PQ", "dot"),
    ("IVF_SQ", "l2"),
    ("IVF_RQ", "cosine"),
    ("IVF_HNSW_FLAT", "l2"),
]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["addresses", "stable row ids"])
def uri(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return indexes.make(tmp_path / "table", enable_stable_row_ids=request.param)


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return indexes.make(tmp_path / "table")


# What indexes answer


@pytest.mark.parametrize(
    "asked", _quick(SCALARS, *[(item.kind, item.column) for item in SCALARS if item.kind != "NGRAM"])
)
def test_filters_find_the_same_rows_with_the_index_after_every_change_of_the_table(uri, asked):
    report = asked.build(uri)
    assert report.segments == report.built == 3
    assert report.rows == 2000
    indexes.assert_filters_agree(uri, asked)
    lance.dataset(uri).delete("id % 11 = 3")
    indexes.append(uri)
    indexes.assert_filters_agree(uri, asked)
    lance_ray.refresh_index(uri, asked.name, progress=False)
    assert indexes.covered(uri, asked.name) == set(lance.dataset(uri).fragment_ids())
    indexes.assert_filters_agree(uri, asked)
    lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=3000)
    indexes.assert_filters_agree(uri, asked)
    lance_ray.refresh_index(uri, asked.name, progress=False)
    indexes.assert_filters_agree(uri, asked)
    (merged,) = lance_ray.optimize_indices(uri, num_segments=1, progress=False, return_report=True)
    assert merged.segments == 1
    indexes.assert_filters_agree(uri, asked)


@pytest.mark.parametrize("asked", TEXTS, ids=lambda item: item.kind)
def test_a_text_search_finds_the_rows_and_scores_of_an_index_made_in_one_process(uri, tmp_path, asked):
    copy = indexes.copy(uri, tmp_path / "copy")
    asked.build(uri)
    lance.dataset(copy).create_scalar_index("text", "INVERTED", name=asked.name, **asked.options)
    for query in ("doc17", "word7 shared", "nothing"):
        assert indexes.words_found(uri, query) == pytest.approx(indexes.words_found(copy, query), rel=1e-5)
    for place in (uri, copy):
        lance.dataset(place).delete("id % 11 = 3")
        indexes.append(place)
    lance_ray.refresh_index(uri, asked.name, progress=False)
    lance.dataset(copy).optimize.optimize_indices(num_indices_to_merge=1)
    for query in ("doc17", "word7 shared", "doc100003"):
        found, expected = indexes.words_found(uri, query), indexes.words_found(copy, query)
        assert found.keys() == expected.keys()
    lance_ray.optimize_indices(uri, num_segments=1, progress=False)
    assert indexes.words_found(uri, "word7 shared").keys() == indexes.words_found(copy, "word7 shared").keys()


def test_a_refreshed_text_index_keeps_its_tokenizer(plain):
    TEXTS[1].build(plain, language="German", custom_stop_words=["doc17"], remove_stop_words=True)
    indexes.append(plain)
    lance_ray.refresh_index(plain, progress=False)
    segments = lance.dataset(plain).stats.index_stats("text_idx")["indices"]
    assert len(segments) == 4
    params = [item["params"] for item in segments]
    assert all(item == params[0] for item in params)
    assert params[0]["language"] == "German"
    assert params[0]["custom_stop_words"] == ["doc17"]


@pytest.mark.parametrize("asked", _quick(VECTORS, *QUICK_VECTORS))
def test_recall_is_that_of_an_index_made_in_one_process(plain, tmp_path, asked):
    metric = asked.options["metric"]
    copy = indexes.copy(plain, tmp_path / "copy")
    report = asked.build(plain, **({"num_sub_vectors": 4} if "PQ" in asked.kind else {}))
    asked.build_in_one_process(copy)
    alone = asked.kind.endswith("_SQ") or (asked.kind.endswith("_PQ") and metric == "dot")
    assert report.segments == (1 if alone else 3)
    noise = 0.1
    assert indexes.recall(plain, metric) >= indexes.recall(copy, metric) - noise
    for place in (plain, copy):
        lance.dataset(place).delete("id % 11 = 3")
        indexes.append(place)
    (refreshed,) = lance_ray.refresh_index(plain, progress=False, return_report=True)
    assert refreshed.unindexed == 0
    assert refreshed.rows == (2318 if alone else 500)
    lance.dataset(copy).optimize.optimize_indices()
    assert indexes.recall(plain, metric) >= indexes.recall(copy, metric) - noise
    lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=5000)
    (merged,) = lance_ray.optimize_indices(plain, num_segments=1, progress=False, return_report=True)
    assert merged.segments == 1
    assert indexes.recall(plain, metric) >= indexes.recall(copy, metric) - noise
    indexes.assert_nothing_left(plain)


@pytest.mark.parametrize("kind", ["IVF_SQ", "IVF_HNSW_SQ"])
def test_scalar_quantised_distances_are_right_for_fragments_of_different_scale(tmp_path, kind):
    uri = str(tmp_path / "table")
    for scale in (1, 100):
        table = indexes.rows(500, first=1000 * scale)
        vectors = np.stack(table["vector"].to_numpy()) * scale
        place = table.schema.get_field_index("vector")
        table = table.set_column(place, table.schema.field(place), vector_array(vectors))
        lance.write_dataset(table, uri, mode="append" if scale > 1 else "create")
    Asked(kind, "vector", options={"num_partitions": 2}).build(uri)
    dataset = lance.dataset(uri)
    query = vectors[3]
    found = dataset.scanner(
        columns=["id", "vector", "_distance"],
        nearest={"column": "vector", "q": query, "k": 20, "nprobes": 2},
        disable_scoring_autoprojection=True,
    ).to_table()
    true = ((np.stack(found["vector"].to_numpy()) - query) ** 2).sum(axis=1)
    error = np.abs(found["_distance"].to_numpy() - true) / np.linalg.norm(query) ** 2
    assert error.max() < 0.02


def test_near_duplicates_index_can_be_built_refreshed_and_merged(uri):
    asked = Asked("MINHASHLSH", "text", options={"num_hashes": 64, "num_bands": 8})
    assert asked.build(uri).segments == 3
    indexes.append(uri)
    (refreshed,) = lance_ray.refresh_index(uri, progress=False, return_report=True)
    assert (refreshed.unindexed, refreshed.segments) == (0, 4)
    assert lance_ray.list_indices(uri)[0].details["num_hashes"] == 64
    (merged,) = lance_ray.optimize_indices(uri, num_segments=1, progress=False, return_report=True)
    assert (merged.segments, merged.fragments) == (1, 5)


def test_vectors_that_are_null_or_not_finite_are_left_out_of_the_training(tmp_path):
    values = np.random.default_rng(0).normal(size=(1200, 16)).astype("float32")
    values[::7] = np.nan
    vectors = [None if place % 5 == 0 else row.tolist() for place, row in enumerate(values)]
    table = pa.table({"id": range(1200), "vector": pa.array(vectors, pa.list_(pa.float32(), 16))})
    uri = str(tmp_path / "table")
    lance.write_dataset(table, uri, max_rows_per_file=300)
    report = lance_ray.create_index(
        uri,
        "vector",
        "IVF_PQ",
        num_partitions=2,
        num_sub_vectors=4,
        num_bits=4,
        num_segments=2,
        progress=False,
        return_report=True,
    )
    assert report.segments == 2
    query = values[1]
    nearest = {"column": "vector", "q": query, "k": 5, "nprobes": 2, "refine_factor": 20}
    assert lance.dataset(uri).to_table(nearest=nearest)["id"].to_pylist()[0] == 1


def test_nested_vectors_and_lists_of_vectors_are_indexed(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(size=(600, 16)).astype("float32")
    nested = pa.StructArray.from_arrays([vector_array(values)], names=["v"])
    many = pa.array([[row.tolist(), (-row).tolist()] for row in values], pa.list_(pa.list_(pa.float32(), 16)))
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"id": range(600), "s": nested, "many": many}), uri, max_rows_per_file=200)
    for column, metric in (("s.v", "l2"), ("many", "cosine")):
        report = lance_ray.create_index(
            uri, column, "IVF_FLAT", metric=metric, num_partitions=3, num_segments=3, progress=False, return_report=True
        )
        assert report.segments == 3
    dataset = lance.dataset(uri)
    found = dataset.scanner(columns=["id"], nearest={"column": "s.v", "q": values[5], "k": 3, "nprobes": 3})
    assert found.to_table()["id"].to_pylist()[0] == 5
    assert "ANN" in found.explain_plan()
    several = dataset.scanner(columns=["id"], nearest={"column": "many", "q": [values[7]], "k": 3, "nprobes": 3})
    assert several.to_table()["id"].to_pylist()[0] == 7


def test_binary_vectors_are_indexed_by_hamming_distance(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, size=(400, 8)).astype("uint8")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 8)
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"id": range(400), "vector": vectors}), uri, max_rows_per_file=100)
    Asked("IVF_FLAT", "vector", options={"metric": "hamming", "num_partitions": 2}).build(uri)
    nearest = {"column": "vector", "q": values[9], "k": 2, "nprobes": 2, "metric": "hamming"}
    assert lance.dataset(uri).to_table(nearest=nearest)["id"].to_pylist()[0] == 9


# Models


def test_the_callers_centroids_and_codes_are_what_the_index_holds(plain):
    random = np.random.default_rng(1)
    centroids = random.normal(size=(3, 16)).astype("float32")
    codes = random.normal(size=(4, 256, 4)).astype("float32")
    report = lance_ray.create_index(
        plain,
        "vector",
        "IVF_PQ",
        num_sub_vectors=4,
        ivf_centroids=centroids,
        pq_codebook=codes,
        num_segments=2,
        progress=False,
        return_report=True,
    )
    assert report.segments == 2
    dataset = lance.dataset(plain)
    for segment in dataset.describe_indices()[0].segments:
        models = index_models.stored_models(dataset, str(segment.uuid), "IVF_PQ")
        assert models is not None
        assert models.centroids is not None
        assert models.codebook is not None
        assert np.array_equal(models.centroids.flatten(), centroids.ravel())
        assert np.array_equal(models.codebook.flatten(), codes.ravel())


@pytest.mark.parametrize("kind", ["IVF_FLAT", "IVF_PQ", "IVF_RQ", "IVF_HNSW_PQ"])
def test_new_segments_share_the_models_of_the_index(plain, kind):
    Asked(kind, "vector", options={"num_partitions": 4}).build(plain, num_segments=2)
    indexes.append(plain)
    lance_ray.refresh_index(plain, progress=False)
    dataset = lance.dataset(plain)
    models = [
        index_models.stored_models(dataset, str(item.uuid), kind) for item in dataset.describe_indices()[0].segments
    ]
    assert len(models) == 3
    first = models[0]
    assert first is not None
    assert all(item is not None and item.same_as(first) for item in models)


def test_retraining_makes_other_models(plain):
    asked = Asked("IVF_FLAT", "vector", options={"num_partitions": 4})
    asked.build(plain)
    dataset = lance.dataset(plain)
    before = index_models.stored_models(dataset, str(dataset.describe_indices()[0].segments[0].uuid), "IVF_FLAT")
    (report,) = lance_ray.optimize_indices(plain, retrain=True, progress=False, return_report=True)
    assert report.rows == 2000
    dataset = lance.dataset(plain)
    after = index_models.stored_models(dataset, str(dataset.describe_indices()[0].segments[0].uuid), "IVF_FLAT")
    assert before is not None
    assert after is not None
    assert not before.same_as(after)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_centroids_trained_in_shares_are_as_good_as_those_trained_from_one_sample(plain, tmp_path, monkeypatch, metric):
    copy = indexes.copy(plain, tmp_path / "copy")
    asked = Asked("IVF_FLAT", "vector", options={"metric": metric, "num_partitions": 12})
    asked.build(copy)
    tasks = _count_tasks(monkeypatch)
    monkeypatch.setattr("lance_ray.planning.indexes.SAMPLE_BYTES", 40_000)
    asked.build(plain)
    assert tasks["train_centroids"] > 1
    assert tasks["cluster_centroids"] == 1
    assert tasks["sum_up"] == index_models.REFINING_PASSES * tasks["train_centroids"]
    assert indexes.recall(plain, metric) >= indexes.recall(copy, metric) - 0.1


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_codebook_trained_in_parts_is_as_good_as_one_trained_at_once(plain, tmp_path, monkeypatch, metric):
    copy = indexes.copy(plain, tmp_path / "copy")
    asked = Asked(
        "IVF_PQ", "vector", options={"metric": metric, "num_partitions": 4, "num_sub_vectors": 8, "num_bits": 4}
    )
    asked.build(copy)
    tasks = _count_tasks(monkeypatch)
    monkeypatch.setattr(index_build, "on_cluster", lambda *args: index_build.Where(LocalExecutor(2), 2, nodes=3))
    asked.build(plain)
    assert tasks["train_codebook"] == 3
    assert indexes.recall(plain, metric) >= indexes.recall(copy, metric) - 0.1


def _count_tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts: dict[str, int] = {}
    run = index_build.Tasks.run

    def counting(self: Any, fn: Any, tasks: Any, *args: Any) -> list[Any]:
        counts[fn.__name__] = counts.get(fn.__name__, 0) + len(tasks)
        return run(self, fn, tasks, *args)

    monkeypatch.setattr(index_build.Tasks, "run", counting)
    return counts


# Reports, names, parts of a table


def test_the_functions_return_the_dataset_unless_the_report_is_asked_for(plain):
    dataset = lance_ray.create_scalar_index(plain, column="id", index_type="btree", progress=False)
    assert isinstance(dataset, lance.LanceDataset)
    assert dataset.version == 2
    assert isinstance(lance_ray.refresh_index(plain, progress=False), lance.LanceDataset)
    assert isinstance(lance_ray.optimize_indices(plain, progress=False), lance.LanceDataset)
    report = Asked("BTREE", "id").build(plain, name="other", num_segments=2)
    assert "'other' on id: 2 segment(s) built, 2,000 rows" in str(report)
    assert {item.name for item in lance_ray.list_indices(plain)} == {"id_idx", "other"}


def test_message_and_properties_are_those_of_the_commit(plain):
    report = Asked("BTREE", "id").build(plain, commit_message="by hand", transaction_properties={"team": "search"})
    assert report.version is not None
    transaction: Any = lance.dataset(plain).read_transaction(report.version)
    assert transaction.transaction_properties["team"] == "search"
    assert "by hand" in transaction.transaction_properties.values()


def test_a_part_of_the_fragments_is_indexed_and_a_refresh_takes_in_the_rest(plain):
    Asked("BTREE", "id").build(plain, fragment_ids=[1, 3])
    assert indexes.covered(plain, "id_idx") == {1, 3}
    indexes.assert_filters_agree(plain, SCALARS[0])
    (info,) = lance_ray.list_indices(plain)
    assert (info.fragments, info.unindexed_fragments, info.rows, info.coverage) == (2, 2, 1000, 0.5)
    lance_ray.refresh_index(plain, "id_idx", progress=False)
    assert indexes.covered(plain, "id_idx") == {0, 1, 2, 3}
    (report,) = lance_ray.refresh_index(plain, "id_idx", progress=False, return_report=True)
    assert report.version is None
    assert "nothing to do" in str(report)


@pytest.mark.parametrize("asked", [*SCALARS[:4], TEXTS[0], *VECTORS[:4]], ids=lambda item: f"{item.kind} {item.column}")
def test_an_untrained_index_knows_no_row_until_it_is_refreshed(plain, asked):
    later = {"num_partitions": None} if asked in VECTORS else {}
    report = asked.build(plain, train=False, **later)
    assert (report.fragments, report.rows, report.unindexed) == (0, 0, 4)
    (refreshed,) = lance_ray.refresh_index(plain, progress=False, return_report=True)
    assert (refreshed.unindexed, refreshed.fragments) == (0, 4)
    if asked.filters:
        indexes.assert_filters_agree(plain, asked)


def test_an_index_of_an_empty_table_is_filled_later(tmp_path):
    uri = str(tmp_path / "table")
    lance.write_dataset(indexes.rows(10).schema.empty_table(), uri)
    SCALARS[0].build(uri)
    Asked("IVF_FLAT", "vector").build(uri)
    indexes.append(uri, 800, first=0)
    lance_ray.refresh_index(uri, progress=False)
    indexes.assert_filters_agree(uri, SCALARS[0])
    assert indexes.covered(uri, "vector_idx") == {0}
    with pytest.raises(InvalidArgumentError, match="BITMAP index of a table without rows"):
        Asked("BITMAP", "group").build(indexes.make(tmp_path / "none", 10, 1) and _emptied(tmp_path / "none"))


def _emptied(path: Path) -> str:
    lance.dataset(str(path)).delete("true")
    return str(path)


def test_the_segments_uuid_may_be_chosen(plain):
    chosen = "12345678-1234-4234-8234-123456789abc"
    report = lance_ray.create_scalar_index(
        plain, column="group", index_type="BITMAP", index_uuid=chosen, progress=False, return_report=True
    )
    assert report.segments == 1
    assert str(lance.dataset(plain).describe_indices()[0].segments[0].uuid) == chosen


def test_options_of_a_kind_reach_the_engine(plain):
    Asked("ZONEMAP", "id").build(plain, rows_per_zone=100, num_segments=1)
    assert lance.dataset(plain).stats.index_stats("id_idx")["indices"][0]["rows_per_zone"] == 100
    Asked(IndexConfig("zonemap", {"rows_per_zone": 50}), "id").build(plain, num_segments=1)
    assert lance.dataset(plain).stats.index_stats("id_idx")["indices"][0]["rows_per_zone"] == 50
    indexes.append(plain)
    lance_ray.refresh_index(plain, progress=False)
    assert {item["rows_per_zone"] for item in lance.dataset(plain).stats.index_stats("id_idx")["indices"]} == {50}


def test_optimizing_merges_the_newest_segments_as_the_engine_does(plain):
    asked = SCALARS[0]
    asked.build(plain, num_segments=1)
    for first in (10_000, 20_000):
        indexes.append(plain, 100, first)
        lance_ray.optimize_indices(plain, num_indices_to_merge=0, progress=False)
    assert lance_ray.list_indices(plain)[0].segments == 3
    indexes.append(plain, 100, 30_000)
    (report,) = lance_ray.optimize_indices(plain, indices="id_idx", progress=False, return_report=True)
    assert report.segments == 3  # the newest and the new rows are one now
    (report,) = lance_ray.optimize_indices(plain, num_indices_to_merge=None, progress=False, return_report=True)
    assert report.segments == 1
    indexes.assert_filters_agree(plain, asked)
    indexes.assert_nothing_left(plain)


def test_segments_with_models_of_their_own_are_built_anew_when_they_are_merged(plain):
    dataset = lance.dataset(plain)
    segments: list[Any] = [
        dataset.create_index_uncommitted("vector", "IVF_FLAT", name="vector_idx", fragment_ids=part, num_partitions=4)
        for part in ([0, 1], [2, 3])
    ]
    dataset.commit_existing_index_segments("vector_idx", "vector", segments)
    (report,) = lance_ray.optimize_indices(plain, num_segments=1, progress=False, return_report=True)
    assert report.segments == 1
    assert indexes.recall(plain, "l2", nprobes=4) == 1.0


def test_an_index_is_dropped_listed_and_loaded(plain):
    SCALARS[0].build(plain)
    TEXTS[1].build(plain)
    assert [str(item).split(":")[0] for item in lance_ray.list_indices(plain)] == ["id_idx", "text_idx"]
    report = lance_ray.prewarm(plain, "text_idx", with_position=True)
    assert len(report.processes) == 1
    assert "loaded in 1 process(es)" in str(report)
    dataset = lance_ray.drop_index(plain, "id_idx")
    assert [item.name for item in dataset.describe_indices()] == ["text_idx"]
    for call in (lance_ray.drop_index, lance_ray.prewarm, lance_ray.refresh_index):
        with pytest.raises(InvalidArgumentError, match=r"id_idx.*must be an index of the table"):
            call(plain, "id_idx")


# Others at work meanwhile


def _meanwhile(monkeypatch: pytest.MonkeyPatch, act: Any, times: int = 1) -> list[int]:
    """Others act just before each of the first commits."""
    done: list[int] = []
    apply = commit.apply

    def late(*args: Any, **kwargs: Any) -> Any:
        if len(done) < times:
            done.append(1)
            act()
        return apply(*args, **kwargs)

    monkeypatch.setattr(commit, "apply", late)
    return done


RACED = [SCALARS[0], SCALARS[3], SCALARS[5], VECTORS[0], VECTORS[6]]


@pytest.mark.parametrize("asked", _quick(RACED, ("BTREE", "id"), ("IVF_FLAT", "l2"), ("IVF_SQ", "l2")))
def test_a_build_that_raced_a_compaction_covers_the_rows_that_there_are_now(uri, monkeypatch, asked):
    lance.dataset(uri).delete("id >= 1000 AND id < 1400")  # of fragment 2 a part is left, and a compaction takes it
    _meanwhile(monkeypatch, lambda: lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=500))
    report = asked.build(uri, num_segments=4)
    assert report.rebuilt >= 1
    assert indexes.covered(uri, asked.name) == set(lance.dataset(uri).fragment_ids())
    if asked.filters:
        indexes.assert_filters_agree(uri, asked)
    else:
        assert indexes.recall(uri, "l2", nprobes=4) > 0.5
    indexes.assert_nothing_left(uri)


def test_only_what_the_compaction_rewrote_is_built_again(plain, monkeypatch):
    lance.dataset(plain).delete("id >= 1000 AND id < 1400")
    _meanwhile(monkeypatch, lambda: lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=500))
    report = SCALARS[0].build(plain, num_segments=4)
    assert report.rebuilt == 1
    assert report.rows == 1600 + 100
    indexes.assert_filters_agree(plain, SCALARS[0])


def test_a_build_that_always_loses_gives_up_and_leaves_the_old_index(plain, monkeypatch):
    SCALARS[0].build(plain)
    before = lance_ray.list_indices(plain)

    gone = iter(range(100))

    def act() -> None:
        lance.dataset(plain).delete(f"id % 500 = {next(gone)}")
        lance.dataset(plain).optimize.compact_files(materialize_deletions_threshold=1e-6)

    _meanwhile(monkeypatch, act, times=100)
    with pytest.raises(CommitConflictError):
        SCALARS[0].build(plain)
    assert lance_ray.list_indices(plain)[0].segments == before[0].segments
    indexes.assert_filters_agree(plain, SCALARS[0])
    indexes.assert_nothing_left(plain)


@pytest.mark.parametrize("act", ["append", "delete", "update", "delete a fragment", "rewrite the column"])
def test_a_build_that_raced_a_change_of_rows_answers_right(uri, monkeypatch, act):
    def change() -> None:
        dataset = lance.dataset(uri)
        if act == "append":
            indexes.append(uri)
        elif act == "delete":
            dataset.delete("id % 3 = 0")
        elif act == "update":
            dataset.update({"id": "id + 50000"}, where="id < 20")
        elif act == "delete a fragment":
            dataset.delete("id < 500")
        else:
            lance_ray.update_columns(uri, columns=["id"], transform={"id": "id + 7"}, progress=False)

    if act == "rewrite the column":
        monkeypatch.setattr("lance_ray.column_jobs.RayExecutor", lambda *args, **kwargs: LocalExecutor(1))
    _meanwhile(monkeypatch, change)
    SCALARS[0].build(uri)
    indexes.assert_filters_agree(uri, SCALARS[0])


@pytest.mark.parametrize("act", ["drop", "cast"])
def test_a_build_whose_column_is_gone_leaves_no_index(plain, monkeypatch, act):
    def change() -> None:
        if act == "drop":
            lance.dataset(plain).drop_columns(["id"])
        else:
            lance_ray.alter_columns(plain, {"path": "id", "data_type": pa.int32()})

    _meanwhile(monkeypatch, change)
    with pytest.raises(SchemaMismatchError, match="dropped or cast"):
        SCALARS[0].build(plain)
    dataset = lance.dataset(plain)
    assert dataset.describe_indices() == []
    assert dataset.count_rows("`group` = 'g1'") == 286
    indexes.assert_nothing_left(plain)


@pytest.mark.parametrize("act", ["drop", "cast"])
def test_an_index_that_landed_after_its_column_went_is_taken_away_again(plain, monkeypatch, act):
    send = commit._send

    def late(table: Any, base: Any, transaction: Any, operation: Any, *rest: Any) -> Any:
        if isinstance(operation, commit.PutIndex):
            if act == "drop":
                lance.dataset(plain).drop_columns(["id"])
            else:
                lance_ray.alter_columns(plain, {"path": "id", "data_type": pa.int32()})
        return send(table, base, transaction, operation, *rest)

    monkeypatch.setattr(commit, "_send", late)
    with pytest.raises(SchemaMismatchError, match="dropped or cast"):
        SCALARS[0].build(plain)
    dataset = lance.dataset(plain)
    assert dataset.describe_indices() == []
    assert dataset.count_rows("`group` = 'g1'") == 286


def test_two_builds_of_one_index_leave_one(plain, monkeypatch):
    other = threading.Event()

    def act() -> None:
        lance.dataset(plain).create_scalar_index("id", "BITMAP", name="id_idx")
        other.set()

    _meanwhile(monkeypatch, act)
    report = SCALARS[0].build(plain)
    assert other.is_set()
    (info,) = lance_ray.list_indices(plain)
    assert (info.kind, info.segments) == ("BTREE", report.segments)
    indexes.assert_filters_agree(plain, SCALARS[0])


def test_a_table_that_was_overwritten_gets_no_index(plain, monkeypatch):
    _meanwhile(monkeypatch, lambda: lance.write_dataset(indexes.rows(100), plain, mode="overwrite"))
    with pytest.raises(CommitConflictError):
        SCALARS[0].build(plain)
    assert lance.dataset(plain).describe_indices() == []


def test_the_callers_fragments_are_not_there_any_more(plain, monkeypatch):
    _meanwhile(monkeypatch, lambda: lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=5000))
    with pytest.raises(CommitConflictError, match=r"fragments \[0, 1\].*were rewritten by others"):
        SCALARS[0].build(plain, fragment_ids=[0, 1])
    indexes.assert_nothing_left(plain)


def test_optimizing_that_raced_a_compaction_is_done_again(plain, monkeypatch):
    SCALARS[0].build(plain)
    indexes.append(plain)
    _meanwhile(monkeypatch, lambda: lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=700))
    lance_ray.optimize_indices(plain, num_segments=1, progress=False)
    indexes.assert_filters_agree(plain, SCALARS[0])
    indexes.assert_nothing_left(plain)


def test_an_old_handle_indexes_the_newest_version_it_was_opened_at_and_rebases(plain):
    old = lance.dataset(plain)
    indexes.append(plain)
    report = lance_ray.create_scalar_index(old, column="id", index_type="BTREE", progress=False, return_report=True)
    assert (report.fragments, report.unindexed) == (4, 1)
    indexes.assert_filters_agree(plain, SCALARS[0])


# Failures


def test_a_failed_segment_is_built_again_alone(plain, monkeypatch):
    build, failed = index_build._build, list[Any]()

    def once(spec: Any, task: Any, name: Any) -> Any:
        if 2 in task.fragments and not failed:
            failed.append(task)
            raise ConnectionResetError("gone")
        return build(spec, task, name)

    monkeypatch.setattr(index_build, "_build", once)
    report = SCALARS[0].build(plain, num_segments=4)
    assert (report.retried, report.built, report.segments) == (1, 4, 4)


def test_a_segment_that_cannot_be_built_ends_the_build_and_leaves_nothing(plain, monkeypatch):
    build = index_build._build

    def never(spec: Any, task: Any, name: Any) -> Any:
        if 2 in task.fragments:
            raise ValueError("a poisoned fragment")
        return build(spec, task, name)

    monkeypatch.setattr(index_build, "_build", never)
    with pytest.raises(TaskFailedError, match="a poisoned fragment"):
        SCALARS[3].build(plain, num_segments=4)
    assert lance.dataset(plain).version == 1
    indexes.assert_nothing_left(plain)


def test_a_commit_whose_answer_was_lost_is_recognised(plain, monkeypatch):
    send = commit._send

    def lossy(*args: Any) -> Any:
        send(*args)
        raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(commit, "_send", lossy)
    report = SCALARS[0].build(plain)
    assert report.recovered
    assert lance.dataset(plain).version == report.version == 2
    indexes.assert_filters_agree(plain, SCALARS[0])
    indexes.assert_nothing_left(plain)


def test_files_are_kept_while_it_is_not_known_whether_the_commit_landed(plain, monkeypatch):
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise CommitOutcomeUnknownError("no answer", operation_id="x")

    monkeypatch.setattr(commit, "apply", unknown)
    with pytest.raises(CommitOutcomeUnknownError):
        SCALARS[0].build(plain)
    assert len(indexes.segments_on_disk(plain)) == 3


def test_a_build_that_was_cleaned_up_does_not_commit(plain, monkeypatch):
    monkeypatch.setattr("lance_ray.ledger.JobRef.is_open", lambda self: False)
    with pytest.raises(LanceRayError):
        SCALARS[3].build(plain)
    assert lance.dataset(plain).version == 1


# Bad input


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"column": "nope"}, "column='nope'.*must be a column"),
        ({"column": ""}, "column"),
        ({"index_type": "HASH"}, "index_type='HASH'.*BTREE"),
        ({"index_type": "IVF_PQ"}, "made by create_index"),
        ({"index_type": 3}, "index_type=3"),
        ({"column": "vector"}, "index_type.*BTREE on vector"),
        ({"column": "id", "index_type": "LABEL_LIST"}, "index_type.*LABEL_LIST on id"),
        ({"column": "id", "index_type": "INVERTED"}, "index_type.*INVERTED on id"),
        ({"column": "text", "index_type": "INVERTED", "stemming": True}, "stemming"),
        ({"zones": 3}, "zones=3.*zone_size"),
        ({"name": 7}, "name=7"),
        ({"replace": "yes"}, "replace='yes'"),
        ({"train": 1}, "train=1"),
        ({"fragment_ids": [99]}, r"fragment_ids=\[99\].*4 fragments"),
        ({"fragment_ids": []}, "fragment_ids"),
        ({"fragment_ids": "12"}, "fragment_ids='12'"),
        ({"num_segments": 0}, "num_segments=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"index_uuid": "x"}, "index_uuid='x'"),
        ({"index_uuid": "12345678-1234-4234-8234-123456789abc"}, "index_uuid.*the engine chooses"),
        ({"ray_remote_args": {"num_returns": 2}}, "num_returns"),
        ({"progress": "loud"}, "progress"),
        ({"return_report": "yes"}, "return_report"),
        ({"transaction_properties": {"lance_ray.x": "1"}}, "transaction_properties"),
        ({"commit_message": 7}, "commit_message=7"),
    ],
)
def test_a_bad_argument_of_a_scalar_index_is_named_before_anything_is_built(plain, monkeypatch, given, named):
    monkeypatch.setattr(index_build.Tasks, "run", None)
    arguments = {"column": "id", "index_type": "BTREE", **given}
    with pytest.raises(InvalidArgumentError, match=named):
        lance_ray.create_scalar_index(plain, **arguments)
    indexes.assert_nothing_left(plain)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"column": "id"}, "column='id'.*no vectors"),
        ({"index_type": "IVF_XX"}, "index_type='IVF_XX'.*IVF_FLAT"),
        ({"index_type": "BTREE"}, "made by create_scalar_index"),
        ({"metric": "manhattan"}, "metric='manhattan'"),
        ({"num_partitions": 0}, "num_partitions=0"),
        ({"index_type": "IVF_PQ", "num_sub_vectors": 5}, "num_sub_vectors=5.*16"),
        ({"num_sub_vectors": 4}, "num_sub_vectors"),
        ({"sample_rate": 1}, "sample_rate=1"),
        ({"max_iters": 0}, "max_iters=0"),
        ({"ivf_centroids": np.zeros((3, 5), "float32")}, "ivf_centroids"),
        ({"ivf_centroids": "many"}, "ivf_centroids"),
        ({"ivf_centroids": np.zeros((3, 16), "float32"), "num_partitions": 4}, "num_partitions=4"),
        ({"index_type": "IVF_PQ", "pq_codebook": np.zeros((4, 256, 4), "float32")}, "pq_codebook"),
        ({"pq_codebook": np.zeros((4, 256, 4), "float32")}, "pq_codebook"),
        ({"index_type": "IVF_RQ", "rabitq_model": 3}, "rabitq_model"),
        ({"speed": 3}, "speed=3"),
        ({"m": 3}, "m=3"),
    ],
)
def test_a_bad_argument_of_a_vector_index_is_named_before_anything_is_built(plain, monkeypatch, given, named):
    monkeypatch.setattr(index_build.Tasks, "run", None)
    arguments = {"column": "vector", "index_type": "IVF_FLAT", **given}
    with pytest.raises(InvalidArgumentError, match=named):
        lance_ray.create_index(plain, **arguments)
    indexes.assert_nothing_left(plain)


def test_an_index_of_the_name_is_kept_when_it_must_not_be_replaced(plain):
    SCALARS[0].build(plain)
    with pytest.raises(InvalidArgumentError, match=r"name='id_idx'.*replace=True"):
        SCALARS[0].build(plain, replace=False)


def test_too_few_vectors_for_the_partitions_are_said_to_be(tmp_path):
    uri = indexes.make(tmp_path / "table", 40, 4)
    with pytest.raises((InvalidArgumentError, TaskFailedError), match="num_bits=8: needs 512 vectors, there are"):
        lance_ray.create_index(
            uri, "vector", "IVF_PQ", num_partitions=2, num_sub_vectors=4, num_segments=2, progress=False
        )


# What segments hold of fragments that they are not said to know


def _rewrite(uri: str, where: str, value: str, column: str = "id") -> None:
    lance_ray.update_columns(uri, columns=[column], transform={column: value}, filter=where, progress=False)


@pytest.fixture
def columns_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_ray.column_jobs.RayExecutor", lambda *args, **kwargs: LocalExecutor(1))


REWRITTEN = [
    (SCALARS[0], "id", "id + 50000"),
    (SCALARS[3], "`group`", "'g0'"),
    (SCALARS[5], "text", "'another text'"),
    (TEXTS[0], "text", "'another text'"),
]


@pytest.mark.parametrize(("asked", "column", "value"), REWRITTEN, ids=[item[0].kind for item in REWRITTEN])
@pytest.mark.parametrize(
    "then", ["refresh", *(pytest.param(item, marks=pytest.mark.slow) for item in ("optimize", "merge"))]
)
def test_values_from_before_a_column_was_rewritten_do_not_come_back(uri, columns_here, asked, column, value, then):
    asked.build(uri)
    _rewrite(uri, "id < 100", value, column.strip("`"))
    if then == "refresh":
        lance_ray.refresh_index(uri, progress=False)
    else:
        lance_ray.optimize_indices(uri, progress=False, num_segments=1 if then == "merge" else None)
    assert indexes.covered(uri, asked.name) == set(lance.dataset(uri).fragment_ids())
    if asked.filters:
        indexes.assert_filters_agree(uri, asked)
    else:
        assert len(indexes.words_found(uri, "word7")) == 38
        assert len(indexes.words_found(uri, "another")) == 100


@pytest.mark.parametrize("asked", [SCALARS[3], SCALARS[4], TEXTS[0]], ids=lambda item: item.kind)
@pytest.mark.parametrize("compacted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compacted"])
def test_values_from_before_an_update_of_rows_with_stable_ids_do_not_come_back(tmp_path, asked, compacted):
    uri = indexes.make(tmp_path / "table", enable_stable_row_ids=True)
    asked.build(uri)
    lance.dataset(uri).update({"group": "'g0'", "tags": "['t9']", "text": "'another text'"}, where="id < 100")
    if compacted:
        lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=3000)
    lance_ray.refresh_index(uri, progress=False)
    lance_ray.optimize_indices(uri, num_segments=1, progress=False)
    if asked.filters:
        indexes.assert_filters_agree(uri, asked)
    else:
        assert len(indexes.words_found(uri, "word7")) == 38
        assert len(lance.dataset(uri).to_table(full_text_query="another", columns=["id"])) == 100


def test_appended_rows_with_stable_ids_do_not_make_a_refresh_build_everything(tmp_path):
    uri = indexes.make(tmp_path / "table", enable_stable_row_ids=True)
    SCALARS[0].build(uri)
    indexes.append(uri)
    lance.dataset(uri).delete("id % 5 = 0")
    lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=700)
    (report,) = lance_ray.refresh_index(uri, progress=False, return_report=True)
    assert report.rows == 400
    indexes.assert_filters_agree(uri, SCALARS[0])


@pytest.mark.parametrize("asked", [SCALARS[0], SCALARS[3], TEXTS[0]], ids=lambda item: item.kind)
@pytest.mark.parametrize(
    "act",
    ["rewrite a part", *(pytest.param(item, marks=pytest.mark.slow) for item in ("update and compact", "compact"))],
)
def test_a_build_that_raced_a_change_of_some_rows_answers_right(uri, monkeypatch, columns_here, asked, act):
    def change() -> None:
        dataset = lance.dataset(uri)
        if act == "rewrite a part":
            _rewrite(uri, "id < 100", "id + 50000")
            _rewrite(uri, "id < 600", "'another text'", "text")
            _rewrite(uri, "id < 600", "'g0'", "group")
        elif act == "update and compact":
            dataset.update({"id": "id + 50000", "group": "'g0'", "text": "'another text'"}, where="id < 100")
        if "compact" in act:
            dataset.delete("id % 4 = 3")
            lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=600)

    _meanwhile(monkeypatch, change)
    asked.build(uri)
    if asked.filters:
        indexes.assert_filters_agree(uri, asked)
    else:
        plain = lance.dataset(uri).count_rows("contains(text, 'word7 ')")
        assert len(lance.dataset(uri).to_table(full_text_query="word7", columns=["id"])) == plain


@pytest.mark.parametrize("asked", [SCALARS[0], TEXTS[0], VECTORS[0]], ids=lambda item: item.kind)
def test_a_build_that_raced_a_compaction_which_leaves_the_indexes_for_later_covers_the_table(plain, monkeypatch, asked):
    def change() -> None:
        lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=5000, defer_index_remap=True)

    _meanwhile(monkeypatch, change)
    asked.build(plain)
    assert indexes.covered(plain, asked.name) == set(lance.dataset(plain).fragment_ids())


@pytest.mark.parametrize(
    "asked", [VECTORS[0], VECTORS[3], VECTORS[9], VECTORS[12], SCALARS[0], TEXTS[0]], ids=lambda item: item.kind
)
def test_merging_after_a_compaction_that_left_the_indexes_for_later_loses_nothing(plain, asked):
    asked.build(plain)
    lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=1000, defer_index_remap=True)
    lance_ray.optimize_indices(plain, num_segments=1, progress=False)
    if asked.filters:
        indexes.assert_filters_agree(plain, asked)
    elif asked in TEXTS:
        assert len(indexes.words_found(plain, "word7")) == 40
    else:
        assert indexes.recall(plain, "l2", refine_factor=10) > 0.8


# Two at one index


def _other_build(uri: str, name: str = "group_idx") -> None:
    dataset = lance.dataset(uri)
    dataset.drop_index(name)
    lance.dataset(uri).create_scalar_index("group", "BTREE", name=name)
    indexes.append(uri, 100, 50_000)


def test_a_refresh_goes_on_with_what_the_index_has_become(plain, monkeypatch):
    SCALARS[3].build(plain)
    indexes.append(plain)
    _meanwhile(monkeypatch, lambda: _other_build(plain))
    lance_ray.refresh_index(plain, "group_idx", progress=False)
    (info,) = lance_ray.list_indices(plain)
    assert (info.kind, info.unindexed_fragments) == ("BTREE", 0)
    indexes.assert_filters_agree(plain, SCALARS[3])


def test_a_refresh_does_not_bring_a_dropped_index_back(plain, monkeypatch):
    SCALARS[3].build(plain)
    indexes.append(plain)
    _meanwhile(monkeypatch, lambda: lance.dataset(plain).drop_index("group_idx"))
    with pytest.raises(InvalidArgumentError, match="group_idx"):
        lance_ray.refresh_index(plain, "group_idx", progress=False)
    assert lance_ray.list_indices(plain) == []
    indexes.assert_nothing_left(plain)


def test_a_refresh_that_another_was_quicker_with_commits_nothing(plain, monkeypatch):
    SCALARS[3].build(plain)
    indexes.append(plain)
    real = commit.apply
    done: list[int] = []

    def late(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(1)
            lance_ray.refresh_index(plain, progress=False)
        return real(*args, **kwargs)

    monkeypatch.setattr(commit, "apply", late)
    (report,) = lance_ray.refresh_index(plain, progress=False, return_report=True)
    assert report.version is None
    assert lance.dataset(plain).version == 4
    indexes.assert_nothing_left(plain)


def test_an_index_that_appeared_meanwhile_is_not_replaced_if_it_must_not_be(plain, monkeypatch):
    old = lance.dataset(plain)
    _meanwhile(monkeypatch, lambda: lance.dataset(plain).create_scalar_index("id", "BITMAP", name="id_idx"))
    with pytest.raises(InvalidArgumentError, match=r"name='id_idx'.*replace=True"):
        SCALARS[0].build(plain, replace=False)
    with pytest.raises(InvalidArgumentError, match=r"name='id_idx'.*replace=True"):
        lance_ray.create_scalar_index(old, column="id", index_type="BTREE", replace=False, progress=False)
    assert lance_ray.list_indices(plain)[0].kind == "BITMAP"


def test_the_name_of_an_index_on_another_column_is_refused_before_anything_is_built(plain, monkeypatch):
    SCALARS[0].build(plain)
    monkeypatch.setattr(index_build.Tasks, "run", None)
    with pytest.raises(InvalidArgumentError, match=r"id_idx.*is the name of an index on id"):
        lance_ray.create_scalar_index(plain, column="group", index_type="BITMAP", name="id_idx", progress=False)


def test_a_chosen_uuid_never_replaces_files(plain, monkeypatch, columns_here):
    chosen = "12345678-1234-4234-8234-123456789abc"
    arguments: dict[str, Any] = {"index_type": "BITMAP", "index_uuid": chosen, "progress": False}
    _meanwhile(monkeypatch, lambda: _rewrite(plain, "id < 100", "'g0'", "group"))
    lance_ray.create_scalar_index(plain, column="group", **arguments)
    indexes.assert_filters_agree(plain, SCALARS[3])
    with pytest.raises(InvalidArgumentError, match=r"index_uuid.*such a segment"):
        lance_ray.create_scalar_index(plain, column="id", **arguments)
    old = lance.dataset(plain, 3)
    assert old.count_rows("`group` = 'g3'") == old.scanner(filter="`group` = 'g3'", use_scalar_index=False).count_rows()


# Odd tables


@pytest.mark.parametrize("kind", [pa.float16(), pa.float64()], ids=str)
def test_vectors_of_other_floats_are_indexed_in_segments(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(1200, 16)).astype(kind.to_pandas_dtype())
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), 16)
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"id": range(1200), "vector": vectors}), uri, max_rows_per_file=300)
    asked = Asked("IVF_PQ", "vector", options={"num_partitions": 2, "num_sub_vectors": 4})
    assert asked.build(uri, num_segments=2).segments == 2
    assert indexes.recall(uri, "l2", refine_factor=20) > 0.8


def test_a_share_of_the_sample_without_vectors_does_not_stop_the_training(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(800, 16)).astype("float32")
    vectors = [row.tolist() if place < 400 else None for place, row in enumerate(values)]
    uri = str(tmp_path / "table")
    table = pa.table({"id": range(800), "vector": pa.array(vectors, pa.list_(pa.float32(), 16))})
    lance.write_dataset(table, uri, max_rows_per_file=100)
    monkeypatch.setattr("lance_ray.planning.indexes.SAMPLE_BYTES", 7_000)
    asked = Asked("IVF_FLAT", "vector", options={"num_partitions": 2})
    assert asked.build(uri, num_segments=2).segments == 2


def test_a_column_without_any_vector_is_said_to_be(tmp_path):
    table = pa.table({"id": range(80), "vector": pa.nulls(80, pa.list_(pa.float32(), 16))})
    uri = str(tmp_path / "table")
    lance.write_dataset(table, uri, max_rows_per_file=20)
    with pytest.raises((InvalidArgumentError, TaskFailedError), match="no vector to train"):
        Asked("IVF_FLAT", "vector", options={"num_partitions": 2}).build(uri, num_segments=2)


def test_partitions_stay_what_they_were(plain):
    Asked("IVF_SQ", "vector", options={"num_partitions": 7}).build(plain)
    indexes.append(plain)
    for change in (lance_ray.refresh_index, lambda uri, **rest: lance_ray.optimize_indices(uri, retrain=True, **rest)):
        change(plain, progress=False)
        assert lance.dataset(plain).stats.index_stats("vector_idx")["indices"][0]["num_partitions"] == 7


def test_arguments_of_the_training_are_refused_where_nothing_is_trained(plain):
    for given in ({"num_partitions": 3}, {"ivf_centroids": np.zeros((3, 16), "float32")}, {"fragment_ids": [0]}):
        with pytest.raises(InvalidArgumentError, match="train=False"):
            lance_ray.create_index(plain, "vector", "IVF_FLAT", train=False, progress=False, **given)
    with pytest.raises(InvalidArgumentError, match="target_partition_size"):
        lance_ray.create_index(plain, "vector", "IVF_FLAT", num_partitions=3, target_partition_size=9, progress=False)


def test_what_the_engine_keeps_for_itself_is_not_dropped(plain):
    SCALARS[0].build(plain)
    lance.dataset(plain).optimize.compact_files(target_rows_per_fragment=5000, defer_index_remap=True)
    with pytest.raises(InvalidArgumentError, match="__lance_frag_reuse"):
        lance_ray.drop_index(plain, "__lance_frag_reuse")
    assert [item.name for item in lance_ray.list_indices(plain)] == ["id_idx"]


def test_columns_of_odd_names_are_indexed(tmp_path):
    struct = pa.StructArray.from_arrays([pa.array(range(100)), pa.array(range(100))], names=["a b", "x.y"])
    table = pa.table({"s": struct, "Name": range(100), "name": [str(item) for item in range(100)], "größe": range(100)})
    uri = str(tmp_path / "table")
    lance.write_dataset(table, uri, max_rows_per_file=25)
    wanted = [("s.`a b`", "BTREE"), ("s.`x.y`", "BTREE"), ("name", "INVERTED"), ("Name", "BTREE"), ("größe", "BTREE")]
    for number, (column, kind) in enumerate(wanted):
        lance_ray.create_scalar_index(uri, column=column, index_type=kind, name=f"index{number}", progress=False)
    assert len(lance_ray.list_indices(uri)) == 5
    lance.write_dataset(table, uri, mode="append")
    lance_ray.refresh_index(uri, progress=False)
    assert {item.unindexed_rows for item in lance_ray.list_indices(uri)} == {0}
