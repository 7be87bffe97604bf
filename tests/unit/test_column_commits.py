"""The schema of a commit is made of what the engine pickles: fields and their ids are as it makes them itself."""

from __future__ import annotations

from pathlib import Path

import lance
import pyarrow as pa
import pytest

from lance_ray.column_commits import AddColumns, added_fields, schema_digest
from lance_ray.table import TableRef

KINDS = [
    pa.int8(),
    pa.struct([("x", pa.int32()), ("y", pa.list_(pa.struct([("z", pa.string())])))]),
    pa.list_(pa.float16(), 4),
    pa.dictionary(pa.int16(), pa.string()),
    pa.decimal128(20, 3),
    pa.timestamp("us", "UTC"),
]


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    """A table from which a column with parts was dropped, whose ids are taken all the same."""
    rows = pa.table({"id": [1, 2], "gone": [{"a": 1}, {"a": 2}], "kept": [{"b": [1]}, {"b": []}]})
    made = lance.write_dataset(rows, str(tmp_path / "t"))
    made.drop_columns(["gone"])
    return lance.dataset(made.uri)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_columns_without_files_are_described_as_the_engine_describes_those_with_files(
    dataset: lance.LanceDataset, kind: pa.DataType
):
    columns = pa.schema([pa.field("new", kind), pa.field("more", pa.int64(), metadata={"unit": "m"})])
    fragment: object = dataset.get_fragment(0)
    values = pa.table([pa.nulls(2, item.type) for item in columns], schema=columns)
    _, schema = fragment.merge_columns(values.to_reader())  # type: ignore[attr-defined] # pylance may return None there
    table = TableRef.fold(dataset.uri, {}).pin()
    operation = AddColumns(table, columns, {}, complete=False).build(dataset)
    assert added_fields(operation.schema, dataset.lance_schema) == added_fields(schema, dataset.lance_schema)  # type: ignore[attr-defined] # it is a Merge


def test_a_digest_tells_columns_from_others_and_says_nothing_of_rows(dataset: lance.LanceDataset):
    digest = schema_digest(dataset)
    lance.write_dataset(pa.table({"id": [3], "kept": [{"b": [1]}]}), dataset.uri, mode="append")
    lance.dataset(dataset.uri).update_schema_metadata({"a": "b"})
    assert schema_digest(lance.dataset(dataset.uri)) == digest
    lance.dataset(dataset.uri).add_columns(pa.field("null", pa.int8()))
    assert schema_digest(lance.dataset(dataset.uri)) != digest
