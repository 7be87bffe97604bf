"""What lies in a table or a catalog is data: it is never unpickled, and no name in it leads out of the table.

What a ledger may not lead to is in ``test_ledger.py``.
"""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_ray
from lance_ray.errors import InvalidArgumentError, LanceRayError
from lance_ray.fragment_pickles import file_of_pickles
from tests.faults.model import local_tasks
from tests.tables import read_here

PACKAGE = Path(lance_ray.__file__).parent
UNSAFE_MODULES = {"pickle", "cloudpickle", "ray.cloudpickle", "marshal", "shelve", "dill", "joblib", "yaml", "code"}
UNSAFE = {"load", "loads", "Unpickler", "eval", "exec", "read_pickle", "unsafe_load"}
TRUST = "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR"


class Mark:
    """When it is unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def loaders(source: str) -> Iterator[str]:
    """What a module names that may make objects or code of bytes, by its full name."""
    tree, known = ast.parse(source), {"eval": "builtins.eval", "exec": "builtins.exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            head, dot, rest = ast.unparse(node).partition(".")
            module, _, name = f"{known.get(head, '')}{dot}{rest}".rpartition(".")
            if (module in {*UNSAFE_MODULES, "builtins"} and name in UNSAFE) or name in ("read_pickle", "allow_pickle"):
                yield f"{module}.{name}"


def test_no_part_of_the_package_makes_objects_of_bytes() -> None:
    found = {path.name: list(loaders(path.read_text("utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 40
    # One reads what a job's own tasks hand on, and admits a list of names; see below.
    assert {name: calls for name, calls in found.items() if calls} == {"fragment_pickles.py": ["pickle.Unpickler"]}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.loads(x)",
        "from pickle import loads as read; read(x)",
        "from ray import cloudpickle; cloudpickle.load(x)",
        "import pickle; f = pickle.Unpickler",
        "eval(x)",
        "import pandas; pandas.read_pickle(x)",
    ],
)
def test_such_a_part_would_be_found(code: str) -> None:
    assert list(loaders(code))


class Call:
    """When it is unpickled, it calls something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_a_pickled_fragment_runs_nothing_that_it_names(tmp_path: Path) -> None:
    fragment, schema = lance.fragment.write_fragments(pa.table({"id": [1]}), str(tmp_path / "t"))[0], pa.schema([])
    good = {"fragment": pickle.dumps(fragment), "schema": pickle.dumps(schema)}
    assert file_of_pickles(good).rows == 1
    mark = tmp_path / "mark"
    attacks = [
        Mark(mark),
        Call(eval, f"__import__('os').mkdir({str(mark)!r})"),
        Call(getattr, dict, "fromkeys"),
        Call(getattr, lance.blob.BlobType, "__init__"),
        Call(pa.OSFile, str(mark), "w"),
    ]
    for attack in attacks:
        for column in ("fragment", "schema"):
            with pytest.raises(InvalidArgumentError, match="may name"):
                file_of_pickles({**good, column: pickle.dumps(attack)})
    for junk in (b"", b"junk", None, 7, pickle.dumps(7), pickle.dumps(schema)[:-4]):
        with pytest.raises(InvalidArgumentError, match="LanceFragmentWriter"):
            file_of_pickles({**good, "fragment": junk})
    assert not mark.exists()


PICKLED = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}


@pytest.fixture(params=["column", "struct", "list"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A table with a column that is, or nests, pickled objects, which leave a mark when they are unpickled."""
    payload = pickle.dumps(Mark(tmp_path / "unpickled"))
    inner = pa.field("item", pa.large_binary(), metadata=PICKLED)
    kind, values = {
        "column": (pa.large_binary(), [payload, payload]),
        "struct": (pa.struct([inner]), [{"item": payload}] * 2),
        "list": (pa.list_(inner), [[payload]] * 2),
    }[request.param]
    field = pa.field("object", kind, metadata=PICKLED if request.param == "column" else None)
    schema = pa.schema([pa.field("id", pa.int64()), field])
    uri = str(tmp_path / "table")
    lance.write_dataset(pa.Table.from_arrays([pa.array([1, 2]), pa.array(values, kind)], schema=schema), uri)
    return uri


@pytest.fixture
def unpickled(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


def identity(batch: pa.RecordBatch) -> pa.Table:
    return pa.table({"new": [str(row) for row in batch.to_pylist()]})


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: read_here(uri),
        lambda uri: read_here(uri, columns=["object"]),
        lambda uri: read_here(uri, columns={"other": "object"}),
        lambda uri: lance_ray.take(uri, [0]),
        lambda uri: lance_ray.add_columns(uri, transform=identity, progress=False),
        lambda uri: lance_ray.merge_columns(uri, transform=identity, progress=False),
        lambda uri: lance_ray.update_columns(uri, columns=["id"], transform=identity, progress=False),
    ],
    ids=["read", "read of it", "read by another name", "take", "add_columns", "merge_columns", "update_columns"],
)
def test_pickled_objects_of_a_table_are_refused(table: str, unpickled: Path, call: Any) -> None:
    with local_tasks(), pytest.raises(InvalidArgumentError, match=TRUST):
        call(table).to_pylist()
    assert not unpickled.exists()


def test_the_other_columns_of_such_a_table_can_be_read_filtered_and_added_to(table: str, unpickled: Path) -> None:
    assert read_here(table, columns=["id"], filter="id > 1").to_pylist() == [{"id": 2}]
    with local_tasks():
        lance_ray.add_columns(table, transform={"twice": "id * 2"}, filter="id > 1", progress=False)
        lance_ray.compact_files(table, progress=False)
    assert read_here(table, columns=["twice"]).to_pylist() == [{"twice": None}, {"twice": 4}]
    lance_ray.table_health(table)
    assert not unpickled.exists()


def test_whoever_trusts_the_table_may_read_them(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, "1")
    assert read_here(table).column_names == ["id", "object"]


@pytest.mark.parametrize("name", ["..", "../t", "/etc", "a/../../t", "a/b", ""])
def test_a_job_id_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(LanceRayError, match="job_id"):
        lance_ray.add_columns(str(tmp_path / "t"), transform={"a": "1"}, job_id=name)
    assert list(tmp_path.iterdir()) == []
