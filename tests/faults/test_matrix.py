"""The table of faults in ``README.md`` tells the truth: its tests exist, and no fault is missing that must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from lance_ray.options import MODES
from tests.faults import test_write_modes
from tests.faults.death import OPERATIONS

FOLDER = Path(__file__).parent
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (`[^|]+`) \|$", re.MULTILINE)
WRITES = ("create", "append", "overwrite", "stream")
"""Every way to write that the package has; ``ignore`` is a create that may find that there is nothing to do."""
FULL = (*WRITES, "compaction")
CHANGES = (*FULL, "columns", "index")
ALL = (*CHANGES, "read", "search")
MERGE = ("merge",)
REQUIRED = {
    "worker killed": ALL + MERGE,
    "node removed": ALL,
    "driver killed": CHANGES,
    "storage, transient": ALL,
    "storage, lasting": ALL,
    "lost answer": CHANGES + MERGE,
    "conflict": CHANGES + MERGE,
    "catalog down": CHANGES,
    "credentials expire": (*FULL, "read"),
    "disk full": CHANGES,
    "object store full": ALL,
    "poisoned block": (*FULL, "columns"),
}
"""Writes and compaction get every fault; what else changes a table being killed, lost answers and conflicts; reads and
searches being killed and failing stores. What is more has come by itself."""


def rows() -> list[tuple[str, str, list[str]]]:
    found = ROW.findall((FOLDER / "README.md").read_text("utf-8"))
    return [(fault, operation, re.findall(r"`([^`]+)`", tests)) for fault, operation, tests in found]


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {item.name for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")}


def test_every_test_that_the_table_names_exists() -> None:
    named = [test.split("::") for _, _, tests in rows() for test in tests]
    assert len(named) > 50
    assert [f"{file}::{name}" for file, name in named if name not in names_in(FOLDER / file)] == []


def test_every_operation_has_the_faults_that_it_must_have() -> None:
    have = {(fault, operation) for fault, operations, _ in rows() for operation in operations.split(", ")}
    assert {(fault, operation) for fault, operations in REQUIRED.items() for operation in operations} - have == set()


def test_the_write_modes_of_the_table_are_those_that_the_tests_and_the_package_have() -> None:
    assert set(WRITES) <= set(test_write_modes.MODES)
    assert {item["mode"] for item in test_write_modes.MODES.values()} == set(MODES) - {"ignore"}
    assert set(WRITES) - {"stream"} <= set(OPERATIONS)


def test_every_file_of_tests_is_in_the_table() -> None:
    named = {test.partition("::")[0] for _, _, tests in rows() for test in tests}
    assert {path.name for path in FOLDER.glob("test_*.py")} - named == {Path(__file__).name}
