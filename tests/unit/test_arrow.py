"""Blocks become tables of one schema, keep every value, and come back from the engine as they went in."""

from __future__ import annotations

import decimal
import math
from contextlib import nullcontext, suppress
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lance.fragment import write_fragments
from ray.data.block import BlockAccessor
from ray.data.extensions import (
    ArrowPythonObjectArray,
    ArrowTensorArray,
    ArrowTensorType,
    ArrowTensorTypeV2,
    ArrowVariableShapedTensorArray,
    TensorArray,
)

from lance_ray.arrow import align, check_fits, engine_safe, in_file, reads_as, row_width, to_arrow, unify
from lance_ray.errors import SchemaMismatchError

VECTOR = pa.list_(pa.float32(), 2)
INT, TEXT = pa.int32(), pa.string()
PANDAS_TEXT = TEXT if pd.__version__ < "3" else pa.large_string()


def money(*values: str | None) -> list[decimal.Decimal | None]:
    return [None if value is None else decimal.Decimal(value) for value in values]


def halves(*values: float | None) -> pa.Array:
    return pa.array([None if value is None else np.float16(value) for value in values], pa.float16())


def one(values: Any, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"c": pa.array(values, kind)})


def schema_of(kind: pa.DataType, **kwargs: Any) -> pa.Schema:
    return pa.schema([pa.field("c", kind, **kwargs)])


def through_engine(table: pa.Table, uri: str) -> pa.Table:
    fragments = write_fragments(table.to_reader(), uri, schema=table.schema, mode="create")
    return lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(table.schema, fragments)).to_table()


def values(table: pa.Table) -> dict[str, list[Any]]:
    return {name: table.column(name).to_pylist() for name in table.schema.names}


def misaligned(array: pa.Array) -> pa.Array:
    """The array with values at an address that 8 divides and 16 does not, as in Ray's shared memory."""
    raw = array.buffers()[1].to_pybytes()
    room = pa.allocate_buffer(len(raw) + 32)
    start = 8 if room.address % 16 == 0 else 16
    np.frombuffer(room, np.uint8)[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
    return pa.Array.from_buffers(array.type, len(array), [array.buffers()[0], room.slice(start, len(raw))])


STRUCT = pa.struct({"n": INT, "s": TEXT})
NATIVE = {
    "null": pa.nulls(3),
    "boolean": pa.array([True, None, False]),
    "uint8": pa.array([0, None, 255], pa.uint8()),
    "int64": pa.array([-(2**63), None, 2**63 - 1]),
    "uint64": pa.array([0, None, 2**64 - 1], pa.uint64()),
    "float16": halves(1.0, None, math.inf),
    "float64": pa.array([1e300, None, -0.5]),
    "date32": pa.array([1, None, -1], pa.date32()),
    "date64": pa.array([86400000, None, 0], pa.date64()),
    "time32": pa.array([1, None, 2], pa.time32("ms")),
    "time64": pa.array([1, None, 2], pa.time64("ns")),
    "duration": pa.array([1, None, 2], pa.duration("us")),
    "timestamp": pa.array([1, None, 2], pa.timestamp("ns")),
    "zoned timestamp": pa.array([1, None, 2], pa.timestamp("us", "Europe/Berlin")),
    "decimal128": pa.array(money("1.50", None, "-2.25"), pa.decimal128(10, 2)),
    "decimal256": pa.array(money("1.50", None, "-2.25"), pa.decimal256(50, 2)),
    "string": pa.array(["a", None, ""]),
    "large_string": pa.array(["a", None, ""], pa.large_string()),
    "binary": pa.array([b"a", None, b""]),
    "large_binary": pa.array([b"a", None, b""], pa.large_binary()),
    "fixed_size_binary": pa.array([b"abc", None, b"def"], pa.binary(3)),
    "list": pa.array([[1, None], None, []], pa.list_(INT)),
    "list of no nulls": pa.array([[1], [2, 3], []], pa.list_(pa.field("item", INT, nullable=False))),
    "list of null": pa.array([[None], None, []], pa.list_(pa.null())),
    "large_list of strings": pa.array([["x"], None, []], pa.large_list(TEXT)),
    "vector": pa.array([[1, 2], None, [3, None]], VECTOR),
    "float16 vector": pa.FixedSizeListArray.from_arrays(halves(1, 2, 3, None, 5, math.inf), 2),
    "boolean vector": pa.array([[True, False, None]] * 3, pa.list_(pa.bool_(), 3)),
    "decimal vector": pa.array([money("1.50")] * 3, pa.list_(pa.decimal128(10, 2), 1)),
    "matrix": pa.array([[[1], [2]], None, [[3], [4]]], pa.list_(pa.list_(INT, 1), 2)),
    "struct": pa.array([{"n": 1, "s": "x"}, None, {"n": None, "s": None}], STRUCT),
    "struct of struct": pa.array([{"a": {"n": 1, "s": "x"}}, None, {"a": None}], pa.struct({"a": STRUCT})),
    "struct of vector": pa.array([{"v": [1, 2]}, None, {"v": None}], pa.struct({"v": VECTOR})),
    "list of struct": pa.array([[{"n": 1, "s": "x"}, None], None, []], pa.list_(STRUCT)),
    "list of decimals": pa.array([money("1.50"), None, []], pa.list_(pa.decimal128(10, 2))),
    "list of vectors": pa.array([[[1, 2], None], None, []], pa.list_(VECTOR)),
    "map": pa.array([[("k", 1)], None, []], pa.map_(TEXT, INT)),
    "map of lists": pa.array([[("k", [1])], None, []], pa.map_(TEXT, pa.list_(INT))),
    "dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
    "dictionary of integers": pa.array([5, None, 6]).dictionary_encode(),
    "dictionary with null value": pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), ["a", None]),
    "dictionary in struct": pa.StructArray.from_arrays([pa.array(["a", None, "b"]).dictionary_encode()], ["d"]),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(3, 2, 2)),
}
# Types that the engine refuses, panics on, or commits and cannot read: what they become.
STAND_INS = {
    "list_view": (pa.array([[1], None, []], pa.list_view(INT)), pa.list_(INT)),
    "large_list_view": (pa.array([[1], None, []], pa.large_list_view(INT)), pa.large_list(INT)),
    "run-end encoded": (pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"]), TEXT),
    "dictionary of dates": (
        pa.array([1, None, 2], pa.date32()).dictionary_encode(),
        pa.date32(),
    ),
    "dictionary of decimals": (
        pa.array(money("1.50", None, "2.50"), pa.decimal128(10, 2)).dictionary_encode(),
        pa.decimal128(10, 2),
    ),
    "ordered dictionary": (
        pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), ["a", "b"], ordered=True),
        pa.dictionary(pa.int8(), TEXT),
    ),
    "map with sorted keys": (
        pa.array([[("k", 1)], None, []], pa.map_(TEXT, INT, keys_sorted=True)),
        pa.map_(TEXT, INT),
    ),
    "vector of size 0": (pa.array([[], None, []], pa.list_(INT, 0)), pa.list_(INT)),
    "vector of strings": (pa.array([["a", "b"], None, ["c", None]], pa.list_(TEXT, 2)), pa.list_(TEXT)),
    "list of vectors of structs": (
        pa.array([[[{"n": 1, "s": "x"}]], None, []], pa.list_(pa.list_(STRUCT, 1))),
        pa.list_(pa.list_(STRUCT)),
    ),
    "vector without null items": (
        pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.field("x", INT, nullable=False), 2)),
        pa.list_(INT, 2),
    ),
    "Ray vector": (
        ArrowTensorArray.from_numpy(np.arange(6, dtype=np.float16).reshape(3, 2)),
        pa.list_(pa.float16(), 2),
    ),
    "Ray tensor": (
        ArrowTensorArray.from_numpy(np.arange(12, dtype=np.uint8).reshape(3, 2, 2)),
        pa.fixed_shape_tensor(pa.uint8(), (2, 2)),
    ),
    "Ray tensor of booleans": (
        ArrowTensorArray.from_numpy(np.arange(12).reshape(3, 2, 2) % 3 == 0),
        pa.list_(pa.bool_(), 4),
    ),
    "Ray tensor of size 0": (ArrowTensorArray.from_numpy(np.ones((3, 0))), pa.list_(pa.float64())),
    "Ray tensor of the old kind": (
        ArrowTensorType((2,), INT).wrap_array(pa.array([[1, 2], None, [3, 4]], pa.list_(INT))),
        pa.list_(INT, 2),
    ),
    "Ray ragged vectors": (
        ArrowVariableShapedTensorArray.from_numpy(np.array([np.ones(1), np.ones(2), np.ones(3)], dtype=object)),
        pa.large_list(pa.float64()),
    ),
}
if hasattr(pa, "decimal32"):  # the oldest pyarrow has none, and no casts of views
    STAND_INS["string_view"] = (pa.array(["a", None, ""], pa.string_view()), TEXT)
    STAND_INS["binary_view"] = (pa.array([b"a", None, b""], pa.binary_view()), pa.binary())
    STAND_INS["decimal32"] = (pa.array(money("1.50", None), pa.decimal32(5, 2)), pa.decimal128(5, 2))
    NATIVE["uuid"] = pa.array([b"0" * 16, None], pa.uuid())


def plain(array: pa.Array) -> list[Any]:
    """Values without the ways of Ray's types to show them: as storage, in one row each."""
    name = getattr(array.type, "extension_name", "")
    if name == "ray.data.arrow_variable_shaped_tensor":
        return list(array.storage.field("data").to_pylist())
    if isinstance(array.type, pa.BaseExtensionType):
        return list(array.storage.to_pylist())
    return list(array.to_pylist())


class TestTypesThroughTheEngine:
    @pytest.mark.parametrize("array", NATIVE.values(), ids=NATIVE.keys())
    def test_a_type_that_lance_stores_stays_and_comes_back(self, array, tmp_path):
        # A slice at an offset, two chunks, and a neighbour with other chunks: what blocks look like.
        column = pa.chunked_array([array.slice(1), array])
        table = to_arrow(pa.table({"c": column, "row": pa.array(range(len(column)))}))

        assert table.schema.field("c").type.equals(array.type, check_metadata=True)
        found = through_engine(table, str(tmp_path / "t"))
        assert found.schema.equals(table.schema)
        assert values(found) == values(table)
        assert table.column("c").to_pylist() == column.to_pylist()

    @pytest.mark.parametrize(("array", "stand_in"), STAND_INS.values(), ids=STAND_INS.keys())
    def test_a_type_that_lance_cannot_keep_has_a_stand_in_of_the_same_values(self, array, stand_in, tmp_path):
        sliced = array.slice(1)
        table = to_arrow(pa.table({"c": pa.chunked_array([sliced, array])}))

        assert table.schema == schema_of(stand_in)
        table.validate(full=True)
        assert [row for chunk in table.column("c").chunks for row in plain(chunk)] == plain(sliced) + plain(array)
        found = through_engine(table, str(tmp_path / "t"))
        assert found.schema == table.schema
        assert values(found) == values(table)

    @pytest.mark.parametrize("array", NATIVE.values(), ids=NATIVE.keys())
    def test_a_table_without_rows_keeps_its_type(self, array):
        empty = to_arrow(pa.table({"c": array.slice(0, 0)}))
        assert empty.num_rows == 0
        assert align(empty, schema_of(array.type)).schema == schema_of(array.type)
        assert align(pa.table({"c": pa.nulls(0)}), schema_of(array.type)).schema == schema_of(array.type)

    @pytest.mark.parametrize("array", NATIVE.values(), ids=NATIVE.keys())
    def test_a_column_without_values_takes_any_type(self, array, tmp_path):
        first = align(one([None, None]), unify([one([None]).schema, schema_of(array.type)]))
        assert first.schema == schema_of(array.type)
        assert values(through_engine(first, str(tmp_path / "t"))) == {"c": [None, None]}

    def test_blob_columns_take_bytes_and_keep_their_rows(self, tmp_path):
        schema = pa.schema([lance.blob_field("c", inline_size_threshold=9)])
        table = align(one([b"abc", None, b""]), schema)
        fragments = write_fragments(table.to_reader(), str(tmp_path), schema=schema, mode="create")
        dataset = lance.LanceDataset.commit(str(tmp_path), lance.LanceOperation.Overwrite(schema, fragments))

        assert table.schema.equals(schema, check_metadata=True)
        assert [data for _, data in dataset.read_blobs("c", indices=[0, 2])] == [b"abc", b""]
        assert dataset.count_rows("c IS NULL") == 1

    def test_strings_name_external_blobs(self):
        table = align(one(["s3://bucket/x", None]), pa.schema([lance.blob_field("c")]))
        first, second = table.column("c").chunk(0).storage.to_pylist()
        assert first == {"data": None, "uri": "s3://bucket/x", "position": None, "size": None}
        assert second is None

    @pytest.mark.parametrize(
        "array",
        [
            pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
            pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]),
            ArrowTensorArray.from_numpy(np.array([["a", "b"]])),
            ArrowVariableShapedTensorArray.from_numpy(np.array([np.ones((1, 2)), np.ones((2, 1))], dtype=object)),
            ArrowPythonObjectArray.from_objects([{1, 2}]),
        ],
        ids=["interval", "union", "tensor of strings", "ragged tensors", "pickled objects"],
    )
    def test_a_type_without_stand_in_is_refused_by_name_at_any_depth(self, array):
        for column, path in ((array, "c"), (pa.StructArray.from_arrays([array], ["part"]), "c.part")):
            with pytest.raises(SchemaMismatchError) as caught:
                to_arrow(pa.table({"c": column}))
            assert caught.value.columns == (path,)
            assert str(array.type) in str(caught.value) or "tensors of" in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            (pa.struct([]), "c"),
            (pa.struct({"x": pa.struct([]), "y": INT}), "c.x"),
            (pa.list_(pa.struct([])), "c[]"),
            (pa.large_list(pa.struct({"x": pa.struct([])})), "c[].x"),
            (pa.map_(TEXT, pa.struct([])), "c[]"),
        ],
    )
    def test_a_table_cannot_have_a_struct_without_fields_at_any_depth(self, kind, path):
        with pytest.raises(SchemaMismatchError, match="struct with fields") as caught:
            unify([schema_of(kind)])
        assert caught.value.columns == (path,)

    @pytest.mark.parametrize("name", ["a.b", ".", "_rowid", "_rowaddr", "_rowoffset", "_row_created_at_version"])
    def test_a_table_cannot_have_a_column_of_a_name_that_the_engine_refuses(self, name, tmp_path):
        schema = pa.schema([(name, INT)])
        with pytest.raises(SchemaMismatchError) as caught:
            unify([schema])
        assert caught.value.columns == (name,)
        with pytest.raises(OSError, match=r"reserved name|cannot contain"):
            lance.write_dataset(schema.empty_table(), str(tmp_path / "t"))

    def test_fields_of_structs_may_have_names_that_columns_may_not(self, tmp_path):
        table = pa.table({"s": [{"a.b": 1, "_rowid": 2}]})
        assert unify([table.schema]) == table.schema
        assert through_engine(table, str(tmp_path / "t")) == table

    @pytest.mark.parametrize("names", [["a", "a"], [""], ["a`b"]])
    def test_names_that_repeat_or_cannot_be_read_are_refused(self, names):
        with pytest.raises(SchemaMismatchError):
            unify([pa.schema([(name, INT) for name in names])])
        with pytest.raises(SchemaMismatchError):
            unify([schema_of(pa.struct([(name, INT) for name in names]))])


class TestRayBlocks:
    @pytest.mark.parametrize(
        ("column", "kind", "expected"),
        [
            ([np.ones(2, np.float32)] * 2, VECTOR, [[1, 1], [1, 1]]),
            ([np.ones(2, np.float32), None], VECTOR, [[1, 1], None]),
            ([math.nan, np.ones(2, np.float16)], pa.list_(pa.float16(), 2), [None, [1, 1]]),
            ([np.ones(1), None, np.ones(2)], pa.list_(pa.float64()), [[1], None, [1, 1]]),
            ([np.array(["a"], object), np.array(["b", "c"], object)], pa.list_(TEXT), [["a"], ["b", "c"]]),
            (TensorArray(np.ones((2, 2), np.float32)), VECTOR, [[1, 1], [1, 1]]),
            ([[1.0, 2.0], None], pa.list_(pa.float64()), [[1, 2], None]),
            (["a", None], PANDAS_TEXT, ["a", None]),
            ([1.0, math.nan], pa.float64(), [1, None]),
            (pd.Series([1, None], dtype=object), pa.int64(), [1, None]),
            (pd.Series([1, None], dtype="Int16"), pa.int16(), [1, None]),
            ([None, None], pa.null(), [None, None]),
            (pd.Categorical(["a", "b"]), pa.dictionary(pa.int8(), PANDAS_TEXT), ["a", "b"]),
            ([{"n": 1}, None], pa.struct({"n": pa.int64()}), [{"n": 1}, None]),
        ],
    )
    def test_pandas_columns_become(self, column, kind, expected):
        frame = pd.DataFrame({"row": range(len(expected)), "c": column})
        frame.index = pd.Index(list("xyz"[: len(expected)]))  # as a filter leaves one that is no range
        table = to_arrow(frame)
        assert table.schema == pa.schema([("row", pa.int64()), ("c", kind)])
        assert table.column("c").to_pylist() == expected
        assert table.schema.metadata is None  # pandas' own describes one block
        assert list(frame.columns) == ["row", "c"]
        assert frame["c"].isna().sum() == expected.count(None)  # the caller's frame is as it was

    def test_tensors_in_pandas_cells_keep_their_shape_when_some_are_missing(self):
        table = to_arrow(pd.DataFrame({"c": [np.arange(4).reshape(2, 2), None]}))
        assert table.schema == schema_of(pa.fixed_shape_tensor(pa.int64(), (2, 2)))
        assert table.column("c").chunk(0).storage.to_pylist() == [[0, 1, 2, 3], None]

    @pytest.mark.parametrize(
        ("column", "kind", "expected"),
        [
            (np.ones((2, 2), np.float32), VECTOR, [[1, 1], [1, 1]]),
            (np.array([np.ones(2, np.float32), None], dtype=object), VECTOR, [[1, 1], None]),
            ([None, np.ones(2, np.float32)], VECTOR, [None, [1, 1]]),
            (np.array(["a", "b"]), TEXT, ["a", "b"]),
            (np.array([1.0, math.inf]), pa.float64(), [1, math.inf]),
            ([1, 2], pa.int64(), [1, 2]),
        ],
    )
    def test_numpy_batches_become(self, column, kind, expected):
        batch = {"c": column, "row": np.arange(2)}
        table = to_arrow(batch)
        assert table.schema == pa.schema([("c", kind), ("row", pa.int64())])
        assert table.column("c").to_pylist() == expected
        assert batch["c"] is column

    def test_nan_stays_nan_outside_of_pandas(self):
        assert math.isnan(to_arrow({"c": np.array([math.nan])}).column("c")[0].as_py())

    def test_an_empty_numpy_block_does_not_fix_types(self):
        empty = to_arrow({"c": np.ones((0, 3))})
        assert empty.schema == schema_of(pa.null())

    def test_record_batches_and_frames_without_columns_are_blocks(self):
        assert to_arrow(pa.record_batch({"c": [1]})) == one([1])
        assert to_arrow(pd.DataFrame()).num_columns == 0

    def test_mixed_objects_are_refused_and_never_pickled_into_a_table(self):
        for column in ([object(), object()], [np.array([object()]), None], [np.ones((2, 2)), np.ones((1, 2)), None]):
            with pytest.raises(SchemaMismatchError, match="pickled Python objects") as caught:
                to_arrow(pd.DataFrame({"c": column}))
            assert caught.value.columns == ("c",)

    def test_arrow_blocks_pass_without_a_copy(self):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(64, np.float32)), 2)
        table = pa.table({"c": vectors, "n": pa.array(range(32))})
        result = align(to_arrow(table), table.schema)
        assert [b.address for b in result["c"].chunk(0).buffers() if b] == [b.address for b in vectors.buffers() if b]

    def test_ray_vectors_become_fixed_size_lists_without_a_copy(self):
        block = BlockAccessor.batch_to_block({"c": np.ones((32, 2), np.float32)})
        assert block.schema.field("c").type == ArrowTensorTypeV2((2,), pa.float32())
        assert to_arrow(block)["c"].chunk(0).buffers()[-1].address == block["c"].chunk(0).buffers()[-1].address


class TestUnify:
    @pytest.mark.parametrize(
        ("left", "right", "both"),
        [
            (pa.null(), INT, INT),
            (TEXT, pa.large_string(), pa.large_string()),
            (pa.binary(), pa.large_binary(), pa.large_binary()),
            (pa.string_view(), pa.large_string(), pa.large_string()),
            (pa.list_(INT), pa.large_list(INT), pa.large_list(INT)),
            (pa.list_(pa.null()), pa.list_(TEXT), pa.list_(TEXT)),
            (pa.list_(pa.null(), 2), VECTOR, VECTOR),
            (pa.dictionary(pa.int8(), TEXT), pa.dictionary(INT, TEXT), pa.dictionary(INT, TEXT)),
            (pa.dictionary(pa.int8(), TEXT), pa.dictionary(pa.uint8(), TEXT), pa.dictionary(pa.int64(), TEXT)),
            (pa.map_(TEXT, pa.null()), pa.map_(TEXT, INT), pa.map_(TEXT, INT)),
            (pa.struct({"a": TEXT}), pa.struct({"a": pa.large_string()}), pa.struct({"a": pa.large_string()})),
        ],
    )
    def test_kinds_that_widen_without_loss_do_at_any_depth_and_in_any_order(self, left, right, both):
        for first, second in ((left, right), (right, left)):
            assert unify([schema_of(first), schema_of(second)]) == schema_of(both)
            nested = [schema_of(pa.struct({"x": pa.list_(kind)})) for kind in (first, second, both)]
            assert unify(nested[:2]) == nested[2]

    def test_structs_have_the_fields_of_both(self):
        left, right = (pa.field(name, INT, nullable=False) for name in "ab")
        both = pa.struct([left.with_nullable(True), right.with_nullable(True)])
        assert unify([schema_of(pa.struct([left])), schema_of(pa.struct([right]))]) == schema_of(both)

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (INT, pa.int64()),
            (pa.int64(), pa.float64()),
            (pa.float32(), pa.float64()),
            (pa.int64(), TEXT),
            (pa.binary(3), pa.large_binary()),
            (pa.timestamp("us"), pa.timestamp("us", "UTC")),
            (pa.timestamp("us"), pa.timestamp("ns")),
            (pa.decimal128(3, 2), pa.decimal128(5, 2)),
            (VECTOR, pa.list_(pa.float32(), 3)),
            (VECTOR, pa.list_(pa.float32())),
            (pa.dictionary(INT, TEXT), TEXT),
            (pa.list_(INT), INT),
        ],
    )
    def test_other_types_conflict_and_the_error_names_column_and_both(self, left, right):
        with pytest.raises(SchemaMismatchError, match="declare the schema") as caught:
            unify([schema_of(left), schema_of(right)])
        assert (caught.value.columns, caught.value.expected, caught.value.actual) == (("c",), str(left), str(right))
        with pytest.raises(SchemaMismatchError) as caught:
            unify([schema_of(pa.list_(pa.struct({"x": left}))), schema_of(pa.list_(pa.struct({"x": right})))])
        assert caught.value.columns == ("c[].x",)

    @pytest.mark.parametrize("wrap", [lambda kind: kind, pa.list_, lambda kind: pa.struct({"in": kind})])
    @pytest.mark.parametrize("empty_first", [True, False])
    def test_a_struct_without_fields_takes_those_of_another_block(self, wrap, empty_first):
        schemas = [schema_of(wrap(pa.struct([]))), schema_of(wrap(STRUCT))]
        assert unify(schemas if empty_first else schemas[::-1]) == schemas[1]

    def test_columns_keep_the_order_of_first_appearance_and_missing_ones_are_nullable(self):
        required = pa.field("a", INT, nullable=False)
        both = pa.field("b", INT, nullable=False)
        first, second = pa.schema([both, required]), pa.schema([pa.field("z", INT, nullable=False), both])
        assert unify([first, second]) == pa.schema([both, required.with_nullable(True), ("z", INT)])
        assert unify([first, first]) == first

    def test_metadata_is_merged_the_first_wins_and_that_of_pandas_goes(self):
        first = pa.schema([pa.field("c", INT, metadata={"k": "1"})], metadata={"s": "1", "pandas": "{}"})
        second = pa.schema([pa.field("c", INT, metadata={"k": "2", "l": "2"})], metadata={"s": "2", "t": "2"})
        merged = unify([first, second])
        assert merged.metadata == {b"s": b"1", b"t": b"2"}
        assert merged.field("c").metadata == {b"k": b"1", b"l": b"2"}

    def test_no_schemas_are_no_columns(self):
        assert unify([]) == pa.schema([])

    def test_blocks_of_differing_schemas_fit_what_they_unify_to(self, tmp_path):
        blocks = [
            pa.table({"a": pa.nulls(2), "b": ["x", "y"]}),
            pa.table({"b": pa.array(["z"], pa.large_string()), "a": [1], "v": pa.array([[1, 2]], VECTOR)}),
        ]
        schema = unify(block.schema for block in blocks)
        table = pa.concat_tables([align(to_arrow(block), schema) for block in blocks])
        assert values(through_engine(table, str(tmp_path / "t"))) == {
            "a": [None, None, 1],
            "b": ["x", "y", "z"],
            "v": [None, None, [1, 2]],
        }


class TestDeclaredSchemas:
    @pytest.mark.parametrize(
        ("given", "table"),
        [
            (INT, pa.int8()),
            (pa.float64(), pa.float32()),
            (TEXT, pa.large_string()),
            (pa.null(), STRUCT),
            (pa.list_(pa.float64()), VECTOR),
            (pa.list_(pa.float64(), 2), pa.list_(INT)),
            (pa.struct({"x": pa.int8()}), pa.struct({"y": TEXT, "x": INT})),
            (pa.map_(TEXT, pa.int8()), pa.map_(TEXT, INT)),
            (TEXT, pa.dictionary(pa.int8(), TEXT)),
        ],
    )
    def test_fit_where_some_of_their_values_do(self, given, table):
        check_fits(schema_of(given), schema_of(table))

    @pytest.mark.parametrize(
        ("given", "table", "path"),
        [
            (TEXT, INT, "c"),
            (pa.timestamp("us"), pa.timestamp("us", "UTC"), "c"),
            (pa.list_(TEXT), pa.list_(INT), "c[]"),
            (pa.list_(pa.float32(), 3), pa.list_(pa.float32(), 2), "c"),
            (pa.struct({"x": TEXT}), pa.struct({"x": INT}), "c.x"),
            (pa.struct({"z": INT}), pa.struct({"x": INT}), "c.z"),
            (pa.map_(TEXT, TEXT), pa.map_(TEXT, INT), "c[].value"),
            (INT, STRUCT, "c"),
        ],
    )
    def test_do_not_fit_where_none_can(self, given, table, path):
        with pytest.raises(SchemaMismatchError) as caught:
            check_fits(schema_of(given), schema_of(table))
        assert caught.value.columns == (path,)


class TestFilesWrittenBeforeTheSchemaWasKnown:
    @pytest.mark.parametrize(
        ("array", "kind", "readable"),
        [
            (pa.array(["a", None]), TEXT, True),
            (pa.array(["a", None]), pa.large_string(), False),
            (pa.array([b"a", None]), pa.large_binary(), False),
            (pa.array([[1], None, []], pa.list_(INT)), pa.large_list(INT), True),
            (pa.array([["x"], None]), pa.large_list(pa.large_string()), False),
            (pa.array([[None], None, []], pa.list_(pa.null())), pa.list_(VECTOR), True),
            (pa.array([[None], None, []], pa.list_(pa.null())), pa.list_(STRUCT), False),
            (pa.array([{"a": None}, None], pa.struct({"a": pa.null()})), pa.struct({"a": TEXT}), True),
            (pa.array([{"a": None}, None], pa.struct({"a": pa.null()})), pa.struct({"a": pa.list_(INT)}), False),
            (pa.array([[("k", None)], None], pa.map_(TEXT, pa.null())), pa.map_(TEXT, INT), True),
            (pa.array(["a"]).dictionary_encode(), pa.dictionary(pa.int64(), TEXT), False),
            (pa.array([{}, {}], pa.struct([])), STRUCT, False),
        ],
    )
    def test_reads_as_says_what_the_engine_can_read(self, array, kind, readable, tmp_path):
        table, schema, uri = pa.table({"c": array}), schema_of(kind), str(tmp_path / "t")
        assert unify([table.schema, schema]) == schema
        assert reads_as(table.schema, schema) is readable

        fragments = write_fragments(table.to_reader(), uri, schema=table.schema, mode="create")
        with nullcontext() if readable else pytest.raises((pa.ArrowInvalid, OSError)):
            found = lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, fragments)).to_table()
            assert values(found) == values(table)

    @pytest.mark.parametrize(
        ("rows", "kind", "later"),
        [
            ([{}, None], pa.struct([]), pa.struct({"x": INT})),
            ([[{}, None], None, []], pa.list_(pa.struct([])), pa.large_list(pa.struct({"x": INT}))),
            ([{"y": 1, "x": {}}, {"y": 2, "x": None}], None, pa.struct({"y": pa.int64(), "x": pa.struct({"z": TEXT})})),
            ([[("k", {})], None], pa.map_(TEXT, pa.struct([])), pa.map_(TEXT, pa.struct({"x": INT}))),
        ],
    )
    def test_a_struct_without_fields_comes_back_from_a_file_as_valid_as_it_was(self, rows, kind, later, tmp_path):
        table = pa.table({"c": pa.array(rows, kind), "b": range(len(rows))})
        stored = in_file(table.schema)
        found = through_engine(align(table, stored), str(tmp_path / "t"))
        assert found["b"] == table["b"]
        wanted = align(table, pa.schema([("c", later), ("b", pa.int64())]))
        assert align(found, wanted.schema) == wanted


LEAVES = [
    (pa.int8(), pa.int64(), st.integers(-9, 9)),
    (INT, pa.float64(), st.integers(-9, 9)),
    (TEXT, pa.large_string(), st.text(max_size=2)),
    (pa.dictionary(pa.int8(), TEXT), TEXT, st.text(max_size=2)),
    (TEXT, pa.dictionary(INT, pa.large_string()), st.text(max_size=2)),
    (pa.null(), INT, st.none()),
    (pa.bool_(), pa.bool_(), st.booleans()),
]


@st.composite
def widenings(draw, depth=3):
    """A type, a wider one, and a strategy for values of the first."""
    kind = draw(st.sampled_from(["leaf", "list", "vector", "struct", "map"])) if depth else "leaf"
    if kind == "leaf":
        return draw(st.sampled_from(LEAVES))
    source, target, rows = draw(widenings(depth - 1))
    rows = st.none() | rows
    wide = draw(st.sampled_from([pa.list_, pa.large_list]))
    if kind == "list":
        return (
            draw(st.sampled_from([pa.list_, pa.large_list, pa.list_view]))(source),
            wide(target),
            st.lists(rows, max_size=2),
        )
    if kind == "vector":
        return (
            pa.list_(source, 2),
            draw(st.sampled_from([wide(target), pa.list_(target, 2)])),
            st.lists(rows, min_size=2, max_size=2),
        )
    if kind == "map":
        entries = st.dictionaries(st.text(max_size=1), rows, max_size=2).map(lambda entry: list(entry.items()))
        return pa.map_(TEXT, source), pa.map_(pa.large_string(), target), entries
    other, wider, cells = draw(widenings(0))
    struct = st.fixed_dictionaries({"x": rows, "y": st.none() | cells})
    return pa.struct({"x": source, "y": other}), pa.struct({"y": wider, "x": target}), struct


class TestCasts:
    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_nested_values_survive_any_widening_from_any_slice(self, data):
        source, target, one_value = data.draw(widenings())
        rows = data.draw(st.lists(st.none() | one_value, max_size=8))
        start, middle = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 8)))
        array = pa.array(rows, source).slice(start)
        column = pa.chunked_array([array.slice(0, middle), array.slice(middle)])
        for table in (align(pa.table({"c": column}), schema_of(target)), to_arrow(pa.table({"c": column}))):
            table.validate()
            assert table["c"].to_pylist() == rows[start:]

    @pytest.mark.parametrize(
        ("source", "target", "expected"),
        [
            (pa.array([1, None, 127]), pa.int8(), None),
            (pa.array([1, None], pa.uint8()), pa.int64(), None),
            (pa.array([1.0, None, -3.0]), pa.int8(), [1, None, -3]),
            (halves(3.0, None), pa.int8(), [3, None]),
            (pa.array([1, None, 2**24]), pa.float32(), None),
            (pa.array([1, None, 2048]), pa.float16(), None),
            (pa.array([0.1, None, math.inf]), pa.float32(), [float(np.float32(0.1)), None, math.inf]),
            (pa.array([0.1, 1e-9], pa.float32()), pa.float16(), [float(np.float16(0.1)), 0.0]),
            (halves(1.5), pa.float64(), [1.5]),
            (pa.array([5, None]), pa.decimal128(4, 2), money("5.00", None)),
            (pa.array(money("1.50", None)), pa.decimal128(4, 1), money("1.5", None)),
            (pa.array(money("1.50")), pa.decimal256(60, 3), money("1.500")),
            (pa.array(money("2.00")), pa.int8(), [2]),
            (pa.array([1000, None], pa.timestamp("ns")), pa.timestamp("us"), None),
            (pa.array([1], pa.timestamp("s", "UTC")), pa.timestamp("ns", "Asia/Tokyo"), None),
            (pa.array([86400000], pa.date64()), pa.date32(), None),
            (pa.array([1000], pa.time64("us")), pa.time32("ms"), None),
            (pa.array([1], pa.duration("s")), pa.duration("us"), None),
            (pa.array(["a", None]), pa.large_string(), None),
            (pa.array(["a", None], pa.large_string()), TEXT, None),
            (pa.array([b"abc", None]), pa.binary(3), None),
            (pa.array([b"abc", None], pa.binary(3)), pa.large_binary(), None),
            (pa.array(["a", None, "a"]), pa.dictionary(pa.int8(), TEXT), None),
            (pa.array(["a", None]).dictionary_encode(), pa.large_string(), None),
            (pa.array(["a", None]).dictionary_encode(), pa.dictionary(pa.int8(), pa.large_string()), None),
            (pa.array([[0.5, 2.0], None]), pa.list_(pa.float16(), 2), None),
            (pa.array([[1, 2], [3, None], None]), VECTOR, None),
            (pa.array([[1, 2], None], VECTOR), pa.list_(pa.float64()), None),
            (pa.array([[1], None, []], pa.large_list(INT)), pa.list_(pa.int8()), None),
            (pa.array([[[1, 2]], None]), pa.list_(VECTOR), None),
            (pa.array([[1] * 4, None], pa.list_(INT, 4)), pa.fixed_shape_tensor(INT, (2, 2)), None),
            (pa.array([[("k", 1)], None], pa.map_(TEXT, INT)), pa.map_(pa.large_string(), pa.int64()), None),
            (pa.array([[{"key": "k", "value": 1}], None]), pa.map_(TEXT, INT), [[("k", 1)], None]),
            (pa.array([b"0" * 16, None], pa.binary(16)), pa.binary(), None),
        ],
    )
    def test_values_that_the_type_holds_are_cast(self, source, target, expected):
        wanted = source.to_pylist() if expected is None else expected
        for array, rows in ((source, wanted), (source.slice(1), wanted[1:]), (source.slice(0, 0), [])):
            table = align(pa.table({"c": array}), schema_of(target))
            table.validate(full=True)
            assert table.schema.equals(schema_of(target), check_metadata=True)
            column = table.column("c")
            assert [plain(chunk) for chunk in column.chunks] == [rows]

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            (pa.array([128]), pa.int8()),
            (pa.array([-1]), pa.uint64()),
            (pa.array([0.5]), pa.int64()),
            (pa.array([math.nan]), pa.int64()),
            (halves(2.5), pa.int64()),
            (pa.array([2**53 + 1]), pa.float64()),
            (pa.array([2049]), pa.float16()),
            (pa.array([70000]), pa.float16()),
            (pa.array([1e300]), pa.float32()),
            (pa.array([70000.0]), pa.float16()),
            (pa.array(money("1.55")), pa.decimal128(4, 1)),
            (pa.array(money("123.5")), pa.decimal128(3, 1)),
            (pa.array([1000]), pa.decimal128(4, 2)),
            (pa.array(money("1.5")), pa.int64()),
            (pa.array([0.5]), pa.decimal128(4, 2)),
            (pa.array(money("1.5")), pa.float64()),
            (pa.array([1], pa.timestamp("ns")), pa.timestamp("us")),
            (pa.array([10**12], pa.timestamp("s")), pa.timestamp("ns")),
            (pa.array([1], pa.timestamp("us")), pa.timestamp("us", "UTC")),
            (pa.array([1], pa.timestamp("us", "UTC")), pa.timestamp("us")),
            (pa.array([1], pa.date64()), pa.date32()),
            (pa.array([1], pa.date32()), pa.timestamp("us")),
            (pa.array(["1"]), pa.int64()),
            (pa.array([1]), TEXT),
            (pa.array([1]), pa.bool_()),
            (pa.array([True]), pa.int8()),
            (pa.array([b"a"]), TEXT),
            (pa.array(["a"]), pa.binary()),
            (pa.array([b"ab", b"abc"]), pa.binary(3)),
            (pa.array([[1, 2], [1]]), pa.list_(pa.int64(), 2)),
            (pa.array([[1, 2, 3]]), pa.list_(pa.int64(), 2)),
            (pa.array([[1, 2]], pa.list_(INT, 2)), pa.list_(INT, 3)),
            (pa.array([1]), pa.list_(pa.int64())),
            (pa.array([[1]]), pa.int64()),
            (pa.array([{"a": 1}]), pa.list_(pa.int64())),
            (pa.array([str(n) for n in range(200)]), pa.dictionary(pa.int8(), TEXT)),
            (pa.array([[1, 2, 3]]), pa.fixed_shape_tensor(pa.int64(), (2, 2))),
        ],
    )
    def test_a_value_that_would_change_is_refused_and_the_error_names_column_and_types(self, source, target):
        with pytest.raises(SchemaMismatchError) as caught:
            align(pa.table({"c": source}), schema_of(target))
        assert caught.value.columns[0] in ("c", "c[]")
        assert str(caught.value.expected) in str(caught.value)
        assert str(caught.value.actual) in str(caught.value)

    def test_what_lies_under_a_null_does_not_fail_a_cast(self):
        mask = pa.array([False, True])
        deep = pa.array([1, 10**9])
        struct = pa.StructArray.from_arrays([deep], ["x"], mask=mask)
        vectors = pa.FixedSizeListArray.from_arrays(deep, 1, mask=mask)
        schema = pa.schema({"s": pa.struct({"x": pa.int8()}), "v": pa.list_(pa.int8(), 1)})
        assert values(align(pa.table({"s": struct, "v": vectors}), schema)) == {"s": [{"x": 1}, None], "v": [[1], None]}

    def test_ray_tensors_go_to_a_tensor_column_of_their_shape_and_no_other(self):
        block = pa.table({"c": ArrowTensorArray.from_numpy(np.arange(8).reshape(2, 2, 2))})
        fits = schema_of(pa.fixed_shape_tensor(pa.int64(), (2, 2)))
        assert align(block, fits).schema == fits
        assert align(block, schema_of(pa.list_(pa.int64(), 4))).num_rows == 2
        for other in (
            pa.fixed_shape_tensor(pa.int64(), (4, 1)),
            pa.fixed_shape_tensor(pa.int64(), (2, 2), permutation=[1, 0]),
        ):
            with pytest.raises(SchemaMismatchError):
                align(to_arrow(block), schema_of(other))

    @settings(deadline=None)
    @given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=5))
    def test_integers_are_kept_or_refused(self, numbers):
        for target in (pa.int8(), pa.uint16(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(12, 2)):
            fits = all(number is None or 0 <= number <= 127 for number in numbers)
            with nullcontext() if fits else suppress(SchemaMismatchError):
                assert align(one(numbers, pa.int64()), schema_of(target))["c"].to_pylist() == numbers

    @settings(deadline=None)
    @given(st.lists(st.floats(width=64), max_size=5))
    def test_floats_are_rounded_to_nearest_or_refused(self, numbers):
        with np.errstate(over="ignore"):
            rounded = np.array(numbers, np.float64).astype(np.float32)
        if np.isinf(rounded).sum() == np.isinf(numbers).sum():
            result = align(one(numbers, pa.float64()), schema_of(pa.float32()))["c"].to_numpy()
            np.testing.assert_array_equal(result, rounded)
        else:
            with pytest.raises(SchemaMismatchError, match="infinite"):
                align(one(numbers, pa.float64()), schema_of(pa.float32()))

    @settings(deadline=None)
    @given(
        st.lists(st.none() | st.lists(st.none() | st.integers(-100, 100), max_size=3), max_size=6), st.integers(0, 3)
    )
    def test_lists_survive_the_way_through_every_list_type_from_any_offset(self, rows, start):
        array = pa.array(rows, pa.list_view(pa.int64())).slice(start)
        for kind in (pa.large_list(pa.int8()), pa.list_(pa.float16()), pa.list_(pa.int64())):
            array = align(pa.table({"c": array}), schema_of(kind))["c"].combine_chunks()
            assert array.to_pylist() == rows[start:]


class TestAlignColumns:
    @settings(deadline=None)
    @given(st.permutations(list("abcd")))
    def test_the_order_of_columns_in_a_block_does_not_matter(self, order):
        table = pa.table({"a": [1], "b": ["x"], "c": [[1.5]], "d": [{"p": 1, "q": 2}]})
        assert align(table.select(order), table.schema) == table

    def test_fields_of_structs_are_found_by_name_too(self):
        table = one([{"q": "x", "p": 1}, None])
        schema = schema_of(pa.struct({"p": pa.int64(), "new": pa.float32(), "q": TEXT}))
        assert align(table, schema)["c"].to_pylist() == [{"p": 1, "new": None, "q": "x"}, None]

    def test_a_missing_nullable_column_is_null(self):
        schema = pa.schema({"c": pa.int64(), "v": VECTOR, "t": pa.fixed_shape_tensor(INT, (1, 2))})
        assert values(align(one([1, 2]), schema)) == {"c": [1, 2], "v": [None, None], "t": [None, None]}

    def test_all_surplus_and_missing_columns_are_named_at_once(self):
        schema = pa.schema([pa.field("a", INT, nullable=False), pa.field("b", INT)])
        with pytest.raises(SchemaMismatchError) as caught:
            align(pa.table({"x": [1], "y": ["1"]}), schema)
        assert caught.value.columns == ("x", "y", "a")
        assert caught.value.expected == "a int32 not null, b int32"
        assert caught.value.actual == "x int64, y string"

    def test_surplus_and_missing_fields_of_structs_are_named_by_path(self):
        schema = schema_of(pa.list_(pa.struct([pa.field("a", INT, nullable=False)])))
        with pytest.raises(SchemaMismatchError) as caught:
            align(one([[{"x": 1}]]), schema)
        assert caught.value.columns == ("c[].x", "c[].a")

    def test_a_repeated_column_is_refused(self):
        with pytest.raises(SchemaMismatchError, match="more than once"):
            align(pa.Table.from_arrays([pa.array([1])] * 2, names=["c", "c"]), schema_of(pa.int64()))

    @pytest.mark.parametrize(
        ("array", "kind"),
        [
            (pa.array([1, None]), pa.int64()),
            (pa.nulls(2), pa.int64()),
            (pa.array([1, None]), pa.int8()),
            (pa.DictionaryArray.from_arrays(pa.array([0, 1]), ["a", None]), pa.dictionary(pa.int64(), TEXT)),
        ],
    )
    def test_a_null_in_a_column_that_allows_none_is_refused(self, array, kind):
        with pytest.raises(SchemaMismatchError, match="not null"):
            align(pa.table({"c": array}), schema_of(kind, nullable=False))

    def test_nulls_inside_are_refused_where_the_schema_says_so_but_not_under_a_null_parent(self):
        struct = pa.struct([pa.field("x", pa.int8(), nullable=False)])
        assert align(one([{"x": 1}, None]), schema_of(struct))["c"].to_pylist() == [{"x": 1}, None]
        for kind, rows in ((struct, [{"x": None}]), (pa.list_(pa.field("x", pa.int8(), nullable=False)), [[None]])):
            with pytest.raises(SchemaMismatchError, match="not null"):
                align(one(rows), schema_of(kind))

    def test_metadata_of_the_schema_and_its_fields_is_kept_at_any_depth(self, tmp_path):
        inner = pa.field("x", INT, metadata={"deep": "1"})
        field = pa.field("c", pa.struct([inner]), metadata={"k": "v"})
        schema = pa.schema([field, pa.field("new", TEXT, metadata={"n": "1"})], metadata={"s": "t"})
        table = align(one([{"x": 1}]).replace_schema_metadata({"other": "1"}), schema)
        assert table.schema.equals(schema, check_metadata=True)
        assert through_engine(table, str(tmp_path / "t")).schema.equals(schema, check_metadata=True)

    def test_a_schema_without_columns_takes_a_table_without_columns(self):
        table = align(one([1, 2]).select([]), pa.schema([], metadata={"s": "t"}))
        assert (table.num_rows, table.schema.metadata) == (2, {b"s": b"t"})

    def test_appending_blocks_to_a_table_keeps_old_and_new_rows(self, tmp_path):
        uri = str(tmp_path / "t")
        through_engine(pa.table({"n": pa.array([1], pa.int16()), "v": pa.array([[1, 2]], VECTOR)}), uri)
        schema = lance.dataset(uri).schema
        block = pd.DataFrame({"v": [[0.5, 1.0]], "n": [2]})  # other order, wider types, lists of any length
        aligned = align(to_arrow(block), schema)
        fragments = write_fragments(aligned.to_reader(), uri, schema=schema, mode="append")
        table = lance.LanceDataset.commit(uri, lance.LanceOperation.Append(fragments), read_version=1).to_table()
        assert values(table) == {"n": [1, 2], "v": [[1, 2], [0.5, 1]]}


class TestLayoutsOnWhichTheEnginePanics:
    DECIMALS = pa.array(money("1.50", None, "2.50"), pa.decimal128(10, 2))
    NESTED = pa.array([{"s": {"x": n, "t": [str(n)]}} for n in range(9)])

    def layouts(self):
        loose = misaligned(self.DECIMALS)
        offset = pa.array([0, 2, 3], pa.int32())
        return {
            "decimal128": loose,
            "decimal256": misaligned(self.DECIMALS.cast(pa.decimal256(50, 2))),
            "decimal in struct": pa.StructArray.from_arrays([loose], ["d"]),
            "decimal in list": pa.ListArray.from_arrays(offset, loose),
            "decimal in vector": pa.FixedSizeListArray.from_arrays(loose, 3),
            "slice of structs of structs": self.NESTED.slice(2, 3),
            "list over a slice of them": pa.ListArray.from_arrays(offset, self.NESTED.slice(4)),
            "vector over a slice of structs": pa.FixedSizeListArray.from_arrays(pa.array([{"x": 1}] * 9).slice(1), 2),
        }

    def test_are_repaired(self, tmp_path):
        for number, array in enumerate(self.layouts().values()):
            table = align(pa.table({"c": array}), schema_of(array.type))
            assert values(through_engine(table, str(tmp_path / str(number)))) == {"c": array.to_pylist()}

    def test_arise_where_chunks_of_columns_differ_and_are_repaired(self, tmp_path):
        halves = pa.chunked_array([pa.array(range(4)), pa.array(range(5))])
        table = engine_safe(pa.table({"c": self.NESTED, "n": halves}))
        assert values(through_engine(table, str(tmp_path / "t"))) == {
            "c": self.NESTED.to_pylist(),
            "n": halves.to_pylist(),
        }

    def test_a_copy_holds_the_slice_only_and_sound_columns_are_not_copied(self):
        part = engine_safe(pa.table({"c": misaligned(pa.array(money(*["1.5"] * 1000))).slice(10, 5)}))
        assert part.get_total_buffer_size() < 200
        sound = engine_safe(pa.table({"d": self.DECIMALS}))["d"].chunk(0)
        assert sound.buffers()[1].address == self.DECIMALS.buffers()[1].address
        nested = engine_safe(pa.table({"s": self.NESTED}))["s"].chunk(0)
        assert [b.address for b in nested.buffers() if b] == [b.address for b in self.NESTED.buffers() if b]

    @pytest.mark.parametrize("name", ["decimal128", "slice of structs of structs"])
    def test_still_make_it_panic(self, name, tmp_path):
        """When this fails after an upgrade of pylance, engine_safe() has less to do."""
        raw = pa.table({"c": self.layouts()[name]})
        with pytest.raises(BaseException, match=r"is not aligned|end <= self\.len"):
            through_engine(raw, str(tmp_path / "t"))


class TestRowWidth:
    @pytest.mark.parametrize(
        ("kind", "width"),
        [
            (pa.bool_(), (1, 0)),
            (pa.int64(), (8, 0)),
            (pa.float16(), (2, 0)),
            (pa.decimal256(50, 2), (32, 0)),
            (pa.binary(5), (5, 0)),
            (pa.null(), (0, 0)),
            (TEXT, (0, 1)),
            (pa.list_(pa.int64()), (0, 1)),
            (pa.map_(TEXT, INT), (0, 1)),
            (pa.list_(pa.float32(), 768), (3072, 0)),
            (pa.list_(pa.bool_(), 10), (10, 0)),
            (pa.list_(VECTOR, 3), (24, 0)),
            (pa.struct({"a": INT, "b": TEXT, "c": VECTOR}), (12, 1)),
            (pa.dictionary(pa.int16(), TEXT), (2, 0)),
            (pa.fixed_shape_tensor(pa.uint8(), (4, 4)), (16, 0)),
            (ArrowTensorTypeV2((4,), INT), (0, 1)),
        ],
    )
    def test_of_a_column(self, kind, width):
        assert row_width(schema_of(kind)) == width

    def test_adds_up(self):
        assert row_width(pa.schema({"a": INT, "b": TEXT, "c": VECTOR, "d": pa.binary()})) == (12, 2)
        assert row_width(pa.schema([])) == (0, 0)
