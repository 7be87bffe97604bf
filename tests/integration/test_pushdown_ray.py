"""What Ray pushes into the read, and what an index answers: less is read, and exactly the right rows come out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.data import Dataset
from ray.data.expressions import Expr, col

import lance_ray
from lance_ray import read
from lance_ray.datasource import LanceDatasource
from lance_ray.errors import InvalidArgumentError
from lance_ray.predicates import apply_residual
from tests.tables import assert_same, expected, numbers, read_here, rows, run_here, source_of, tasks_of, write

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
NAN = math.nan


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 rows in four fragments."""
    uri = tmp_path_factory.mktemp("table") / "t"
    write(uri, numbers(1000), fragments=4)
    return uri


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values in which engines differ: NaN, nulls, signed zeros, infinities, empty strings; many pairs."""
    floats = [1.5, NAN, None, 0.0, -0.0, math.inf, -math.inf, -1.5]
    strings = ["", "a", "A", None, "a%b", "ä"]
    uri = tmp_path_factory.mktemp("odd") / "t"
    data = {
        "f": floats * len(strings),
        "g": [floats[item * 3 % 8] if item % 3 else 1.5 for item in range(48)],
        "s": [value for value in strings for _ in floats],
        "i": [None if item % 5 == 0 else item % 7 - 3 for item in range(48)],
    }
    write(uri, pa.table(data), fragments=3)
    return uri


def bytes_read(table: Path, directory: Path, use: Callable[[Dataset], Any]) -> int:
    """Bytes that the scans of a consumed dataset read from storage, as the engine counts them."""
    directory.mkdir()

    def note(stats: Any) -> None:
        directory.joinpath(f"{id(stats)}-{stats.bytes_read}").touch()

    use(lance_ray.read_lance(table, scanner_options={"scan_stats_callback": note}, override_num_blocks=2))
    sizes = [int(path.name.split("-")[1]) for path in directory.iterdir()]
    assert sizes, "no scan reported what it read"
    return sum(sizes)


# Columns


def test_only_selected_columns_are_read(tmp_path: Path) -> None:
    data = {f"c{item}": np.random.default_rng(item).random(20_000) for item in range(30)}
    write(tmp_path / "wide", pa.table(data))

    everything = bytes_read(tmp_path / "wide", tmp_path / "all", rows)
    selected = bytes_read(tmp_path / "wide", tmp_path / "one", lambda wide: rows(wide.select_columns(["c7"])))

    assert everything > 4_000_000
    assert selected < everything / 25


@pytest.mark.parametrize(
    ("use", "columns"),
    [
        (lambda table: table.select_columns(["text", "id"]), {"text": "text", "id": "id"}),
        (lambda table: table.drop_columns(["text", "x"]), {"id": "id", "group": "`group`"}),
        (lambda table: table.rename_columns({"id": "key"}).select_columns(["key"]), {"key": "id"}),
        (lambda table: table.select_columns(["id", "x"]).select_columns(["x"]), {"x": "x"}),
        (lambda table: table.with_column("y", col("id") + 1).select_columns(["y", "id"]), {"y": "id + 1", "id": "id"}),
    ],
    ids=["select", "drop", "rename", "twice", "computed"],
)
def test_selections_of_ray_give_the_columns_of_the_table(use: Any, columns: dict[str, str], table: Path) -> None:
    found = rows(use(lance_ray.read_lance(table, filter="id < 300")))

    assert_same(found, expected(table, columns=columns, filter="id < 300"))


def test_a_selection_keeps_the_schema_the_metadata_and_the_computed_columns(table: Path) -> None:
    computed = lance_ray.read_lance(table, columns={"twice": "id * 2", "upper": "upper(text)"})
    meta = lance_ray.read_lance(table, with_row_id=True, with_metadata=True)

    assert rows(computed.select_columns(["upper"])).schema.names == ["upper"]
    assert rows(meta.select_columns(["_fragid", "id"])).schema.names == ["_fragid", "id"]
    assert meta.select_columns(["_rowid"]).schema().names == ["_rowid"]


# Filters


def pushed(source: LanceDatasource, predicate: Expr) -> LanceDatasource:
    found = source.apply_predicate(predicate)
    assert isinstance(found, LanceDatasource)
    return found


EXPRESSIONS: dict[str, Expr] = {
    "comparison": col("i") > 1,
    "NaN beside a number": col("f") > 0.5,
    "NaN below": col("f") <= 0.0,
    "not equal": col("f") != 1.5,
    "negated comparison": ~(col("f") < 1.0),
    "column beside column": col("f") >= col("g"),
    "equal columns": col("f") == col("g"),
    "signed zero in a list": col("f").is_in([0.0, 1.5]),
    "not in a list": ~col("i").is_in([1, 2]),
    "null tests": col("f").is_null() | col("i").is_not_null(),
    "integer division": (col("i") // 2) == -1,
    "arithmetic": (col("i") * 3 - 1) > 2,
    "pushed and left": (col("i") > 0) & (col("f") >= col("g")),
    "left in a disjunction": (col("i") > 0) | ((col("i") // 2) == 1),
    "strings": (col("s") == "") | (col("s") > "a"),
    "string function": col("s").str.starts_with("a"),
    "string length": (col("s").str.len() < 2) & (col("i") < 3),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_filter_expression_keeps_exactly_the_rows_that_ray_keeps(name: str, odd: Path) -> None:
    wanted = apply_residual(expected(odd), EXPRESSIONS[name])

    found = rows(lance_ray.read_lance(odd, override_num_blocks=2).filter(expr=EXPRESSIONS[name]))

    assert found.num_rows == wanted.num_rows > 0
    assert repr(found.to_pylist()) == repr(wanted.to_pylist())


def test_rays_own_filter_is_the_same_as_the_oracle_of_these_tests(odd: Path) -> None:
    for expression in (EXPRESSIONS["NaN beside a number"], EXPRESSIONS["negated comparison"]):
        by_ray = rows(ray.data.from_arrow(expected(odd)).filter(expr=expression))
        assert repr(by_ray.to_pylist()) == repr(apply_residual(expected(odd), expression).to_pylist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.booleans(), st.sampled_from(sorted(EXPRESSIONS))), min_size=1, max_size=3),
    select=st.booleans(),
)
def test_any_combination_of_filters_selections_and_tasks_keeps_rays_rows(
    parts: list[tuple[bool, str]], select: bool, odd: Path
) -> None:
    source = source_of(odd, override_num_blocks=3)
    wanted = expected(odd)
    for negated, name in parts:
        expression = ~EXPRESSIONS[name] if negated else EXPRESSIONS[name]
        found = pushed(source, expression)
        if found is not source:
            source, wanted = found, apply_residual(wanted, expression)
    if select:
        source, wanted = source.apply_projection({"s": "s"}), wanted.select(["s"])

    assert repr(run_here(source).to_pylist()) == repr(wanted.to_pylist())


def test_what_lance_can_decide_is_filtered_in_the_scan(table: Path) -> None:
    source = pushed(source_of(table), (col("id") > 990) & (col("x") // 1 >= 0))
    seen: list[int] = []

    def spy(block: pa.Table, residual: Expr) -> pa.Table:
        seen.append(block.num_rows)
        return apply_residual(block, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "apply_residual", spy)
        found = run_here(source)

    assert found["id"].to_pylist() == list(range(991, 1000))
    assert sum(seen) == 9


def test_a_filter_that_an_index_answers_reads_little(tmp_path: Path) -> None:
    data = numbers(200_000).append_column("wide", pa.array(np.random.default_rng(0).random(200_000)))
    write(tmp_path / "t", data, fragments=2).create_scalar_index("id", "BTREE")

    everything = bytes_read(tmp_path / "t", tmp_path / "all", rows)
    selected = bytes_read(tmp_path / "t", tmp_path / "one", lambda t: rows(t.filter(expr=col("id") == 170_000)))

    assert selected < everything / 10


CHAINS: dict[str, tuple[Callable[[Dataset], Dataset], str, list[str] | dict[str, str]]] = {
    "filter then select": (lambda t: t.filter(expr=col("id") > 900).select_columns(["x"]), "id > 900", ["x"]),
    "select then filter": (lambda t: t.select_columns(["x"]).filter(expr=col("x") > 450), "x > 450", ["x"]),
    "filter by a dropped column": (
        lambda t: t.filter(expr=col("text").str.ends_with("7")).drop_columns(["text"]),
        "ends_with(text, '7')",
        ["id", "x", "group"],
    ),
    "two filters": (
        lambda t: t.filter(expr=col("id") > 900).filter(expr=(col("id") // 2) == 470),
        "id in (940, 941)",
        ["id", "x", "text", "group"],
    ),
    "filter by a new name": (
        lambda t: t.rename_columns({"id": "x", "x": "id"}).filter(expr=col("x") >= 990).select_columns(["id", "x"]),
        "id >= 990",
        {"id": "x", "x": "id"},
    ),
    "filter by a computed column": (
        lambda t: t.with_column("y", col("id") * 2).filter(expr=col("y") > 1990).select_columns(["y"]),
        "id > 995",
        {"y": "id * 2"},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_filters_and_selections_chain(name: str, table: Path) -> None:
    chain, where, columns = CHAINS[name]

    dataset = chain(lance_ray.read_lance(table, override_num_blocks=3))

    wanted = expected(table, filter=where, columns=columns)
    assert_same(rows(dataset), wanted)
    assert chain(lance_ray.read_lance(table)).count() == wanted.num_rows > 0


@pytest.mark.parametrize(
    "where",
    ["id > 500 or x < 10", pc.field("id") > 500, "id > 500 -- large (ones"],
    ids=["text", "pyarrow", "with a comment"],
)
def test_a_filter_of_the_read_and_a_later_one_both_hold(where: Any, table: Path) -> None:
    dataset = lance_ray.read_lance(table, filter=where).filter(expr=col("group") == 3)

    assert_same(rows(dataset), expected(table, filter=where).filter(pc.field("group") == 3))


@pytest.mark.parametrize(
    ("options", "predicate"),
    [
        ({"columns": {"twice": "id * 2"}}, col("twice") > 1990),
        ({"with_row_id": True}, col("_rowid") % 2 == 0),
        ({"with_metadata": True}, (col("_fragid") == 1) & (col("id") < 260)),
        ({"columns": ["id"]}, col("id") > 900),
    ],
    ids=["computed", "row id", "fragment id", "columns"],
)
def test_a_later_filter_sees_the_columns_that_come_out(options: dict[str, Any], predicate: Expr, table: Path) -> None:
    wanted = apply_residual(read_here(table, **options), predicate)

    assert_same(rows(lance_ray.read_lance(table, **options).filter(expr=predicate)), wanted)


UNKNOWN: dict[str, tuple[str, Callable[[Dataset], Dataset]]] = {
    "selected": ("columns", lambda ds: ds.select_columns(["id", "nope"])),
    "renamed": ("columns", lambda ds: ds.rename_columns({"nope": "other"})),
    "filtered": ("expr", lambda ds: ds.filter(expr=col("nope") > 3)),
    "filtered after it was left out": ("expr", lambda ds: ds.select_columns(["id"]).filter(expr=col("x") > 3)),
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_a_column_that_the_dataset_does_not_have_is_refused_on_the_driver(how: str, table: Path) -> None:
    parameter, use = UNKNOWN[how]

    with pytest.raises(InvalidArgumentError) as caught:
        use(lance_ray.read_lance(table, columns=["id", "x"])).take(1)

    assert caught.value.parameter == parameter
    assert "id" in str(caught.value)


def test_a_later_filter_cannot_see_columns_that_were_left_out(table: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="expr"):
        pushed(source_of(table, columns=["id"]), col("x") > 3)


def test_a_predicate_on_several_tables_holds_where_a_column_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "a", pa.table({"id": [1, 2, 3], "n": [1, 5, None]}))
    write(tmp_path / "b", pa.table({"id": [4, 5]}))
    both = [tmp_path / "a", tmp_path / "b"]
    unfiltered = read_here(both)

    for predicate in ((col("id") > 1) & (col("n") > 2), (col("id") > 1) & col("n").is_null(), col("n").is_not_null()):
        found = rows(lance_ray.read_lance(both).filter(expr=predicate))
        assert found.to_pylist() == apply_residual(unfiltered, predicate).to_pylist() != []


# Where a later filter must see only the rows selected


QUERY = {"column": "vector", "q": np.zeros(4, np.float32), "k": 20}
SELECTIONS: dict[str, dict[str, Any]] = {
    "limit": {"limit": 20},
    "offset": {"offset": 980},
    "limit with a filter": {"limit": 20, "filter": "id >= 100"},
    "order": {"scanner_options": {"order_by": ["text"]}, "limit": 20},
    "nearest": {"scanner_options": {"nearest": QUERY}},
    "full text": {"scanner_options": {"full_text_query": "common"}, "limit": 20},
}


@pytest.fixture(scope="module")
def searchable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("searchable") / "t"
    vectors = np.random.default_rng(1).random((1000, 4), dtype=np.float32)
    data = pa.table(
        {
            "id": range(1000),
            "text": [f"common word{item % 9}" for item in range(1000)],
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 4),
        }
    )
    write(uri, data, fragments=3).create_scalar_index("text", "INVERTED")
    return uri


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_filter_above_a_selection_sees_only_its_rows(name: str, searchable: Path) -> None:
    source = source_of(searchable, **SELECTIONS[name])
    selected = run_here(source)
    wanted = apply_residual(selected, col("id") % 2 == 0)
    assert 0 < wanted.num_rows < selected.num_rows == 20

    dataset = lance_ray.read_lance(searchable, **SELECTIONS[name]).filter(expr=(col("id") % 2 == 0) & (col("id") >= 0))

    assert not source.supports_predicate_pushdown()
    assert rows(dataset)["id"].to_pylist() == wanted["id"].to_pylist()
    assert dataset.count() == wanted.num_rows


def test_a_filter_after_a_limit_of_ray_sees_only_those_rows(table: Path) -> None:
    dataset = lance_ray.read_lance(table, override_num_blocks=1).limit(10).filter(expr=col("id") % 2 == 0)

    assert rows(dataset)["id"].to_pylist() == [0, 2, 4, 6, 8]


# Indices


def answered(source: LanceDatasource) -> bool:
    """Whether the plan knows the number of rows of every task of a filtered read, which only an index can tell."""
    return all(task.metadata.num_rows is not None for task in tasks_of(source))


def grow(dataset: lance.LanceDataset) -> None:
    lance.write_dataset(numbers(300, 2000), dataset.uri, mode="append")


def compact(dataset: lance.LanceDataset) -> None:
    dataset.optimize.compact_files(target_rows_per_fragment=700, materialize_deletions_threshold=0.01)


STEPS: dict[str, Callable[[lance.LanceDataset], Any]] = {
    "as built": lambda dataset: None,
    "deleted": lambda dataset: dataset.delete("id % 5 = 0"),
    "updated": lambda dataset: dataset.update({"group": "3"}, where="id between 100 and 200"),
    "compacted": compact,
    "updated again": lambda dataset: dataset.update({"group": "5"}, where="id between 150 and 400"),
    "indexed anew": lambda dataset: dataset.optimize.optimize_indices(),
    "deleted again": lambda dataset: dataset.delete("id % 11 = 0"),
    "grown": grow,
}


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable row ids"])
@pytest.mark.parametrize("kind", ["BTREE", "BITMAP", "ZONEMAP", "BLOOMFILTER"])
def test_an_index_never_changes_the_rows_whatever_became_of_the_table(kind: Any, stable: bool, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=4, enable_stable_row_ids=stable)
    dataset.create_scalar_index("group", kind)
    for name, step in STEPS.items():
        step(lance.dataset(dataset.uri))
        for where in ("group = 3", "group in (1, 5) and id > 120", "group is null", "group >= 2"):
            options: dict[str, Any] = {"filter": where, "with_row_id": True}
            wanted = expected(tmp_path / "t", **options, use_scalar_index=False)
            found = read_here(tmp_path / "t", **options, override_num_blocks=3)
            assert found.sort_by("_rowid") == wanted.sort_by("_rowid"), (name, where)
            assert found["id"].to_pylist() == wanted["id"].to_pylist(), (name, where)


@pytest.mark.parametrize("kind", ["BTREE", "BITMAP"])
def test_an_exact_index_that_covers_the_table_answers_by_itself(kind: Any, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=4)
    dataset.create_scalar_index("group", kind)

    assert answered(source_of(tmp_path / "t", filter="group = 3"))
    assert answered(pushed(source_of(tmp_path / "t"), col("group") == 3))
    assert not answered(source_of(tmp_path / "t", filter="group = 3 and x > 5"))
    assert not answered(source_of(tmp_path / "t", filter="group = 3", scanner_options={"use_scalar_index": False}))
    grow(dataset)
    assert not answered(source_of(tmp_path / "t", filter="group = 3"))
    lance.dataset(dataset.uri).optimize.optimize_indices()
    assert answered(source_of(tmp_path / "t", filter="group = 3"))


@pytest.mark.parametrize("kind", ["ZONEMAP", "BLOOMFILTER", "NGRAM"])
def test_an_index_that_only_narrows_does_not_answer(kind: Any, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=4)
    dataset.create_scalar_index("text", kind)
    where = "contains(text, 'row 77')" if kind == "NGRAM" else "text = 'row 77'"

    assert not answered(source_of(tmp_path / "t", filter=where))
    assert 77 in read_here(tmp_path / "t", filter=where)["id"].to_pylist()


def test_beyond_the_bound_of_matches_the_tasks_filter_themselves(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path / "t", numbers(1000), fragments=4).create_scalar_index("id", "BTREE")
    monkeypatch.setattr(read, "INDEX_ANSWER_ROWS", 100)

    assert answered(source_of(tmp_path / "t", filter="id < 100"))
    assert not answered(source_of(tmp_path / "t", filter="id < 101"))
    assert read_here(tmp_path / "t", filter="id < 101").num_rows == 101


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_the_driver_asks_an_index_once_and_scans_nothing_without_one(indexed: bool, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=4)
    if indexed:
        dataset.create_scalar_index("id", "BTREE")
    scans: list[lance.LanceScanner] = []
    to_table = lance.LanceScanner.to_table

    def spy(scanner: lance.LanceScanner) -> pa.Table:
        scans.append(scanner)
        return to_table(scanner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance.LanceScanner, "to_table", spy)
        source = source_of(tmp_path / "t", filter="id = 5")
        source.get_read_tasks(1)
        source.get_read_tasks(200)
        source.estimate_inmemory_data_size()
        tasks = tasks_of(source)

    assert len(scans) == indexed
    assert [block["id"].to_pylist() for task in tasks for block in task()] == [[5]]


def test_an_answered_read_has_its_columns_counts_and_order(tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=4, enable_stable_row_ids=True)
    dataset.create_scalar_index("group", "BITMAP")
    dataset.update({"x": "-1.0"}, where="id < 30")
    compact(dataset)
    lance.dataset(dataset.uri).optimize.optimize_indices()
    assert answered(source_of(tmp_path / "t", filter="group = 2"))

    reader = lance_ray.read_lance(tmp_path / "t", filter="group = 2", columns=["id", "_rowid"], override_num_blocks=3)

    wanted = expected(tmp_path / "t", filter="group = 2", columns=["id", "_rowid"], use_scalar_index=False)
    assert reader.count() == wanted.num_rows
    assert_same(rows(reader), wanted)
    assert read_here(tmp_path / "t", filter="group = 2", fragment_ids=[]).num_rows == 0
    assert read_here(tmp_path / "t", filter="group = 2", limit=3)["id"].to_pylist() == wanted["id"].to_pylist()[:3]


def test_an_index_may_have_any_name_and_a_filter_any_text(tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(100))
    dataset.create_scalar_index("text", "BTREE", name="an odd (name)")

    for value in ("row 7", "x]@an_index(BTree)", "refine_filter=--"):
        found = read_here(tmp_path / "t", filter=f"text = '{value}'")
        assert found.num_rows == (value == "row 7")
