"""Index builds on a real Ray: workers and drivers die, stores fail, commits lose their answers. The old index serves
until the new one is there, and what did not land leaves no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray

import lance_ray
from lance_ray import IndexReport, WarmWorkers, cleanup_orphans, index_build, index_upkeep
from lance_ray.errors import StorageError, TaskFailedError
from tests import indexes
from tests.faults.proxy import Rule
from tests.faults.stores import Place, failing_with

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def written(place: Place, count: int = 2000) -> Place:
    place.write(pa.concat_tables([indexes.rows(count)]), max_rows_per_file=count // 4)
    return place


def build(place: Place, **options: Any) -> IndexReport:
    arguments = {"column": "id", "index_type": "BTREE", "num_segments": 4, "progress": False, **options}
    report = lance_ray.create_scalar_index(**place.to, return_report=True, **arguments)
    assert isinstance(report, IndexReport)
    return report


def assert_index_is_right(place: Place) -> None:
    dataset = place.open()
    for text in ("id = 17", "id IN (3, 900)", "id >= 1990"):
        scan = dataset.scanner(columns=["id"], filter=text)
        assert "ScalarIndexQuery" in scan.explain_plan()
        without = dataset.scanner(columns=["id"], filter=text, use_scalar_index=False).to_table()
        assert sorted(scan.to_table()["id"].to_pylist()) == sorted(without["id"].to_pylist())


def segments(place: Place) -> set[str]:
    return {name.split("/")[1] for name in place.files() if name.startswith("_indices/")}


def referred_to(place: Place) -> set[str]:
    return {str(item.uuid) for found in place.open().describe_indices() for item in found.segments}


def assert_clean(place: Place) -> None:
    assert segments(place) == referred_to(place)
    assert place.ledger() == set()


def _first_time(spec: index_build.BuildSpec) -> bool:
    try:
        Path(f"{spec.table.uri}-died").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_before_building(spec: index_build.BuildSpec, task: Any) -> Any:
    if _first_time(spec):
        os.kill(os.getpid(), signal.SIGKILL)
    return index_build.build_segment(spec, task)


def die_after_building(spec: index_build.BuildSpec, task: Any) -> Any:
    built = index_build.build_segment(spec, task)
    if _first_time(spec):
        os.kill(os.getpid(), signal.SIGKILL)
    return built


def die_before_merging(spec: index_build.BuildSpec, task: Any) -> Any:
    if _first_time(spec):
        os.kill(os.getpid(), signal.SIGKILL)
    return index_build.merge_segments(spec, task)


@pytest.mark.parametrize("worker", [die_before_building, die_after_building], ids=["before", "after"])
def test_a_worker_that_dies_is_replaced_and_its_segment_built_again(on_disk: Place, monkeypatch, worker):
    written(on_disk)
    monkeypatch.setattr(index_build, "build_segment", worker)
    report = build(on_disk)
    assert (report.retried, report.segments, report.rows) == (1, 4, 2000)
    assert_index_is_right(on_disk)
    assert_clean(on_disk)


def test_a_worker_that_dies_in_a_merge_is_replaced(on_disk: Place, monkeypatch):
    build(written(on_disk))
    monkeypatch.setattr(index_build, "merge_segments", die_before_merging)
    (report,) = lance_ray.optimize_indices(**on_disk.to, num_segments=1, progress=False, return_report=True)
    assert (report.retried, report.segments) == (1, 1)
    assert_index_is_right(on_disk)


def test_vectors_are_trained_and_indexed_on_workers(on_disk: Place):
    written(on_disk)
    report = lance_ray.create_index(
        on_disk.uri,
        "vector",
        "IVF_PQ",
        num_partitions=4,
        num_sub_vectors=4,
        num_segments=2,
        progress=False,
        return_report=True,
    )
    assert isinstance(report, IndexReport)
    assert report.segments == 2
    assert indexes.recall(on_disk.uri, "l2", refine_factor=10) > 0.9


@pytest.mark.slow
def test_an_index_is_loaded_into_every_warm_worker(on_disk: Place):
    build(written(on_disk))
    with WarmWorkers(2) as pool:
        report = lance_ray.prewarm(on_disk.uri, "id_idx", pool=pool)
    assert len(report.processes) == 3


DRIVER = """
import os, signal, sys
import ray
import lance_ray
from lance_ray import commit

real = commit.apply

def deadly(*args, **kwargs):
    if sys.argv[3] == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

commit.apply = deadly
ray.init(address=sys.argv[1], log_to_driver=False)
lance_ray.create_scalar_index(sys.argv[2], column="id", index_type="BTREE", num_segments=4, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_driver_that_was_killed_leaves_what_cleanup_orphans_removes(on_disk: Place, when):
    written(on_disk)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), address, on_disk.uri, when]
    ended = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(segments(on_disk)) == 4
    assert on_disk.ledger()
    found = cleanup_orphans(on_disk.uri, dry_run=True)
    assert len(found.files) == (4 if when == "before" else 0)
    assert [job.state for job in found.jobs] == ["dead" if when == "before" else "committed"]
    cleanup_orphans(on_disk.uri)
    assert_clean(on_disk)
    if when == "before":
        assert on_disk.open().version == 1
        build(on_disk)
    assert_index_is_right(on_disk)


@pytest.mark.slow
def test_throttling_of_the_store_is_waited_out(on_s3: Place):
    written(on_s3)
    assert on_s3.s3 is not None
    with on_s3.s3.proxy.failing(Rule("PUT", "/_indices/", count=20, status=503)) as rule:
        build(on_s3)
    assert rule.hits >= 20
    assert_index_is_right(on_s3)
    assert_clean(on_s3)


def test_a_store_that_refuses_index_files_ends_the_build_and_the_table_is_as_it_was(on_s3: Place):
    place = written(on_s3).impatient
    assert place.s3 is not None
    with (
        place.s3.proxy.failing(Rule("PUT", "/_indices/", status=403, code="AccessDenied")),
        failing_with(StorageError, TaskFailedError),
    ):
        build(place)
    assert place.open().version == 1
    assert_clean(place)


@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_commit_without_an_answer_is_looked_up(on_s3: Place, lost):
    place = written(on_s3).impatient
    assert place.s3 is not None
    rule = Rule("PUT", "/_versions/", count=1, lose_answer=lost == "answer", reset=lost == "request")
    with place.s3.proxy.failing(rule):
        try:
            report = build(place)
        except lance_ray.CommitOutcomeUnknownError:
            assert lost == "request"
            assert len(segments(place)) == 4
            return
    assert report.version == 2
    assert_index_is_right(place)
    assert_clean(place)


def test_an_index_that_was_dropped_in_the_meantime_is_not_refreshed(on_disk: Place):
    build(written(on_disk))
    lance_ray.drop_index(on_disk.uri, "id_idx")
    with pytest.raises(lance_ray.InvalidArgumentError, match="id_idx"):
        lance_ray.refresh_index(on_disk.uri, "id_idx", progress=False)
    assert lance.dataset(on_disk.uri).describe_indices() == []
    assert index_upkeep.list_indices(on_disk.uri) == []
