"""What computes new columns: SQL expressions, functions over batches, and classes that are set up once per worker."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import pyarrow as pa
from lance.udf import BatchUDF

from lance_ray.arrow import align, to_arrow, unify
from lance_ray.errors import InvalidArgumentError, SchemaMismatchError

BatchFormat = Literal["pyarrow", "pandas", "numpy"]
_FORMATS = ("pyarrow", "pandas", "numpy")


@dataclass(frozen=True, slots=True)
class Transform:
    """A transform, folded from what the caller gave.

    Attributes:
        sql: expressions by column name; empty for a function.
        function: takes a batch and returns one; for a class, the class.
        batch_format: what the function takes: a ``RecordBatch``, a ``DataFrame`` or a dict of NumPy arrays.
        schema: what it returns, where the caller said so.
        keeps_input: whether it may return the columns that it was given, too.
    """

    sql: tuple[tuple[str, str], ...] = ()
    function: Callable[..., Any] | None = None
    batch_format: BatchFormat = "pyarrow"
    schema: pa.Schema | None = None
    keeps_input: bool = False
    setup: tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]] = field(default=((), ()), repr=False)

    @property
    def is_stateful(self) -> bool:
        """Whether each worker makes an object of its own."""
        return inspect.isclass(self.function)

    def load(self) -> Transform:
        """The transform ready for use; a class is called, once, with the arguments of its constructor."""
        if not self.is_stateful:
            return self
        assert self.function is not None  # noqa: S101 - is_stateful says so
        args, kwargs = self.setup
        made = self.function(*args, **dict(kwargs))
        return Transform((), made, self.batch_format, self.schema, self.keeps_input)

    def __call__(self, batch: pa.RecordBatch) -> pa.Table:
        """What the function makes of a batch, as a table of types that the engine stores.

        Raises:
            SchemaMismatchError: another number of rows came back, or values that no column holds.
        """
        assert self.function is not None  # noqa: S101 - SQL is left to the engine
        given: Any = batch
        if self.batch_format == "pandas":
            given = batch.to_pandas()
        elif self.batch_format == "numpy":
            given = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
        found = self.function(given)
        if not isinstance(found, (pa.Table, pa.RecordBatch, Mapping)) and not hasattr(found, "iloc"):
            raise InvalidArgumentError(
                "transform", type(found).__name__, "must return a RecordBatch, a Table, a DataFrame or a dict of arrays"
            )
        table = to_arrow(found)
        if table.num_rows != batch.num_rows:
            raise SchemaMismatchError(
                f"the transform returned {table.num_rows} rows for a batch of {batch.num_rows}",
                columns=table.schema.names,
            )
        return table

    def fingerprint(self) -> str:
        """Tells a transform from another one across processes: by its expressions, or by its code and constants."""
        digest = hashlib.blake2b(digest_size=16)
        for part in _parts_of(self):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()


def _parts_of(transform: Transform) -> Iterator[str]:
    yield repr((transform.sql, transform.batch_format, str(transform.schema)))
    if transform.function is not None:
        yield from _parts_of_callable(transform.function)
        yield repr(transform.setup)


def _parts_of_callable(function: Any) -> Iterator[str]:
    if inspect.isclass(function):
        yield function.__qualname__
        for name, member in sorted(vars(function).items()):
            if callable(member) and hasattr(member, "__code__"):
                yield name
                yield from _parts_of_callable(member)
        return
    inner = getattr(function, "func", None)
    if inner is not None and not hasattr(function, "__code__"):  # functools.partial, BatchUDF
        yield repr((getattr(function, "args", ()), sorted(getattr(function, "keywords", {}).items())))
        yield from _parts_of_callable(inner)
        return
    code = getattr(function, "__code__", None)
    if code is None:
        yield type(function).__qualname__
        yield from _parts_of_callable(type(function))
        return
    yield from _parts_of_code(code)
    yield _plain(getattr(function, "__defaults__", None))
    for cell in getattr(function, "__closure__", None) or ():
        yield _plain(cell.cell_contents)


def _parts_of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:
            yield _plain(constant)


def _plain(value: Any) -> str:
    # What repr() says of other objects has their address, which differs between processes.
    plain = value is None or isinstance(value, (str, bytes, int, float, bool, tuple, frozenset))
    return repr(value) if plain else type(value).__qualname__


@dataclass(frozen=True, slots=True)
class Appending:
    """Marks a function that returns its batch with the new columns appended."""

    transform: Any


def fold_transform(
    transform: Any,
    *,
    batch_format: Any = "pyarrow",
    output_schema: pa.Schema | None = None,
    setup: tuple[Any, Any] = (None, None),
) -> Transform | pa.Schema:
    """The transform, checked; for fields or a schema (columns of nulls) the schema.

    Raises:
        InvalidArgumentError: it is none of what a transform may be.
    """
    if batch_format not in _FORMATS:
        raise InvalidArgumentError("batch_format", batch_format, f"must be one of {_FORMATS}")
    if (schema := _as_schema(transform)) is not None:
        return schema
    keeps_input = isinstance(transform, Appending)
    if isinstance(transform, Appending):
        transform = transform.transform
    arguments = (tuple(setup[0] or ()), tuple(sorted((setup[1] or {}).items())))
    if isinstance(transform, BatchUDF):
        if transform.cache is not None:
            raise InvalidArgumentError("transform", "batch_udf(checkpoint_file=...)", "use job_id=, which resumes")
        output_schema = output_schema or transform.output_schema
        transform = transform.func
    if isinstance(transform, Mapping):
        return Transform(_as_sql(transform), schema=output_schema)
    if not callable(transform):
        raise InvalidArgumentError(
            "transform", transform, "must be a dict of SQL expressions, a function, a class, a field or a schema"
        )
    if arguments != ((), ()) and not inspect.isclass(transform):
        raise InvalidArgumentError("fn_constructor_args", arguments, "is for a class only")
    return Transform((), transform, batch_format, output_schema, keeps_input, arguments)


def _as_schema(transform: Any) -> pa.Schema | None:
    if isinstance(transform, pa.Field):
        return pa.schema([transform])
    if isinstance(transform, pa.Schema):
        return transform
    if isinstance(transform, (list, tuple)) and transform and all(isinstance(item, pa.Field) for item in transform):
        return pa.schema(list(transform))
    return None


def _as_sql(transform: Mapping[Any, Any]) -> tuple[tuple[str, str], ...]:
    if not transform or not all(isinstance(item, str) and item for pair in transform.items() for item in pair):
        raise InvalidArgumentError("transform", dict(transform), "must map column names to SQL expressions")
    return tuple(transform.items())


def output_of(table: pa.Table, transform: Transform, existing: pa.Schema) -> pa.Schema:
    """The schema of the new columns, from what a transform made of some rows.

    Raises:
        SchemaMismatchError: a type cannot be known from these rows.
    """
    names = [name for name in table.schema.names if not (transform.keeps_input and name in existing.names)]
    schema = unify([table.select(names).schema]).remove_metadata()
    unknown = [item.name for item in schema if pa.types.is_null(item.type)]
    if unknown:
        raise SchemaMismatchError(
            f"columns {unknown} are null in the rows that were tried; declare output_schema", columns=unknown
        )
    return schema


def aligned(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The new columns of what a transform returned, of exactly the schema."""
    return align(table.select([name for name in table.schema.names if name in schema.names]), schema)
