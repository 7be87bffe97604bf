"""Blocks of a Ray Dataset as Arrow tables of one schema that the engine stores without loss.

Lance binds record batches to a schema *by position* and trusts their buffers. A block whose columns have another order
or another type is committed as unreadable or reinterpreted data without an error. So every block goes through two
steps before ``write_fragments``: :func:`to_arrow` gives it plain Arrow types, :func:`align` the exact schema of the
table. :func:`unify` makes that schema from the blocks' own schemas when nobody declared one.

Types that the engine refuses, or accepts and then cannot read back, have a stand-in that keeps every value:

=============================================  ==========================================================
``string_view``, ``binary_view``               ``string``, ``binary``
``list_view``, ``large_list_view``             ``list``, ``large_list``
``decimal32``, ``decimal64``                   ``decimal128`` of the same precision and scale
run-end encoded                                the value type
dictionary of temporal, decimal, nested, ...   the value type
ordered dictionary, map with sorted keys       the same, unordered
fixed-size list of size 0, or of values that   ``list``
are not of fixed width (strings, structs, ...)
Ray tensors of one dimension, or of booleans   fixed-size list
Ray tensors of more dimensions                 ``arrow.fixed_shape_tensor`` (stored as a fixed-size list)
Ray tensors of variable length                 ``large_list``
=============================================  ==========================================================

A struct without fields, which the engine cannot store, takes the fields that another block gives it; until then a file
keeps its validity (:func:`in_file`), and a table cannot have it.

Intervals, unions, ragged tensors of several dimensions, tensors of strings and Ray's pickled Python objects have no
stand-in and are refused with :class:`~lance_ray.errors.SchemaMismatchError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lance_ray.errors import SchemaMismatchError

_RAY_TENSORS = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_RAY_RAGGED = "ray.data.arrow_variable_shaped_tensor"
_RAY_PICKLED = "ray.data.arrow_pickled_object"
_BLOB = "lance.blob.v2"
_DECLARE = "declare the schema to choose one"
_ALIGNMENT = 16
_RESERVED = ("_rowid", "_rowaddr", "_rowoffset", "_row_created_at_version", "_row_last_updated_at_version")
_NO_FIELDS = pa.struct([pa.field("__lance_ray_no_fields", pa.null())])


def to_arrow(block: Any) -> pa.Table:
    """A block of a Ray Dataset, or a batch as ``map_batches`` gives it, as a table of types that the engine stores.

    Zero-copy when the block is Arrow already and needs no stand-in (see the module's table). In pandas blocks NaN is a
    missing value and becomes null, in NumPy and Arrow data it stays NaN. Cells that are NumPy arrays of one shape
    become fixed-size lists or tensors also when some cells are missing. A column of a block without rows whose type
    cannot be known has the null type.

    Args:
        block: Arrow table or record batch, pandas DataFrame, or mapping of names to arrays or lists.

    Raises:
        SchemaMismatchError: a column holds pickled Python objects or another type that cannot be stored.
        ValueError, TypeError: Ray cannot make a block of it.
    """
    if isinstance(block, pa.RecordBatch):
        block = pa.Table.from_batches([block])
    table = block if isinstance(block, pa.Table) else _from_ray(block)
    if not table.num_rows:
        table = _without_pickled(table)
    for field in table.schema:
        _refuse_descriptors(field, field.name)
    return align(table, unify([table.schema], stored=False))


def unify(schemas: Iterable[pa.Schema], *, stored: bool = True) -> pa.Schema:
    """One schema that the engine stores and that every block of the given schemas can be aligned to without loss.

    Columns keep the order of their first appearance; one that some schema lacks is nullable. ``null`` gives way to any
    type, ``string``, ``binary`` and ``list`` to their large forms, a dictionary index to a wider one, at any depth. Any
    other two types are a conflict: the engine has no type that stands for both, and guessing one would lose values. The
    metadata of fields and schemas is merged, the first wins; pandas' own is dropped, for it describes one block only.

    ``unify([schema])`` is the declared ``schema`` with the stand-ins of the module's table. Leave the schemas of blocks
    without rows out while there are others: NumPy gives an empty column a type of its own choice.

    Args:
        schemas: of blocks, or a declared one.
        stored: whether this is the schema of a table. It is not while further blocks may give a struct its fields, nor
            for rows that are read, which may have row ids.

    Raises:
        SchemaMismatchError: two types conflict, a type cannot be stored, or names are repeated or unusable.
    """
    fields: list[pa.Field] | None = None
    metadata: dict[bytes, bytes] = {}
    last: pa.Schema | None = None
    for schema in schemas:
        if last is not None and schema.equals(last, check_metadata=True):
            continue
        last = schema
        found = _stored_fields(schema, "")
        fields = found if fields is None else _merged_fields(fields, found, "")
        metadata = {**(schema.metadata or {}), **metadata}
    metadata.pop(b"pandas", None)
    schema = pa.schema(fields or [], metadata=metadata or None)
    if stored:
        check_names(schema)
        _check_fields(schema, "")
    return schema


def check_names(schema: pa.Schema) -> None:
    """Refuse names that no column of a table can have.

    Raises:
        SchemaMismatchError: a name has a dot, or is one that the engine keeps for itself.
    """
    for name in schema.names:
        if "." in name:
            _mismatch(name, "a name without dots", repr(name), "to the engine a dot leads into a struct")
        if name in _RESERVED:
            _mismatch(name, "another name", repr(name), "the engine gives every row such a column itself")


def in_file(schema: pa.Schema) -> pa.Schema:
    """The schema of a data file for rows of this one, when further blocks may still have more to say.

    A column of unknown type is left out; it reads as null all the same. A struct without fields gets one that is null,
    of a name of its own, which :func:`align` passes over on the way back.

    Raises:
        SchemaMismatchError: as for :func:`check_names`.
    """
    check_names(schema)
    known = [field for field in schema if not pa.types.is_null(field.type)]
    return pa.schema([field.with_type(_in_file(field.type)) for field in known], schema.metadata)


def _in_file(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_file(field.type)) for field in kind]) if kind.num_fields else _NO_FIELDS
    if _is_map(kind):
        return pa.map_(*(part.with_type(_in_file(part.type)) for part in (kind.key_field, kind.item_field)))
    if _is_plain_list(kind):
        make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
        return make(kind.value_field.with_type(_in_file(kind.value_type)))
    return kind


def _check_fields(fields: Iterable[pa.Field], prefix: str) -> None:
    """Refuse structs without fields, at any depth."""
    for field in fields:
        path, kind = prefix + field.name, getattr(field.type, "storage_type", field.type)
        if pa.types.is_struct(kind):
            if not kind.num_fields:
                why = "the engine cannot store a struct without fields, and no block gives it any"
                _mismatch(path, "a struct with fields", kind, f"{why}; leave it out or {_DECLARE}")
            _check_fields(kind, f"{path}.")
        elif _is_list(kind):
            parts = [kind.key_field, kind.item_field] if _is_map(kind) else [kind.value_field]
            _check_fields([part.with_name("") for part in parts], f"{path}[]")


def align(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with exactly ``schema``: its columns found by name, in its order, of its types, with its metadata.

    Missing nullable columns become nulls, at any depth of structs. Casts keep every value or fail: integers must be in
    range, floats going to integers integral, decimals exact, timestamps expressible in the unit. There is no cast
    between numbers, strings, booleans and times, nor between timestamps with and without a time zone. Lists become
    fixed-size lists when all have the size. Binary values fill a blob column inline, strings name external blobs.

    One loss of precision is allowed, because vectors often arrive as Python floats: a float going to a narrower float
    type is rounded to the nearest value. A finite value that would become infinite is refused.

    Zero-copy where types are equal already, apart from what :func:`engine_safe` copies.

    Args:
        table: a table as :func:`to_arrow` gives it; one with Ray's tensor columns is taken too.
        schema: what the table shall have, as :func:`unify` or the existing table gives it.

    Raises:
        SchemaMismatchError: a column is missing or surplus, has nulls where none may be, or holds a value that the
            type cannot. It names the columns and both types.
    """
    _check_columns(table.schema, schema)
    if not schema.names:  # only a selection from some column knows its number of rows
        return pa.table({"": pa.nulls(table.num_rows)}).replace_schema_metadata(schema.metadata).select([])
    columns = [_column(table, field) for field in schema]
    return engine_safe(pa.Table.from_arrays(columns, schema=schema))


def check_fits(given: pa.Schema, schema: pa.Schema) -> None:
    """Refuse a schema of which :func:`align` could take no rows but nulls.

    Raises:
        SchemaMismatchError: as for :func:`align`, by the types alone.
    """
    _check_columns(given, schema)
    for field in given:
        _check_type(field.type, schema.field(field.name).type, field.name)


def _check_type(source: pa.DataType, target: pa.DataType, path: str) -> None:
    if pa.types.is_struct(source) and pa.types.is_struct(target):
        _check_columns(pa.schema(list(source)), pa.schema(list(target)), f"{path}.")
        for part in source:
            _check_type(part.type, target.field(part.name).type, f"{path}.{part.name}")
    elif _is_list(source) and _is_list(target):
        sizes = {kind.list_size for kind in (source, target) if pa.types.is_fixed_size_list(kind)}
        if len(sizes) > 1:
            _mismatch(path, target, source, "lists of another size")
        _check_type(source.field(0).type, target.field(0).type, f"{path}[]")
    else:
        _convert(pa.nulls(0, source), target, path)


def engine_safe(table: pa.Table) -> pa.Table:
    """``table`` in a memory layout on which the engine does not panic, so that ``to_reader()`` may be given to it.

    Two layouts that Arrow allows make the engine panic: decimals that are aligned to 8 bytes, as in Ray's shared
    memory, where it wants 16; and structs inside structs that start at an offset, which is what slicing makes. Columns
    of these types are copied where needed, others never. :func:`align` includes this; call it again after slicing.
    """
    nested = [_nests_structs(field.type) for field in table.schema]
    if any(nested):
        # to_reader() slices columns whose chunks do not match; chunks that match stay whole.
        table = pa.Table.from_batches(table.to_batches(), schema=table.schema)
    for index, field in enumerate(table.schema):
        if nested[index] or _has_decimals(field.type):
            chunks = [_packed(chunk, nested[index]) for chunk in table.column(index).chunks]
            table = table.set_column(index, field, pa.chunked_array(chunks, type=field.type))
    return table


def row_width(schema: pa.Schema) -> tuple[int, int]:
    """How wide a row is: bytes of what has a fixed width, and the number of parts whose width varies.

    Fixed-size lists multiply, structs add up, a boolean counts one byte, a dictionary its index. A list, map, string or
    binary is one part of varying width, whatever it holds.
    """
    widths = [_width(field.type) for field in schema]
    return sum(fixed for fixed, _ in widths), sum(varying for _, varying in widths)


def reads_as(written: pa.Schema, schema: pa.Schema) -> bool:
    """Whether data files written with one schema can be committed under another that :func:`unify` made of it.

    Wider is not enough there. To the engine a file of ``string`` is a corrupt one of ``large_string``, and so for
    ``binary`` and for dictionaries with wider indices: such a file must be written again. Nulls read as any type but a
    list, struct or map, and a list as a large list.
    """
    return all(_reads_as(field.type, schema.field(field.name).type) for field in written)


def _reads_as(written: pa.DataType, kind: pa.DataType) -> bool:
    if written.equals(kind):
        return True
    if pa.types.is_null(written):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        return kind.num_fields == 0 or (pa.types.is_fixed_size_list(kind) and _reads_as(written, kind.value_type))
    if pa.types.is_struct(written):
        # To the engine a struct without fields is as wide as the file has it.
        return written.num_fields > 0 and all(_reads_as(part.type, kind.field(part.name).type) for part in written)
    if _is_map(written):
        return _reads_as(written.key_type, kind.key_type) and _reads_as(written.item_type, kind.item_type)
    return _is_list(written) and _reads_as(written.value_type, kind.value_type)


def _width(kind: pa.DataType) -> tuple[int, int]:
    if isinstance(kind, pa.BaseExtensionType):
        return _width(kind.storage_type)
    if pa.types.is_struct(kind):
        return row_width(pa.schema(list(kind)))
    if pa.types.is_fixed_size_list(kind):
        fixed, varying = _width(kind.value_type)
        return fixed * kind.list_size, varying
    if pa.types.is_dictionary(kind):
        return _width(kind.index_type)
    if pa.types.is_null(kind):
        return 0, 0
    try:
        return -(-kind.bit_width // 8), 0
    except ValueError:
        return 0, 1


def _mismatch(path: str, expected: object, actual: object, why: str) -> NoReturn:
    raise SchemaMismatchError(
        f"column {path!r}: expected {expected}, got {actual}: {why}",
        columns=[path],
        expected=str(expected),
        actual=str(actual),
    )


def _from_ray(block: Any) -> pa.Table:
    from ray.data.block import BlockAccessor

    tensors = {name: array for name, cells in block.items() if (array := _from_cells(str(name), cells)) is not None}
    if tensors:
        block = dict(block) if isinstance(block, Mapping) else block.copy(deep=False)
    for name, array in tensors.items():
        block[name] = [None] * len(array)
    if isinstance(block, Mapping):
        block = BlockAccessor.batch_to_block(block)
    table = BlockAccessor.for_block(block).to_arrow()
    for name, array in tensors.items():
        table = table.set_column(table.schema.get_field_index(str(name)), str(name), array)
    return table


def _from_cells(name: str, cells: Any) -> pa.Array | None:
    """A column of NumPy arrays that Ray would pickle because some are missing or hold objects; None for any other."""
    if not isinstance(cells, list) and getattr(cells, "dtype", None) != np.dtype(object):
        return None
    first = next((cell for cell in cells if not _is_missing(cell)), None)
    if not isinstance(first, np.ndarray):
        return None
    found = [None if _is_missing(cell) else cell for cell in cells]
    if first.dtype != np.dtype(object) and all(cell is not None for cell in found):
        return None
    shapes = {getattr(cell, "shape", ()) for cell in found if cell is not None}
    try:
        array = pa.array([None if cell is None else cell.ravel() for cell in found])
    except (pa.ArrowException, AttributeError):
        return None  # mixed cells, which Ray pickles and unify() refuses by name
    if len(shapes) == 1 and pa.types.is_primitive(array.type.value_type):
        return _convert(array, _tensor_type(array.type.value_type, shapes.pop(), name), name)
    return array if all(len(shape) == 1 for shape in shapes) else None


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and isnan(cell))


def pickled_columns(schema: pa.Schema) -> list[str]:
    """The columns that are, or nest, Ray's pickled Python objects: to look at a value of one is to run its code."""
    return [field.name for field in schema if _holds_pickled(field)]


def _holds_pickled(field: pa.Field) -> bool:
    kind, metadata = field.type, field.metadata or {}
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == _RAY_PICKLED or _holds_pickled(pa.field(field.name, kind.storage_type))
    if metadata.get(b"ARROW:extension:name") == _RAY_PICKLED.encode():
        return True
    if pa.types.is_dictionary(kind):
        return _holds_pickled(pa.field(field.name, kind.value_type))
    return any(_holds_pickled(kind.field(index)) for index in range(kind.num_fields))


def _without_pickled(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if getattr(field.type, "extension_name", "") == _RAY_PICKLED:
            table = table.set_column(index, field.name, pa.nulls(table.num_rows))
    return table


def _stored_fields(fields: Iterable[pa.Field], prefix: str) -> list[pa.Field]:
    stored = [field.with_type(_stored(field.type, prefix + field.name)) for field in fields]
    for name, count in Counter(field.name for field in stored).items():
        if count > 1:
            _mismatch(prefix + name, "one column of this name", count, "names repeat")
        if not name or "`" in name:
            _mismatch(prefix + name, "a name without backticks", repr(name), "the engine cannot read such a column")
    return stored


def _refuse_descriptors(field: pa.Field, path: str) -> None:
    """Descriptors say where payloads are in the table that they were read from, and mean nothing elsewhere."""
    marked = (field.metadata or {}).get(b"lance-encoding:blob") == b"true"
    if marked and pa.types.is_struct(field.type) and "position" in [item.name for item in field.type]:
        _mismatch(path, "bytes", "descriptors of blobs", "read the column with blobs='bytes' to write it again")
    for inner in field.type if pa.types.is_struct(field.type) else ():
        _refuse_descriptors(inner, f"{path}.{inner.name}")


def _stored(kind: pa.DataType, path: str) -> pa.DataType:
    """The type itself where the engine stores it, or else its stand-in."""
    is_ = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _stored_extension(kind, path)
    if is_.is_dictionary(kind) or is_.is_run_end_encoded(kind):
        value = _stored(kind.value_type, path)
        return pa.dictionary(kind.index_type, value) if is_.is_dictionary(kind) and _is_indexed(value) else value
    if is_.is_struct(kind):
        return pa.struct(_stored_fields(kind, f"{path}."))
    if is_.is_map(kind):
        return pa.map_(*_stored_fields([kind.key_field, kind.item_field], f"{path}."))
    if _is_list(kind):
        return _stored_list(kind, _stored(kind.value_type, f"{path}[]"))
    if is_.is_decimal(kind) and kind.bit_width < 128:
        return pa.decimal128(kind.precision, kind.scale)
    if is_.is_interval(kind) or is_.is_union(kind):
        _mismatch(path, "a type that Lance stores", kind, "there is no type that keeps its values")
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


def _stored_list(kind: pa.DataType, value: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(value, kind.list_size if kind.list_size and _is_fixed_width(value) else -1)
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    return (pa.large_list if large else pa.list_)(kind.value_field.with_type(value))


def _stored_extension(kind: pa.BaseExtensionType, path: str) -> pa.DataType:
    if kind.extension_name == _RAY_PICKLED:
        why = "pickled Python objects do not go into a table; give the column values of one Arrow type"
        _mismatch(path, "Arrow values", kind, why)
    if kind.extension_name == _RAY_RAGGED:
        if kind.ndim != 1:
            _mismatch(path, "tensors of one shape or of one dimension", kind, "ragged tensors cannot be stored")
        return _stored(kind.storage_type.field("data").type, path)
    if kind.extension_name in _RAY_TENSORS:
        return _tensor_type(kind.value_type, kind.shape, path)
    storage = _stored(kind.storage_type, path)
    return kind if storage.equals(kind.storage_type) else storage


def _tensor_type(value: pa.DataType, shape: Sequence[int], path: str) -> pa.DataType:
    if not pa.types.is_primitive(value):
        _mismatch(path, "tensors of numbers, booleans or times", f"tensors of {value}", "use lists instead")
    size = int(np.prod(shape))
    # What reads tensors back as NumPy arrays knows numbers only.
    if len(shape) > 1 and size and (pa.types.is_integer(value) or pa.types.is_floating(value)):
        return pa.fixed_shape_tensor(value, shape)
    return pa.list_(value, size or -1)


def _is_fixed_width(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(kind):
        return _is_fixed_width(kind.value_type)
    known = pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    return known or bool(pa.types.is_fixed_size_binary(kind))


def _is_indexed(kind: pa.DataType) -> bool:
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return True
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _merged_fields(left: Iterable[pa.Field], right: Iterable[pa.Field], prefix: str) -> list[pa.Field]:
    first, second = ({field.name: field for field in fields} for fields in (left, right))
    merged = []
    for name in {**first, **second}:
        if name in first and name in second:
            merged.append(_merged_field(first[name], second[name], prefix + name))
        else:
            merged.append((first.get(name) or second[name]).with_nullable(True))
    return merged


def _merged_field(left: pa.Field, right: pa.Field, path: str) -> pa.Field:
    metadata = {**(right.metadata or {}), **(left.metadata or {})}
    return pa.field(left.name, _merged(left.type, right.type, path), left.nullable or right.nullable, metadata or None)


def _merged(left: pa.DataType, right: pa.DataType, path: str) -> pa.DataType:
    is_ = pa.types
    if left.equals(right) or is_.is_null(right):
        return left
    if is_.is_null(left):
        return right
    for narrow, wide in ((pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())):
        if {left, right} == {narrow, wide}:
            return wide
    if _is_plain_list(left) and _is_plain_list(right):
        make = pa.large_list if is_.is_large_list(left) or is_.is_large_list(right) else pa.list_
        return make(_merged_field(left.value_field, right.value_field, f"{path}[]"))
    both = {left.id, right.id}
    if len(both) == 1 and is_.is_fixed_size_list(left) and left.list_size == right.list_size:
        return pa.list_(_merged(left.value_type, right.value_type, f"{path}[]"), left.list_size)
    if len(both) == 1 and is_.is_struct(left):
        return pa.struct(_merged_fields(left, right, f"{path}."))
    if len(both) == 1 and is_.is_map(left):
        item = _merged_field(left.item_field, right.item_field, f"{path}.value")
        return pa.map_(_merged(left.key_type, right.key_type, f"{path}.key"), item)
    if len(both) == 1 and is_.is_dictionary(left):
        value = _merged(left.value_type, right.value_type, path)
        return pa.dictionary(_wider_index(left.index_type, right.index_type), value)
    _mismatch(path, left, right, f"blocks disagree; {_DECLARE}")


def _wider_index(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    if pa.types.is_signed_integer(left) != pa.types.is_signed_integer(right):
        return pa.int64()
    return max(left, right, key=lambda index: int(index.bit_width))


def _is_plain_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _check_columns(actual: pa.Schema, expected: pa.Schema, prefix: str = "") -> None:
    has, wanted = Counter(actual.names), set(expected.names)
    wrong = {
        "more than once in the data": [field for field in actual if has[field.name] > 1],
        "in the data but not in the schema": [field for field in actual if field.name not in wanted],
        "not in the data and not nullable": [f for f in expected if not f.nullable and f.name not in has],
    }
    if any(wrong.values()):
        problems = (f"{_described(fields, prefix)}: {problem}" for problem, fields in wrong.items() if fields)
        raise SchemaMismatchError(
            "; ".join(problems),
            columns=[prefix + field.name for fields in wrong.values() for field in fields],
            expected=_described(expected, prefix),
            actual=_described(actual, prefix),
        )


def _described(fields: Iterable[pa.Field], prefix: str) -> str:
    return ", ".join(f"{prefix}{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in fields)


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    index = table.schema.get_field_index(field.name)
    column = pa.chunked_array([pa.nulls(table.num_rows, field.type)]) if index < 0 else table.column(index)
    if not column.type.equals(field.type, check_metadata=True):
        chunks = [_convert(chunk, field.type, field.name) for chunk in column.chunks]
        column = pa.chunked_array(chunks, type=field.type)
    for chunk in column.chunks:
        _refuse_nulls(chunk, field, field.name, allowed=0)
    return column


def _refuse_nulls(array: pa.Array, field: pa.Field, path: str, allowed: int) -> None:
    if field.nullable:
        return
    # A dictionary may hold a null as one of its values, which null_count does not see.
    nulls = (array.dictionary_decode() if pa.types.is_dictionary(array.type) else array).null_count
    if nulls > allowed:
        _mismatch(path, f"{field.type} not null", array.type, f"{nulls} values are null")


def _convert(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    """The same values as an array of exactly the type ``target``, whatever nests in it."""
    source = array.type
    if source.equals(target, check_metadata=True):
        return array
    if pa.types.is_null(source):
        return pa.nulls(len(array), target)
    if isinstance(source, pa.BaseExtensionType):
        return _convert(_storage(array, target, path), target, path)
    if isinstance(target, pa.BaseExtensionType):
        array = _as_blobs(array) if target.extension_name == _BLOB else array
        return pa.ExtensionArray.from_storage(target, _convert(array, target.storage_type, path))
    if pa.types.is_dictionary(target):
        return _to_dictionary(array, target, path)
    if pa.types.is_dictionary(source):
        return _convert(array.dictionary_decode(), target, path)
    if pa.types.is_run_end_encoded(source):
        return _convert(pc.run_end_decode(array), target, path)
    if pa.types.is_struct(source) and pa.types.is_struct(target):
        return _to_struct(array, target, path)
    if _is_list(source) and _is_list(target):
        return _to_list(array, target, path)
    return _to_scalar(array, target, path)


def _storage(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    source = array.type
    _stored_extension(source, path)
    if isinstance(target, pa.BaseExtensionType):
        same_shape = _shape(source) is not None and _shape(source) == _shape(target)
        if not same_shape and {source.extension_name, target.extension_name} != {_BLOB}:
            _mismatch(path, target, source, "they stand for different values")
    return array.storage.flatten()[0] if source.extension_name == _RAY_RAGGED else array.storage


def _shape(kind: pa.BaseExtensionType) -> tuple[int, ...] | None:
    """The shape of a tensor type whose values are in row-major order, None for other types."""
    if kind.extension_name in _RAY_TENSORS:
        return tuple(kind.shape)
    if isinstance(kind, pa.FixedShapeTensorType) and kind.permutation in (None, list(range(len(kind.shape)))):
        return tuple(kind.shape)
    return None


def _as_blobs(array: pa.Array) -> pa.Array:
    part = {"binary": "data", "string": "uri"}.get(_kind(array.type))
    return pa.StructArray.from_arrays([array], [part], mask=array.is_null()) if part else array


def _to_dictionary(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    if not pa.types.is_dictionary(array.type):
        array = _convert(array, target.value_type, path).dictionary_encode()
    indices = _to_scalar(array.indices, target.index_type, path)
    values = _convert(array.dictionary, target.value_type, path)
    return pa.DictionaryArray.from_arrays(indices, values, ordered=target.ordered)


def _to_struct(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    mask = array.is_null() if array.null_count else None
    fields = [] if array.type.equals(_NO_FIELDS) else list(array.type)
    _check_columns(pa.schema(fields), pa.schema(list(target)), f"{path}.")
    # flatten() hides what lies under a null struct: garbage there must not fail a cast.
    parts = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    children = []
    for field in target:
        name = f"{path}.{field.name}"
        child = _convert(parts.get(field.name, pa.nulls(len(array))), field.type, name)
        _refuse_nulls(child, field, name, allowed=array.null_count)
        children.append(child)
    return pa.StructArray.from_arrays(children, fields=list(target), mask=mask)


def _to_list(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    if _is_map(array.type):
        fields = [array.type.key_field, array.type.item_field]
        entries = pa.StructArray.from_arrays([array.keys, array.items], fields=fields)
        # Arrow's own cast is wrong for slices; from_arrays() takes no offsets that are a slice.
        array = pa.ListArray.from_arrays(pa.concat_arrays([array.offsets]), entries, mask=array.is_null())
    item = pa.field("item", pa.struct([target.key_field, target.item_field])) if _is_map(target) else target.value_field
    values = array.flatten()  # without what lies under null lists
    # The engine refuses an empty slice of strings that starts at an offset; a new array has none.
    values = _convert(values, item.type, f"{path}[]") if len(values) else pa.nulls(0, item.type)
    _refuse_nulls(values, item, f"{path}[]", allowed=0)
    lengths, valid = pc.list_value_length(array), array.is_valid()
    if pa.types.is_fixed_size_list(target):
        bounds = pc.min_max(lengths).as_py()
        if not set(bounds.values()) <= {target.list_size, None}:
            _mismatch(path, target, array.type, f"there are lists of {bounds['min']} to {bounds['max']} values")
        vectors = pa.FixedSizeListArray.from_arrays(values, type=target)
        index = pc.subtract(pc.cumulative_sum(valid.cast(pa.int64())), 1)
        return vectors.take(pc.if_else(valid, index, None)) if array.null_count else vectors
    offsets = pa.concat_arrays([pa.array([0]), pc.cumulative_sum(lengths.fill_null(0).cast(pa.int64()))])
    if array.null_count:  # a null offset starts a null list
        offsets = pc.if_else(pa.concat_arrays([valid, pa.array([True])]), offsets, None)
    if pa.types.is_large_list(target):
        return pa.LargeListArray.from_arrays(offsets, values, type=target)
    offsets = _to_scalar(offsets, pa.int32(), path)
    if _is_map(target):
        return pa.MapArray.from_arrays(offsets, *values.flatten(), type=target)
    return pa.ListArray.from_arrays(offsets, values, type=target)


def _to_scalar(array: pa.Array, target: pa.DataType, path: str) -> pa.Array:
    kinds = _kind(array.type), _kind(target)
    if kinds[0] != kinds[1] and kinds not in _CASTS:
        _mismatch(path, target, array.type, f"{kinds[0]} values are not cast to {kinds[1]}")
    try:
        return _cast(array, target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        _mismatch(path, target, array.type, str(error))


_CASTS = {("integer", "float"), ("float", "integer"), ("integer", "decimal"), ("decimal", "integer")}
_KINDS = {
    "integer": pa.types.is_integer,
    "float": pa.types.is_floating,
    "decimal": pa.types.is_decimal,
    "date": pa.types.is_date,
    "time": pa.types.is_time,
    "duration": pa.types.is_duration,
    "string": lambda kind: kind in (pa.string(), pa.large_string(), pa.string_view()),
    "binary": lambda kind: (
        pa.types.is_fixed_size_binary(kind) or kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    ),
}


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "zoned timestamp" if kind.tz else "timestamp without zone"
    return next((name for name, belongs in _KINDS.items() if belongs(kind)), str(kind))


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Arrow's safe cast, made safe where it is not: around float16, and where finite floats overflow to infinity."""
    source, half = array.type, pa.float16()
    if pa.types.is_integer(source) and pa.types.is_decimal(target):
        array = array.cast(pa.decimal256(76, 0))  # Arrow asks for room for any integer, not for these
    elif half in (source, target) and (pa.types.is_integer(source) or pa.types.is_integer(target)):
        array = array.cast(pa.float32())
    result = array.cast(target)
    if pa.types.is_integer(source) and target == half and not result.cast(array.type).equals(array):
        raise pa.ArrowInvalid("an integer is not exact in this type")
    if pa.types.is_floating(source) and pa.types.is_floating(target) and target.bit_width < source.bit_width:
        overflow = pc.and_(pc.is_inf(result.cast(source)), pc.is_finite(array))
        if pc.any(overflow).as_py():
            raise pa.ArrowInvalid("a finite value would become infinite")
    return result


def _nested_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    yield kind
    if isinstance(kind, pa.BaseExtensionType):
        yield from _nested_types(kind.storage_type)
    for index in range(kind.num_fields):
        yield from _nested_types(kind.field(index).type)


def _has_decimals(kind: pa.DataType) -> bool:
    return any(pa.types.is_decimal(part) for part in _nested_types(kind))


def _nests_structs(kind: pa.DataType) -> bool:
    outer = (part for part in _nested_types(kind) if pa.types.is_struct(part) or pa.types.is_fixed_size_list(part))
    return any(pa.types.is_struct(inner) for part in outer for inner in list(_nested_types(part))[1:])


def _packed(array: pa.Array, nests_structs: bool) -> pa.Array:
    misaligned = any(buffer is not None and buffer.address % _ALIGNMENT for buffer in array.buffers())
    copy = (nests_structs and _has_offset(array)) or (_has_decimals(array.type) and misaligned)
    return pa.concat_arrays([array]) if copy else array


def _has_offset(array: pa.Array) -> bool:
    if isinstance(array, pa.ExtensionArray):
        return _has_offset(array.storage)
    children: list[pa.Array] = []
    if isinstance(array, pa.StructArray):
        children = [array.field(index) for index in range(array.type.num_fields)]
    elif isinstance(array, pa.MapArray):
        children = [array.keys, array.items]
    elif _is_list(array.type):
        children = [array.values]
    return array.offset > 0 or any(_has_offset(child) for child in children)


def _is_map(kind: pa.DataType) -> bool:
    return bool(pa.types.is_map(kind))


def _is_list(kind: pa.DataType) -> bool:
    views = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return _is_plain_list(kind) or views or bool(pa.types.is_fixed_size_list(kind) or pa.types.is_map(kind))
