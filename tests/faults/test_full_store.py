"""The object store of Ray is full: every operation, on data of more than twice its size, does its work, in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.faults.driver import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WHOLE = {"each once": True, "orphans": [], "ledger": []}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of :mod:`tests.faults.full_store`."""
    folder = tmp_path_factory.mktemp("full")
    command = [sys.executable, "-m", "tests.faults.full_store", str(folder)]
    environment = os.environ | {"PYTHONPATH": ROOT, "LANCE_RAY_NO_BACKOFF": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 2 * found["store"]
    assert found["held"], "what the driver held in the store was lost"
    return found


def assert_whole(found: dict[str, Any], blocks: int, **values: bool) -> None:
    assert found.pop("seconds") < 120
    assert found == {"blocks": blocks, "values": values, **WHOLE}


@pytest.mark.parametrize(("mode", "blocks"), [("create", 48), ("append", 96), ("overwrite", 48), ("stream", 96)])
def test_a_write_through_a_full_object_store_writes_every_row_once(outcome: dict[str, Any], mode: str, blocks: int):
    assert_whole(outcome[mode], blocks)


def test_a_read_through_a_full_object_store_gets_every_row_once(outcome: dict[str, Any]):
    found = outcome["read"]
    assert found.pop("seconds") < 120
    assert found == {"each once": True, "values": True}


def test_a_compaction_beside_a_full_object_store_loses_nothing(outcome: dict[str, Any]):
    assert_whole(outcome["compaction"], 48)


def test_columns_beside_a_full_object_store_get_every_value(outcome: dict[str, Any]):
    assert_whole(outcome["columns"], 48, twice=True)


def test_columns_from_a_dataset_larger_than_the_store_get_every_value(outcome: dict[str, Any]):
    assert_whole(outcome["columns from a dataset"], 48, twice=True, merged=True)


def test_an_index_is_built_beside_a_full_object_store(outcome: dict[str, Any]):
    assert outcome["index"].pop("indexes") == ["vector_idx"]
    assert_whole(outcome["index"], 48)


@pytest.mark.parametrize("name", ["search", "join"])
def test_a_search_beside_a_full_object_store_finds_the_nearest(outcome: dict[str, Any], name: str):
    found = outcome[name]
    assert found.pop("seconds") < 120
    assert found.pop("rows", 192) == 192
    assert found == {"found": True}
