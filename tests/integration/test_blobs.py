"""Blob columns of both kinds: as bytes within a bound, as ranges, as descriptors, as handles; taken in from URLs."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray
from lance.dataset import ColumnOrdering

import lance_ray
from lance_ray.blob_ingest import Ingest, fetched
from lance_ray.blobs import BlobHandle, open_blobs
from lance_ray.errors import InvalidArgumentError, SchemaMismatchError, StorageError
from lance_ray.retry import RetryPolicy
from tests.faults.stores import BUCKET, S3
from tests.tables import read_here, rows, run_here, source_of, tasks_of

VALUES = [b"a" * 10, None, b"", b"z" * 100_000, b"x"]
LEGACY = pa.field("data", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
FORMATS = ["2.0", "2.1", "2.2"]


def blobs(uri: Path, storage_format: Any, values: list[Any] = VALUES) -> str:
    """A table of an ``id`` and a blob column ``data`` in two fragments, of the kind that the file format has."""
    new = storage_format == "2.2"
    data = lance.blob_array(values) if new else pa.array(values, pa.large_binary())
    field = lance.blob_field("data", inline_size_threshold=8) if new else LEGACY
    table = pa.table(
        {"id": pa.array(range(len(values))), "data": data}, schema=pa.schema([pa.field("id", pa.int64()), field])
    )
    lance.write_dataset(
        table,
        str(uri),
        data_storage_version=storage_format,
        max_rows_per_file=3,
        allow_external_blob_outside_bases=True,
    )
    return str(uri)


@pytest.fixture(params=FORMATS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return blobs(tmp_path / "table", request.param)


def column(found: pa.Table, name: str = "data") -> list[Any]:
    values: list[Any] = found[name].to_pylist()
    return values


# Reading


def test_blobs_come_out_as_bytes_marked_as_blobs(table: str):
    found = read_here(table)
    assert column(found) == VALUES
    field = found.schema.field("data")
    assert field.type == pa.large_binary()
    assert field.metadata[b"lance-encoding:blob"] == b"true"


def test_blobs_come_out_as_descriptors_under_the_name_in_ray_data(table: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray.data, "read_datasource", lambda source, **_: source)
    monkeypatch.setattr("lance_ray.datasource.start_in_full", lambda dataset: dataset)
    read: Any = ray.data.read_lance
    assert run_here(read(table)).equals(lance.dataset(table).to_table())
    assert column(run_here(read(table, blobs="bytes"))) == VALUES
    assert column(run_here(read(table, scanner_options={"blob_handling": "all_binary"}))) == VALUES


@pytest.mark.parametrize(("handling", "is_bytes"), [("all_binary", True), ("blobs_descriptions", False)])
def test_the_scanners_own_option_says_how_blobs_come_out(table: str, handling: str, is_bytes: bool):
    found = read_here(table, scanner_options={"blob_handling": handling})
    assert pa.types.is_large_binary(found.schema.field("data").type) == is_bytes
    with pytest.raises(InvalidArgumentError, match="blob_handling"):
        source_of(table, blobs="handles", scanner_options={"blob_handling": handling})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((0, 2), [b"aa", None, b"", b"zz", b"x"]),
        ((9, 5), [b"a", None, b"", b"zzzzz", b""]),
        ((-2, 2), [b"aa", None, b"", b"zz", b"x"]),
        ((-2, 1), [b"a", None, b"", b"z", b"x"]),
        ((0, 0), [b"", None, b"", b"", b""]),
    ],
)
def test_a_range_of_each_blob_is_read(table: str, wanted: tuple[int, int], expected: list[bytes | None]):
    assert column(read_here(table, blob_range=wanted)) == expected


def test_a_range_reads_no_more_than_asked_for(table: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lance.LanceDataset, "read_blobs", lambda *_, **__: pytest.fail("whole blobs were read"))
    assert column(read_here(table, blob_range=(1, 1)))[3] == b"z"


@pytest.mark.parametrize("budget", [1, 11, 50_000])
def test_a_block_holds_no_more_payload_than_asked_for_but_for_a_single_blob(tmp_path: Path, budget: int):
    uri = blobs(tmp_path / "table", "2.2", [bytes([item]) * 10 for item in range(7)] + [b"large" * 9999])
    found = [block for task in tasks_of(source_of(uri, blob_batch_bytes=budget)) for block in task()]
    sizes = [[len(item) for item in column(block)] for block in found]
    assert all(sum(block) <= budget or len(block) == 1 for block in sizes)
    assert [item for block in sizes for item in block] == [10] * 7 + [49995]
    assert len(sizes) == (2 if budget == 50_000 else 8)


def test_blobs_are_read_only_where_they_come_out(table: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lance.LanceDataset, "read_blobs", lambda *_, **__: pytest.fail("blobs were read"))
    source = source_of(table)
    assert run_here(source.apply_projection({"id": "id"}))["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert read_here(table, columns=["id"])["id"].to_pylist() == [0, 1, 2, 3, 4]


def test_filters_offsets_and_row_ids_go_with_blobs(table: str):
    assert column(read_here(table, filter="id >= 3")) == VALUES[3:]
    assert column(read_here(table, limit=2, offset=2)) == VALUES[2:4]
    assert read_here(table, with_row_id=True, columns=["data"]).schema.names == ["data", "_rowid"]
    assert read_here(table, with_metadata=True).schema.names == ["id", "data", "_rowaddr", "_fragid"]
    ordered = read_here(table, columns=["data"], scanner_options={"order_by": [ColumnOrdering("id", ascending=False)]})
    assert column(ordered) == VALUES[::-1]
    assert column(read_here(table, columns={"other": "data", "twice": "id * 2"}), "other") == VALUES


def test_a_later_filter_on_the_bytes_sees_the_bytes(table: str):
    wanted = ray.data.expressions.col("data") == b"x"
    source = source_of(table)
    pushed = source.apply_predicate(wanted & (ray.data.expressions.col("id") > 0))
    found = run_here(pushed)
    assert {4} <= set(found["id"].to_pylist()) <= {1, 2, 3, 4}


def test_a_later_filter_that_no_row_passes_leaves_no_rows_of_the_types_asked_for(table: str):
    ids = ray.data.expressions.col("id")
    for mode in ("bytes", "handles"):  # the remainder is left to Ray, and decided before a blob is read
        source = source_of(table, blobs=mode).apply_predicate((ids >= 0) & (ids % 10 == 9))
        assert run_here(source).num_rows == 0


def test_several_tables_of_both_kinds_are_read_as_one(tmp_path: Path):
    tables = [blobs(tmp_path / name, name) for name in FORMATS]
    assert column(read_here(tables)) == VALUES * 3
    assert column(read_here(tables, limit=4, offset=4)) == [VALUES[4], *VALUES[:3]]


def test_blobs_inside_structs_come_out_as_bytes(tmp_path: Path):
    fields = [lance.blob_field("b"), pa.field("x", pa.int32())]
    inner = pa.StructArray.from_arrays(
        [lance.blob_array([b"aa", None, b"c"]), pa.array([1, 2, 3], pa.int32())], fields=fields
    )
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"s": inner}), uri)
    assert column(read_here(uri), "s") == [{"b": b"aa", "x": 1}, {"b": None, "x": 2}, {"b": b"c", "x": 3}]
    assert column(read_here(uri, columns=["s.b"]), "s.b") == [b"aa", None, b"c"]
    with pytest.raises(InvalidArgumentError, match="structs"):
        source_of(uri, blobs="handles")
    handles = open_blobs(uri, "s.b", indices=[2, 1])
    assert [handle and handle.read() for handle in handles] == [b"c", None]


def test_the_rows_that_a_search_finds_come_with_their_bytes(tmp_path: Path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(20, dtype=np.float32)), 4)
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"vector": vectors, "data": lance.blob_array(VALUES)}), uri)
    nearest = {"column": "vector", "q": [12.0, 13, 14, 15], "k": 2}
    assert column(read_here(uri, nearest=nearest, columns=["data"])) == [VALUES[3], VALUES[2]]
    described = read_here(uri, nearest=nearest, columns=["data"], blobs="descriptors")
    assert [item["size"] for item in column(described)] == [100_000, 0]


def test_stable_row_ids_do_not_mix_blobs_up(tmp_path: Path):
    uri = str(tmp_path / "table")
    values = [bytes([item]) for item in range(20)]
    data = pa.table({"id": range(20), "data": lance.blob_array(values)})
    lance.write_dataset(data, uri, max_rows_per_file=5, enable_stable_row_ids=True)
    lance.dataset(uri).delete("id % 3 = 0")
    lance.dataset(uri).optimize.compact_files()
    found = read_here(uri)
    assert column(found) == [bytes([item]) for item in found["id"].to_pylist()]
    assert found.num_rows == 13


# Handles


def test_handles_are_small_and_opened_where_they_are_used(table: str):
    handles = column(read_here(table, blobs="handles"))
    assert [handle and handle.size for handle in handles] == [10, None, 0, 100_000, 1]
    large: BlobHandle = pickle.loads(pickle.dumps(handles[3]))
    assert len(pickle.dumps(large)) < 2000
    assert large.read() == VALUES[3]
    assert (large.read_range(99_999, 5), large.read_range(-3, 2), large.read_range(200_000, 1)) == (b"z", b"zz", b"")
    with large.open() as opened:
        opened.seek(99_998)
        assert opened.read() == b"zz"


def test_handles_are_opened_by_position_row_id_and_address(table: str):
    told = lance.dataset(table).scanner(columns=["id"], with_row_id=True, with_row_address=True).to_table()
    for ways in (
        {"indices": [3, 0, 1]},
        {"row_ids": [told["_rowid"][item].as_py() for item in (3, 0, 1)]},
        {"addresses": [told["_rowaddr"][item].as_py() for item in (3, 0, 1)]},
    ):
        found = open_blobs(table, "data", **ways)
        assert [handle and handle.read() for handle in found] == [VALUES[3], VALUES[0], None]
    assert open_blobs(table, "data", indices=[]) == []


@pytest.mark.parametrize(
    ("keywords", "parameter"),
    [
        ({"column": "id", "indices": [0]}, "column"),
        ({"column": "data"}, "indices"),
        ({"column": "data", "indices": [0], "row_ids": [0]}, "indices"),
        ({"column": "data", "indices": [99]}, "indices"),
    ],
)
def test_what_is_no_blob_cannot_be_opened(tmp_path: Path, keywords: dict[str, Any], parameter: str):
    with pytest.raises(InvalidArgumentError) as caught:
        open_blobs(blobs(tmp_path / "table", "2.2"), **keywords)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("keywords", "parameter"),
    [
        ({"blobs": "files"}, "blobs"),
        ({"blob_range": (1,)}, "blob_range"),
        ({"blob_range": (0, -1)}, "blob_range"),
        ({"blob_range": (0, 1), "blobs": "handles"}, "blob_range"),
        ({"blob_batch_bytes": 0}, "blob_batch_bytes"),
        ({"blobs": "handles", "full_text_query": "x"}, "blobs"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path: Path, keywords: dict[str, Any], parameter: str):
    with pytest.raises(InvalidArgumentError) as caught:
        source_of(blobs(tmp_path / "table", "2.2"), **keywords)
    assert caught.value.parameter == parameter


# Lookups

ORDER = [3, 0, 1, 3, 2]


@pytest.mark.parametrize("way", [{"indices": ORDER}, {"keys": ORDER, "on": "id"}], ids=["indices", "keys"])
def test_rows_that_are_looked_up_come_with_their_blobs_in_the_form_asked_for(table: str, way: dict[str, Any]):
    found = lance_ray.take(table, **way)
    assert (found["id"].to_pylist(), column(found)) == (ORDER, [VALUES[item] for item in ORDER])
    assert found.schema.field("data").metadata[b"lance-encoding:blob"] == b"true"
    sizes = [item and item["size"] for item in column(lance_ray.take(table, **way, blobs="descriptors"))]
    assert [sizes[0], sizes[1], sizes[4]] == [100_000, 10, 0]
    handles = column(lance_ray.take(table, **way, blobs="handles"))
    assert [handle and handle.read() for handle in handles] == [VALUES[item] for item in ORDER]


def test_ranges_of_the_blobs_of_looked_up_rows_are_all_that_is_read(table: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lance.LanceDataset, "read_blobs", lambda *_, **__: pytest.fail("whole blobs were read"))
    assert column(lance_ray.take(table, ORDER, blob_range=(-2, 2))) == [b"zz", b"aa", None, b"zz", b""]
    assert lance_ray.take(table, ORDER, columns=["id"])["id"].to_pylist() == ORDER
    renamed = lance_ray.take(table, ORDER, columns={"other": "data"}, blob_range=(0, 1))
    assert column(renamed, "other") == [b"z", b"a", None, b"z", b""]


def test_a_lookup_reads_no_more_payload_at_a_time_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = blobs(tmp_path / "table", "2.2", [bytes([item]) * 10 for item in range(12)])
    read, asked = lance.LanceDataset.read_blobs, []

    def counted(*args: Any, **keywords: Any) -> Any:
        found = read(*args, **keywords)
        asked.append(sum(len(data or b"") for _, data in found))
        return found

    monkeypatch.setattr(lance.LanceDataset, "read_blobs", counted)
    found = column(lance_ray.take(uri, list(range(11, -1, -1)), blob_batch_bytes=30))
    assert found == [bytes([item]) * 10 for item in range(11, -1, -1)]
    assert (sum(asked), max(asked) <= 30) == (120, True)


def test_rows_that_are_not_there_have_no_blobs(table: str):
    for mode in ("bytes", "handles"):
        found = column(lance_ray.take(table, row_ids=[2**40, 0], missing="null", blobs=mode))
        assert found[0] is None
        assert found[1] is not None
        assert lance_ray.take(table, row_ids=[2**40], missing="skip", blobs=mode).num_rows == 0
        assert lance_ray.take(table, [], blobs=mode).schema.names == ["id", "data"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("mode", ["bytes", "handles"])
def test_workers_look_blobs_up_as_this_process_does(table: str, mode: str):
    here, there = (column(lance_ray.take(table, ORDER, blobs=mode, num_workers=count)) for count in (None, 2))
    assert [getattr(item, "address", item) for item in here] == [getattr(item, "address", item) for item in there]


# Memory

PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.tables import source_of, tasks_of
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
source = source_of({uri!r})
before, total = peak(), 0
for task in tasks_of(source):
    for block in task():
        total += block["data"].nbytes
print(total, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage_format", ["2.1", "2.2"])
def test_half_a_gigabyte_of_blobs_is_read_within_a_fraction_of_it(tmp_path: Path, storage_format: str):
    uri, version = str(tmp_path / "table"), cast("Any", storage_format)
    for start in range(0, 64, 16):
        values = [bytes([item]) * (8 * 1024**2) for item in range(start, start + 16)]
        data = lance.blob_array(values) if storage_format == "2.2" else pa.array(values, pa.large_binary())
        field = lance.blob_field("data") if storage_format == "2.2" else LEGACY
        lance.write_dataset(
            pa.table({"data": data}, schema=pa.schema([field])),
            uri,
            mode="append" if start else "create",
            data_storage_version=version,
        )
    program = PEAK.format(root=str(Path(__file__).parents[2]), uri=uri)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True)
    total, grown = map(float, done.stdout.split())
    assert total >= 512 * 1024**2
    assert grown < 256


# Writing

ray_tests = pytest.mark.usefixtures("ray_session")


@pytest.mark.ray
@ray_tests
def test_a_round_trip_keeps_blobs_blobs_in_every_mode(table: str, tmp_path: Path):
    copy = str(tmp_path / "copy")
    lance_ray.write_lance(lance_ray.read_lance(table), copy)
    lance_ray.write_lance(lance_ray.read_lance(copy), copy, mode="append")
    lance_ray.write_lance(lance_ray.read_lance(copy), copy, mode="overwrite")
    assert sorted(map(str, column(read_here(copy)))) == sorted(map(str, VALUES * 2))
    assert lance.dataset(copy).read_blobs("data", indices=[0])  # which only blob columns have
    older = str(tmp_path / "older")
    lance_ray.write_lance(lance_ray.read_lance(table), older, data_storage_version="2.1")
    assert lance.dataset(older).schema.field("data").metadata[b"lance-encoding:blob"] == b"true"
    assert column(read_here(older)) == VALUES


@pytest.mark.ray
@ray_tests
def test_descriptors_and_handles_are_not_written_as_if_they_were_blobs(table: str, tmp_path: Path):
    for mode in ("descriptors", "handles"):
        with pytest.raises(SchemaMismatchError, match="data"):
            lance_ray.write_lance(lance_ray.read_lance(table, blobs=mode), str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "_versions").exists()


@pytest.mark.ray
@ray_tests
def test_handles_are_used_by_workers(table: str):
    found = lance_ray.read_lance(table, blobs="handles").map(
        lambda row: {"id": row["id"], "end": None if row["data"] is None else row["data"].read_range(-1, 1)}
    )
    assert sorted((row["id"], row["end"]) for row in found.take_all()) == [
        *((0, b"a"), (1, None), (2, b""), (3, b"z"), (4, b"x"))
    ]


@pytest.mark.ray
@ray_tests
def test_references_inside_a_base_are_kept_as_references(tmp_path: Path):
    base = tmp_path / "videos"
    base.mkdir()
    (base / "one.bin").write_bytes(b"0123456789")
    uri = str(tmp_path / "table")
    schema = pa.schema([lance.blob_field("data")])
    given = lance.blob_array([(base / "one.bin").as_uri(), lance.Blob.from_uri((base / "one.bin").as_uri(), 2, 3)])
    source = ray.data.from_arrow(pa.table({"data": given}, schema=schema))
    bases = [lance.DatasetBasePath(str(base), "videos", is_dataset_root=False, id=1)]
    lance_ray.write_lance(source, uri, schema=schema, initial_bases=bases)
    assert column(read_here(uri)) == [b"0123456789", b"234"]
    handles = column(read_here(uri, blobs="handles"))
    assert [(handle.known_size, handle.size) for handle in handles] == [(None, 10), (3, 3)]
    assert column(read_here(uri, blob_range=(-2, 2))) == [b"89", b"34"]
    (base / "one.bin").unlink()
    with pytest.raises(StorageError) as caught:
        read_here(uri)
    assert caught.value.kind == "missing"


@pytest.mark.ray
@ray_tests
def test_blobs_go_to_the_base_that_they_are_meant_for_with_its_own_options(s3: S3, tmp_path: Path):
    base = f"s3://{BUCKET}/blobs-base"
    uri = str(tmp_path / "table")
    schema = pa.schema([pa.field("id", pa.int64()), lance.blob_field("data", inline_size_threshold=4)])
    source = ray.data.from_arrow(pa.table({"id": [0, 1], "data": pa.array([b"a" * 99, b"b"], pa.large_binary())}))
    params = {base: s3.options()}
    bases = [lance.DatasetBasePath(base, "far", is_dataset_root=False, id=1)]
    lance_ray.write_lance(
        source, uri, schema=schema, initial_bases=bases, target_bases=["far"], base_store_params=params
    )
    assert list(Path(uri).rglob("*.lance")) == []
    assert column(read_here(uri, base_store_params=params)) == [b"a" * 99, b"b"]
    (handle, *_) = column(read_here(uri, base_store_params=params, blobs="handles"))
    assert handle.read_range(0, 2) == b"aa"


# Taking in from URLs


def test_urls_of_any_filesystem_become_bytes(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"from a file")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("inner.txt", "from an archive")
    urls = [str(tmp_path / "a.bin"), (tmp_path / "a.bin").as_uri(), f"zip://inner.txt::file://{tmp_path}/b.zip", None]
    found = pa.concat_tables(fetched(pa.table({"url": urls}), Ingest("url", "data")))
    assert column(found) == [b"from a file", b"from a file", b"from an archive", None]
    assert found.schema.field("data").metadata == {b"lance-encoding:blob": b"true"}
    assert found["url"].to_pylist() == urls


def test_payloads_are_handed_on_in_tables_of_bounded_size(tmp_path: Path):
    for item in range(5):
        (tmp_path / f"{item}").write_bytes(bytes([item]) * (100 if item == 2 else 10))
    urls = pa.table({"url": [str(tmp_path / f"{item}") for item in range(5)]})
    found = list(fetched(urls, Ingest("url", "url", batch_bytes=25)))
    assert [[len(item) for item in column(table, "url")] for table in found] == [[10, 10], [100], [10, 10]]
    assert [table.num_rows for table in fetched(urls.slice(0, 0), Ingest("url", "data"))] == [0]


def test_what_cannot_be_fetched_is_an_error_that_names_it_or_a_null(tmp_path: Path):
    urls = pa.table({"url": [str(tmp_path / "absent.bin"), "ftp://me:secret-word@127.0.0.1:9/x?sig=also-secret"]})
    once = RetryPolicy(max_attempts=1)
    for row, name in ((0, "absent.bin"), (1, "127.0.0.1")):
        with pytest.raises(StorageError, match=name) as caught:
            list(fetched(urls.slice(row, 1), Ingest("url", "data", retry=once)))
        assert "secret" not in str(caught.value)
    left = pa.concat_tables(fetched(urls, Ingest("url", "data", on_error="null", retry=once)))
    assert column(left) == [None, None]
    with pytest.raises(InvalidArgumentError, match="no_such"):
        list(fetched(urls, Ingest("no_such", "data")))
    with pytest.raises(InvalidArgumentError, match="strings"):
        list(fetched(pa.table({"n": [1]}), Ingest("n", "data")))


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("no-such-scheme://bucket/a", {}, "no-such-scheme"),
        ("zip://inner.txt::file://b.zip", {"zip": {"mode": "no-such-mode"}}, "no-such-mode"),
        ("a.bin", {"url": "b.bin"}, "fsspec_options"),
    ],
)
def test_an_error_of_configuration_is_raised_even_where_nulls_are_wanted(url, options, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("b.zip", "w") as archive:
        archive.writestr("inner.txt", "from an archive")
    with pytest.raises(InvalidArgumentError, match=named):
        list(fetched(pa.table({"url": [url]}), Ingest("url", "data", options, on_error="null")))


@pytest.mark.ray
@ray_tests
def test_urls_are_taken_in_on_workers_and_written_as_blobs(tmp_path: Path):
    for item in range(20):
        (tmp_path / f"{item}.bin").write_bytes(np.full(1000 * item, item, np.uint8).tobytes())
    source = ray.data.from_arrow(pa.table({"id": range(20), "url": [f"{tmp_path}/{item}.bin" for item in range(20)]}))
    uri = str(tmp_path / "table")
    # The last has no name in Ray Data; its warning of that would be an error here.
    further = {"num_cpus": 2, "memory": 1, "scheduling_strategy": "SPREAD"}
    workers: Any = {"concurrency": 1, "num_cpus": 1, "ray_remote_args": further}
    lance_ray.write_lance(lance_ray.ingest_blobs(source, "url", into="data", **workers), uri)
    found = rows(lance_ray.read_lance(uri)).sort_by("id")
    assert [len(item) for item in column(found)] == [1000 * item for item in range(20)]
    assert len(open_blobs(uri, "data", indices=[19])) == 1
    with pytest.raises(InvalidArgumentError, match="on_error"):
        lance_ray.ingest_blobs(source, "url", on_error="skip")
