"""Ray Data filter expressions as Lance SQL, such that a scan keeps exactly the rows that Ray would keep.

Ray evaluates a predicate with pyarrow, Lance with DataFusion, and the two differ where it hurts: NaN, nulls around
``is_in``, rounded literals. So every boolean expression is asked two questions, "in which rows is it true?" and "in
which rows is it false?", and answers with SQL that is true in those rows; SQL's third value counts as "not true".
``NOT`` then only swaps the questions, the SQL needs no ``NOT`` over three-valued logic, and an answer that is merely
a superset stays one through any nesting. What has no proven answer is left to Ray's own code, after the scan.

Values that make Ray raise in the middle of a block (a uint64 of 2**63 beside a Python int, an int64 beyond 2**53
beside a float) make no error here: Lance compares them exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce
from operator import and_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types
from ray.data.block import BlockAccessor
from ray.data.expressions import (
    AliasExpr,
    BinaryExpr,
    ColumnExpr,
    Expr,
    LiteralExpr,
    Operation,
    PyArrowComputeUDFExpr,
    UDFExpr,
    UnaryExpr,
)

_COMPARISONS = {
    Operation.EQ: "=",
    Operation.NE: "<>",
    Operation.LT: "<",
    Operation.LE: "<=",
    Operation.GT: ">",
    Operation.GE: ">=",
}
_OPPOSITE = {"=": "<>", "<>": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"=": "=", "<>": "<>", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_MEMBERSHIPS = (Operation.IN, Operation.NOT_IN)
_ARITHMETIC = {Operation.ADD: "+", Operation.SUB: "-", Operation.MUL: "*"}
_STRING_SEARCHES = {pc.starts_with: "starts_with", pc.ends_with: "ends_with", pc.match_substring: "contains"}
_INFINITY, _MINUS_INFINITY = "CAST('inf' AS DOUBLE)", "CAST('-inf' AS DOUBLE)"
_NULL = "NULL"
_TIME_UNITS = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}
_TIME_ZONE = re.compile(r"[\w+:/-]+", re.ASCII)
_CONVERSION_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)

# Metadata of columns that a scan returns, or that SQL sees, as another type than the schema's.
_NOT_AS_STORED = {b"lance-encoding:blob", b"ARROW:extension:name"}
# Lance's SQL parser gives up at 50 levels of recursion and takes several for each pair of parentheses.
_MAX_NESTING = 10
# Parsing costs some 5 microseconds a value in every task that scans; past this, reading the column is cheaper.
_MAX_LIST_LENGTH = 20_000


@dataclass(frozen=True, slots=True)
class SplitPredicate:
    """A predicate in two parts: the rows that pass both are the rows that pass the predicate.

    Attributes:
        sql: Lance SQL, true for at least every row that Ray would keep. None when Lance can decide nothing.
        residual: what Ray's code must still evaluate on the rows that Lance returns. None when ``sql`` is exact.
    """

    sql: str | None
    residual: Expr | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """SQL that is true in the rows asked for and, when not ``exact``, perhaps in more."""

    sql: str
    exact: bool = True


@dataclass(frozen=True, slots=True)
class _Value:
    """SQL of a column, or of arithmetic over columns."""

    sql: str
    type: pa.DataType


def split_predicate(expr: Expr, schema: pa.Schema) -> SplitPredicate:
    """What Lance can decide of a filter expression, and what is left for Ray.

    The conjuncts of the top-level ``AND`` are judged one by one. A predicate that does not look at each row by itself
    (random numbers, membership in another column) is left to Ray whole.

    Args:
        expr: a boolean expression over top-level columns.
        schema: the Arrow schema of the Lance table.

    Returns:
        The SQL and the residual; at least one of them is set.
    """
    if not _is_row_by_row(expr):
        return SplitPredicate(None, expr)
    translator = _Translator(schema)
    sql: list[str] = []
    rest: list[Expr] = []
    for conjunct in _operands(expr, Operation.AND):
        rows = translator.rows(conjunct, True, _MAX_NESTING)
        if rows is not None:
            sql.append(rows.sql)
        if rows is None or not rows.exact:
            rest.append(conjunct)
    if not all(columns_of(conjunct) for conjunct in rest):
        rest = [expr]  # without a column the conjunct is one value, which Ray accepts only beside a column
    return SplitPredicate(" AND ".join(sql) or None, reduce(and_, rest) if rest else None)


def apply_residual(table: pa.Table, residual: Expr) -> pa.Table:
    """The rows of ``table`` that pass ``residual``, in order, by Ray's own evaluation and with its errors."""
    # Before version 23, pyarrow's AND and OR of nullable chunks write over neighbouring bits (apache/arrow#47825).
    accessor: Any = BlockAccessor.for_block(table.combine_chunks())
    return accessor.filter(residual)


def key_condition(name: str, keys: pa.Array) -> Any:
    """A filter for the rows in which a column is one of the keys: SQL where Lance has literals of the type."""
    literals = [] if _kind(keys.type) is None else [_literal(scalar) for scalar in keys]
    if not literals or None in literals or _NULL in literals or "`" in name:
        return pc.field(name).isin(keys)
    return f"`{name}` IN ({', '.join(map(str, literals))})"


def columns_of(expr: Expr) -> frozenset[str]:
    """The names of the top-level columns that ``expr`` reads."""
    return frozenset(node.name for node in _walk(expr) if isinstance(node, ColumnExpr))


def _walk(expr: Expr) -> Iterator[Expr]:
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, BinaryExpr):
            stack += [node.left, node.right]
        elif isinstance(node, UnaryExpr):
            stack.append(node.operand)
        elif isinstance(node, AliasExpr):
            stack.append(node.expr)
        elif isinstance(node, UDFExpr):
            stack += [*node.args, *node.kwargs.values()]


def _is_row_by_row(expr: Expr) -> bool:
    leaves_first = list(_walk(expr))[::-1]  # Ray remembers the answers, and would recurse through a long chain
    lists = (node.right for node in leaves_first if isinstance(node, BinaryExpr) and node.op in _MEMBERSHIPS)
    return all(node.is_idempotent() for node in leaves_first) and all(
        isinstance(_unalias(values), LiteralExpr) for values in lists
    )


def _unalias(expr: Expr) -> Expr:
    while isinstance(expr, AliasExpr):
        expr = expr.expr
    return expr


def _operands(expr: Expr, op: Operation) -> list[Expr]:
    """The operands of a chain of one associative operation, in order, however it is bracketed."""
    found: list[Expr] = []
    stack = [expr]
    while stack:
        node = _unalias(stack.pop())
        if isinstance(node, BinaryExpr) and node.op == op:
            stack += [node.right, node.left]
        else:
            found.append(node)
    return found


@dataclass(frozen=True, slots=True)
class _Translator:
    schema: pa.Schema

    def rows(self, expr: Expr, want: bool, nesting: int) -> _Rows | None:
        """The rows in which ``expr`` is ``want``; None when no SQL is known to find them all."""
        expr = _unalias(expr)
        if nesting == 0:
            return None
        if isinstance(expr, UnaryExpr):
            if expr.op == Operation.NOT:
                return self.rows(expr.operand, not want, nesting - 1)
            return self._null_test(expr, want, nesting)
        if isinstance(expr, BinaryExpr):
            return self._binary(expr, want, nesting)
        if isinstance(expr, PyArrowComputeUDFExpr):
            return self._string_search(expr, want)
        column = self._value(expr, nesting)
        if column is None or not types.is_boolean(column.type):
            return None
        return _Rows(column.sql if want else f"NOT {column.sql}")

    def _null_test(self, expr: UnaryExpr, want: bool, nesting: int) -> _Rows | None:
        value = self._value(expr.operand, nesting)
        null = "NULL" if (expr.op == Operation.IS_NULL) == want else "NOT NULL"
        return None if value is None else _Rows(f"{value.sql} IS {null}")

    def _binary(self, expr: BinaryExpr, want: bool, nesting: int) -> _Rows | None:
        if expr.op in (Operation.AND, Operation.OR):
            parts = [self.rows(part, want, nesting - 1) for part in _operands(expr, expr.op)]
            return _join(parts, (expr.op == Operation.AND) == want)
        left, right, symbol = _unalias(expr.left), _unalias(expr.right), _COMPARISONS.get(expr.op)
        if symbol and isinstance(left, LiteralExpr):
            left, right, symbol = right, left, _MIRRORED[symbol]
        value = self._value(left, nesting)
        if value is None:
            return None
        if isinstance(right, LiteralExpr):
            if expr.op in _MEMBERSHIPS:
                return _member_rows(value, right.value, (expr.op == Operation.IN) == want)
            return _compare_literal(value, symbol, right.value, want) if symbol else None
        other = self._value(right, nesting)
        return _compare_values(value, symbol, other, want) if symbol and other else None

    def _string_search(self, expr: PyArrowComputeUDFExpr, want: bool) -> _Rows | None:
        function, value = _STRING_SEARCHES.get(expr.pc_func), self._value(expr.args[0], 0)
        plain = [type(argument) for argument in expr.pc_positional] == [str] and not expr.pc_kwargs
        if function is None or value is None or _kind(value.type) != "text" or not plain:
            return None
        pattern = _scalar(expr.pc_positional[0])
        if pattern is None:
            return None
        return _Rows(f"{'' if want else 'NOT '}{function}({value.sql}, {_literal(pattern)})")

    def _value(self, expr: Expr, nesting: int) -> _Value | None:
        expr = _unalias(expr)
        if isinstance(expr, ColumnExpr):
            return self._column(expr.name)
        if isinstance(expr, BinaryExpr) and expr.op in _ARITHMETIC and nesting > 0:
            terms = [self._term(side, nesting - 1) for side in (expr.left, expr.right)]
            if None not in terms and columns_of(expr):
                return _Value(f"({terms[0]} {_ARITHMETIC[expr.op]} {terms[1]})", pa.int64())
        return None

    def _column(self, name: str) -> _Value | None:
        index = self.schema.get_field_index(name)
        # Lance cannot name a column that holds a backtick, and sees a path in one that holds a dot.
        if index < 0 or not name or "`" in name or "." in name:
            return None
        field = self.schema.field(index)
        if isinstance(field.type, pa.BaseExtensionType) or _NOT_AS_STORED & set(field.metadata or ()):
            return None
        return _Value(f"`{name}`", field.type)

    def _term(self, expr: Expr, nesting: int) -> str | None:
        """SQL of an int64 operand. Both engines compute in int64, and wrap around on overflow."""
        expr = _unalias(expr)
        if isinstance(expr, LiteralExpr):
            scalar = _scalar(expr.value)
            whole = scalar is not None and types.is_signed_integer(scalar.type)
            return f"({_literal(scalar)})" if whole else None
        value = self._value(expr, nesting)
        return value.sql if value and types.is_int64(value.type) else None


def _join(parts: Sequence[_Rows | None], every: bool) -> _Rows | None:
    known = [part for part in parts if part is not None]
    if not known or not (every or len(known) == len(parts)):
        return None
    sql = (" AND " if every else " OR ").join(part.sql for part in known)
    return _Rows(f"({sql})", len(known) == len(parts) and all(part.exact for part in known))


def _compare_literal(value: _Value, symbol: str, raw: object, want: bool) -> _Rows | None:
    given = _scalar(raw)
    bound = None if given is None else _cast(given, value.type)
    literal = None if bound is None else _literal(bound)
    if given is None or bound is None or literal is None:
        return None
    if types.is_floating(value.type) and bound.as_py() != given.as_py():
        # The literal lies between two float32 values, and Ray compares in float64: `bound` stands in for it.
        if symbol in ("=", "<>"):
            return None
        symbol = symbol[0] + ("=" if (symbol[0] == ">") == (bound.as_py() > given.as_py()) else "")
    comparison = f"{value.sql} {symbol if want else _OPPOSITE[symbol]} {literal}"
    if not types.is_floating(value.type) or symbol in ("=", "<>"):
        return _Rows(comparison)
    # No order holds for NaN in Ray; Lance has it beyond the infinity of its sign.
    beyond, infinity = symbol[0], _INFINITY if symbol[0] == ">" else _MINUS_INFINITY
    if want:
        return _Rows(f"({comparison} AND {value.sql} {_OPPOSITE[beyond]} {infinity})")
    return _Rows(f"({comparison} OR {value.sql} {beyond} {infinity})")


def _compare_values(left: _Value, symbol: str, right: _Value, want: bool) -> _Rows | None:
    kind = _kind(left.type)
    if kind is None or (left.type != right.type and not kind == _kind(right.type) == "text"):
        return None
    if not types.is_floating(left.type):
        return _Rows(f"{left.sql} {symbol if want else _OPPOSITE[symbol]} {right.sql}")
    if not want or symbol == "<>":
        return None  # holds for NaN beside NaN, which are equal in Lance
    comparison = f"{left.sql} {symbol} {right.sql}"
    if "=" in symbol:  # between columns, Lance has -0.0 below 0.0
        comparison = f"({comparison} OR ({left.sql} = 0.0 AND {right.sql} = 0.0))"
    return _Rows(comparison, exact=False)


def _member_rows(value: _Value, members: object, inside: bool) -> _Rows | None:
    literals = _list_literals(members, value.type)
    if literals is None:
        return None
    # Ray's is_in is never null: a null is a member if the list has one, and otherwise it is not.
    has_null = _NULL in literals
    values = ", ".join(literal for literal in literals if literal != _NULL)
    listed = f"{value.sql} {'' if inside else 'NOT '}IN ({values})"
    return _Rows(f"({listed} OR {value.sql} IS {_NULL})" if has_null == inside else listed)


def _list_literals(values: object, target: pa.DataType) -> list[Any] | None:
    """SQL of a list as Ray's ``is_in`` takes it; None where it may mean something else to Ray than to Lance."""
    try:
        array = pa.array(values)
        if _kind(array.type) is None or _kind(array.type) != _kind(target) or len(array) > _MAX_LIST_LENGTH:
            return None
        array = array.cast(target)
    except _CONVERSION_ERRORS:
        return None
    if array.null_count == len(array) or (types.is_floating(target) and pc.any(pc.equal(array, 0)).as_py()):
        return None  # Ray's is_in tells 0.0 from -0.0, Lance does not
    literals = [_literal(scalar) for scalar in array]
    return None if None in literals else literals


def _scalar(value: object) -> pa.Scalar | None:
    """A literal with the type that pyarrow gives it, in which Ray compares."""
    try:
        scalar = pa.scalar(value)
    except _CONVERSION_ERRORS:
        return None
    return scalar if scalar.is_valid else None


def _cast(scalar: pa.Scalar, target: pa.DataType) -> pa.Scalar | None:
    """The literal in the column's type; None when it does not fit. Only a float32 may be rounded."""
    try:
        return scalar.cast(target) if _kind(scalar.type) == _kind(target) is not None else None
    except _CONVERSION_ERRORS:
        return None


def _kind(data_type: pa.DataType) -> str | None:
    """Both engines compare by value within a kind; None for types that are left to Ray."""
    if types.is_integer(data_type) or types.is_float32(data_type) or types.is_float64(data_type):
        return "number"
    if types.is_string(data_type) or types.is_large_string(data_type):
        return "text"
    if types.is_timestamp(data_type) and _TIME_ZONE.fullmatch(data_type.tz or "UTC"):
        return f"timestamp {data_type.tz}"
    return str(data_type) if types.is_boolean(data_type) or types.is_date32(data_type) else None


def _literal(scalar: pa.Scalar) -> str | None:
    """SQL for a value of a type that has a kind; None for NaN, which SQL has no literal for."""
    if not scalar.is_valid:
        return _NULL
    if types.is_timestamp(scalar.type):
        zone = f'Some("{scalar.type.tz}")' if scalar.type.tz else "None"
        return f"arrow_cast({scalar.value}, 'Timestamp({_TIME_UNITS[scalar.type.unit]}, {zone})')"
    value = scalar.as_py()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else _INFINITY if value > 0 else _MINUS_INFINITY
    if value == -(2**63):  # as a number, it would be the negation of one that does not fit
        return f"CAST('{value}' AS BIGINT)"
    return str(value).lower()
