"""The first tasks of an execution: as many as there are CPUs, not one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import lance
import pyarrow as pa
import pytest
import ray
from ray.data import DataContext, Dataset

import lance_ray
from lance_ray.full_start import KnownResources

TASK_SECONDS = 0.3
TRIES = 5
"""On a busy machine, a worker process or Ray's answer may come late."""

pytestmark = pytest.mark.ray


def slow(table: pa.Table) -> pa.Table:
    begun = time.time()
    time.sleep(TASK_SECONDS)
    return pa.table({"begun": [begun], "ended": [time.time()]})


def most_at_once(ds: Dataset) -> int:
    """How many of its tasks ran at the same time."""
    rows: list[dict[str, float]] = ds.map_batches(slow, batch_size=None, batch_format="pyarrow").take_all()
    return max(sum(row["begun"] <= at["begun"] < row["ended"] for row in rows) for at in rows)


def callbacks(context: DataContext) -> list[Any]:
    return cast("list[Any]", context.custom_execution_callback_classes)


@pytest.fixture(scope="module", autouse=True)
def warm(ray_session: Path) -> None:
    """In a new cluster, what knows the resources is started by the first execution, which does not wait that long."""
    for _ in range(2):
        ray.data.range(4, override_num_blocks=4).map_batches(slow, batch_format="pyarrow").materialize()


@pytest.fixture
def table(tmp_path: Path) -> str:
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.table({"id": range(4000)}), uri, max_rows_per_file=1000)
    return uri


def test_two_tasks_of_a_read_run_on_two_cpus_from_the_start(table: str) -> None:
    assert any(most_at_once(lance_ray.read_lance(table, override_num_blocks=2)) == 2 for _ in range(TRIES))


def test_without_the_wait_ray_runs_one_task_at_a_time(table: str) -> None:
    """If this fails, Ray has mended it, and the module has done its work."""

    def as_ray_does_it() -> Dataset:
        ds = lance_ray.read_lance(table, override_num_blocks=2)
        callbacks(ds.context).remove(KnownResources)
        return ds

    assert any(most_at_once(as_ray_does_it()) == 1 for _ in range(TRIES))


def test_a_limit_starts_with_one_task_as_ray_does_it(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task is a small one, and often enough."""
    waited: list[Any] = []
    monkeypatch.setattr("lance_ray.full_start.wait_for", waited.append)
    assert len(lance_ray.read_lance(table).limit(10).take_all()) == 10
    assert waited == []
    assert lance_ray.read_lance(table).materialize().count() == 4000
    assert len(waited) == 1


def test_only_the_dataset_itself_is_marked(table: str) -> None:
    first, second = lance_ray.read_lance(table), lance_ray.read_lance(table)
    assert callbacks(first.context) == callbacks(second.context) == [KnownResources]
    assert KnownResources not in callbacks(DataContext.get_current())


def test_a_scheduler_of_another_kind_is_left_alone() -> None:
    KnownResources().before_execution_starts(object())


def test_an_answer_that_does_not_come_is_waited_for_for_a_moment_only() -> None:
    class Silent:
        _cluster_autoscaler: Silent
        cpu = gpu = 0.0

        def get_total_resources(self) -> Silent:
            return self

    scheduler = Silent()
    scheduler._cluster_autoscaler = scheduler
    begun = time.monotonic()
    KnownResources().before_execution_starts(scheduler)
    assert 0.05 < time.monotonic() - begun < 2
