"""``read_lance`` on a real Ray: every way to name a table, every version, column, order and shape of its rows."""

from __future__ import annotations

import datetime as dt
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from lance.dataset import ColumnOrdering, serialize_row_addrs
from lance.namespace import RestAdapter
from ray.data import DataContext, Dataset
from ray.data.expressions import col

import lance_ray
from lance_ray.datasource import LanceDatasource
from lance_ray.errors import StorageError, VersionNotFoundError
from lance_ray.planning import reads
from lance_ray.table import _BoundedCache
from tests.tables import (
    assert_same,
    expected,
    numbers,
    read_here,
    rows,
    run_here,
    source_of,
    tasks_of,
    write,
    write_many_fragments,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
ADDRESSES = ("path", "pathlib", "file URI", "opened dataset", "dir namespace", "rest namespace")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is also the root of a namespace."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def table(root: Path) -> Path:
    """1,000 rows in four fragments, 30 of them deleted: version 2, which nothing changes."""
    dataset = write(root / "numbers.lance", numbers(1000), fragments=4)
    dataset.delete("id < 10 or id between 300 and 309 or id >= 990")
    return root / "numbers.lance"


@pytest.fixture(scope="module")
def rest(root: Path) -> Iterator[str]:
    with RestAdapter("dir", {"root": str(root)}, port=0) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def vectors(root: Path) -> lance.LanceDataset:
    """2,000 rows in five fragments, with an index over their text."""
    values = np.random.default_rng(0).random((2000, 8), dtype=np.float32)
    text = [f"word{item % 50} common" for item in range(2000)]
    data = pa.table({"id": range(2000), "text": text, "vector": pa.FixedSizeListArray.from_arrays(values.ravel(), 8)})
    dataset = write(root / "vectors.lance", data, fragments=5)
    dataset.create_scalar_index("text", "INVERTED")
    return lance.dataset(dataset.uri)


def read(*args: Any, **kwargs: Any) -> pa.Table:
    return rows(lance_ray.read_lance(*args, **kwargs))


# Which table


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_way_to_name_a_table_gives_its_rows(address: str, table: Path, root: Path, rest: str) -> None:
    where: dict[str, dict[str, Any]] = {
        "path": {"uri": str(table)},
        "pathlib": {"uri": table},
        "file URI": {"uri": table.as_uri()},
        "opened dataset": {"uri": lance.dataset(str(table))},
        "dir namespace": {
            "namespace_impl": "dir",
            "namespace_properties": {"root": str(root)},
            "table_id": ["numbers"],
        },
        "rest namespace": {"namespace_impl": "rest", "namespace_properties": {"uri": rest}, "table_id": ["numbers"]},
    }

    assert_same(read(**where[address], override_num_blocks=3), expected(table))


def test_ray_data_has_this_read_lance(table: Path) -> None:
    dataset = ray.data.read_lance(str(table), columns=["id"], filter="id > 500")

    assert_same(rows(dataset), expected(table, columns=["id"], filter="id > 500"))


def test_a_relative_path_is_found_by_the_workers(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table.parent)

    assert read("numbers.lance", columns=["id"]).num_rows == 970


def test_an_opened_dataset_keeps_its_version(tmp_path: Path) -> None:
    old = write(tmp_path / "t", numbers(10))
    lance.write_dataset(numbers(10, 10), old.uri, mode="append")

    assert read(old)["id"].to_pylist() == list(range(10))
    assert read(old, version=2)["id"].to_pylist() == list(range(20))


def test_an_opened_dataset_keeps_its_branch(tmp_path: Path) -> None:
    main = write(tmp_path / "t", numbers(10))
    lance.write_dataset(numbers(1, 100), main.create_branch("side"), mode="append")

    assert read(main.checkout_version(("side", None)))["id"].to_pylist() == [*range(10), 100]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 and 3 have 10, 20 and 30 rows; tag "two" is version 2; branch "side" has 11 rows."""
    uri = tmp_path_factory.mktemp("history") / "t"
    dataset = write(uri, numbers(10))
    side = dataset.create_branch("side")
    lance.write_dataset(numbers(1, 100), side, mode="append")
    for start in (10, 20):
        time.sleep(0.002)  # so that no two versions have the same time
        lance.write_dataset(numbers(10, start), str(uri), mode="append")
    lance.dataset(str(uri)).tags.create("two", 2)
    return uri


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 30),
        ({"version": 1}, 10),
        ({"version": "two"}, 20),
        ({"dataset_options": {"version": 1}}, 10),
        ({"version": 2, "dataset_options": {"version": 1}}, 20),
        ({"branch": "side"}, 11),
        ({"branch": "side", "version": 1}, 10),
        ({"branch": "main"}, 30),
    ],
    ids=str,
)
def test_a_version_tag_or_branch_is_read(options: dict[str, Any], count: int, history: Path) -> None:
    assert read(history, **options).num_rows == count


def test_asof_includes_the_version_of_that_very_moment(history: Path) -> None:
    first, second, _ = times(history)
    moment = second.astimezone()

    assert source_rows(history, asof=second) == 20
    assert source_rows(history, asof=second - dt.timedelta(microseconds=1)) == 10
    assert source_rows(history, asof=moment.astimezone(dt.timezone(dt.timedelta(hours=9))).isoformat()) == 20
    assert source_rows(history, dataset_options={"asof": moment.astimezone(dt.UTC)}) == 20
    assert source_rows(history, asof=first.isoformat()) == 10
    with pytest.raises(VersionNotFoundError):
        source_of(history, asof=first - dt.timedelta(days=1))


def times(table: Path) -> list[dt.datetime]:
    versions: list[Any] = lance.dataset(str(table)).versions()
    return [version["timestamp"] for version in versions]


def source_rows(*args: Any, **kwargs: Any) -> int:
    return int(read_here(*args, **kwargs).num_rows)


def test_a_naive_asof_is_local_time(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = times(history)[1].astimezone(dt.UTC)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert source_rows(history, asof=(second + dt.timedelta(hours=9)).replace(tzinfo=None)) == 20
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_read_stays_on_its_version_whatever_is_committed_before_it_runs(tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(1000), fragments=10)
    wanted = expected(dataset)
    reader = lance_ray.read_lance(dataset.uri, override_num_blocks=4)

    lance.write_dataset(numbers(50, 5000), dataset.uri, mode="append")
    current = lance.dataset(dataset.uri)
    current.delete("id < 700")
    current.optimize.compact_files()
    current.add_columns({"more": "id + 1"})

    assert reader.count() == 1000
    assert_same(rows(reader), wanted)
    assert_same(rows(reader.select_columns(["x"])), wanted.select(["x"]))


def test_a_table_dropped_and_made_again_at_its_path_is_read_anew(tmp_path: Path) -> None:
    def work(source: LanceDatasource) -> pa.Table:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lance_ray.table, "_OPENED", opened_by_the_worker)
            return run_here(source)

    opened_by_the_worker = _BoundedCache(4)
    write(tmp_path / "t", numbers(100))
    work(source_of(tmp_path / "t"))
    shutil.rmtree(tmp_path / "t")
    write(tmp_path / "t", numbers(50, 5000))

    assert work(source_of(tmp_path / "t"))["id"].to_pylist() == list(range(5000, 5050))


def test_several_tables_come_out_one_after_the_other_with_nulls_for_missing_columns(tmp_path: Path) -> None:
    write(tmp_path / "a", pa.table({"id": [1, 2], "left": ["a", "b"]}))
    write(tmp_path / "b", pa.table({"id": [3], "right": [0.5]}))
    write(tmp_path / "c", pa.table({"right": [1.5], "id": [4], "left": pa.array(["c"], pa.large_string())}))

    found = read([tmp_path / "a", str(tmp_path / "b"), tmp_path / "c"])

    assert found.to_pydict() == {
        "id": [1, 2, 3, 4],
        "left": ["a", "b", None, "c"],
        "right": [None, None, 0.5, 1.5],
    }
    assert found.schema.field("left").type == pa.large_string()
    assert found.schema == lance_ray.read_lance([tmp_path / "a", tmp_path / "b", tmp_path / "c"]).schema().base_schema


def test_columns_and_filters_apply_to_each_of_several_tables(tmp_path: Path) -> None:
    write(tmp_path / "a", pa.table({"id": [1, 2, 3], "left": [1, 2, None]}))
    write(tmp_path / "b", pa.table({"id": [3, 4], "right": [5, 6]}))
    both = [tmp_path / "a", tmp_path / "b"]

    assert read(both, columns=["left", "id"], filter="id >= 2").to_pydict() == {
        "left": [2, None, None, None],
        "id": [2, 3, 3, 4],
    }


@pytest.mark.parametrize("where", [None, "id % 2 = 0"])
@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 3), (0, 0), (7, None), (8, 5), (3, 30), (10, 10), (45, 3), (20, 25), (0, 90)]
)
def test_a_limit_over_several_tables_counts_all_rows_in_the_order_of_the_list(
    tmp_path: Path, where: str | None, offset: int, limit: int | None
) -> None:
    for name, first, count in (("a", 0, 10), ("b", 10, 20), ("c", 30, 0), ("d", 30, 17)):
        write(tmp_path / name, numbers(count, first), fragments=3)
    options: dict[str, Any] = {"filter": where, "scanner_options": {"limit": limit, "offset": offset}}

    source = source_of([tmp_path / name for name in "abcd"], columns=["id"], **options)

    wanted = [number for number in range(47) if where is None or number % 2 == 0]
    assert run_here(source)["id"].to_pylist() == wanted[offset:][:limit]
    assert not source.supports_predicate_pushdown()


def test_a_limit_over_several_tables_holds_below_what_follows_it(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        write(tmp_path / name, numbers(10, first))
    for where in (None, "id >= 4"):
        limited = lance_ray.read_lance([tmp_path / "a", tmp_path / "b"], filter=where, limit=12)
        wanted = list(range(20))[0 if where is None else 4 :][:12]
        assert limited.count() == 12
        assert rows(limited.filter(expr=col("id") > 9))["id"].to_pylist() == [item for item in wanted if item > 9]


# Which columns


@pytest.mark.parametrize(
    "columns",
    [["x", "id"], ["text"], {"twice": "id * 2", "upper": "upper(text)"}, ["id", "_rowid"], ["_rowaddr"]],
    ids=str,
)
def test_columns_come_out_as_plain_lance_gives_them(columns: Any, table: Path) -> None:
    assert_same(read(table, columns=columns, override_num_blocks=3), expected(table, columns=columns))


def test_a_field_of_a_struct_is_a_column_of_its_own(tmp_path: Path) -> None:
    inner = [{"a": item, "b": {"c": str(item)}} for item in range(5)]
    write(tmp_path / "t", pa.table({"id": range(5), "s": inner}))

    found = read(tmp_path / "t", columns=["s.a", "id", "s.b.c"], filter="s.a > 2")

    assert found.to_pydict() == {"s.a": [3, 4], "id": [3, 4], "s.b.c": ["3", "4"]}


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable row ids"])
def test_row_ids_addresses_fragments_and_versions_come_out_when_asked_for(stable: bool, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(100), fragments=4, enable_stable_row_ids=stable)
    dataset.update({"x": "0.0"}, where="id = 30")
    versions = ["_row_created_at_version", "_row_last_updated_at_version"] if stable else []

    found = read(tmp_path / "t", with_row_id=True, with_metadata=True, columns=["id", *versions], override_num_blocks=3)

    plain = expected(tmp_path / "t", columns=["id", *versions], with_row_id=True, with_row_address=True)
    fragments = pc.shift_right(plain["_rowaddr"], pa.scalar(32, pa.uint64()))
    assert_same(found, plain.append_column("_fragid", fragments))
    assert sorted(set(found["_fragid"].to_pylist())) == [0, 1, 2, 3, 4]


def test_metadata_columns_may_be_named_and_selected_later(table: Path) -> None:
    named = lance_ray.read_lance(table, columns=["id", "_fragid"])
    later = lance_ray.read_lance(table, with_metadata=True).select_columns(["_fragid"])

    assert named.schema().names == ["id", "_fragid"]
    assert rows(named).schema.names == ["id", "_fragid"]
    assert rows(later)["_fragid"].to_pylist() == rows(named)["_fragid"].to_pylist()


def test_no_columns_at_all_still_count(table: Path) -> None:
    assert lance_ray.read_lance(table, columns=[]).count() == 970
    assert lance_ray.read_lance(table, columns=[], filter="id >= 500").count() == 490


def test_rows_come_out_with_the_types_of_the_table(tmp_path: Path) -> None:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float16)), 2)
    data = pa.table(
        {
            "vector": vector,
            "list": pa.array([[1, 2], None, [], [3]], pa.list_(pa.int32())),
            "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": []}, {"a": 2, "b": None}]),
            "moment": pa.array([0, 1, None, 3], pa.timestamp("us", "Europe/Berlin")),
            "naive": pa.array([0, 1, None, 3], pa.timestamp("ns")),
            "day": pa.array([0, 1, None, 3], pa.date32()),
            "decimal": pa.array([1, 2, None, 3], pa.decimal128(12, 2)),
            "category": pa.array(["a", "b", None, "a"]).dictionary_encode(),
            "large": pa.array(["a", "b", None, ""], pa.large_string()),
            "binary": pa.array([b"a", b"", None, b"\x00"], pa.binary()),
            "nothing": pa.nulls(4, pa.int8()),
            "flag": pa.array([True, False, None, True]),
        }
    )
    write(tmp_path / "t", data, fragments=2)

    found = read(tmp_path / "t")

    assert_same(found, expected(tmp_path / "t"))
    assert found.schema.types == data.schema.types
    assert lance_ray.read_lance(tmp_path / "t").schema().types == data.schema.types


def test_a_pandas_consumer_gets_the_rows(table: Path) -> None:
    frame = lance_ray.read_lance(table, columns=["id", "text"]).to_pandas()

    wanted = expected(table, columns=["id", "text"]).to_pandas()
    pd.testing.assert_frame_equal(frame.sort_values("id", ignore_index=True), wanted, check_dtype=False)


# Which rows


@pytest.mark.parametrize("form", ["text", "pyarrow"])
def test_a_filter_has_lances_meaning(form: str, table: Path) -> None:
    where: Any = "id % 3 = 0 and x < 200" if form == "text" else (pc.field("id") > 50) & pc.field("text").is_valid()

    dataset = lance_ray.read_lance(table, filter=where, override_num_blocks=3)

    wanted = expected(table, filter=where)
    assert dataset.count() == wanted.num_rows > 0
    assert_same(rows(dataset), wanted)


@pytest.mark.parametrize("limit", [0, 1, 37, 250, 969, 5000, None])
@pytest.mark.parametrize("offset", [0, 1, 240, 968, 5000])
@pytest.mark.parametrize("where", [None, "id % 2 = 0"])
def test_limit_and_offset_are_global_and_follow_table_order(
    limit: int | None, offset: int, where: str | None, table: Path
) -> None:
    source = source_of(table, filter=where, limit=limit, offset=offset, override_num_blocks=3)
    blocks = [block for task in tasks_of(source) for block in task()]

    ids = [item for block in blocks for item in block["id"].to_pylist()]
    assert ids == expected(table, filter=where)["id"].to_pylist()[offset:][:limit]


@pytest.mark.parametrize("options", [{}, {"filter": "id >= 500"}, {"scanner_options": {"order_by": ["text"]}}], ids=str)
def test_a_limited_read_counts_and_gives_its_rows_only(options: dict[str, Any], table: Path) -> None:
    dataset = lance_ray.read_lance(table, limit=7, offset=2, override_num_blocks=3, **options)

    assert dataset.count() == 7
    wanted = expected(table, filter=options.get("filter"), **options.get("scanner_options", {}))
    assert_same(rows(dataset), wanted.slice(2, 7))


def test_a_limit_asked_of_ray_reads_little_and_gives_the_first_rows(table: Path) -> None:
    dataset = lance_ray.read_lance(table).limit(15)

    assert rows(dataset)["id"].to_pylist() == list(range(10, 25))


@pytest.mark.parametrize(
    ("wanted", "where"), [([3, 1], None), ([3, 1], "id % 2 = 0"), ([0, 0], None), ([], None), ([], "id > 3")], ids=str
)
def test_only_the_fragments_asked_for_are_read(wanted: list[int], where: str | None, table: Path) -> None:
    dataset = lance_ray.read_lance(table, fragment_ids=wanted, filter=where, columns=["id"])
    lanes = {0: range(10, 250), 1: range(250, 500), 2: range(500, 750), 3: range(750, 990)}

    ids = [item for fragment in sorted(set(wanted)) for item in lanes[fragment]]
    ids = [item for item in ids if not 300 <= item < 310 and (where is None or item % 2 == 0)]
    assert dataset.count() == len(ids)
    assert rows(dataset)["id"].to_pylist() == ids


def test_fragments_and_a_limit_follow_table_order_whatever_the_order_asked_for(table: Path) -> None:
    assert read(table, fragment_ids=[3, 1], filter="id % 2 = 0", limit=2)["id"].to_pylist() == [250, 252]


@pytest.mark.parametrize("kind", ["no rows", "all rows deleted"])
def test_an_empty_table_gives_no_rows_and_its_schema(kind: str, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(20 if kind == "all rows deleted" else 0))
    dataset.delete("true")

    reader = lance_ray.read_lance(tmp_path / "t")

    assert reader.count() == 0
    assert reader.take_all() == []
    assert reader.schema().names == ["id", "x", "text", "group"]
    assert lance_ray.read_lance(tmp_path / "t", filter="id > 3").count() == 0
    assert reader.select_columns(["id"]).take_all() == []


# Searches and other options of the scanner


@pytest.mark.parametrize("options", [{}, {"filter": "id < 700", "scanner_options": {"prefilter": True}}], ids=str)
def test_nearest_gives_exactly_the_global_top_k_in_order(options: dict[str, Any], vectors: lance.LanceDataset) -> None:
    query = {"column": "vector", "q": np.full(8, 0.5, np.float32), "k": 12}
    where, scanner = options.get("filter"), options.get("scanner_options", {})
    wanted = vectors.scanner(columns=["id", "_distance"], nearest=query, filter=where, **scanner).to_table()

    found = read(
        vectors,
        columns=["id", "_distance"],
        filter=where,
        scanner_options={"nearest": query, **scanner},
        override_num_blocks=4,
    )

    assert found.num_rows == 12
    assert found["_distance"].to_pylist() == sorted(found["_distance"].to_pylist())
    assert_same(found, wanted)


def test_nearest_adds_its_distance_to_schema_and_rows(vectors: lance.LanceDataset) -> None:
    query = {"column": "vector", "q": np.full(8, 0.5, np.float32), "k": 3}

    dataset = lance_ray.read_lance(vectors, scanner_options={"nearest": query})

    assert dataset.schema().names == ["id", "text", "vector", "_distance"]
    assert dataset.count() == 3
    assert rows(dataset.select_columns(["_distance"])).schema.names == ["_distance"]


def test_full_text_queries_give_their_rows_with_the_score(vectors: lance.LanceDataset) -> None:
    query = {"columns": ["id", "_score"], "full_text_query": "word7"}

    dataset = lance_ray.read_lance(vectors, columns=["id"], scanner_options={"full_text_query": "word7"})

    found = rows(dataset)
    assert dataset.schema().names == found.schema.names == ["id", "_score"]
    assert sorted(found["id"].to_pylist()) == list(range(7, 2000, 50))
    assert found["_score"].to_pylist() == expected(vectors, **query)["_score"].to_pylist()


def test_order_by_is_global_even_over_a_column_that_does_not_come_out(table: Path) -> None:
    order = [ColumnOrdering("group", ascending=False), ColumnOrdering("id")]

    found = read(table, columns=["id"], scanner_options={"order_by": order}, limit=30, override_num_blocks=4)

    wanted = expected(table, columns=["id", "group"]).sort_by([("group", "descending"), ("id", "ascending")])
    assert_same(found, wanted.slice(0, 30).select(["id"]))


def test_the_scanners_batch_size_is_the_callers(table: Path, tmp_path: Path) -> None:
    sizes: list[int | None] = []
    scanner = lance.LanceDataset.scanner

    def spy(self: lance.LanceDataset, *args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs.get("batch_size"))
        return scanner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance.LanceDataset, "scanner", spy)
        found = read_here(table, scanner_options={"batch_size": 16}, default_scan_options={"batch_size": 32})
    assert set(sizes) == {16}
    assert found.num_rows == 970


def test_default_scan_options_hold_until_an_option_overrides_them(table: Path) -> None:
    defaults = {"filter": "id < 100", "limit": 20, "columns": ["id"]}

    assert read_here(table, default_scan_options=defaults)["id"].to_pylist() == list(range(10, 30))
    assert read_here(table, dataset_options={"default_scan_options": defaults}).num_rows == 20
    overridden = read_here(table, default_scan_options=defaults, scanner_options={"limit": 3}, filter="id > 500")
    assert overridden["id"].to_pylist() == [501, 502, 503]


def test_row_masks_of_the_caller_are_kept(table: Path) -> None:
    mask = serialize_row_addrs([20, 30, 40, 1 << 32])

    options: dict[str, Any] = {"scanner_options": {"row_addr_allowlist": mask}, "override_num_blocks": 9}
    assert lance_ray.read_lance(table, **options).count() == 4
    assert read(table, **options)["id"].to_pylist() == [20, 30, 40, 250]
    assert read(table, filter="id > 25", **options)["id"].to_pylist() == [30, 40, 250]
    assert read(table, limit=2, offset=1, **options)["id"].to_pylist() == [30, 40]


def test_the_callers_dicts_and_lists_are_never_changed(table: Path, root: Path) -> None:
    given: dict[str, Any] = {
        "columns": ["id", "x"],
        "scanner_options": {"batch_size": 100, "limit": 5, "with_row_id": True, "filter": "id > 3"},
        "dataset_options": {"version": 2, "block_size": 4096, "index_cache_size": 8},
        "default_scan_options": {"offset": 1, "columns": ["id"]},
        "storage_options": {},
        "fragment_ids": [2, 1],
        "ray_remote_args": {"num_cpus": 1},
    }
    before = repr(given)

    lance_ray.read_lance(table, **given).take_all()
    properties = {"root": str(root)}
    lance_ray.read_lance(namespace_impl="dir", namespace_properties=properties, table_id=["numbers"]).count()

    assert repr(given) == before
    assert properties == {"root": str(root)}


@pytest.mark.parametrize(
    "options",
    [{"index_cache_size_bytes": 1 << 20}, {"metadata_cache_size_bytes": 1 << 20}, {"block_size": 1 << 16}],
    ids=str,
)
def test_options_of_opening_change_no_row(options: dict[str, Any], table: Path) -> None:
    assert_same(read(table, **options), expected(table))


def test_a_session_of_the_caller_serves_this_process_and_no_other(table: Path) -> None:
    make = lance.Session  # type: ignore[attr-defined] # exported, but not declared so
    mine = make(index_cache_size_bytes=1 << 20, metadata_cache_size_bytes=1 << 20)
    source = LanceDatasource(str(table), dataset_options={"session": mine})
    elsewhere = pickle.loads(pickle.dumps(source))
    sessions: list[Any] = [item.lance_dataset.session() for item in (source, elsewhere, LanceDatasource(str(table)))]
    assert [item.is_same_as(mine) for item in sessions] == [True, False, False]
    assert read_here(table, dataset_options={"session": mine}).num_rows == 970


def test_switches_of_the_decoder_reach_every_process(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    class Opened(lance.LanceDataset):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            opened.append(keywords["read_params"])
            super().__init__(*args, **keywords)

    monkeypatch.setattr(lance, "LanceDataset", Opened)
    params = {"validate_on_decode": True, "cache_repetition_index": False}
    source = LanceDatasource(str(table), dataset_options={"read_params": params})
    pickle.loads(pickle.dumps(source))._specs[0].table.open_at(None)
    assert opened[0] == opened[-1] == params
    assert len(opened) == 2


# A scan that breaks


class BreakingScanner:
    """A scanner that loses its connection after some batches, as long as there are faults left."""

    def __init__(self, scanner: lance.LanceScanner, faults: list[int], message: str) -> None:
        self._scanner, self._faults, self._message = scanner, faults, message

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        left = self._faults.pop() if self._faults else None
        for batch in self._scanner.to_batches():
            if left == 0:
                raise OSError(self._message)
            yield batch
            left = None if left is None else left - 1

    def __getattr__(self, name: str) -> Any:
        if name == "to_table" and self._faults:
            self._faults.pop()
            raise OSError(self._message)
        return getattr(self._scanner, name)


RESET = "LanceError(IO): error reading data/a.lance: connection reset by peer"


def break_scans(monkeypatch: pytest.MonkeyPatch, faults: list[int], message: str = RESET) -> list[int]:
    """Breaks the next scans, each after so many batches. Returns the faults not used yet, the next one last."""
    scanner, left = lance.LanceDataset.scanner, faults[::-1]
    monkeypatch.setattr(
        lance.LanceDataset, "scanner", lambda self, **options: BreakingScanner(scanner(self, **options), left, message)
    )
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    return left


QUERY = {"column": "vector", "q": np.full(8, 0.5, np.float32), "k": 60}
SCANS: dict[str, dict[str, Any]] = {
    "whole fragments": {},
    "row ranges": {"override_num_blocks": 7},
    "filter over whole fragments": {"filter": "id % 3 = 0", "override_num_blocks": 2},
    "filter over row ranges": {"filter": "id % 3 = 0", "override_num_blocks": 7},
    "limit and offset": {"limit": 700, "offset": 123, "override_num_blocks": 3},
    "filter with limit and offset": {"filter": "id % 3 = 0", "limit": 300, "offset": 21},
    "index answer": {"filter": "id < 1200", "override_num_blocks": 3},
    "no columns": {"columns": []},
    "order": {"scanner_options": {"order_by": ["text"]}, "columns": ["id"]},
    "nearest": {"scanner_options": {"nearest": QUERY}},
    "full text": {"scanner_options": {"full_text_query": "common"}},
    "shuffled": {"shuffle": 5, "override_num_blocks": 3},
}


@pytest.mark.parametrize("faults", [[0], [1], [3], [2, 0, 1], [0] * 8], ids=str)
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_that_breaks_goes_on_at_the_row_it_reached(
    name: str, faults: list[int], broken: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SCANS[name], "default_scan_options": {"batch_size": 16}}
    tasks = tasks_of(source_of(broken, **options))
    wanted = [block for task in tasks for block in task()]
    left = break_scans(monkeypatch, faults)

    found = [block for task in tasks for block in task()]

    assert left == [] or name in ("nearest", "full text")  # which come in a batch or two
    assert_same(pa.concat_tables(found), pa.concat_tables(wanted))
    assert pa.concat_tables(found).num_rows >= 60


@pytest.fixture(scope="module")
def broken(root: Path, vectors: lance.LanceDataset) -> lance.LanceDataset:
    vectors.create_scalar_index("id", "BTREE")
    current = lance.dataset(vectors.uri)
    current.delete("id % 10 = 4")
    return current


def test_ray_settings_say_how_often_a_scan_is_tried(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataContext.get_current().lance_config, "read_fragments_max_attempts", 3)
    tasks = tasks_of(source_of(table))
    left = break_scans(monkeypatch, [0] * 5)

    with pytest.raises(StorageError):
        list(tasks[0]())

    assert left == [0, 0]


def test_an_unordered_scan_that_breaks_ends_rather_than_lose_a_row(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_of(source_of(table, scanner_options={"scan_in_order": False, "batch_size": 16}))
    break_scans(monkeypatch, [2])

    with pytest.raises(StorageError) as raised:
        list(tasks[0]())
    assert raised.value.retryable


def test_a_scan_that_is_refused_is_not_tried_again(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tasks_of(source_of(table))
    left = break_scans(monkeypatch, [0, 0, 0], "LanceError(IO): GET data/a.lance: AccessDenied")

    with pytest.raises(StorageError) as raised:
        list(tasks[0]())
    assert (raised.value.kind, len(left)) == ("denied", 2)


# How many tasks


def blocks(dataset: Dataset) -> int:
    return int(dataset.materialize().num_blocks())


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner cuts as if the test tables were a hundred thousand times larger."""
    monkeypatch.setattr(reads, "TASK_BYTES", 2000)
    monkeypatch.setattr(reads, "MIN_TASK_BYTES", 2000)


@pytest.mark.usefixtures("small_tasks")
def test_ray_makes_exactly_the_blocks_of_the_plan_also_after_pushdown_made_it_smaller(table: Path) -> None:
    dataset = lance_ray.read_lance(table)
    narrow = dataset.select_columns(["group"])  # 4 bytes a row

    assert blocks(dataset) == len(tasks_of(source_of(table))) > 10
    assert blocks(narrow) == 2


@pytest.mark.usefixtures("small_tasks")
def test_group_size_wins_over_a_number_of_blocks_which_wins_over_the_planner(table: Path) -> None:
    assert blocks(lance_ray.read_lance(table, fragment_group_size=2, override_num_blocks=7)) == 2
    assert blocks(lance_ray.read_lance(table, override_num_blocks=7)) == 7
    assert blocks(lance_ray.read_lance(table, override_num_blocks=7, concurrency=1)) == 7
    assert blocks(lance_ray.read_lance(table)) > 7


@pytest.mark.parametrize("where", [None, "id % 5 <> 0"], ids=["all rows", "filtered"])
@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable row ids"])
def test_one_big_fragment_is_split_into_tasks(stable: bool, where: str | None, tmp_path: Path) -> None:
    dataset = write(tmp_path / "t", numbers(20_000), enable_stable_row_ids=stable)
    dataset.delete("id % 3 = 0")
    dataset.optimize.compact_files(materialize_deletions_threshold=0.1)
    dataset.update({"x": "-1.0"}, where="id < 100")
    dataset.optimize.compact_files()
    dataset.delete("id % 7 = 0")
    assert len(dataset.get_fragments()) == 1
    wanted = expected(dataset, filter=where, with_row_id=True)

    reader = lance_ray.read_lance(tmp_path / "t", filter=where, with_row_id=True, override_num_blocks=6)

    assert blocks(reader) == 6
    assert reader.count() == wanted.num_rows
    assert_same(rows(reader), wanted)


# Planning without reading


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("many") / "t"
    dataset = write_many_fragments(uri, numbers(200), 5000)
    dataset.create_scalar_index("id", "BTREE")
    return uri


def test_count_and_schema_of_many_fragments_read_nothing(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outline = LanceDatasource.get_read_tasks

    def only_outlines(self: LanceDatasource, parallelism: int, limit: Any = None, data_context: Any = None) -> Any:
        assert data_context is None, "the read was run"
        return outline(self, parallelism, limit)

    dataset = lance_ray.read_lance(many)
    monkeypatch.setattr(LanceDatasource, "get_read_tasks", only_outlines)
    monkeypatch.delattr(lance.LanceDataset, "scanner")

    started = time.perf_counter()
    assert dataset.count() == 1_000_000
    assert dataset.schema().names == ["id", "x", "text", "group"]
    assert dataset.select_columns(["x"]).schema().types == [pa.float64()]
    assert time.perf_counter() - started < 1


def test_a_filter_that_an_index_answers_is_counted_exactly(many: Path) -> None:
    dataset = lance_ray.read_lance(many, filter="id = 17")

    assert dataset.count() == 5000
    assert sum(task.metadata.num_rows for task in tasks_of(source_of(many, filter="id = 17"))) == 5000


def test_rows_of_many_fragments_are_all_read(many: Path) -> None:
    found = read(many, columns=["id"], filter="id >= 198")

    assert found["id"].to_pylist() == [198, 199] * 5000


def test_counts_of_tasks_agree_with_their_rows(table: Path) -> None:
    for options in ({}, {"limit": 100, "offset": 5}, {"fragment_ids": [1]}, {"scanner_options": {"order_by": ["x"]}}):
        for task in tasks_of(source_of(table, override_num_blocks=3, **options)):
            assert task.metadata.num_rows == sum(block.num_rows for block in task())


# Only Ray's own


def test_options_of_ray_reach_the_tasks_by_name_and_win_over_the_dict(table: Path) -> None:
    given: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "read_datasource", lambda source, **options: given.append(options))
        patch.setattr("lance_ray.datasource.start_in_full", lambda dataset: dataset)
        lance_ray.read_lance(table, num_cpus=0.5, max_calls=3, ray_remote_args={"num_cpus": 2, "memory": 9})
        lance_ray.read_lance(table, concurrency=2, ray_remote_args={"max_retries": 1})

    assert [given[0][name] for name in ("num_cpus", "max_calls", "memory", "ray_remote_args")] == [0.5, 3, 9, None]
    assert [given[1][name] for name in ("concurrency", "ray_remote_args")] == [2, {"max_retries": 1}]
    further = {"memory": 10_000_000, "scheduling_strategy": "SPREAD"}  # the last has no name there: no warning of it
    assert read(table, num_cpus=0.5, ray_remote_args=further).num_rows == 970
