"""Two transforms have one fingerprint exactly when they compute the same: what counts, and what must not."""

from __future__ import annotations

import functools
import operator
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lance_ray.transforms import Appending, Transform, fold_transform


def told(transform: Any, *arguments: Any, version: str | None = None, **named: Any) -> str:
    folded = fold_transform(transform, setup=(arguments, named), version=version)
    assert isinstance(folded, Transform)
    return folded.fingerprint()


def closure(value: Any) -> Callable[[Any], Any]:
    return lambda batch: {"new": value}


def with_keyword(value: Any) -> Callable[[Any], Any]:
    def function(batch: Any, *, factor: Any = value) -> Any:
        return factor

    return function


def with_default(value: Any) -> Callable[[Any], Any]:
    def function(batch: Any, factor: Any = value) -> Any:
        return factor

    return function


def from_source(text: str, **names: Any) -> Any:
    """What a piece of source calls ``transform``, in a module of its own that has further names."""
    space: dict[str, Any] = {"__name__": "transforms_of_a_test", "np": np, "pa": pa, **names}
    exec(textwrap.dedent(text), space)
    return space["transform"]


class Base:
    """Holds its state, and computes by a method of its own."""

    def __init__(self, state: Any = 1) -> None:
        self.state = state

    def __call__(self, batch: Any) -> Any:
        return {"new": self.state}

    def method(self, batch: Any) -> Any:
        return self.state


class Loop:
    """Holds itself."""

    def __init__(self, value: int) -> None:
        self.me, self.value = self, value
        self.lock = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        return batch


VALUES: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "kind of number": (1, 1.0),
    "list": ([1, 2], [1, 3]),
    "dict": ({"a": 1}, {"a": 2}),
    "nested": ({"a": [{"b": {1, 2}}]}, {"a": [{"b": {1, 3}}]}),
    "array": (np.zeros(100_000), np.eye(1, 100_000, 50_000).ravel()),
    "array's type": (np.zeros(4, np.int8), np.zeros(2, np.int16)),
    "array's shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "array of objects": (np.array([{}, None]), np.array([{1: 2}, None])),
    "arrow": (pa.array([1, 2]), pa.array([1, 3])),
    "table": (pa.table({"a": [1]}), pa.table({"b": [1]})),
    "type": (pa.int64(), pa.int32()),
    "function": (closure(1), closure(2)),
    "bound method": (Base(1).method, Base(2).method),
    "object": (Base([1]), Base([2])),
    "object with itself": (Loop(1), Loop(2)),
    "partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "cached": (functools.lru_cache(closure(1)), functools.lru_cache(closure(2))),
    "bytes": (b"a", bytearray(b"a")),
    "random state": (np.random.default_rng(1), np.random.default_rng(2)),
    "pattern": (re.compile("a"), re.compile("b")),
    "keys": ({"a": 1}.keys(), {"b": 1}.keys()),
    "view of bytes": (memoryview(b"a"), memoryview(b"b")),
    "function made by a package": (pytest.approx(1).__eq__, pytest.approx(2).__eq__),
    "closure of a package": (operator.attrgetter("a"), operator.attrgetter("b")),
    "decorator of a package": (contextmanager(closure(1)), contextmanager(closure(2))),
    "path": (Path("a"), Path("b")),
}


@pytest.mark.parametrize("holder", [closure, with_default, with_keyword, Base, lambda value: Base(value).method])
@pytest.mark.parametrize(("one", "other"), VALUES.values(), ids=VALUES)
def test_values_that_a_transform_holds_tell_it_from_another(holder: Callable[[Any], Any], one: Any, other: Any):
    assert told(holder(one)) == told(holder(one))
    assert told(holder(one)) != told(holder(other))


@pytest.mark.parametrize(("one", "other"), VALUES.values(), ids=VALUES)
def test_arguments_of_a_class_or_a_partial_tell_it_from_another(one: Any, other: Any):
    assert len({told(Base, one), told(Base, other), told(Base, state=one), told(Base, state=other)}) == 4
    partials = [functools.partial(print, value) for value in (one, other, one)]
    assert told(partials[0]) == told(partials[2]) != told(partials[1])


SOURCES: dict[str, tuple[str, str]] = {
    "code": ("def transform(b): return b + 1", "def transform(b): return b - 1"),
    "constant": ("def transform(b): return b + 1", "def transform(b): return b + 2"),
    "attribute": ("def transform(b): return b.min()", "def transform(b): return b.max()"),
    "global": (
        "FACTOR = [1]\ndef transform(b): return FACTOR",
        "FACTOR = [2]\ndef transform(b): return FACTOR",
    ),
    "helper": (
        "def helper(b): return b + 1\ndef transform(b): return helper(b)",
        "def helper(b): return b + 2\ndef transform(b): return helper(b)",
    ),
    "global of an inner function": (
        "FACTOR = 1\ndef transform(b): return [FACTOR for _ in b]",
        "FACTOR = 2\ndef transform(b): return [FACTOR for _ in b]",
    ),
    "class attribute": (
        "class transform:\n  factor = 1\n  def __call__(self, b): return self.factor",
        "class transform:\n  factor = 2\n  def __call__(self, b): return self.factor",
    ),
    "inherited method": (
        "class A:\n  def __call__(self, b): return 1\nclass transform(A): pass",
        "class A:\n  def __call__(self, b): return 2\nclass transform(A): pass",
    ),
    "static method": (
        "class transform:\n  @staticmethod\n  def f(b): return 1\n  def __call__(self, b): return self.f(b)",
        "class transform:\n  @staticmethod\n  def f(b): return 2\n  def __call__(self, b): return self.f(b)",
    ),
    "property": (
        "class transform:\n  @property\n  def f(self): return 1\n  def __call__(self, b): return self.f",
        "class transform:\n  @property\n  def f(self): return 2\n  def __call__(self, b): return self.f",
    ),
}


@pytest.mark.parametrize(("one", "other"), SOURCES.values(), ids=SOURCES)
def test_code_that_a_transform_uses_tells_it_from_another(one: str, other: str):
    assert told(from_source(one)) == told(from_source(one))
    assert told(from_source(one)) != told(from_source(other))


def test_what_is_not_used_or_does_not_compute_makes_no_difference():
    one = from_source("FACTOR = 1\nUNUSED = 1\ndef transform(b): return FACTOR")
    other = from_source("\n\n\nFACTOR = 1\nUNUSED = 2\n\n\ndef transform(b: int) -> int: return FACTOR")
    assert told(one) == told(other)


def test_functions_that_name_each_other_have_a_fingerprint():
    text = "def transform(b): return other(b)\ndef other(b): return transform(b) + {}"
    assert told(from_source(text.format(1))) == told(from_source(text.format(1)))
    assert told(from_source(text.format(1))) != told(from_source(text.format(2)))


def test_code_of_installed_packages_counts_by_its_name():
    one = from_source("def transform(b): return np.linalg.norm(b), pa.table(b)")
    assert told(one) == told(from_source("def transform(b): return np.linalg.norm(b), pa.table(b)"))


def test_returning_the_batch_too_is_another_transform():
    function = closure(1)
    assert told(Appending(function)) != told(function)


def test_a_version_stands_for_what_cannot_be_compared():
    assert told(closure([1]), version="1") == told(closure([2]), version="1")
    assert told(closure([1]), version="1") != told(closure([1]), version="2")


PROGRAM = """
    import dataclasses, enum, functools, threading
    import numpy as np, pandas as pd, pyarrow as pa, pyarrow.compute as pc
    from lance_ray.transforms import fold_transform

    NAMES = {"alpha", "beta", "gamma", "delta"}
    TABLE = {"set": frozenset(NAMES), "frame": pd.DataFrame({"a": [1.5, None], "b": ["x", "y"]})}
    class Kind(enum.Enum):
        ONE = "one"

    @dataclasses.dataclass
    class Model:
        weights: np.ndarray
        names: set = dataclasses.field(default_factory=set)
        def __call__(self, batch):
            return batch["a"] in {"alpha", "beta", "gamma", "epsilon"}

    @functools.lru_cache
    def helper(text):
        return [name for name in NAMES if name in {"x", "y", "z", text}]

    model = Model(np.arange(10), {"p", "q", "r"})
    lock = threading.Lock()

    def transform(batch, *, names={"k", "l", "m"}):
        with lock:
            return pc.add(model(batch), helper(TABLE)), Kind.ONE, object, print, Model

    print(fold_transform(transform).fingerprint(), fold_transform(model).fingerprint())
    print(fold_transform(functools.partial(transform, names=NAMES)).fingerprint())
    print(fold_transform(Model, setup=((model.weights, NAMES), {"x": object()})).fingerprint())
"""


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process(tmp_path: Path):
    program = tmp_path / "job.py"
    program.write_text(textwrap.dedent(PROGRAM))
    found = []
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == 0
    assert len(set(found[0][1].split())) == 4
