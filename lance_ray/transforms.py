"""What computes new columns: SQL expressions, functions over batches, and classes that are set up once per worker."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from lance.udf import BatchUDF

from lance_ray.arrow import align, to_arrow, unify
from lance_ray.errors import InvalidArgumentError, SchemaMismatchError
from lance_ray.fingerprints import fingerprint
from lance_ray.options import check_choice, check_mapping, check_schema, check_text

BatchFormat = Literal["pyarrow", "pandas", "numpy", "lists"]
_FORMATS = ("pyarrow", "pandas", "numpy", "lists")


@dataclass(frozen=True, slots=True)
class Transform:
    """A transform, folded from what the caller gave.

    Attributes:
        sql: expressions by column name; empty for a function.
        function: takes a batch and returns one; for a class, the class.
        batch_format: what the function takes: a ``RecordBatch``, a ``DataFrame``, a dict of NumPy arrays or of lists.
        schema: what it returns, where the caller said so.
        keeps_input: whether it may return the columns that it was given, too.
        setup: arguments of a class's constructor.
        version: stands for the function in :meth:`fingerprint`, where the caller keeps count of its versions.
    """

    sql: tuple[tuple[str, str], ...] = ()
    function: Callable[..., Any] | None = None
    batch_format: BatchFormat = "pyarrow"
    schema: pa.Schema | None = None
    keeps_input: bool = False
    setup: tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]] = field(default=((), ()), repr=False)
    version: str | None = None

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
        return dataclasses.replace(self, function=made, setup=((), ()))

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
        elif self.batch_format == "lists":
            given = batch.to_pydict()
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
        """Tells a transform from another one across processes: by its version, or by all that it consists of."""
        told = (self.sql, self.batch_format, str(self.schema), self.keeps_input)
        computed = (self.function, self.setup) if self.version is None else self.version
        return fingerprint((told, computed), of=self.function)


@dataclass(frozen=True, slots=True)
class Appending:
    """Marks a function that returns its batch with the new columns appended."""

    transform: Any


def lists_unless_told(transform: Any, batch_format: Any) -> Any:
    """What a function takes where the caller has not said it: a dict of lists, as in lance-ray's ``add_columns_from``.

    A class and a ``batch_udf`` take what they take everywhere.
    """
    if batch_format is not None:
        return batch_format
    plain = callable(transform) and not inspect.isclass(transform) and not isinstance(transform, BatchUDF)
    return "lists" if plain else "pyarrow"


def fold_transform(
    transform: Any,
    *,
    batch_format: Any = "pyarrow",
    output_schema: pa.Schema | None = None,
    setup: tuple[Any, Any] = (None, None),
    version: str | None = None,
) -> Transform | pa.Schema:
    """The transform, checked; for fields or a schema (columns of nulls) the schema.

    Raises:
        InvalidArgumentError: it is none of what a transform may be.
    """
    check_choice("batch_format", batch_format, _FORMATS)
    if (schema := _as_schema(transform)) is not None:
        return schema
    check_schema("output_schema", output_schema)
    check_text("transform_version", version)
    keeps_input = isinstance(transform, Appending)
    if isinstance(transform, Appending):
        transform = transform.transform
    arguments = _fold_setup(*setup)
    if isinstance(transform, BatchUDF):
        if transform.cache is not None:
            raise InvalidArgumentError("transform", "batch_udf(checkpoint_file=...)", "use job_id=, which resumes")
        output_schema = output_schema or transform.output_schema
        transform = transform.func
    for name, given in zip(("fn_constructor_args", "fn_constructor_kwargs"), arguments, strict=True):
        if given and not inspect.isclass(transform):
            raise InvalidArgumentError(name, given, "is for a class only")
    if isinstance(transform, Mapping):
        return Transform(_as_sql(transform), schema=output_schema, version=version)
    if not callable(transform):
        raise InvalidArgumentError(
            "transform", transform, "must be a dict of SQL expressions, a function, a class, a field or a schema"
        )
    return Transform((), transform, batch_format, output_schema, keeps_input, arguments, version)


def _fold_setup(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    if args is not None and (isinstance(args, (str, bytes)) or not isinstance(args, Sequence)):
        raise InvalidArgumentError("fn_constructor_args", args, "must be a list of arguments")
    check_mapping("fn_constructor_kwargs", kwargs)
    if unnamed := [name for name in kwargs or () if not isinstance(name, str)]:
        raise InvalidArgumentError("fn_constructor_kwargs", unnamed, "must be names")
    return tuple(args or ()), tuple(sorted((kwargs or {}).items()))


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


def aligned(table: pa.Table, schema: pa.Schema, beside: Collection[str] | None = ()) -> pa.Table:
    """What a transform returned, as exactly the columns of the schema: each must be there, by its name.

    A column that is missing is an error also where it may be null: one that is misspelt would become nulls.

    Args:
        table: what came back.
        schema: the columns to be written.
        beside: names that may come back too, and are left; None for any.

    Raises:
        SchemaMismatchError: columns are missing or surplus, or values do not fit their types.
    """
    require_names(table.schema.names, schema.names, beside)
    places = [place for place, name in enumerate(table.schema.names) if name in schema.names]
    return align(table.select(places), schema)


def require_names(found: Collection[str], wanted: Collection[str], beside: Collection[str] | None = ()) -> None:
    """Raise SchemaMismatchError unless a transform makes the columns wanted, and no others than those ``beside``."""
    missing = [name for name in wanted if name not in found]
    surplus = [] if beside is None else [name for name in found if name not in wanted and name not in beside]
    if missing or surplus:
        raise SchemaMismatchError(
            f"the transform makes columns {list(found)}: missing {missing}, surplus {surplus}",
            columns=[*missing, *surplus],
            expected=", ".join(wanted),
            actual=", ".join(found),
        )
