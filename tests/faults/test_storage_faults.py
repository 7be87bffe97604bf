"""What the store does to a job: throttles, resets, refuses, fills up, is not there.

What may pass is waited for within the stated time of the retry policy; what will not pass ends within ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from lance_ray import cleanup_orphans, read_lance, write_lance
from lance_ray.errors import StorageError, TableNotFoundError, unwrap
from lance_ray.retry import RetryPolicy
from tests.faults.proxy import FaultProxy, Rule
from tests.faults.stores import BUCKET, S3, SECRET, Place, ends_within, failing_with, rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SOON = 10.0  # seconds within which a permanent error must come out
STATED = RetryPolicy().total_seconds + 10


@pytest.fixture(autouse=True)
def _quiet_workers(ray_session: Path) -> Iterator[None]:
    """No log of Ray or of its workers may show the secret."""
    yield
    logs = [
        path for path in ray_session.rglob("*") if path.is_file() and not path.is_symlink() and "logs" in path.parts
    ]
    assert logs
    assert [path.name for path in logs if SECRET.encode() in path.read_bytes()] == []


@pytest.fixture(scope="module", autouse=True)
def _warm(ray_session: Path) -> None:
    """Workers that have imported everything, so that the times below are those of the faults."""
    ray.data.range(2, override_num_blocks=2).map_batches(_import_all, batch_size=None).materialize()


def _import_all(batch: dict[str, Any]) -> dict[str, Any]:
    import lance_ray  # noqa: F401 - for its own sake

    return batch


def blocks(count: int, size: int = 100) -> ray.data.Dataset:
    """So many blocks of so many rows, which become as many files."""
    return ray.data.from_arrow([rows(first, size) for first in range(0, count * size, size)])


def proxy_of(place: Place) -> FaultProxy:
    assert place.s3 is not None
    return place.s3.proxy


# What passes


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"reset": True}, pytest.param({"status": 500}, marks=pytest.mark.slow)],
    ids=["503", "resets", "500"],
)
def test_twenty_data_puts_fail_and_every_row_arrives_once(on_s3: Place, fault: dict[str, Any]):
    on_s3.write(rows(-100, 50))
    rule = Rule("PUT", "/data/", count=20, **fault)
    with proxy_of(on_s3).failing(rule), ends_within(STATED):
        report = write_lance(blocks(4), **on_s3.to, mode="append", min_rows_per_file=100, concurrency=1)
    assert rule.hits > 20
    assert report.rows == 400
    on_s3.assert_holds([*range(-100, -50), *range(400)])


@pytest.mark.slow
def test_a_create_through_twenty_failing_data_puts(on_s3: Place):
    rule = Rule("PUT", "/data/", count=20, status=503)
    with proxy_of(on_s3).failing(rule), ends_within(STATED):
        write_lance(blocks(1), **on_s3.to)
    assert rule.hits > 20
    on_s3.assert_holds(range(100))


@pytest.mark.parametrize("lost", [1, 3])
def test_answers_to_data_puts_are_lost_and_no_row_is_doubled(on_s3: Place, lost: int):
    rule = Rule("PUT", "/data/", count=lost, lose_answer=True)
    with proxy_of(on_s3).failing(rule):
        write_lance(blocks(4), **on_s3.to, min_rows_per_file=100)
    on_s3.assert_holds(range(400))


def test_answers_to_everything_come_late_and_one_in_five_requests_is_throttled(on_s3: Place):
    rules = [Rule(count=1, skip=skip, status=503) for skip in range(0, 200, 5)]
    with proxy_of(on_s3).failing(*rules, Rule(delay=0.05)), ends_within(STATED):
        write_lance(blocks(4), **on_s3.to, min_rows_per_file=100)
    on_s3.assert_holds(range(400))


@pytest.fixture
def wide(on_s3: Place) -> Place:
    """A table of about a megabyte, in two fragments."""
    table = rows(0, 2000).append_column("data", pa.array([os.urandom(256) for _ in range(2000)]))
    on_s3.write(table, max_rows_per_file=1000)
    return on_s3


@pytest.mark.parametrize(
    "rule",
    [
        Rule("GET", "/data/", count=3, cut_body=2000),
        Rule("GET", "/data/", count=12, reset=True),
        Rule("GET", "/data/", count=12, status=503),
    ],
    ids=["connections break in mid-body", "connections are reset", "answers 503"],
)
def test_a_read_through_a_broken_store_gets_every_row_once(wide: Place, rule: Rule):
    with proxy_of(wide).failing(rule), ends_within(STATED):
        found = read_lance(**wide.impatient.to).take_all()
    assert rule.hits >= rule.count
    assert sorted(row["id"] for row in found) == list(range(2000))
    assert len({row["data"] for row in found}) == 2000


def test_a_filtered_read_through_a_broken_store_gets_every_row_once(wide: Place):
    rule = Rule("GET", "/data/", count=8, reset=True)
    with proxy_of(wide).failing(rule), ends_within(STATED):
        found = read_lance(**wide.impatient.to, columns=["id"], filter="id % 7 = 0").take_all()
    assert rule.hits >= rule.count
    assert sorted(row["id"] for row in found) == list(range(0, 2000, 7))


# What does not pass


def error_of(action: str, place: Place, mode: str = "append") -> BaseException:
    """What reading or writing raises, soon."""
    with failing_with(Exception) as caught, ends_within(SOON):
        if action == "read":
            read_lance(**place.to).take_all()
        else:
            write_lance(blocks(2), **place.to, mode=mode)
    error: BaseException = caught.value
    return error


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("read", "AccessDenied"),
        ("write", "InvalidAccessKeyId"),
        pytest.param("read", "SignatureDoesNotMatch", marks=pytest.mark.slow),
        pytest.param("write", "ExpiredToken", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_key_is_told_at_once_and_not_called_a_missing_table(on_s3: Place, action: str, code: str):
    on_s3.write(rows(0, 10))
    with proxy_of(on_s3).failing(Rule(status=403, code=code)):
        error = error_of(action, on_s3)
    assert isinstance(error, StorageError)
    assert error.kind == "denied"
    on_s3.assert_holds(range(10))


def test_a_key_that_may_read_but_not_write(on_s3: Place):
    with proxy_of(on_s3).failing(Rule("PUT|POST|DELETE", status=403, code="AccessDenied")):
        error = error_of("write", on_s3, "create")
    assert isinstance(error, StorageError)
    assert error.kind == "denied"
    on_s3.assert_empty()


@pytest.mark.parametrize(
    ("action", "mode"), [("read", ""), ("write", "create"), pytest.param("write", "append", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_bucket_that_does_not_exist(s3: S3, action: str, mode: str):
    error = error_of(action, Place("s3://no-such-bucket/table", s3.options(), s3), mode)
    assert isinstance(error, StorageError)
    assert error.kind == "missing"


@pytest.mark.parametrize(
    ("action", "mode", "host"),
    [
        ("read", "", "127.0.0.1:9"),
        pytest.param("write", "create", "127.0.0.1:9", marks=pytest.mark.slow),
        ("write", "append", "127.0.0.1:9"),
        pytest.param("write", "append", "no-such-host.invalid:9000", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_an_endpoint_where_nobody_answers(s3: S3, action: str, mode: str, host: str):
    place = Place(f"s3://{BUCKET}/table", s3.options(aws_endpoint=f"http://{host}"), s3)
    error = error_of(action, place, mode)
    assert isinstance(error, StorageError)
    assert error.kind == "unreachable"


@pytest.mark.parametrize("action", ["read", "write"])
def test_a_table_that_does_not_exist(place: Place, action: str):
    assert isinstance(error_of(action, place), TableNotFoundError)


@pytest.mark.parametrize(
    ("mode", "below"), [("create", "table"), pytest.param("overwrite", "deeper/table", marks=pytest.mark.slow)]
)
def test_a_parent_that_is_a_file(tmp_path: Path, mode: str, below: str):
    parent = tmp_path / "file"
    parent.write_text("not a folder")
    error = error_of("write", Place(str(parent / below)), mode)
    assert isinstance(error, StorageError)
    assert error.kind == "invalid"
    assert parent.read_text() == "not a folder"


@pytest.mark.slow
def test_a_table_path_that_is_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("not a table")
    for action in ("read", "write"):
        assert isinstance(error_of(action, Place(str(path)), "create"), (StorageError, TableNotFoundError))
    assert path.read_text() == "not a table"


def test_credentials_that_expire_while_workers_write(on_s3: Place, caplog: pytest.LogCaptureFixture):
    on_s3.write(rows(-100, 50))
    expired = Rule("PUT", "/data/", skip=2, status=403, code="ExpiredToken")
    with proxy_of(on_s3).failing(expired), failing_with(StorageError) as caught, ends_within(SOON):
        write_lance(blocks(4), **on_s3.to, mode="append", min_rows_per_file=100, concurrency=1)
    assert caught.value.kind == "denied"
    on_s3.assert_holds(range(-100, -50))


def test_a_store_that_refuses_even_the_clean_up_leaves_a_ledger_for_later(on_s3: Place, caplog):
    on_s3.write(rows(-100, 50))
    refused = [
        Rule("PUT", "/data/", skip=2, status=403, code="AccessDenied"),
        Rule("DELETE|POST", status=403, code="AccessDenied"),
    ]
    with proxy_of(on_s3).failing(*refused), failing_with(StorageError, match="write") as caught, ends_within(SOON):
        write_lance(blocks(4), **on_s3.to, mode="append", min_rows_per_file=100, concurrency=1)
    assert caught.value.kind == "denied"
    assert "left for cleanup_orphans" in caplog.text
    orphans = on_s3.orphans()
    assert len(orphans) == 2
    assert set(cleanup_orphans(**on_s3.to).files) == orphans
    on_s3.assert_holds(range(-100, -50))


# Disk full


def megabytes(count: int) -> ray.data.Dataset:
    """So many blocks of a megabyte that does not compress, each a file."""
    tables = [
        rows(first, 1000).append_column("data", pa.array([os.urandom(1024) for _ in range(1000)]))
        for first in range(0, count * 1000, 1000)
    ]
    return ray.data.from_arrow(tables)


@pytest.mark.parametrize("mode", ["create", "append"])
def test_a_disk_that_fills_up(small_disk: Path, mode: str):
    place = Place(str(small_disk / "table"))
    if mode == "append":
        place.write(megabytes(1).take_batch(10, batch_format="pyarrow"))
    with failing_with(StorageError) as caught, ends_within(SOON):
        write_lance(megabytes(10), **place.to, mode=mode, min_rows_per_file=1000)
    assert caught.value.kind == "full"
    if mode == "append":
        place.assert_holds(range(10))
    else:
        place.assert_empty()


def test_a_disk_that_is_full_from_the_start(small_disk: Path):
    place = Place(str(small_disk / "table"))
    place.write(rows(0, 10))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb") as file:  # noqa: PT012 - one thing: it gets full
        while True:
            file.write(bytes(4096))
            file.flush()
    with failing_with(StorageError) as caught, ends_within(SOON):
        write_lance(blocks(1), **place.to, mode="append")
    assert caught.value.kind == "full"
    filler.unlink()
    place.assert_holds(range(10))


def test_errors_of_a_write_are_those_of_this_package_and_keep_their_cause(on_s3: Place):
    denied = Rule("PUT", "/data/", status=403, code="AccessDenied")
    with proxy_of(on_s3).failing(denied), failing_with(StorageError) as caught:
        write_lance(blocks(1), **on_s3.to)
    assert unwrap(caught.value) is caught.value
    assert caught.value.__cause__ is not None
    on_s3.assert_empty()
