"""The table of faults in ``README.md`` tells the truth: its tests exist, and no fault is missing that must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (`[^|]+`) \|$", re.MULTILINE)
ALL = ("read", "write", "compaction", "columns", "index", "search")
REQUIRED = {
    "worker killed": ALL,
    "storage, transient": ALL,
    "storage, lasting": ALL,
    "node removed": ("write", "compaction", "index"),
    "driver killed": ("write", "compaction", "columns", "index"),
    "lost answer": ("write", "compaction", "index"),
    "conflict": ("write", "compaction", "columns", "index"),
    "disk full": ("write", "compaction", "columns", "index"),
    "credentials expire": ("read", "write", "compaction"),
}


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
    have = {(fault, operation) for fault, operation, _ in rows()}
    assert {(fault, operation) for fault, operations in REQUIRED.items() for operation in operations} - have == set()


def test_every_file_of_tests_is_in_the_table() -> None:
    named = {test.partition("::")[0] for _, _, tests in rows() for test in tests}
    assert {path.name for path in FOLDER.glob("test_*.py")} - named == {Path(__file__).name}
