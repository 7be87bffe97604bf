"""Blocks of every shape become one table: aligned by name and type, lossless, or refused with nothing left behind."""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
from lance import DatasetBasePath
from ray.data import Dataset

from lance_ray import SchemaMismatchError, write_lance
from tests.blocks import (
    assert_no_table,
    assert_nothing_left_over,
    dataset,
    files_below,
    rows_per_file,
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


def stored(uri: str, *blocks: Any, **options: Any) -> pa.Table:
    """The blocks as the table that they become."""
    write_lance(dataset(*blocks), uri, **options)
    assert_nothing_left_over(uri)
    return lance.dataset(uri).to_table()


# Types

UTC = dt.UTC
TYPES: dict[str, tuple[list[Any], pa.DataType]] = {
    "int8": ([-128, None, 127], pa.int8()),
    "uint64": ([0, None, 2**64 - 1], pa.uint64()),
    "float16": ([np.float16(0.5), None, np.float16("inf")], pa.float16()),
    "float64": ([-0.0, None, float("inf")], pa.float64()),
    "bool": ([True, None, False], pa.bool_()),
    "string": (["", None, "äöü 🙂"], pa.string()),
    "large_string": (["a", None, "b"], pa.large_string()),
    "large_binary": ([b"\x00\xff", None, b""], pa.large_binary()),
    "fixed_size_binary": ([b"abcd", None, b"\x00" * 4], pa.binary(4)),
    "decimal128": ([decimal.Decimal("-1.50"), None, decimal.Decimal("12345.67")], pa.decimal128(20, 2)),
    "decimal256": ([decimal.Decimal("1.5"), None, decimal.Decimal(10) ** 60], pa.decimal256(70, 2)),
    "date": ([dt.date(1969, 12, 31), None, dt.date(2400, 1, 1)], pa.date32()),
    "time": ([dt.time(23, 59, 59, 999999), None, dt.time(0)], pa.time64("us")),
    "duration": ([dt.timedelta(days=-1), None, dt.timedelta(microseconds=1)], pa.duration("us")),
    "timestamp": ([dt.datetime(1900, 1, 1), None, dt.datetime(2400, 1, 1)], pa.timestamp("us")),
    "zoned": (
        [dt.datetime(2024, 3, 31, 1, 30, tzinfo=UTC), None, dt.datetime(1970, 1, 1, tzinfo=UTC)],
        pa.timestamp("ms", "Europe/Berlin"),
    ),
    "dictionary": (["red", None, "red"], pa.dictionary(pa.int8(), pa.string())),
    "struct": ([{"a": 1, "b": {"c": "x"}}, None, {"a": None, "b": None}], None),
    "list": ([[1, None], None, []], pa.list_(pa.int32())),
    "list of structs": ([[{"a": 1}], None, []], None),
    "vector": ([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    "float16 vector": (
        [[np.float16(1), np.float16(2)], None, [np.float16(0.5), np.float16(-1)]],
        pa.list_(pa.float16(), 2),
    ),
    "uint8 vector": ([[1, 2, 3], None, [255, 0, 7]], pa.list_(pa.uint8(), 3)),
    "map": ([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
}
# The oldest pyarrow that the project supports has no types of these names yet.
if hasattr(pa, "uuid"):
    TYPES["uuid"] = ([b"0123456789abcdef", None, b"\x00" * 16], pa.uuid())
if hasattr(pa, "json_"):
    TYPES["json"] = (['{"a":1}', None, "[]"], pa.json_())


def column(name: str) -> pa.Array:
    values, kind = TYPES[name]
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


@pytest.fixture(scope="module")
def all_types(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """A table of all types, that came over Ray's object store in two blocks."""
    block = pa.table({name: column(name) for name in TYPES})
    return stored(str(tmp_path_factory.mktemp("types") / "t"), block, block.slice(1, 1))


@pytest.mark.parametrize("name", TYPES)
def test_values_and_types_survive(all_types: pa.Table, name: str):
    wanted = column(name)
    found = all_types.column(name)
    assert found.type == wanted.type
    values = wanted.to_pylist()
    assert [str(value) for value in found.to_pylist()] == [str(value) for value in [*values, values[1]]]


NESTED_DECIMALS = pa.list_(pa.struct([pa.field("d", pa.decimal128(9, 0))]))


def test_decimals_survive_the_alignment_of_the_object_store(uri: str):
    blocks = [
        pa.table(
            {
                "pad": ["x" * number] * number,
                "small": pa.array([decimal.Decimal(f"{number}.25")] * number, pa.decimal128(12, 2)),
                "large": pa.array([decimal.Decimal(10) ** 50 + number] * number, pa.decimal256(60, 0)),
                "nested": pa.array([[{"d": decimal.Decimal(number)}]] * number, NESTED_DECIMALS),
            }
        )
        for number in range(1, 15)
    ]
    found = stored(uri, *blocks, min_rows_per_file=1).sort_by("small")
    assert found == pa.concat_tables(blocks).cast(found.schema)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: ray.data.range_tensor(6, shape=(2,)), pa.list_(pa.int64(), 2)),
        (lambda: ray.data.from_numpy(np.ones((6, 3), np.float16)), pa.list_(pa.float16(), 3)),
        (lambda: ray.data.from_items([{"data": np.ones(2, np.float32)}] * 6), pa.list_(pa.float32(), 2)),
        (
            lambda: ray.data.range(6).map_batches(lambda b: {"data": np.zeros((len(b["id"]), 4))}),
            pa.list_(pa.float64(), 4),
        ),
    ],
    ids=["range_tensor", "from_numpy", "from_items", "map_batches"],
)
def test_vectors_however_they_were_made_become_fixed_size_lists(uri: str, make: Callable[[], Dataset], kind: Any):
    write_lance(make(), uri)
    assert lance.dataset(uri).schema.types == [kind]
    assert lance.dataset(uri).count_rows() == 6


def test_images_keep_their_shape(uri: str):
    images = np.arange(6 * 2 * 3 * 4, dtype=np.uint8).reshape(6, 2, 3, 4)
    write_lance(ray.data.from_numpy(images), uri)
    found = lance.dataset(uri).to_table().column(0)
    assert np.array_equal(found.combine_chunks().to_numpy_ndarray(), images)


def test_pandas_blocks_become_what_they_mean(uri: str):
    frames = [
        pd.DataFrame({"i": [1, 2], "s": ["a", None], "f": [0.5, np.nan], "t": pd.to_datetime(["2024-01-01", None])}),
        pd.DataFrame({"t": pd.to_datetime(["2024-01-02"]), "s": ["b"], "f": [1.0], "i": [3]}),
    ]
    found = stored(uri, *frames)
    assert found.schema.names == ["i", "s", "f", "t"]
    assert b"pandas" not in (found.schema.metadata or {})
    assert [tuple(row.values())[:3] for row in found.to_pylist()] == [(1, "a", 0.5), (2, None, None), (3, "b", 1.0)]
    assert [str(value)[:10] for value in found.column("t").to_pylist()] == ["2024-01-01", "None", "2024-01-02"]


# Alignment to a table or a declared schema

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("small", pa.int16()),
        pa.field("ratio", pa.float32()),
        pa.field("text", pa.large_string()),
        pa.field("vector", pa.list_(pa.float32(), 2)),
        pa.field("inner", pa.struct([pa.field("a", pa.int32()), pa.field("b", pa.string())])),
        pa.field("when", pa.timestamp("us", "UTC")),
    ]
)


@pytest.fixture(params=["append", "schema"])
def write_aligned(request: pytest.FixtureRequest, uri: str) -> Callable[[pa.Table], pa.Table]:
    """Writes a block that must fit ``SCHEMA``: of the table, or declared for a new one."""
    if request.param == "append":
        lance.write_dataset(SCHEMA.empty_table(), uri)
        return lambda block: stored(uri, block, mode="append")
    return lambda block: stored(uri, block, schema=SCHEMA)


def test_columns_are_found_by_name_and_missing_ones_are_null(write_aligned: Callable[[pa.Table], pa.Table]):
    found = write_aligned(pa.table({"text": ["x"], "inner": [{"b": "y"}], "id": [7]}))
    assert found.schema == SCHEMA
    missing = {"small": None, "ratio": None, "vector": None, "when": None}
    assert found.to_pylist() == [{**missing, "id": 7, "text": "x", "inner": {"a": None, "b": "y"}}]


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("small", pa.array([-5, 300]), [-5, 300]),
        ("small", pa.array([2.0, -3.0]), [2, -3]),
        ("small", pa.nulls(2), [None, None]),
        ("ratio", pa.array([0.1, 2.0]), [float(np.float32(0.1)), 2.0]),
        ("ratio", pa.array([1, 2]), [1.0, 2.0]),
        ("text", pa.array(["a", "b"]), ["a", "b"]),
        ("text", pa.array(["a", "a"]).dictionary_encode(), ["a", "a"]),
        ("vector", pa.array([[1.0, 2.0], None]), [[1.0, 2.0], None]),
        (
            "when",
            pa.array([0, 1], pa.timestamp("s", "UTC")),
            [dt.datetime(1970, 1, 1, 0, 0, s, tzinfo=UTC) for s in (0, 1)],
        ),
        ("inner", pa.array([{"b": "x", "a": 1}, None]), [{"a": 1, "b": "x"}, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_casts_that_keep_every_value_are_made(
    write_aligned: Callable[[pa.Table], pa.Table], name: str, values: pa.Array, wanted: list[Any]
):
    found = write_aligned(pa.table({"id": [1, 2], name: values}))
    assert found.column(name).to_pylist() == wanted


REFUSED: list[tuple[str, pa.Table, list[str]]] = [
    ("a value out of range", pa.table({"id": [1], "small": [40_000]}), ["small", "int16", "int64"]),
    ("a fraction", pa.table({"id": [1], "small": [0.5]}), ["small", "int16", "double"]),
    ("a float too large", pa.table({"id": [1], "ratio": [1e300]}), ["ratio", "float", "double"]),
    ("a number for text", pa.table({"id": [1], "text": [3]}), ["text", "large_string", "int64"]),
    ("text for a number", pa.table({"id": ["1"]}), ["id", "int64", "string"]),
    ("a vector of another length", pa.table({"id": [1], "vector": [[1.0, 2.0, 3.0]]}), ["vector", "[2]"]),
    ("a time without its zone", pa.table({"id": [1], "when": [dt.datetime(2024, 1, 1)]}), ["when", "UTC"]),
    ("a null that must not be", pa.table({"id": [1, None]}), ["id"]),
    ("no required column", pa.table({"text": ["x"]}), ["id"]),
    ("a surplus column", pa.table({"id": [1], "extra": [2]}), ["extra"]),
    ("a surplus part of a struct", pa.table({"id": [1], "inner": [{"a": 1, "z": 2}]}), ["inner", "z"]),
]


@pytest.mark.parametrize(("block", "names"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_anything_else_is_refused_by_name_and_changes_nothing(uri: str, block: pa.Table, names: list[str]):
    lance.write_dataset(SCHEMA.empty_table(), uri)
    before = files_below(uri)
    with pytest.raises(SchemaMismatchError) as caught:
        write_lance(dataset(block), uri, mode="append")
    assert all(name in str(caught.value) for name in names)
    assert caught.value.columns
    assert versions(uri) == [1]
    assert files_below(uri) == before


def test_a_declared_schema_of_an_append_may_not_name_other_columns(uri: str):
    lance.write_dataset(pa.table({"id": [1]}), uri)
    with pytest.raises(SchemaMismatchError) as caught:
        write_lance(dataset(pa.table({"id": [2]})), uri, mode="append", schema=pa.schema([("extra", pa.int64())]))
    assert caught.value.columns == ("extra",)


def test_an_append_binds_to_columns_that_were_dropped_and_added_again(uri: str):
    table = lance.write_dataset(pa.table({"a": [1], "b": ["x"], "c": [0.5]}), uri)
    table.drop_columns(["a"])
    table.add_columns(pa.field("a", pa.int64()))
    stored(uri, pa.table({"a": [2], "b": ["y"], "c": [1.5]}), mode="append")
    assert written_rows(uri) == [{"b": "x", "c": 0.5, "a": None}, {"b": "y", "c": 1.5, "a": 2}]


# Without a declared schema

SPREADS: list[dict[str, Any]] = [{}, {"min_rows_per_file": 1}]  # all blocks in one file, and each in its own
spread = pytest.mark.parametrize("spread", SPREADS, ids=["one file", "several files"])


@spread
@pytest.mark.parametrize("null_first", [True, False])
def test_a_column_of_nulls_takes_the_type_that_another_block_has(uri: str, spread: dict[str, Any], null_first: bool):
    blocks = [pa.table({"id": [1, 2], "v": pa.nulls(2)}), pa.table({"id": [3], "v": [[1.5]]})]
    found = stored(uri, *(blocks if null_first else blocks[::-1]), **spread).sort_by("id")
    assert found.schema == pa.schema({"id": pa.int64(), "v": pa.list_(pa.float64())})
    assert found.column("v").to_pylist() == [None, None, [1.5]]


@spread
def test_a_schema_types_a_column_of_nulls_from_the_start(uri: str, spread: dict[str, Any]):
    schema = pa.schema({"id": pa.int64(), "v": pa.list_(pa.float32(), 1)})
    blocks = [pa.table({"id": [1], "v": pa.nulls(1)}), pa.table({"id": [2], "v": [[1.5]]})]
    found = stored(uri, *blocks, schema=schema, **spread).sort_by("id")
    assert found.to_pylist() == [{"id": 1, "v": None}, {"id": 2, "v": [1.5]}]
    assert found.schema == schema


@spread
def test_blocks_of_nothing_but_nulls_take_part(uri: str, spread: dict[str, Any]):
    blocks = [pa.table({"v": pa.nulls(3)}), pa.table({"v": ["x"]}), pa.table({"v": pa.nulls(2)})]
    found = stored(uri, *blocks, **spread)
    assert sorted(map(str, found.column("v").to_pylist())) == ["None"] * 5 + ["x"]
    assert found.schema.field("v").type == pa.string()


def test_a_table_of_nothing_but_nulls_can_be_read_and_takes_no_values_later(uri: str):
    assert stored(uri, pa.table({"v": pa.nulls(3)})).column("v").to_pylist() == [None] * 3
    assert stored(uri, pa.table({"v": pa.nulls(1)}), mode="append").num_rows == 4
    with pytest.raises(SchemaMismatchError):
        write_lance(dataset(pa.table({"v": [1]})), uri, mode="append")
    assert stored(uri, pa.table({"v": [1]}), mode="overwrite").column("v").to_pylist() == [1]


@spread
def test_nulls_inside_take_a_type_and_dictionaries_grow(uri: str, spread: dict[str, Any]):
    few, many = pa.array(["x"]), pa.array([f"word {number}" for number in range(300)])
    blocks = [
        pa.table({"s": [{"a": None, "b": [None]}], "d": few.cast(pa.dictionary(pa.int8(), pa.string()))}),
        pa.table({"s": [{"a": 1, "b": ["y"]}] * 300, "d": many.cast(pa.dictionary(pa.int16(), pa.string()))}),
    ]
    found = stored(uri, *blocks, **spread)
    rows = sorted(found.to_pylist(), key=lambda row: str(row["d"]))
    assert rows[-1] == {"s": {"a": None, "b": [None]}, "d": "x"}
    assert [row["s"] for row in rows[:-1]] == [{"a": 1, "b": ["y"]}] * 300
    assert {row["d"] for row in rows} == {"x", *many.to_pylist()}


EMPTY = pa.struct([])


@spread
@pytest.mark.parametrize("empty_first", [True, False])
@pytest.mark.parametrize(
    ("empty", "full", "kind"),
    [
        (pa.array([{}, None], EMPTY), [{"x": 1}], pa.struct({"x": pa.int64()})),
        (pa.array([[{}], []], pa.list_(EMPTY)), [[{"x": 1}]], pa.list_(pa.struct({"x": pa.int64()}))),
        (
            pa.array([{"x": {}, "y": 1}, None]),
            [{"x": {"z": "a"}, "y": 2}],
            pa.struct({"x": pa.struct({"z": pa.string()}), "y": pa.int64()}),
        ),
    ],
    ids=["column", "in lists", "in structs"],
)
def test_a_struct_without_fields_is_the_struct_that_another_block_has(
    uri: str, spread: dict[str, Any], empty_first: bool, empty: pa.Array, full: list[Any], kind: pa.DataType
):
    blocks = [pa.table({"a": empty, "b": [1, 2]}), pa.table({"a": pa.array(full, kind), "b": [3]})]
    found = stored(uri, *(blocks if empty_first else blocks[::-1]), **spread).sort_by("b")
    assert found.schema.field("a").type == kind
    assert found["b"].to_pylist() == [1, 2, 3]
    assert found["a"].is_valid().to_pylist() == [*empty.is_valid().to_pylist(), True]
    assert found["a"].to_pylist() == pa.array([*empty.to_pylist(), *full], kind).to_pylist()


@spread
@pytest.mark.parametrize(
    ("column", "path"),
    [([{}, {}], "a"), ([{"x": {}, "y": 1}] * 2, "a.x"), ([[{}]] * 2, "a[]")],
    ids=["column", "in structs", "in lists"],
)
def test_a_struct_that_no_block_gives_fields_is_refused_and_leaves_nothing(
    uri: str, spread: dict[str, Any], column: list[Any], path: str
):
    block = pa.table({"a": pa.array(column), "b": [1, 2]})
    with pytest.raises(SchemaMismatchError, match="declare the schema") as caught:
        write_lance(dataset(block, block), uri, **spread)
    assert caught.value.columns == (path,)
    assert_no_table(uri)


def test_a_schema_gives_a_struct_its_fields_from_the_start(uri: str):
    schema = pa.schema({"id": pa.int64(), "meta": pa.struct({"x": pa.int64()})})
    write_lance(ray.data.from_items([{"meta": {}, "id": number} for number in range(4)]), uri, schema=schema)
    assert sorted(written_rows(uri), key=lambda row: row["id"]) == [{"id": n, "meta": {"x": None}} for n in range(4)]


@pytest.mark.parametrize("name", ["a.b", "_rowid"])
def test_a_name_that_no_column_can_have_is_refused(uri: str, name: str):
    known = dataset(pa.table({name: [1]}))
    for made in (known, known.map_batches(lambda batch: batch)):  # known to the driver, or not
        with pytest.raises(SchemaMismatchError, match=f"column '{name}'") as caught:
            write_lance(made, uri)
        assert caught.value.columns == (name,)
        assert_no_table(uri)


@spread
@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_blocks_in_another_order_and_with_further_columns_are_put_together(uri: str, spread: dict[str, Any], mode: str):
    if mode == "overwrite":  # of a table whose column ids have gaps
        lance.write_dataset(pa.table({"b": [1], "x": [2], "a": ["old"]}), uri).drop_columns(["x"])
    blocks = [
        pa.table({"a": [1], "s": [{"x": 1, "y": "p"}]}),
        pa.table({"s": [{"y": "q", "x": 2, "z": 0.5}], "a": [2]}),
        pa.table({"b": ["new"], "a": [3]}),
    ]
    found = stored(uri, *blocks, mode=mode, **spread).sort_by("a")
    assert found.to_pylist() == [
        {"a": 1, "s": {"x": 1, "y": "p", "z": None}, "b": None},
        {"a": 2, "s": {"x": 2, "y": "q", "z": 0.5}, "b": None},
        {"a": 3, "s": None, "b": "new"},
    ]
    assert len(rows_per_file(uri)) == (3 if spread else 1)


@spread
@pytest.mark.parametrize("mode", ["create", "overwrite"])
@pytest.mark.parametrize(
    ("second", "kinds"),
    [({"v": ["x"]}, ["int64", "string"]), ({"v": [1.5]}, ["int64", "double"]), ({"v": [[1]]}, ["int64", "list"])],
    ids=["text", "float", "list"],
)
def test_conflicting_types_are_refused_and_leave_nothing(
    uri: str, spread: dict[str, Any], mode: str, second: dict[str, Any], kinds: list[str]
):
    if mode == "overwrite":
        lance.write_dataset(pa.table({"old": [1]}), uri)
    with pytest.raises(SchemaMismatchError) as caught:
        write_lance(dataset(pa.table({"v": [1]}), pa.table(second)), uri, mode=mode, **spread)
    assert all(word in str(caught.value) for word in ["'v'", *kinds])
    assert caught.value.columns == ("v",)
    if mode == "create":
        assert_no_table(uri)
    else:
        assert written_rows(uri) == [{"old": 1}]
        assert_nothing_left_over(uri)


# What a new table is made with


def test_stable_row_ids_survive_compaction(uri: str):
    stored(uri, *(pa.table({"id": [number]}) for number in range(4)), enable_stable_row_ids=True, min_rows_per_file=1)
    stored(uri, pa.table({"id": [9]}), mode="append", enable_stable_row_ids=True)
    table = lance.dataset(uri)
    assert table.has_stable_row_ids
    ids = {row["id"]: row["_rowid"] for row in table.to_table(with_row_id=True).to_pylist()}
    assert len(set(ids.values())) == 5
    table.optimize.compact_files()
    after = lance.dataset(uri).to_table(with_row_id=True).to_pylist()
    assert {row["id"]: row["_rowid"] for row in after} == ids


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2"])
def test_the_file_format_asked_for_is_the_one_of_the_table_from_then_on(uri: str, version: str):
    stored(uri, pa.table({"id": [1]}), data_storage_version=version)
    stored(uri, pa.table({"id": [2]}), mode="append")
    assert lance.dataset(uri).data_storage_version == version
    stored(uri, pa.table({"other": ["x"]}), mode="overwrite")
    assert lance.dataset(uri).data_storage_version == version


# Blobs

BLOBS = pa.schema([pa.field("id", pa.int64()), lance.blob_field("data", inline_size_threshold=8)])


def blobs(uri: str) -> list[bytes | None]:
    table = lance.dataset(uri)
    found = dict(table.read_blobs("data", indices=list(range(table.count_rows()))))
    return [
        found.get(address) for address in table.to_table(columns=["id"], with_row_address=True)["_rowaddr"].to_pylist()
    ]


def test_bytes_fill_a_blob_column(uri: str):
    values = [b"short", b"longer than the threshold" * 100, None, b""]
    stored(uri, pa.table({"id": [0, 1, 2, 3], "data": values}), schema=BLOBS)
    assert blobs(uri) == values
    stored(uri, pa.table({"data": [b"more" * 100], "id": [4]}), mode="append")
    assert blobs(uri) == [*values, b"more" * 100]


@pytest.mark.parametrize("mode", ["reference", "ingest"])
def test_blobs_given_by_address_are_referred_to_or_taken_in(uri: str, tmp_path: Path, mode: str):
    media = tmp_path / "media"
    media.mkdir()
    (media / "one.bin").write_bytes(b"one" * 1000)
    write_lance(
        dataset(pa.table({"id": [1], "data": [f"file://{media}/one.bin"]})),
        uri,
        schema=BLOBS,
        external_blob_mode=mode,
        initial_bases=[DatasetBasePath(f"file://{media}", name="media")],
    )
    assert blobs(uri) == [b"one" * 1000]
    (media / "one.bin").unlink()
    if mode == "ingest":
        assert blobs(uri) == [b"one" * 1000]
    else:
        with pytest.raises(Exception, match=r"one\.bin"):
            blobs(uri)


def test_a_reference_outside_the_bases_needs_leave(uri: str, tmp_path: Path):
    (tmp_path / "one.bin").write_bytes(b"one" * 1000)
    rows = dataset(pa.table({"id": [1], "data": [f"file://{tmp_path}/one.bin"]}))
    with pytest.raises(Exception, match="base"):
        write_lance(rows, uri, schema=BLOBS)
    assert_no_table(uri)
    write_lance(rows, uri, schema=BLOBS, allow_external_blob_outside_bases=True)
    assert blobs(uri) == [b"one" * 1000]


def test_a_failed_write_takes_its_blobs_along(uri: str):
    large = pa.table({"id": [1], "data": [b"x" * 100_000]})
    with pytest.raises(SchemaMismatchError):
        write_lance(
            dataset(large, pa.table({"id": ["no number"], "data": [b"y"]})), uri, schema=BLOBS, max_rows_per_file=1
        )
    assert_no_table(uri)
