"""More nodes than one: what a write and a read do on them, and what is told of a node that cannot do the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import pytest

from lance_ray import preflight
from lance_ray.table import TableRef
from tests.faults.driver import ROOT

# The probe itself, in this process


def probed(version: str = lance.__version__, paths: tuple[str, ...] = (), witness: str = "") -> list[str]:
    return preflight._make_probe()(version, paths, witness)


def test_a_node_that_has_everything_has_no_problem(tmp_path: Path):
    (tmp_path / "witness").touch()
    assert probed(paths=(str(tmp_path),)) == []
    assert probed(paths=(str(tmp_path),), witness="witness") == []


def test_another_pylance_is_told_with_both_versions():
    assert probed("0.0.1") == [f"pylance {lance.__version__} is installed, the driver has 0.0.1"]


def test_a_path_that_is_not_there_is_told(tmp_path: Path):
    missing = str(tmp_path / "missing")
    assert probed(paths=(str(tmp_path), missing)) == [f"does not see {missing}"]


def test_a_path_without_the_file_that_the_driver_made_is_another_file_system(tmp_path: Path):
    assert probed(paths=(str(tmp_path),), witness="job.json") == [f"does not see {tmp_path}"]


def test_a_package_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lance_ray", None)
    (problem,) = probed()
    assert problem.startswith("lance-ray cannot be imported: ")


def test_without_a_cluster_nothing_is_asked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    preflight.check_cluster([TableRef.fold(tmp_path / "missing", {}).unpinned()])


# A cluster of several nodes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of :mod:`tests.faults.cluster`."""
    folder = tmp_path_factory.mktemp("cluster")
    command = [sys.executable, "-m", "tests.faults.cluster", str(folder)]
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_two_nodes_write_and_read_every_row_once(cluster):
    found = cluster["two nodes"]
    assert (found["writers"], found["readers"]) == (2, 2)
    assert found["rows"] == 400
    assert found["ids"] == found["read"] == list(range(400))


@pytest.mark.slow
@pytest.mark.parametrize("action", ["no package", "no package to write"])
def test_a_node_without_the_package_is_told_before_any_task(cluster, action: str):
    found = cluster[action]
    assert found["type"] == "WorkerEnvironmentError"
    assert any("lance-ray cannot be imported" in problem for problem in found["problems"])
    assert found["seconds"] < 30


@pytest.mark.slow
def test_a_node_with_another_pylance_is_told_before_any_task(cluster):
    found = cluster["another pylance"]
    assert found["type"] == "WorkerEnvironmentError"
    assert any(f"pylance 0.0.1 is installed, the driver has {lance.__version__}" in item for item in found["problems"])
    assert cluster["rows of seen"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("action", ["hidden table", "hidden append", "hidden create"])
def test_a_node_that_has_another_file_system_at_the_path_is_told_before_any_task(cluster, action: str):
    if action not in cluster:
        pytest.skip("giving a node a file system of its own needs privileges")
    found = cluster[action]
    assert found["type"] == "WorkerEnvironmentError"
    assert any("does not see" in problem for problem in found["problems"])
    assert found["seconds"] < 30


@pytest.mark.slow
def test_what_a_preflight_stops_leaves_no_file(cluster):
    assert cluster["files of new"] == []
