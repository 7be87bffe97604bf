"""Writing what lies in the object store as many small blocks: the same table as through Ray Data, in less time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pandas as pd
import pyarrow as pa
import pytest
import ray
from ray.data import Dataset

from lance_ray import SchemaMismatchError, WriteReport, write_lance
from lance_ray.block_refs import FEWEST_BLOCKS, shares_of
from tests.blocks import assert_nothing_left_over

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]
COUNT = FEWEST_BLOCKS + 20


def block(number: int, **columns: Any) -> pa.Table:
    return pa.table({"id": [2 * number, 2 * number + 1], **columns})


def stored(make: Callable[[int], pa.Table], count: int = COUNT) -> Dataset:
    refs: list[Any] = [ray.put(make(number)) for number in range(count)]
    return ray.data.from_arrow_refs(refs)


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> list[Dataset]:
    """The datasets that were handed to Ray Data to be written."""
    found: list[Dataset] = []
    original = Dataset.write_datasink

    def noted(ds: Dataset, *args: Any, **kwargs: Any) -> None:
        found.append(ds)
        original(ds, *args, **kwargs)

    monkeypatch.setattr(Dataset, "write_datasink", noted)
    return found


def test_every_row_is_there_once_in_order_and_in_one_file(tmp_path: Path, executions: list[Dataset]) -> None:
    report = write_lance(stored(block), tmp_path / "t")

    assert (report.rows, report.files, executions) == (2 * COUNT, 1, [])
    assert lance.dataset(tmp_path / "t").to_table()["id"].to_pylist() == list(range(2 * COUNT))


def odd(number: int) -> pa.Table:
    """The columns in another order, one of unknown type, one missing."""
    kinds = (
        pa.table({"text": [f"{number}", None], "id": [2 * number, 2 * number + 1]}),
        block(number, text=pa.nulls(2)),
        block(number),
    )
    return kinds[number % 3]


def test_blocks_of_other_shapes_become_the_table_that_ray_data_makes_of_them(
    tmp_path: Path, executions: list[Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lance(stored(odd), tmp_path / "here")
    assert executions == []
    monkeypatch.setattr("lance_ray.block_refs.FEWEST_BLOCKS", 10**6)
    write_lance(stored(odd), tmp_path / "there")
    assert len(executions) == 1

    here, there = (lance.dataset(tmp_path / name).to_table() for name in ("here", "there"))
    assert here.schema == there.schema
    assert here.sort_by("id") == there.sort_by("id")
    assert here["text"].null_count == 2 * COUNT - len(range(0, COUNT, 3))


def test_types_that_conflict_are_the_error_that_they_always_are_and_nothing_stays(tmp_path: Path) -> None:
    write_lance(stored(block), tmp_path / "t")
    mixed = stored(lambda number: block(number, text=["a", "b"]) if number % 2 else block(number, text=[True, False]))

    with pytest.raises(SchemaMismatchError, match="text"):
        write_lance(mixed, tmp_path / "t", mode="overwrite")
    assert lance.dataset(tmp_path / "t").count_rows() == 2 * COUNT
    assert_nothing_left_over(tmp_path / "t")


def test_pandas_blocks_are_left_to_ray_data(tmp_path: Path, executions: list[Dataset]) -> None:
    frames = [pd.DataFrame({"id": [2 * number, 2 * number + 1]}) for number in range(COUNT)]
    assert write_lance(ray.data.from_pandas(frames), tmp_path / "t").rows == 2 * COUNT
    assert len(executions) == 1


def test_concurrency_and_ray_options_decide_what_they_always_decide(tmp_path: Path, executions: list[Dataset]) -> None:
    reports: list[WriteReport] = [
        write_lance(stored(block), tmp_path / "a", concurrency=1),
        write_lance(stored(block), tmp_path / "b", min_rows_per_file=2 * COUNT),
        write_lance(stored(block), tmp_path / "c", ray_remote_args={"num_cpus": 0.5}),
    ]
    assert [report.rows for report in reports] == [2 * COUNT] * 3
    assert len(executions) == 2  # rows of a file and options of a task are Ray Data's business


def test_shares_are_runs_of_blocks_of_about_the_size_that_was_asked_for() -> None:
    ds = stored(block)
    shares = shares_of(ds, ds.size_bytes() // 4)
    assert [len(share) for share in shares] == [COUNT // 4] * 4
    assert ray.get([ref for share in shares for ref in share]) == ray.get(ds.to_arrow_refs())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ray.data.range(COUNT, override_num_blocks=COUNT),
        lambda: stored(block, FEWEST_BLOCKS - 1),
        lambda: stored(lambda number: pa.table({"id": range(40_000)})),
    ],
    ids=["not made yet", "few blocks", "larger blocks"],
)
def test_other_datasets_are_left_to_ray_data(make: Callable[[], Dataset]) -> None:
    assert shares_of(make(), 1 << 20) == []


@pytest.mark.slow
def test_two_thousand_small_blocks_take_less_than_half_of_ray_datas_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = stored(block, 2000)

    def seconds(name: str, fewest: int) -> float:
        monkeypatch.setattr("lance_ray.block_refs.FEWEST_BLOCKS", fewest)
        begun = time.perf_counter()
        write_lance(ds, tmp_path / name)
        return time.perf_counter() - begun

    pairs = [(seconds(f"here{turn}", 100), seconds(f"there{turn}", 10**6)) for turn in range(4)][1:]
    assert min(here for here, _ in pairs) < min(there for _, there in pairs) / 2
