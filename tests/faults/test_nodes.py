"""A node is lost in the middle of an operation on three: what the others make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.faults.driver import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of :mod:`tests.faults.nodes`."""
    folder = tmp_path_factory.mktemp("nodes")
    command = [sys.executable, "-m", "tests.faults.nodes", str(folder)]
    environment = os.environ | {"PYTHONPATH": ROOT, "LANCE_RAY_NO_BACKOFF": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_survived(found: dict[str, Any], rows: int) -> None:
    assert found["gone"] == 1
    assert found["error"] is None
    assert found["ids"] == list(range(rows))
    assert found["orphans"] == []
    assert not found["ledger"]
    assert found["seconds"] < 120


@pytest.mark.parametrize(("mode", "rows"), [("create", 600), ("append", 1200), ("stream", 1200)])
def test_a_write_outlives_a_node(outcome: dict[str, Any], mode: str, rows: int) -> None:
    assert_survived(outcome[mode], rows)


def test_an_overwrite_outlives_a_node(outcome: dict[str, Any]) -> None:
    found = outcome["overwrite"]
    found["ids"] = [item - 600 for item in found["ids"]]
    assert_survived(found, 600)


def test_a_read_outlives_a_node(outcome: dict[str, Any]) -> None:
    assert_survived(outcome["read"], 600)
    assert outcome["read"]["seen"] == list(range(600))


def test_a_search_outlives_a_node(outcome: dict[str, Any]) -> None:
    assert_survived(outcome["search"], 600)
    assert sorted(row["id"] for row in outcome["search"]["rows"]) == [7, 599]


def test_added_columns_outlive_a_node(outcome: dict[str, Any]) -> None:
    assert_survived(outcome["columns"], 600)
    assert outcome["columns"]["columns"] == ["id", "vector", "twice"]


def test_a_compaction_outlives_a_node(outcome: dict[str, Any]) -> None:
    assert_survived(outcome["compact"], 600)
    assert outcome["compact"]["fragments"] == 12


def test_an_index_build_outlives_a_node(outcome: dict[str, Any]) -> None:
    assert_survived(outcome["index"], 600)
    assert outcome["index"]["indexes"] == ["id_idx"]
