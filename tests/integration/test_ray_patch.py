"""``ray.data.read_lance`` and ``Dataset.write_lance`` are this connector; every call that stock Ray takes works."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import ray
from ray.data import Dataset, SaveMode

import lance_ray
from lance_ray import InvalidArgumentError, TableExistsError, WriteReport
from lance_ray.ray_patch import SWITCH
from tests.blocks import TYPED, dataset, ids_of, rows, rows_per_file, versions

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Ray leaves the log files of its executions to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]


@pytest.fixture
def stock() -> Iterator[dict[str, Any]]:
    """Ray's own functions, put in their places for one test."""
    lance_ray.restore_ray_data()
    yield {"read": ray.data.read_lance, "write": Dataset.write_lance}
    lance_ray.patch_ray_data()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An address without a table."""
    return str(tmp_path / "table")


def is_ours(function: Any) -> bool:
    return bool(inspect.unwrap(function).__module__.startswith("lance_ray."))


# On and off


def test_importing_puts_the_connector_in_place():
    assert is_ours(ray.data.read_lance)
    assert is_ours(Dataset.write_lance)


def test_restoring_gives_ray_its_own_back_and_patching_again_takes_it(stock: dict[str, Any]):
    assert stock["read"].__module__.startswith("ray.data.")
    assert stock["write"].__module__.startswith("ray.data.")
    lance_ray.restore_ray_data()  # twice does no harm
    assert ray.data.read_lance is stock["read"]
    lance_ray.patch_ray_data()
    lance_ray.patch_ray_data()
    assert is_ours(ray.data.read_lance)
    lance_ray.restore_ray_data()
    assert (ray.data.read_lance, Dataset.write_lance) == (stock["read"], stock["write"])


IMPORT_WITH_THE_SWITCH_OFF = """
import sys

import ray.data  # what Ray does is not asked here

before = ray.data.read_lance, ray.data.Dataset.write_lance
done = []

def watch(event, arguments):
    imported = event == "open" and str(arguments[0]).startswith(tuple(filter(None, sys.path)))
    if event.startswith(("open", "socket.connect", "subprocess.", "os.mkdir", "os.remove")) and not imported:
        done.append((event, arguments))

sys.addaudithook(watch)
import lance_ray
opened = list(done)
assert not ray.is_initialized()
assert not opened, opened
assert (ray.data.read_lance, ray.data.Dataset.write_lance) == before
lance_ray.patch_ray_data()
assert (ray.data.read_lance, ray.data.Dataset.write_lance) != before
print("passed")
"""


def test_importing_starts_nothing_opens_nothing_and_obeys_the_switch():
    environment = {
        **os.environ,
        SWITCH: "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_THE_SWITCH_OFF], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "passed\n", done.stderr


# The keywords of stock Ray


def test_reading_takes_every_keyword_that_stock_ray_takes(stock: dict[str, Any]):
    assert set(inspect.signature(stock["read"]).parameters) <= set(inspect.signature(lance_ray.read_lance).parameters)


def test_writing_takes_every_keyword_that_stock_ray_takes_with_the_same_default(stock: dict[str, Any]):
    ours = inspect.signature(lance_ray.write_lance).parameters
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(stock["write"]).parameters.items()
        if name not in ("self", "path")
    }
    assert {name: ours[name].default for name in theirs} == theirs


def test_the_methods_show_their_own_help():
    assert "commit_message" in inspect.signature(Dataset.write_lance).parameters
    assert "commit_message" in (Dataset.write_lance.__doc__ or "")
    assert "Args" in (ray.data.read_lance.__doc__ or "")


# Calls


@pytest.mark.parametrize("call", ["positional", "path", "uri", "pathlib"])
def test_the_address_may_be_given_in_every_way(tmp_path: Path, call: str):
    uri = str(tmp_path / "table")
    blocks = dataset(rows(0, 2))
    named: dict[str, dict[str, Any]] = {"path": {"path": uri}, "uri": {"uri": uri}, "pathlib": {"path": Path(uri)}}
    report: Any = blocks.write_lance(uri) if call == "positional" else blocks.write_lance(**named[call])
    assert isinstance(report, WriteReport)
    assert ids_of(uri) == [0, 1]


def test_two_addresses_are_refused(uri: str):
    both: dict[str, Any] = {"uri": f"{uri}2"}
    with pytest.raises(InvalidArgumentError, match="uri"):
        dataset(rows(0, 1)).write_lance(uri, **both)


def test_a_call_with_all_the_keywords_of_stock_ray(uri: str):
    keywords: dict[str, Any] = {
        "schema": TYPED,
        "mode": SaveMode.CREATE,
        "min_rows_per_file": 2,
        "max_rows_per_file": 2,
        "data_storage_version": "2.1",
        "storage_options": {},
        "table_id": None,
        "namespace_impl": None,
        "namespace_properties": None,
        "ray_remote_args": {"num_cpus": 0.5},
        "concurrency": 2,
    }
    dataset(rows(0, 2), rows(2, 2)).write_lance(uri, **keywords)
    assert rows_per_file(uri) == [2, 2]
    assert lance.dataset(uri).data_storage_version == "2.1"
    with pytest.raises(TableExistsError):
        dataset(rows(0, 1)).write_lance(uri)
    dataset(rows(4, 1)).write_lance(uri, mode=SaveMode.APPEND)
    assert sorted(ids_of(uri)) == [0, 1, 2, 3, 4]
    dataset(pa.table({"other": [1]})).write_lance(uri, mode=SaveMode.OVERWRITE)
    assert versions(uri) == [1, 2, 3]


def test_a_path_beside_a_namespace_is_ignored_as_ray_does(tmp_path: Path):
    dataset(rows(0, 2)).write_lance(
        str(tmp_path / "ignored"), namespace_impl="dir", namespace_properties={"root": str(tmp_path)}, table_id=["t"]
    )
    assert not (tmp_path / "ignored").exists()
    namespace: dict[str, Any] = {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}}
    assert lance_ray.read_lance(table_id=["t"], **namespace).count() == 2


def test_what_was_written_is_read_through_ray_too(uri: str):
    dataset(rows(0, 5)).write_lance(uri)
    read: Any = ray.data.read_lance(uri, columns=["id"], filter="id > 2")
    assert sorted(row["id"] for row in read.take_all()) == [3, 4]


def test_an_unknown_keyword_is_named(uri: str):
    unknown: dict[str, Any] = {"max_row_per_file": 3}
    with pytest.raises(TypeError, match="max_row_per_file"):
        dataset(rows(0, 1)).write_lance(uri, **unknown)
    with pytest.raises(TypeError, match="max_row_per_file"):
        ray.data.read_lance(uri, **unknown)
