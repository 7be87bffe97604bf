"""Jobs written for lance-ray 0.5.0 and for Ray's own functions, run as they are."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pytest
import ray

import lance_ray
from lance_ray.datasink import LanceDatasink, LanceFragmentCommitter
from lance_ray.datasource import LanceDatasource
from lance_ray.errors import InvalidArgumentError, SchemaMismatchError, TableExistsError, TaskFailedError
from lance_ray.fragment import LanceFragmentWriter, write_fragment
from lance_ray.pandas import pd_to_arrow
from lance_ray.pool import get_or_create_pool
from tests.blocks import assert_nothing_left_over, dataset, ids_of, rows, written_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An address without a table."""
    return str(tmp_path / "table")


@pytest.fixture
def table(uri: str) -> str:
    """A table with the ids 0, 1, 2 in version 1."""
    lance.write_dataset(rows(0, 3), uri)
    return uri


def ids(found: ray.data.Dataset) -> list[int]:
    return sorted(row["id"] for row in found.take_all())


# Datasources and datasinks made by hand


def test_a_datasource_made_by_hand_reads_the_table_at_its_version(table: str):
    source = LanceDatasource(table, None, ["id"], "id > 0", dataset_options={"version": 1}, with_metadata=True)
    lance.write_dataset(rows(3, 2), table, mode="append")
    found = ray.data.read_datasource(source)
    assert found.schema().names == ["id", "_rowaddr", "_fragid"]
    assert ids(found) == [1, 2]
    assert source.lance_dataset.version == 1
    assert [fragment.fragment_id for fragment in source.fragments] == [0]


def test_a_datasource_made_by_hand_takes_pushdown_and_leaves_the_callers_options_alone(table: str):
    options = {"batch_size": 2}
    source = LanceDatasource(table, columns=["id"], scanner_options=options, fragment_ids=[0])
    assert ids(ray.data.read_datasource(source).filter(expr=ray.data.expressions.col("id") < 2)) == [0, 1]
    assert options == {"batch_size": 2}


@pytest.mark.parametrize(("mode", "left"), [("append", [0, 1, 2, 3, 4]), ("overwrite", [3, 4])])
def test_a_datasink_made_by_hand_writes_in_one_commit(table: str, mode: str, left: list[int]):
    dataset(rows(3, 1), rows(4, 1)).write_datasink(LanceDatasink(table, mode=mode))
    assert sorted(ids_of(table)) == left
    assert lance.dataset(table).version == 2
    assert_nothing_left_over(table)


def test_a_datasink_made_by_hand_may_be_used_again(uri: str):
    lance.write_dataset(rows(0, 1), uri)
    sink = LanceDatasink(uri, mode="append")
    for start in (1, 2):
        dataset(rows(start, 1)).write_datasink(sink)
    assert sorted(ids_of(uri)) == [0, 1, 2]
    assert_nothing_left_over(uri)


def test_a_datasink_made_by_hand_refuses_to_create_what_exists(table: str):
    with pytest.raises(TableExistsError):
        LanceDatasink(table)
    with pytest.raises(InvalidArgumentError, match="ignore"):
        LanceDatasink(table, mode="ignore")


def test_a_datasink_made_by_hand_makes_a_table_of_no_rows(uri: str):
    empty = ray.data.from_arrow(rows(0, 0))
    empty.write_datasink(LanceDatasink(uri, schema=rows(0, 0).schema))
    assert lance.dataset(uri).count_rows() == 0
    assert_nothing_left_over(uri)


def test_a_datasink_made_by_hand_removes_its_files_after_a_failure(table: str):
    source = dataset(rows(3, 2), pa.table({"other": ["x"]}))
    with pytest.raises((SchemaMismatchError, ray.exceptions.RayTaskError)):
        source.write_datasink(LanceDatasink(table, mode="append", min_rows_per_file=1))
    assert ids_of(table) == [0, 1, 2]
    assert_nothing_left_over(table)


# Writers made by hand


def test_fragments_are_written_by_hand_and_committed_by_the_callers_own_code(uri: str):
    written = write_fragment([rows(0, 2), rows(2, 1).to_pandas(), rows(3, 1).to_pydict()], uri)
    assert [type(schema) for _, schema in written] == [pa.Schema]
    operation = lance.LanceOperation.Overwrite(written[0][1], [fragment for fragment, _ in written])
    lance.LanceDataset.commit(uri, operation)
    assert ids_of(uri) == [0, 1, 2, 3]
    assert write_fragment([], uri) == []


def test_fragments_written_by_hand_for_a_table_are_appended(table: str):
    written = write_fragment([rows(3, 5)], table, max_rows_per_file=2)
    operation = lance.LanceOperation.Append([fragment for fragment, _ in written])
    lance.LanceDataset.commit(table, operation, read_version=1)
    assert ids_of(table) == list(range(8))
    assert len(written) == 3


def test_retry_parameters_of_lance_ray_are_taken(uri: str):
    params = {"description": "write", "match": ["some text"], "max_attempts": 3, "max_backoff_s": 1}
    assert len(write_fragment([rows(0, 1)], uri, retry_params=params)) == 1
    with pytest.raises(InvalidArgumentError, match="max_tries"):
        write_fragment([rows(0, 1)], uri, retry_params={"max_tries": 1})


def test_the_legacy_file_format_and_its_groups_are_written_where_asked_for(uri: str):
    writer = LanceFragmentWriter(uri, use_legacy_format=True, max_rows_per_group=2)
    dataset(rows(0, 5)).map_batches(writer, batch_size=None, batch_format="pyarrow").write_datasink(
        LanceFragmentCommitter(uri)
    )
    assert lance.dataset(uri).data_storage_version == "0.1"
    assert ids_of(uri) == [0, 1, 2, 3, 4]


def test_rows_of_a_writer_hold_pickles_as_in_lance_ray(uri: str):
    (row,) = LanceFragmentWriter(uri)(rows(0, 2)).to_pylist()
    assert isinstance(pickle.loads(row["fragment"]), lance.FragmentMetadata)
    assert pickle.loads(row["schema"]).names == rows(0, 2).schema.names


# Pools and frames


def test_a_pool_is_made_for_a_block_and_the_global_one_is_used_where_there_is_one():
    with get_or_create_pool(processes=1, ray_remote_args=None) as pool:
        assert pool.processes == 1
        made = pool
    with pytest.raises(InvalidArgumentError):
        made.executor()
    kept = lance_ray.init_global_pool(1)
    try:
        with get_or_create_pool(processes=1, ray_remote_args=None) as pool:
            assert pool is kept
    finally:
        lance_ray.clear_global_pool(close=True)


def test_frames_become_tables_with_columns_matched_by_name():
    schema = pa.schema([("b", pa.int32()), ("a", pa.string())])
    frame = pd.DataFrame({"a": ["x"], "b": [1]})
    wanted = pa.table({"b": [1], "a": ["x"]}, schema=schema)
    assert pd_to_arrow(frame, schema) == wanted
    assert pd_to_arrow(frame.to_dict("list"), schema) == wanted
    assert pd_to_arrow(wanted, None) == wanted


# Whole jobs


def test_a_job_for_lance_ray_runs_as_it_is(uri: str):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(40, dtype=np.float32)), 4)
    table = pa.table({"id": range(10), "vector": vectors})
    lance_ray.write_lance(ray.data.from_arrow(table), uri, min_rows_per_file=1, max_rows_per_file=5)
    lance_ray.write_lance(ray.data.from_arrow(table), uri, mode="append")
    lance_ray.add_columns(uri, transform=lambda batch: twice(batch), read_columns=["id"], concurrency=2)
    source = lance_ray.read_lance(uri, columns=["id"], with_metadata=True)
    more = source.map_batches(lambda batch: plus(batch), batch_format="pyarrow")
    lance_ray.merge_columns_from(uri, more.select_columns(["plus", "_rowaddr"]), batch_size=64)
    metrics: Any = lance_ray.compact_files(uri, num_workers=2)
    found = lance_ray.vector_search(uri, nearest={"column": "vector", "q": [0.0, 1, 2, 3], "k": 2}, num_workers=2)
    assert metrics.fragments_added == 1
    assert found["id"].to_pylist() == [0, 0]
    row = lance_ray.read_lance(uri, filter="id = 7").take(1)[0]
    assert (row["twice"], row["plus"]) == (14, 8)


def twice(batch: Any) -> pa.RecordBatch:
    return pa.record_batch({"twice": pa.compute.multiply(batch["id"], 2)})


def plus(table: pa.Table) -> pa.Table:
    return table.append_column("plus", pa.compute.add(table["id"], 1))


def test_a_job_for_ray_runs_as_it_is(uri: str):
    ray.data.range(10).write_lance(uri, mode=ray.data.SaveMode.CREATE)
    ray.data.range(5).write_lance(uri, mode=ray.data.SaveMode.APPEND, concurrency=1)
    found = ray.data.read_lance(uri, columns=["id"], filter="id >= 4", concurrency=1, num_cpus=1)
    assert ids(found) == [4, 4, 5, 6, 7, 8, 9]
    assert ids(ray.data.read_lance([uri, uri], version=1)) == sorted([*range(10)] * 2)
    assert written_rows(uri)[0] == {"id": 0}


def test_an_error_of_a_worker_names_what_is_wrong(table: str):
    with pytest.raises((TaskFailedError, SchemaMismatchError), match="other"):
        lance_ray.write_lance(dataset(pa.table({"other": ["x"]})), table, mode="append")
