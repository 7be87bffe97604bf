"""Filter expressions given to Lance keep the rows that Ray keeps: with and without an index, exactly and in order."""

from __future__ import annotations

import math
import operator
import random
import struct
from datetime import date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from functools import reduce
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.data.block import BlockAccessor
from ray.data.datatype import DataType
from ray.data.expressions import col, lit, udf
from ray.data.expressions import random as random_number

from lance_ray.predicates import apply_residual, columns_of, split_predicate

INDEXES = (None, "BTREE", "BITMAP", "ZONEMAP", "BLOOMFILTER", "NGRAM")
INDEX_SIZES: dict[str, Any] = {
    "ZONEMAP": {"rows_per_zone": 300},
    "BLOOMFILTER": {"number_of_items": 300, "probability": 0.01},
}
ROWS, APPENDED = 9000, 1000  # several pages of a BTREE, many zones, and rows that no index covers

NAN, NEGATIVE_NAN, ODD_NAN = struct.unpack("<3d", struct.pack("<3Q", 0x7FF8 << 48, 0xFFF8 << 48, (0x7FF8 << 48) + 1))
NARROW = float(np.float32(0.1))  # what a float32 column holds for 0.1
MOMENT = datetime(2020, 2, 29, 1, 2, 3, 456789)
STRINGS = [
    *("", "a", "A", "ab", "aa", "ba", "abc", "a%b", "a_b", "%", "_", "%a", "\\", "a\\b", "a\\", "\\%", "it's", 'a"b'),
    *("`", "ß", "é", "\U0001f600", "\U0001f600x", "\U0010ffff", "\x00", "a\x00", "\n", "ab\n", "NULL"),
]
FLOATS = [NAN, NEGATIVE_NAN, 0.0, -0.0, math.inf, -math.inf, 1.5, -1.5, 5.0]
VALUES = {
    "i8": (pa.int8(), [-128, -127, -1, 0, 1, 5, 126, 127]),
    "i32": (pa.int32(), [-(2**31), -1, 0, 5, 2**31 - 1]),
    "i64": (pa.int64(), [-(2**63), 1 - 2**63, -1, 0, 1, 5, 2**53 + 1, 2**62, 2**63 - 2, 2**63 - 1]),
    "j64": (pa.int64(), [-(2**63), -1, 0, 1, 2, 5, 3037000500, 2**63 - 1]),
    "u8": (pa.uint8(), [0, 1, 5, 254, 255]),
    "u64": (pa.uint64(), [0, 1, 5, 2**53 + 1, 2**63 - 1]),
    "f32": (pa.float32(), [*FLOATS, NARROW, 1e-45, 3.4028234663852886e38, 2.0**24]),
    "f64": (pa.float64(), [*FLOATS, ODD_NAN, 0.1, 5e-324, 1.7976931348623157e308, 2.0**53]),
    "g64": (pa.float64(), [*FLOATS, ODD_NAN]),
    "text": (pa.string(), STRINGS),
    "large": (pa.large_string(), STRINGS),
    "yes": (pa.bool_(), [True, False]),
    "no": (pa.bool_(), [True, False]),
    "day": (pa.date32(), [date(1, 1, 1), date(1969, 12, 31), date(1970, 1, 1), date(2020, 2, 29), date(9999, 12, 31)]),
    "time": (pa.timestamp("us"), [datetime(1, 1, 1), datetime(1969, 12, 31, 23, 59, 59, 999999), MOMENT]),
    "seconds": (pa.timestamp("s"), [datetime(1, 1, 1), datetime(1970, 1, 1), MOMENT.replace(microsecond=0)]),
    "nanos": (pa.timestamp("ns"), [datetime(1970, 1, 1), MOMENT]),
    "instant": (pa.timestamp("us", "UTC"), [datetime(1, 1, 1), datetime(1970, 1, 1), MOMENT]),
}
SCHEMA = pa.schema([("id", pa.int64()), *((name, data_type) for name, (data_type, _) in VALUES.items())])


def in_runs(values, data_type, choose):
    """A column in which single values, and nulls, fill whole zones, and others mix."""
    found: list[Any] = []
    while len(found) < ROWS + APPENDED:
        run = choose.choice([1, 1, 1, 400])
        found += [choose.choice([*values, None])] * run
    return pa.array(found[: ROWS + APPENDED], data_type)


def build_table():
    choose = random.Random(7)
    columns = {name: in_runs(values, data_type, choose) for name, (data_type, values) in VALUES.items()}
    return pa.table({"id": pa.array(range(ROWS + APPENDED), pa.int64()), **columns}, schema=SCHEMA)


def index_all(dataset, kind):
    for name, (data_type, _) in VALUES.items():
        is_text = pa.types.is_string(data_type) or pa.types.is_large_string(data_type)
        if (kind == "NGRAM" and not is_text) or (kind == "BLOOMFILTER" and pa.types.is_boolean(data_type)):
            continue
        dataset.create_scalar_index(name, kind, **INDEX_SIZES.get(kind, {}))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The same rows once for each kind of index: several fragments, deletions before and after, a tail not indexed."""
    table, found = build_table(), {}
    for kind in INDEXES:
        path = str(tmp_path_factory.mktemp("predicates") / f"{kind}.lance")
        dataset = lance.write_dataset(table.slice(0, ROWS), path, max_rows_per_file=3500)
        dataset.delete("id % 13 = 4 OR id BETWEEN 1000 AND 1200")
        if kind:
            index_all(dataset, kind)
        dataset.delete("id % 17 = 3")
        lance.write_dataset(table.slice(ROWS), path, mode="append").delete(f"id = {ROWS + 5}")
        found[kind] = lance.dataset(path)
    return found


@pytest.fixture(scope="module")
def table(datasets):
    return datasets[None].to_table().combine_chunks()


def filtered_by_ray(table, expr):
    accessor: Any = BlockAccessor.for_block(table)
    return accessor.filter(expr)


def kept_by_ray(table, expr):
    return filtered_by_ray(table, expr)["id"]


def kept_by_lance(dataset, split):
    """The rows by SQL, and by what is left of the expression when something is."""
    if split.residual is None:
        return dataset.scanner(filter=split.sql, columns=["id"]).to_table()["id"]
    columns = ["id", *columns_of(split.residual)]
    return apply_residual(dataset.scanner(filter=split.sql, columns=columns).to_table(), split.residual)["id"]


def assert_same_rows(datasets, table, expr):
    split = split_predicate(expr, table.schema)
    expected = kept_by_ray(table, expr)
    for kind, dataset in datasets.items():
        found = kept_by_lance(dataset, split)
        assert found.equals(expected), f"{kind}: {len(found)} rows, not {len(expected)}, for {split.sql}"


def exact_sql(expr, schema=SCHEMA):
    split = split_predicate(expr, schema)
    assert split.residual is None
    return split.sql


i8, i64, j64, u64, f32, f64, g64 = map(col, ("i8", "i64", "j64", "u64", "f32", "f64", "g64"))
text, large, yes, no, day, time, instant = map(col, ("text", "large", "yes", "no", "day", "time", "instant"))
ASK_RAY = text.str.len() > 1  # what has no translation
UTC_MOMENT = MOMENT.replace(tzinfo=timezone.utc)  # noqa: UP017 # pyarrow names this zone UTC, as the column does

EXACT = {
    "a literal on the right": i64 > 5,
    "a literal on the left": lit(5) > i64,
    "the smallest int64, which has no SQL number": i64 > -(2**63),
    "the largest int64": i64 == 2**63 - 1,
    "a negative literal": i8 <= -128,
    "a numpy integer": i64 == np.int8(5),
    "a whole float beside integers": i8 > 5.0,
    "two columns of one type": i64 < j64,
    "a column beside itself": i64 == i64,  # noqa: PLR0124 # builds an expression
    "NaN is in no order, above": f64 > 1.5,
    "NaN is in no order, below": f64 <= 1.5,
    "NaN passes a negated order, above": ~(f64 > 1.5),
    "NaN passes a negated order, below": ~(f64 < 1.5),
    "NaN differs from every number": f64 != 1.5,
    "NaN equals no number": ~(f64 == 1.5),
    "an infinite bound": (f64 >= math.inf) | (f64 < -math.inf),
    "-0.0 is not below 0.0": f64 < 0.0,
    "0.0 is not above -0.0": f64 > -0.0,
    "-0.0 equals 0.0": f64 == 0,
    "0.0 equals -0.0": f32 == -0.0,
    "neither zero differs from zero": f64 != 0.0,
    "0.0 is at most -0.0": f64 <= -0.0,
    "-0.0 is at least 0.0": f32 >= 0,
    "an integer beside floats": f64 >= 5,
    "a float32 that holds the literal": f32 == 1.5,
    "a literal just below its float32": f32 > 0.1,
    "a literal just below its float32, negated": ~(f32 <= 0.1),
    "a literal just above its float32": f32 >= 16777216.5,
    "a literal just above its float32, the other way": f32 < 16777216.5,
    "a literal that float32 rounds to zero": (f32 > 1e-60) | (f32 < -1e-60),
    "a literal that float32 rounds to infinity": (f32 > 1e300) | (f32 <= -1e300),
    "strings compare by bytes": text > "a",
    "the empty string is not null": text == "",
    "a large string beside a string": text == large,
    "the word NULL is a string": text.is_in(["NULL", "a"]),
    "a boolean column": yes,
    "a negated boolean column drops nulls": ~yes,
    "a boolean column beside a literal": yes == False,  # noqa: E712 # builds an expression
    "booleans are ordered": yes > no,
    "dates from the first year": day > date(1, 1, 1),
    "dates to the last year": day == date(9999, 12, 31),
    "microseconds": time >= MOMENT,
    "seconds beside microseconds that fit": col("seconds") > MOMENT.replace(microsecond=0),
    "nanoseconds beside microseconds": col("nanos") == MOMENT,
    "an instant in the column's zone": instant < UTC_MOMENT,
    "null": f64.is_null(),
    "NaN is not null": f64.is_not_null(),
    "not null, negated": ~text.is_not_null(),
    "is_in is false for null": i64.is_in([1, 5]),
    "not_in keeps null": i64.not_in([1, 5]),
    "negated is_in keeps null": ~i64.is_in([1, 5]),
    "is_in of a list with null finds null": i64.is_in([1, None]),
    "not_in of a list with null drops null": i64.not_in([1, None]),
    "is_in of a numpy array": i64.is_in(lit(np.array([1, 5]))),
    "is_in of strings": text.is_in(["a", "", "it's", "\U0001f600"]),
    "is_in of rounded float32": f32.is_in([0.1, 1e300]),
    "is_in of dates": day.is_in([date(1, 1, 1), None]),
    "not_in of instants": instant.not_in([UTC_MOMENT]),
    "and, with null on one side": yes & (i8 > 0),
    "or, with null on one side": yes | (i8 > 0),
    "a negated and": ~(yes & (i8 > 0)),
    "a negated or": ~(yes | text.is_in(["a"])),
    "not not": ~~yes,
    "an alias": (i8.alias("x") > 5).alias("y"),
    "starts_with": text.str.starts_with("a"),
    "starts_with a wildcard": text.str.starts_with("%") | text.str.starts_with("_"),
    "starts_with a backslash": text.str.starts_with("a\\") | text.str.starts_with("\\%"),
    "starts_with nothing drops nulls": text.str.starts_with(""),
    "starts_with the last character": text.str.starts_with("\U0010ffff"),
    "starts_with, negated": ~large.str.starts_with("a"),
    "ends_with": text.str.ends_with("b"),
    "contains": large.str.contains("\\") | text.str.contains("'"),
    "contains a long piece": text.str.contains("abc"),
    "contains is case-sensitive": text.str.contains("A"),
    "sums wrap around": i64 + 1 > 5,
    "differences wrap around": i64 - (2**63 - 1) > j64,
    "products wrap around": (i64 * j64) * -3 == j64 - -(2**63),
    "literals on the left of arithmetic": (5 - i64).is_in([4, 5, None]),
    "arithmetic over null": (i64 + j64).is_null(),
}
REFINED = {
    "float columns in order, which NaN is not": f64 > g64,
    "float columns in order or equal, where -0.0 meets 0.0": f64 <= g64,
    "equal float columns": f64 == g64,
    "only a part of a conjunction": (i64 > 1) & ASK_RAY,
    "a part of a conjunction inside a disjunction": ((i64 > 1) & ASK_RAY) | (i64 == 0),
    "a negated disjunction with a part": ~(ASK_RAY | (i64 > 1)),
    "what is nested too deeply for the SQL parser": reduce(lambda inner, _: ~(inner & yes), range(12), i8 > 5),
    "a conjunct without columns": (i64 > 1) & (lit(1) < lit(2)),
    "a conjunct that is a literal": (i64 > 1) & lit(True),
    "an anti-pattern for NaN beside something": (f64 != f64) & (i64 > 1),  # noqa: PLR0124 # builds an expression
}
LEFT_TO_RAY = {
    "a literal beyond the column's range": i8 < 300,
    "a fraction beside integers": i8 > 2.5,
    "NaN as a literal": f64 != NAN,
    "null as a literal": i64 == None,  # noqa: E711 # builds an expression
    "null of the column's type as a literal": i64 != pa.scalar(None, pa.int64()),
    "float32 equal to what it cannot hold": f32 != 0.1,
    "not in order, between float columns": ~(f64 > g64),
    "is_in of zero, whose signs Ray tells apart": f64.is_in([0.0, 1.5]),
    "is_in of NaN": f64.is_in([NAN]),
    "not_in of nothing": i64.not_in([]),
    "is_in of nothing but null": i64.is_in([None]),
    "is_in of no integers": i64.is_in(lit(np.array([], np.int64))),
    "is_in with values out of range": i8.is_in([5, 300]),
    "is_in of a very long list": i64.is_in(list(range(20_001))),
    "is_in of another column, which is no matter of one row": (i64 > 1) & i64.is_in(j64.alias("x")),
    "integer columns of two widths": i8 < i64,
    "arithmetic in a narrow integer": i8 + 1 > 5,
    "arithmetic with a float": i64 * 2.0 > 5,
    "arithmetic with null": i64 + None > 5,
    "arithmetic without a column": lit(2) * lit(3) > 5,
    "division": u64 / 2 > 5,
    "a date beside a time": day > datetime(2020, 1, 1),
    "a time finer than the column": col("seconds") > MOMENT,
    "a column that is not boolean": i8,
    "a predicate compared with a literal": (i8 > 5) == lit(True),
    "starts_with in any case": text.str.starts_with("A", ignore_case=True),
    "contains in any case, by position": text.str.contains("A", True),
    "a regular expression": text.str.match_regex("a+"),
    "a function of a column": text.str.upper() == "A",
    "a disjunction with an unknown side": (i64 > 1) | ASK_RAY,
}


@pytest.mark.parametrize("expr", EXACT.values(), ids=EXACT)
def test_lance_alone_keeps_the_rows_that_ray_keeps(expr, datasets, table):
    assert exact_sql(expr)
    assert_same_rows(datasets, table, expr)


@pytest.mark.parametrize("expr", REFINED.values(), ids=REFINED)
def test_lance_keeps_a_superset_that_ray_refines(expr, datasets, table):
    split = split_predicate(expr, table.schema)
    assert split.sql
    assert split.residual is not None
    assert_same_rows(datasets, table, expr)


@pytest.mark.parametrize("expr", LEFT_TO_RAY.values(), ids=LEFT_TO_RAY)
def test_what_is_not_proven_equal_is_left_to_ray_whole(expr):
    split = split_predicate(expr, SCHEMA)
    assert (split.sql, split.residual) == (None, expr)


COMPARISONS = (operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne)
LITERALS = {
    **{name: values for name, (_, values) in VALUES.items()},
    "i8": [*VALUES["i8"][1], 2, 300, -129, 5.0, 2.5, np.int16(5)],
    "u8": [*VALUES["u8"][1], -1, 256, 7.0],
    "f32": [*VALUES["f32"][1], 0.1, 16777217.0, 5, 0, 1e300, -1e-60, np.float32(0.1)],
    "f64": [*VALUES["f64"][1], 5, 0, -1, 2**53, np.float64(0.1)],
    "time": [*VALUES["time"][1], MOMENT + timedelta(microseconds=1)],
    "instant": [value.replace(tzinfo=timezone.utc) for value in VALUES["instant"][1]],  # noqa: UP017 # as UTC_MOMENT
}
PAIRS = [(name, other) for name, (kind, _) in VALUES.items() for other, (same, _) in VALUES.items() if kind == same]
names = st.sampled_from(sorted(VALUES))
beside_literal = names.flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(LITERALS[name])))
with_list = names.flatmap(
    lambda name: st.tuples(st.just(name), st.lists(st.sampled_from([*LITERALS[name], None]), min_size=1, max_size=4))
)
int64s = st.recursive(
    st.sampled_from([i64, j64, lit(1), lit(-1), lit(2**62), lit(-(2**63))]),
    lambda inner: st.builds(
        lambda op, a, b: op(a, b), st.sampled_from([operator.add, operator.sub, operator.mul]), inner, inner
    ),
    max_leaves=3,
)
leaves = st.one_of(
    st.builds(lambda op, pair: op(col(pair[0]), pair[1]), st.sampled_from(COMPARISONS), beside_literal),
    st.builds(lambda op, pair: op(lit(pair[1]), col(pair[0])), st.sampled_from(COMPARISONS), beside_literal),
    st.builds(lambda op, pair: op(col(pair[0]), col(pair[1])), st.sampled_from(COMPARISONS), st.sampled_from(PAIRS)),
    st.builds(
        lambda pair, inside: getattr(col(pair[0]), inside)(pair[1]), with_list, st.sampled_from(["is_in", "not_in"])
    ),
    st.builds(lambda name, test: getattr(col(name), test)(), names, st.sampled_from(["is_null", "is_not_null"])),
    st.builds(
        lambda column, search, pattern: getattr(column.str, search)(pattern),
        st.sampled_from([text, large]),
        st.sampled_from(["starts_with", "ends_with", "contains"]),
        st.sampled_from(STRINGS),
    ),
    st.builds(lambda op, a, b: op(a, b), st.sampled_from(COMPARISONS), int64s, st.sampled_from([i64, lit(0), lit(5)])),
    st.sampled_from([yes, no, ASK_RAY, lit(1) < lit(2)]),
)


def deeper(inner):
    return st.one_of(
        st.builds(operator.and_, inner, inner),
        st.builds(operator.or_, inner, inner),
        st.builds(operator.invert, inner),
    )


predicates = deeper(leaves) | deeper(deeper(leaves) | leaves) | deeper(deeper(deeper(leaves))) | leaves


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(expr=predicates)
def test_any_predicate_keeps_the_rows_that_ray_keeps(expr, datasets, table):
    try:
        kept_by_ray(table, expr)
    except (pa.ArrowException, TypeError):
        split = split_predicate(expr, table.schema)  # Ray has no answer to compare with, Lance must still read the SQL
        datasets[None].scanner(filter=split.sql, columns=["id"]).count_rows()
    else:
        assert_same_rows(datasets, table, expr)


@pytest.mark.parametrize(
    "expr",
    [
        *(i64 > 5, i64.is_null(), i64.is_in([1, 5]), i64.not_in([1]), f64 > 1.5, ~(f64 > 1.5), f32 < 0.1, yes),
        *(text == "a", text.str.starts_with("a"), day > date(1970, 1, 1), time == MOMENT, instant < UTC_MOMENT),
    ],
)
def test_an_index_answers_alone(expr, datasets):
    plan = datasets["BTREE"].scanner(filter=exact_sql(expr), columns=["id"]).explain_plan()
    assert "ScalarIndexQuery" in plan
    assert "refine_filter=--" in plan


@pytest.mark.parametrize(
    ("expr", "sql"),
    [
        (i64 > 5, "`i64` > 5"),
        (lit(5) > i64, "`i64` < 5"),
        (~(i64 > 5), "`i64` <= 5"),
        (f64 == 5, "`f64` = 5.0"),
        (text == "it's", "`text` = 'it''s'"),
        (yes & (i8 == 1), "`yes` AND `i8` = 1"),
        (yes | (i8 == 1), "(`yes` OR `i8` = 1)"),
        (i8.is_in([1, 2]), "`i8` IN (1, 2)"),
        (i8.not_in([1, 2]), "(`i8` NOT IN (1, 2) OR `i8` IS NULL)"),
        (day == date(2020, 2, 29), "`day` = DATE '2020-02-29'"),
    ],
)
def test_the_sql_is_what_one_would_write(expr, sql):
    assert exact_sql(expr) == sql


def test_conjuncts_are_split_and_only_the_rest_stays():
    split = split_predicate((i64 > 5) & (ASK_RAY & (text == "a")), SCHEMA)
    assert split.sql == "`i64` > 5 AND `text` = 'a'"
    assert split.residual is ASK_RAY


def test_long_chains_are_pushed_whole(datasets, table):
    for join in (operator.and_, operator.or_):
        expr = reduce(join, [i64 != number for number in range(200)])
        assert exact_sql(expr).count("<>") == 200
        assert_same_rows(datasets, table, expr)


@pytest.mark.parametrize("levels", range(1, 40, 2))
def test_however_deep_the_nesting_lance_can_parse_what_it_gets(levels, datasets):
    number, expr = i64 + 1, (f64 > 1.5) | i64.not_in([1])
    for level in range(levels):
        number = number * 3 + 1
        expr = (expr & yes) | (number > level)
    sql = split_predicate(expr, SCHEMA).sql or "true"
    datasets[None].scanner(filter=f"((id >= 0) AND ({sql}))", columns=["id"]).count_rows()


def test_integers_that_ray_cannot_compare_are_compared_exactly(tmp_path):
    numbers = pa.table({"id": [0, 1, 2], "n": pa.array([0, 2**63, 2**64 - 1], pa.uint64())})
    dataset = lance.write_dataset(numbers, tmp_path / "t.lance")
    with pytest.raises(pa.ArrowInvalid, match="not in range"):
        kept_by_ray(numbers, col("n") > 5)
    for expr, expected in ((col("n") > 5, [1, 2]), (col("n") == np.uint64(2**64 - 1), [2]), (col("n") < 1, [0])):
        assert dataset.to_table(filter=exact_sql(expr, numbers.schema))["id"].to_pylist() == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Paris", "+05:30"])
def test_times_compare_in_every_unit_and_zone(unit, zone, tmp_path):
    step = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    moments = [None, -1, 0, 1582938122, 1582938123, 1582938124]
    ticks = pa.array([None if moment is None else moment * step for moment in moments], pa.int64())
    times = pa.table({"id": range(len(moments)), "t": ticks.cast(pa.timestamp(unit, zone))})
    dataset = lance.write_dataset(times, tmp_path / "t.lance")
    literal = pa.scalar(1582938123 * 10**6, pa.timestamp("us", zone))
    for compare in COMPARISONS:
        expr = compare(col("t"), literal)
        kept = dataset.to_table(filter=exact_sql(expr, times.schema))
        assert kept.equals(filtered_by_ray(times, expr))


def test_times_of_another_zone_raise_as_they_do_in_ray():
    schema = pa.schema([("t", pa.timestamp("us", "Europe/Paris"))])
    assert split_predicate(col("t") > UTC_MOMENT, schema).sql is None


def test_a_zone_that_could_break_out_of_the_sql_is_left_to_ray():
    odd = pa.timestamp("us", "x', '")
    assert split_predicate(col("t") > pa.scalar(0, odd), pa.schema([("t", odd)])).sql is None


OTHER_TYPES = [
    (pa.decimal128(5, 2), Decimal("1.50")),
    (pa.binary(), b"a"),
    (pa.large_binary(), b"a"),
    (pa.float16(), np.float16(1.5)),
    (pa.date64(), date(2020, 1, 1)),
    (pa.time32("s"), clock(1)),
    (pa.duration("s"), timedelta(seconds=1)),
    (pa.dictionary(pa.int32(), pa.string()), "a"),
    (pa.list_(pa.int64()), [1]),
    (pa.list_(pa.float32(), 2), [1.0, math.nan]),
    (pa.struct([("x", pa.int64())]), {"x": 1}),
    (pa.null(), None),
]


@pytest.mark.parametrize(("data_type", "value"), OTHER_TYPES, ids=[str(data_type) for data_type, _ in OTHER_TYPES])
def test_of_a_column_of_another_type_lance_is_asked_only_for_nulls(data_type, value, tmp_path):
    rows = pa.table({"id": range(5), "x": pa.array([value, None, value, None, None], data_type)})
    dataset = lance.write_dataset(rows, tmp_path / "t.lance", data_storage_version="2.1")
    for expr in (col("x").is_null(), col("x").is_not_null()):
        kept = dataset.to_table(filter=exact_sql(expr, rows.schema), columns=["id"])
        assert kept["id"].equals(kept_by_ray(rows, expr))
    for expr in (col("x") == value, col("x") > col("x"), col("x").is_in([value]), col("x").not_in([value])):
        assert split_predicate(expr, rows.schema).sql is None


@pytest.mark.parametrize(
    "field",
    [
        pa.field("x", pa.large_binary(), metadata={b"lance-encoding:blob": b"true"}),
        pa.field("x", pa.string(), metadata={b"ARROW:extension:name": b"arrow.json"}),
        pa.field("x", pa.fixed_shape_tensor(pa.int8(), [2])),
    ],
    ids=["blob", "extension type that pyarrow does not know", "extension type"],
)
def test_a_column_that_lance_takes_for_another_type_is_left_to_ray(field):
    assert split_predicate(col("x").is_null(), pa.schema([field])).sql is None


def test_a_column_that_is_not_in_the_table_is_left_to_ray_to_complain_about():
    assert split_predicate(col("missing") > 5, SCHEMA).sql is None


@pytest.mark.parametrize(
    "name",
    ["Upper", "two words", 'do"uble', "sin'gle", "a--b", "a;b", "/*x*/", "a\nb", "select", "1", "Straße", "$1", "?"],
)
def test_any_column_name_that_lance_can_say_is_quoted(name, tmp_path):
    rows = pa.table({"id": [0, 1, 2], name: pa.array([1, 2, None], pa.int64()), name.swapcase() + "x": [2, 1, 0]})
    dataset = lance.write_dataset(rows, tmp_path / "t.lance")
    for expr in (col(name) == 1, col(name).is_null(), col(name) + 1 > 2, col(name).not_in([1])):
        kept = dataset.to_table(filter=exact_sql(expr, rows.schema))
        assert kept.equals(filtered_by_ray(rows, expr))


@pytest.mark.parametrize("name", ["", "a`b", "i64` = 1 OR `i64", "a.b", "`"])
def test_a_column_name_that_lance_cannot_say_is_left_to_ray(name):
    schema = pa.schema([(name, pa.int64()), ("i64", pa.int64()), ("a", pa.struct([("b", pa.int64())]))])
    assert split_predicate(col(name) == 1, schema).sql is None


INJECTIONS = [
    *("' OR 1=1 --", "'; DROP TABLE t; --", "' OR ''='", "\\' OR 1=1 --", "'' OR true", "a' /*", "*/ OR true", "')"),
    *("$1", "?", ":x", "${x}", "U&'\\0041'", "E'\\n'", "--", "\x00' OR true", "'" * 7, "\u2019 OR 1=1", "` OR true"),
]


@pytest.mark.parametrize("value", INJECTIONS)
def test_a_string_literal_never_breaks_out_of_the_sql(value, tmp_path):
    rows = pa.table({"id": range(4), "s": ["other", value, value + "x", None]})
    dataset = lance.write_dataset(rows, tmp_path / "t.lance")
    for expr, expected in (
        (col("s") == value, [1]),
        (col("s") != value, [0, 2]),
        (col("s").is_in([value, "none"]), [1]),
        (col("s").str.starts_with(value), [1, 2]),
        (col("s").str.ends_with(value), [1]),
        (col("s").str.contains(value), [1, 2]),
    ):
        assert dataset.to_table(filter=exact_sql(expr, rows.schema))["id"].to_pylist() == expected


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=st.text(st.characters(codec="utf-8")) | st.text("'\"`\\%_-*/; ", max_size=8))
def test_any_string_literal_means_itself(value, datasets, table):
    expected = table["text"].to_pylist().count(value)
    assert datasets[None].count_rows(exact_sql(text == value)) == expected
    assert datasets[None].count_rows(exact_sql(text.is_null() | (text != value))) == table.num_rows - expected


def test_a_string_that_is_not_unicode_is_left_to_ray():
    assert split_predicate(text == "\ud800", SCHEMA).sql is None
    assert split_predicate(text.str.contains("\ud800"), SCHEMA).sql is None


def test_predicates_that_differ_with_the_rows_they_see_are_left_to_ray_whole():
    expr = (i64 > 5) & (random_number(seed=1) < 0.5)
    split = split_predicate(expr, SCHEMA)
    assert (split.sql, split.residual) == (None, expr)


def test_columns_of_finds_every_column_however_deep():
    both: Any = udf(return_dtype=DataType.from_arrow(pa.bool_()))(pc.and_)
    expr = ~(both(col("a"), right=col("b").alias("x")) | (col("c").str.len() + 1 > col("d"))) & col("e").is_in([1])
    assert columns_of(expr) == {"a", "b", "c", "d", "e"}
    assert columns_of(lit(1) < lit(2)) == frozenset()


def test_a_residual_raises_what_ray_raises(table):
    expr = i64 > "a"
    assert split_predicate(expr, SCHEMA).residual is expr
    with pytest.raises(pa.ArrowNotImplementedError, match="no kernel"):
        apply_residual(table, expr)


def test_a_residual_over_chunks_keeps_the_rows_it_keeps_over_one_piece():
    def one_by_one(*values):
        return pa.chunked_array([pa.array([None] * at + [value], pa.bool_())[at:] for at, value in enumerate(values)])

    rows = pa.table({"id": [0, 1, 2], "yes": one_by_one(True, True, True), "no": one_by_one(False, True, False)})
    assert apply_residual(rows, yes & no)["id"].to_pylist() == [1]
