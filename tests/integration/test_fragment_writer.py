"""Writers made by hand: files in the middle of a pipeline, one commit at its end, and nothing the engine misreads."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray
from lance.namespace import RestAdapter
from ray.data import SaveMode

from lance_ray import (
    InvalidArgumentError,
    LanceFragmentCommitter,
    LanceFragmentWriter,
    SchemaMismatchError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    read_lance,
)
from lance_ray.fragment_pickles import file_of_pickles
from tests.blocks import (
    SECRET,
    TYPED,
    assert_nothing_left_over,
    data_files,
    dataset,
    ids_of,
    referenced_files,
    rows,
    rows_per_file,
    transaction,
    versions,
    written_rows,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Ray leaves the log files of its executions to the garbage collector.
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


def run(writer: LanceFragmentWriter, committer: LanceFragmentCommitter, *blocks: Any) -> None:
    """The pipeline that both are made for, one batch for each block."""
    source = dataset(*blocks).map_batches(writer, batch_size=None, batch_format="pyarrow")
    source.write_datasink(committer)


# The two together


@pytest.mark.parametrize("mode", ["create", "overwrite", SaveMode.CREATE])
def test_files_become_a_table_in_one_commit(uri: str, mode: Any):
    committer = LanceFragmentCommitter(
        uri, mode=mode, commit_message="by hand", transaction_properties={"source": "pipeline"}
    )
    run(LanceFragmentWriter(uri, mode=mode), committer, rows(0, 3), rows(3, 2))
    assert sorted(ids_of(uri)) == [0, 1, 2, 3, 4]
    assert versions(uri) == [1]
    assert committer.receipt is not None
    assert committer.receipt.version == 1
    properties = transaction(uri, 1).transaction_properties or {}
    assert {"pipeline", "by hand"} <= set(properties.values())
    assert_nothing_left_over(uri)


@pytest.mark.parametrize("mode", ["append", "APPEND", None])
def test_files_are_appended_in_one_commit(table: str, mode: str | None):
    blocks = [rows(3, 2), pa.table({"text": ["row 5"], "id": [5]}), pa.table({"id": [6]})]
    run(LanceFragmentWriter(table, mode=mode), LanceFragmentCommitter(table, mode="append"), *blocks)
    found = sorted(written_rows(table), key=lambda row: row["id"])
    assert found == [*rows(0, 6).to_pylist(), {"id": 6, "text": None}]
    assert versions(table) == [1, 2]
    assert_nothing_left_over(table)


def test_an_overwrite_may_change_the_schema(table: str):
    new = pa.table({"name": ["a"], "score": [1.5]})
    run(LanceFragmentWriter(table, mode="overwrite"), LanceFragmentCommitter(table, mode="overwrite"), new)
    assert written_rows(table) == new.to_pylist()
    assert ids_of(table, version=1) == [0, 1, 2]


def test_a_declared_schema_is_the_one_of_the_table(uri: str):
    schema = pa.schema([pa.field("text", pa.large_string()), pa.field("id", pa.int32())])
    run(
        LanceFragmentWriter(uri, schema=schema, mode="create"),
        LanceFragmentCommitter(uri, schema=schema, mode="create"),
        rows(0, 2),
    )
    assert lance.dataset(uri).schema == schema
    assert written_rows(uri) == [{"text": "row 0", "id": 0}, {"text": "row 1", "id": 1}]


@pytest.mark.parametrize(
    ("transform", "wanted"),
    [
        (lambda batch: batch.slice(0, 1), [0, 2]),
        (lambda batch: batch.to_pandas(), [0, 1, 2]),
        (lambda batch: {"id": batch["id"].to_numpy() + 10, "text": batch["text"].to_pylist()}, [10, 11, 12]),
        (lambda batch: (batch.slice(i, 1) for i in range(batch.num_rows)), [0, 1, 2]),
        (lambda batch: batch.slice(0, 0), []),
    ],
    ids=["fewer rows", "pandas", "numpy", "generator", "no rows"],
)
def test_what_the_transform_makes_is_written(uri: str, transform: Any, wanted: list[int]):
    writer = LanceFragmentWriter(uri, transform=transform, mode="create", schema=TYPED)
    run(writer, LanceFragmentCommitter(uri, schema=TYPED), rows(0, 2), rows(2, 1))
    assert sorted(ids_of(uri)) == wanted
    assert_nothing_left_over(uri)


def test_a_batch_may_become_several_files(uri: str):
    writer = LanceFragmentWriter(uri, mode="create", max_rows_per_file=4)
    run(writer, LanceFragmentCommitter(uri), rows(0, 10))
    assert rows_per_file(uri) == [4, 4, 2]
    assert ids_of(uri) == list(range(10))


def test_a_file_is_told_as_pickles_for_code_that_commits_by_itself(uri: str):
    told = LanceFragmentWriter(uri)(rows(0, 3)).to_pylist()
    fragments = [pickle.loads(row["fragment"]) for row in told]
    schema = pickle.loads(told[0]["schema"])
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, fragments))
    assert written_rows(uri) == rows(0, 3).to_pylist()


WIDE = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("when", pa.timestamp("us", "UTC"), metadata={"unit": "us"}),
        pa.field("price", pa.decimal128(10, 2)),
        pa.field("tags", pa.list_(pa.field("tag", pa.large_string()))),
        pa.field("vector", pa.list_(pa.float32(), 2)),
        pa.field("place", pa.struct([pa.field("x", pa.date32()), pa.field("code", pa.binary(4))])),
        pa.field("kind", pa.dictionary(pa.int8(), pa.string())),
        pa.field("took", pa.duration("ms")),
        pa.field("at", pa.time64("us")),
        lance.blob_field("image"),
    ],
    {"made": "by hand"},
)


class OwnWriter:
    """What a job may have of its own in place of the package's writer: files, told as two pickles."""

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self.uri, self.schema = uri, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows that lance-ray's writer returns."""
        made = lance.fragment.write_fragments(batch, self.uri, schema=self.schema)
        told = [pickle.dumps(item) for item in made]
        return pa.table({"fragment": told, "schema": [pickle.dumps(self.schema)] * len(told)})


def test_files_of_a_jobs_own_writer_are_committed_as_those_of_lance_rays_are(uri: str):
    for mode in ("create", "append"):
        told = dataset(rows(0, 2), rows(2, 1)).map_batches(
            OwnWriter(uri, TYPED), batch_size=None, batch_format="pyarrow"
        )
        assert told.schema().names == ["fragment", "schema"]
        told.write_datasink(LanceFragmentCommitter(uri, mode=mode))
    assert sorted(ids_of(uri)) == [0, 0, 1, 1, 2, 2]
    assert versions(uri) == [1, 2]


def test_every_type_of_a_schema_is_told_by_its_pickle(uri: str):
    fragment = lance.fragment.write_fragments(rows(0, 1), uri)[0]
    row = {"fragment": pickle.dumps(fragment), "schema": pickle.dumps(WIDE)}
    told = file_of_pickles(row)
    assert told.arrow_schema.equals(WIDE, check_metadata=True)
    assert (told.rows, told.metadata()) == (1, fragment)


def test_a_file_is_told_as_plain_data(uri: str):
    told = LanceFragmentWriter(uri, mode="create")(rows(0, 3))
    assert told.schema.names == ["fragment", "schema", "rows", "bytes", "metadata"]
    assert told.column("rows").to_pylist() == [3]
    assert data_files(uri).pop() in told.column("metadata")[0].as_py()
    assert LanceFragmentWriter(uri, mode="create")(rows(0, 0)).column("fragment").to_pylist() == [None]


def test_batches_may_have_any_format(uri: str):
    for batch_format in ("numpy", "pandas", "pyarrow"):
        source = dataset(rows(0, 2)).map_batches(
            LanceFragmentWriter(uri, schema=TYPED), batch_size=None, batch_format=batch_format
        )
        mode = "create" if batch_format == "numpy" else "append"
        source.write_datasink(LanceFragmentCommitter(uri, mode=mode, schema=TYPED))
    assert written_rows(uri) == rows(0, 2).to_pylist() * 3


@pytest.mark.slow
def test_writers_are_made_on_actors_too(uri: str):
    source = dataset(rows(0, 3), rows(3, 2)).map_batches(
        LanceFragmentWriter, fn_constructor_args=[uri], batch_size=None, batch_format="pyarrow", concurrency=1
    )
    source.write_datasink(LanceFragmentCommitter(uri))
    assert sorted(ids_of(uri)) == [0, 1, 2, 3, 4]


@pytest.fixture(params=["dir", "rest"])
def namespace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Keywords that name a table of a namespace."""
    if request.param == "dir":
        yield {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}, "table_id": ["t"]}
        return
    with RestAdapter("dir", {"root": str(tmp_path)}, port=0) as server:
        properties = {"uri": f"http://127.0.0.1:{server.port}"}
        yield {"namespace_impl": "rest", "namespace_properties": properties, "table_id": ["t"]}


def test_tables_of_a_namespace_are_made_and_appended_to(namespace: dict[str, Any]):
    for mode in ("create", "append"):
        run(LanceFragmentWriter(mode=mode, **namespace), LanceFragmentCommitter(mode=mode, **namespace), rows(0, 2))
    assert read_lance(**namespace).count() == 4


# Two halves that do not fit


def test_an_append_of_files_that_were_written_for_an_overwrite_is_refused(table: str):
    """The engine would take the first column of a file for the first of the table, whatever their names."""
    swapped = pa.table({"text": ["x"], "id": [3]})
    with pytest.raises(SchemaMismatchError):
        run(LanceFragmentWriter(table, mode="overwrite"), LanceFragmentCommitter(table, mode="append"), swapped)
    assert versions(table) == [1]
    assert_nothing_left_over(table)


@pytest.mark.parametrize(("writing", "committing"), [("overwrite", "append"), ("append", "overwrite")])
def test_files_whose_column_ids_are_other_ones_are_refused(table: str, writing: str, committing: str):
    other = lance.dataset(table)
    other.drop_columns(["text"])
    other.add_columns(pa.field("text", pa.string()))  # from now on the ids have a gap
    with pytest.raises(InvalidArgumentError, match="another mode"):
        run(LanceFragmentWriter(table, mode=writing), LanceFragmentCommitter(table, mode=committing), rows(3, 1))
    assert ids_of(table) == [0, 1, 2]
    assert_nothing_left_over(table)


def test_files_of_another_schema_than_the_committers_are_refused(uri: str):
    with pytest.raises(SchemaMismatchError) as caught:
        run(
            LanceFragmentWriter(uri, mode="create"),
            LanceFragmentCommitter(uri, schema=pa.schema([("id", pa.int64())])),
            rows(0, 1),
        )
    assert caught.value.columns == ("text",)
    assert "text: string" in str(caught.value)
    assert data_files(uri) == set()


def test_files_in_another_order_than_the_committers_schema_are_read_right(uri: str):
    swapped = pa.table({"text": ["row 0"], "id": [0]})
    run(LanceFragmentWriter(uri, mode="create"), LanceFragmentCommitter(uri, schema=TYPED), swapped)
    assert lance.dataset(uri).schema == TYPED
    assert written_rows(uri) == rows(0, 1).to_pylist()


def test_a_writer_stays_with_the_table_that_it_was_made_for(table: str):
    """The same worker process may have served another writer of the same address."""
    run(LanceFragmentWriter(table), LanceFragmentCommitter(table, mode="append"), rows(3, 1))
    lance.write_dataset(pa.table({"other": [1]}), table, mode="overwrite")
    run(LanceFragmentWriter(table), LanceFragmentCommitter(table, mode="append"), pa.table({"other": [2]}))
    assert written_rows(table) == [{"other": 1}, {"other": 2}]


def test_rows_that_no_writer_made_are_refused(uri: str):
    with pytest.raises(InvalidArgumentError, match="LanceFragmentWriter"):
        dataset(rows(0, 2)).write_datasink(LanceFragmentCommitter(uri))


# Failures


def test_files_that_were_certainly_not_committed_are_removed(table: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise StorageError("no", kind="denied")

    monkeypatch.setattr("lance_ray.commit._send", refuse)
    before = data_files(table)
    with pytest.raises(StorageError):
        run(LanceFragmentWriter(table), LanceFragmentCommitter(table, mode="append"), rows(3, 2))
    assert data_files(table) == before == referenced_files(table)


def test_a_batch_that_does_not_fit_is_refused(table: str):
    with pytest.raises(Exception, match="extra") as caught:
        run(
            LanceFragmentWriter(table, mode="append"),
            LanceFragmentCommitter(table, mode="append"),
            pa.table({"id": [1], "extra": [2]}),
        )
    assert isinstance(caught.value.__cause__ or caught.value, (SchemaMismatchError, ray.exceptions.RayTaskError))
    assert versions(table) == [1]


# Bad input


@pytest.mark.parametrize("half", [LanceFragmentWriter, LanceFragmentCommitter])
def test_each_half_looks_at_the_table_before_any_task_starts(half: Any, table: str, tmp_path: Path):
    with pytest.raises(TableExistsError):
        half(table, mode="create")
    with pytest.raises(TableNotFoundError):
        half(tmp_path / "none", mode="append")
    with pytest.raises(InvalidArgumentError):
        half(table, mode="ignore")
    with pytest.raises(InvalidArgumentError):
        half(table, mode="apend")


@pytest.mark.parametrize(
    ("keywords", "parameter"),
    [
        ({"max_rows_per_group": 0}, "max_rows_per_group"),
        ({"retry_params": {"match": [""]}}, "texts"),
        ({"max_rows_per_file": 0}, "max_rows_per_file"),
        ({"max_bytes_per_file": -1}, "max_bytes_per_file"),
        ({"data_storage_version": "9.9"}, "data_storage_version"),
        ({"retry_params": {"tries": 3}}, "retry_params"),
        ({"retry_params": {"max_attempts": 0}}, "max_attempts"),
        ({"retry_params": {"max_attempts": "x"}}, "max_attempts"),
        ({"retry_params": {"max_delay": "x"}}, "max_delay"),
        ({"retry_params": 5}, "retry_params"),
        ({"transform": 5}, "transform"),
        ({"target_bases": ["nowhere"]}, "target_bases"),
    ],
)
def test_bad_arguments_of_a_writer_are_refused(uri: str, keywords: dict[str, Any], parameter: str):
    with pytest.raises(InvalidArgumentError) as caught:
        LanceFragmentWriter(uri, **keywords)
    assert caught.value.parameter == parameter


def test_what_travels_is_small_and_shows_no_secret(table: str):
    writer = LanceFragmentWriter(table, storage_options={"aws_secret_access_key": SECRET})
    assert SECRET not in f"{vars(writer)}"
    assert len(pickle.dumps(writer)) < 5000
