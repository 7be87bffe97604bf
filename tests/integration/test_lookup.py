"""Rows by position, row id or key, in the order asked for."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_ray
from lance_ray import lookup
from lance_ray.errors import InvalidArgumentError, RowCoverageError, SchemaMismatchError


@pytest.fixture(params=[False, True], ids=["addresses", "stable row ids"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """400 rows in five fragments with deletions and rows that an update moved; looked up in tasks of 16 rows."""
    monkeypatch.setattr(lookup, "_TASK_ROWS", 16)
    ids = np.arange(400)
    table = pa.table({"id": ids, "key": [f"k{item}" for item in ids], "value": ids * 10})
    dataset = lance.write_dataset(
        table, str(tmp_path / "t"), max_rows_per_file=100, enable_stable_row_ids=request.param
    )
    dataset.create_scalar_index("key", "BTREE")
    dataset.delete("id % 7 = 3")
    dataset.update({"value": "value + 1"}, where="id < 5")
    return str(tmp_path / "t")


def permuted(values: Any, seed: int = 0) -> np.ndarray:
    """In a random order, with repetitions."""
    return np.random.default_rng(seed).choice(np.asarray(values), 150)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 2])
def test_rows_come_by_position_in_the_order_asked_for(ray_session: object, uri: str, workers: int | None):
    whole = lance.dataset(uri).to_table()
    places = permuted(range(whole.num_rows))
    found = lance_ray.take(uri, places, num_workers=workers)
    assert found.equals(whole.take(pa.array(places)).combine_chunks())


@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 2])
def test_rows_come_by_row_id_and_by_key(ray_session: object, uri: str, workers: int | None):
    whole = lance.dataset(uri).to_table(with_row_id=True)
    places = pa.array(permuted(range(whole.num_rows)))
    wanted = whole.take(places).combine_chunks()
    by_id = lance_ray.take(uri, row_ids=wanted.column("_rowid"), columns=["value", "_rowid"], num_workers=workers)
    assert by_id.equals(wanted.select(["value", "_rowid"]))
    by_key = lance_ray.take(
        uri, keys=wanted.column("key"), on="key", columns={"twice": "value * 2"}, num_workers=workers
    )
    assert by_key.column("twice").to_pylist() == [2 * item for item in wanted.column("value").to_pylist()]


def test_rows_of_an_old_version_are_found_there(uri: str):
    assert lance_ray.take(uri, [3], version=1, columns=["id"]).to_pylist() == [{"id": 3}]
    assert lance_ray.take(lance.dataset(uri, 1), keys=["k3"], on="key", columns=["id"]).to_pylist() == [{"id": 3}]


@pytest.mark.parametrize(
    ("asked", "count", "example"),
    [
        ({"indices": [0, 400, 401, 400]}, 2, 400),
        ({"row_ids": [6, 2**40]}, 1, 2**40),
        ({"keys": ["k1", "k3", "nope"], "on": "key"}, 2, "k3"),
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_counted_or_null_or_left_out(uri: str, asked: Any, count: int, example: Any):
    with pytest.raises(RowCoverageError) as caught:
        lance_ray.take(uri, **asked)
    assert caught.value.missing == count
    assert example in caught.value.examples["missing"]
    rows = lance_ray.take(uri, **asked, columns=["id"], missing="null").column("id").to_pylist()
    assert len(rows) == len(next(value for name, value in asked.items() if name != "on"))
    assert rows[0] is not None
    assert rows[-1] is None
    present = [item for item in rows if item is not None]
    assert lance_ray.take(uri, **asked, columns=["id"], missing="skip").column("id").to_pylist() == present


def test_a_key_of_several_rows_is_refused(uri: str):
    lance.dataset(uri).insert(pa.table({"id": [900], "key": ["k1"], "value": [1]}))
    with pytest.raises(RowCoverageError) as caught:
        lance_ray.take(uri, keys=["k1", "k2"], on="key")
    assert (caught.value.duplicate, caught.value.examples) == (1, {"duplicate": ["k1"]})


KEYS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.int8(), [3, -1]),
    (pa.uint64(), [2**63, 5]),
    (pa.float64(), [0.5, -2.0]),
    (pa.string(), ["a", "ü 'quoted'"]),
    (pa.large_string(), ["a", "b"]),
    (pa.binary(), [b"a", b"\x00"]),
    (pa.bool_(), [True, False]),
    (pa.date32(), [dt.date(2020, 1, 1), dt.date(1969, 1, 1)]),
    (pa.timestamp("us", "UTC"), [dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.datetime(1969, 1, 1, tzinfo=dt.UTC)]),
    (pa.decimal128(10, 2), [Decimal("1.50"), Decimal("-3.00")]),
]


@pytest.mark.parametrize(("kind", "values"), KEYS, ids=lambda item: str(item) if isinstance(item, pa.DataType) else "")
@pytest.mark.parametrize("index", [True, False])
def test_keys_of_any_comparable_type_are_found_with_and_without_an_index(
    tmp_path: Path, kind: pa.DataType, values: list[Any], index: bool
):
    table = pa.table({"key": pa.array([*values, None], kind), "id": [0, 1, 2]})
    dataset = lance.write_dataset(table, str(tmp_path / "t"))
    if index:
        dataset.create_scalar_index("key", "BTREE")
    found = lance_ray.take(str(tmp_path / "t"), keys=pa.array(values[::-1], kind), on="key", columns=["id"])
    assert found.column("id").to_pylist() == [1, 0]


def test_nothing_asked_for_is_no_rows_of_the_right_schema(uri: str):
    ways: list[dict[str, Any]] = [{"indices": []}, {"row_ids": []}, {"keys": pa.array([], pa.string()), "on": "key"}]
    for asked in ways:
        found = lance_ray.take(uri, **asked)
        assert found.num_rows == 0
        assert found.schema.equals(lance.dataset(uri).schema)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, "indices"),
        ({"indices": [1], "row_ids": [1]}, "indices"),
        ({"indices": [-1]}, "indices"),
        ({"indices": ["a"]}, "indices"),
        ({"indices": [1.5]}, "indices"),
        ({"row_ids": [None]}, "row_ids"),
        ({"keys": ["a"]}, "on"),
        ({"indices": [1], "on": "key"}, "on"),
        ({"keys": ["a"], "on": "nope"}, "on"),
        ({"keys": ["a", None], "on": "key"}, "keys"),
        ({"indices": [1], "missing": "ignore"}, "missing"),
        ({"indices": [1], "columns": ["nope"]}, "columns"),
        ({"indices": [1], "num_workers": 0}, "num_workers"),
    ],
    ids=str,
)
def test_a_lookup_that_cannot_work_is_refused_by_name(uri: str, asked: dict[str, Any], named: str):
    with pytest.raises(InvalidArgumentError) as caught:
        lance_ray.take(uri, **asked)
    assert caught.value.parameter == named


def test_keys_of_another_type_are_refused(uri: str):
    with pytest.raises(SchemaMismatchError):
        lance_ray.take(uri, keys=[1, 2], on="key")
