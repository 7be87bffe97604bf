"""What a public docstring tells: every argument, what comes back, what is raised, and what is left after a failure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import lance_ray
from lance_ray.fragment import write_fragment

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(lance_ray, name) for name in lance_ray.__all__ if inspect.isfunction(getattr(lance_ray, name))
} | {"write_fragment": write_fragment}
# What reads, or changes nothing but this process, has nothing to leave behind.
READS = {
    *("clear_global_pool", "connect", "describe_table", "full_text_search", "get_global_pool", "hybrid_search"),
    *("ingest_blobs", "init_global_pool", "list_indices", "list_tables", "nearest_join", "open_blobs"),
    *("patch_ray_data", "prewarm", "read_lance", "restore_ray_data", "set_global_pool", "table_health", "take"),
    "vector_search",
}
LEFT = re.compile(
    r"as it was|left behind|leaves|is left|are left|stays?\b|removed|[Nn]othing is|[Nn]ot committed|still there"
    r"|go(es)? on|is gone"
)
BESIDE = re.compile(r"[Cc]oncurrent|[Cc]onflict|meanwhile|beside")


def sections(function: Callable[..., Any]) -> dict[str, str]:
    """The text below each heading of a docstring, and before the first one."""
    text = inspect.getdoc(function) or ""
    parts = re.split(r"^(Args|Returns|Raises|Yields):$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_first_line_says_what_the_caller_gets(name):
    first = sections(FUNCTIONS[name])[""].strip().split("\n\n")[0]
    assert first.endswith((".", "::"))
    assert len(first) > 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_told_of_in_its_order(name):
    wanted = [
        parameter.name
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    told = re.findall(r"^ {4}\*{0,2}(\w+):", sections(FUNCTIONS[name]).get("Args", ""), re.MULTILINE)
    if name in ("merge_columns", "add_columns_from"):  # those of add_columns, by reference
        assert "add_columns" in (FUNCTIONS[name].__doc__ or "")
        return
    assert [item for item in wanted if item not in told] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_comes_back_and_what_is_raised_are_told(name):
    found = sections(FUNCTIONS[name])
    returns = str(inspect.signature(FUNCTIONS[name]).return_annotation)
    if name in ("merge_columns", "add_columns_from"):
        return
    simple = {"get_global_pool", "clear_global_pool", "patch_ray_data", "restore_ray_data"}
    assert returns == "None" or "Returns" in found or name in simple, "Returns"
    assert "Raises" in found or name in simple, "Raises"


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - READS))
def test_what_writes_tells_what_a_failure_leaves_and_which_concurrent_changes_conflict(name):
    parts = sections(FUNCTIONS[name])
    told = "".join(text for heading, text in parts.items() if heading != "Args")
    assert LEFT.search(told), "what is left after a failure"
    # In a sentence of its own: arguments and errors that name others in passing do not count.
    own = "\n".join(line for line in told.splitlines() if not line.startswith("    "))
    assert BESIDE.search(own), "what others may do meanwhile"


def test_every_function_that_commits_is_among_those_that_write():
    """The list of readers is written by hand: what calls for a commit must not hide in it."""
    committing = re.compile(r"\b(CommitConflictError|CommitOutcomeUnknownError)\b")
    assert [name for name in sorted(READS) if committing.search(inspect.getdoc(FUNCTIONS[name]) or "")] == []


def test_the_list_of_what_only_reads_names_what_exists():
    assert set(FUNCTIONS) >= READS
