"""Who may import and call what: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lance_ray

PACKAGE = Path(lance_ray.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}

# What a file, or a folder ending in "/", must never import. What workers run of reading and writing
# calls nothing of Ray.
FORBIDDEN = {
    "": {"ray.data._internal"},
    "planning/": {"ray", "lance", "lance_namespace", "fsspec"},
    "errors.py": {"ray", "lance", "lance_namespace", "fsspec"},
    "options.py": {"ray", "lance_namespace"},
    "catalog.py": {"ray"},
    "plugins.py": {"ray", "lance"},
    "stores.py": {"ray", "lance", "lance_namespace", "fsspec"},
    "store_": {"ray", "lance", "lance_namespace", "fsspec"},
    "table.py": {"ray"},
    "commit.py": {"ray"},
    "ledger.py": {"ray"},
    "retry.py": {"ray"},
    "read.py": {"ray", "lance_namespace"},
    "write.py": {"ray", "lance_namespace"},
    "column_values.py": {"ray", "lance_namespace"},
    "vectors.py": {"ray", "lance", "lance_namespace"},
    "nearest.py": {"ray", "lance_namespace"},
    "lookup.py": {"ray", "lance_namespace"},
    "index_models.py": {"ray", "lance_namespace"},
    "search.py": {"lance_namespace"},
    "runner.py": {"ray", "lance", "lance_namespace"},
    "executors.py": {"lance", "lance_namespace"},
    "datasource.py": {"lance_namespace"},
    "datasink.py": {"lance_namespace"},
    "writing.py": {"lance_namespace"},
}
# What one file alone may call: who opens tables, who commits.
RESERVED = {
    "table.py": {"lance.dataset", "lance.LanceDataset", "lance.write_dataset"},  # the last in memory only
    "commit.py": {"lance.LanceDataset.commit", "lance.LanceDataset.commit_batch"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module name that a file imports, at its top or inside a function, other than for its annotations."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from imports(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[str]:
    """Full names of what a file calls, as far as its imports tell."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            yield known.get(head, head) + dot + rest


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_layer_may(module):
    forbidden = set().union(*(names for place, names in FORBIDDEN.items() if module.startswith(place)))
    assert [name for name in imports(MODULES[module]) if any(within(name, banned) for banned in forbidden)] == []


@pytest.mark.parametrize("place", sorted(FORBIDDEN))
def test_the_table_of_layers_names_what_exists(place):
    assert any(module.startswith(place) for module in MODULES)


@pytest.mark.parametrize(("owner", "reserved"), RESERVED.items())
def test_one_file_opens_tables_and_one_commits(owner, reserved):
    home = {name.replace("lance.", "lance.dataset.", 1) for name in reserved}  # where pylance defines them
    assert {module for module, tree in MODULES.items() if (reserved | home) & set(calls(tree))} == {owner}


def test_planning_imports_of_the_package_only_what_is_pure():
    allowed = {"lance_ray.planning", "lance_ray.errors"}
    for module in (module for module in MODULES if module.startswith("planning/")):
        own = {name for name in imports(MODULES[module]) if within(name, "lance_ray")}
        assert {name for name in own if not any(within(name, pure) for pure in allowed)} == set(), module


def test_importing_the_package_starts_no_ray_opens_no_file_and_says_nothing():
    program = """if True:
        import sys, lance, lance_namespace, ray.data, tqdm
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        import lance_ray
        print([path for path in opened if not path.endswith((".py", ".pyc"))], ray.is_initialized())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[] False\n", "", 0)


def test_public_names_are_sorted_exist_and_are_documented():
    names = lance_ray.__all__
    assert list(names) == sorted(set(names))
    assert [name for name in names if not hasattr(lance_ray, name)] == []
    objects = {name: getattr(lance_ray, name) for name in names}
    assert [name for name, found in objects.items() if callable(found) and not inspect.getdoc(found)] == []


def test_the_package_documents_itself_and_is_typed():
    assert "lance_ray" in (lance_ray.__doc__ or "")
    assert (PACKAGE / "py.typed").is_file()


def test_every_module_says_what_it_is_for():
    assert [module for module, tree in MODULES.items() if not ast.get_docstring(tree)] == []
