"""What tells a function, class or object from another one across processes: its code, and every value that it uses.

Two runs of a job may only share results if they compute the same. So a value is walked as a whole: the code of
functions with their constants, defaults, closures and the globals that they name; classes with their attributes and
bases; objects by what they are pickled as; arrays by their buffers. Nothing that differs between processes goes in: no
addresses, no order of sets, no line numbers. Code of installed packages counts by its name.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any

import numpy as np
import pyarrow as pa
from ray.cloudpickle import CloudPickler

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range)
_UNTOLD = re.compile(
    r"__(dict|weakref|module|doc|annotat\w+|firstlineno|static_attributes|slotnames|abstractmethods|parameters|orig_bases)__"
    r"|_abc_impl"
)
_STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
_SITE = {"site-packages", "dist-packages"}


def fingerprint(value: Any, *, of: Any = None) -> str:
    """A digest of a value: equal for equal code and state in any process, another one for any other.

    Args:
        value: what to walk.
        of: the function or object that this is about; code of its package is walked even where that is installed.
    """
    return _Walk(of).digest(value).hex()


class _Walk:
    """One walk. Each object is digested once; where an object holds itself, its place stands for it."""

    def __init__(self, root: Any) -> None:
        self._known: dict[int, bytes] = {}
        self._kept: list[Any] = []  # what is digested stays alive, or another object could get its id
        home = _package(getattr(root, "__module__", None) or type(root).__module__)
        self._home = None if home in sys.stdlib_module_names or home == "numpy" else home

    def digest(self, value: Any) -> bytes:
        if isinstance(value, _ATOMS):
            return _hashed(type(value).__name__, repr(value))
        if id(value) not in self._known:
            self._kept.append(value)
            self._known[id(value)] = _hashed("itself", type(value).__qualname__)
            self._known[id(value)] = _hashed(type(value).__qualname__, *self._parts(value))
        return self._known[id(value)]

    def _parts(self, value: Any) -> Iterator[bytes | str | memoryview]:
        # What is built in by its very type: a subclass may hold more, and is walked as what it is pickled as.
        walk = _EXACT.get(type(value)) or next((walk for kinds, walk in _KINDS if isinstance(value, kinds)), None)
        yield from (walk or _Walk._object)(self, value)

    def _all(self, values: Any) -> Iterator[bytes]:
        return (self.digest(item) for item in values)

    def _unordered(self, values: Any) -> Iterator[bytes]:
        yield from sorted(self._all(values))

    def _mapping(self, values: Mapping[Any, Any]) -> Iterator[bytes]:
        for pair in values.items():
            yield from self._all(pair)

    def _array(self, array: np.ndarray) -> Iterator[bytes | str | memoryview]:
        yield f"{array.dtype!r} {array.shape}"
        if array.dtype.hasobject:
            yield from self._all(array.ravel().tolist())
        elif array.nbytes:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # not copied

    def _arrow(self, value: Any) -> Iterator[bytes]:
        table = value if isinstance(value, (pa.Table, pa.RecordBatch)) else pa.table({"": value})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write(table)
        yield sink.getvalue().to_pybytes()

    def _type(self, value: Any) -> Iterator[str]:
        yield value.to_string(show_field_metadata=True) if isinstance(value, pa.Schema) else f"{value!r}"

    def _module(self, module: ModuleType) -> Iterator[str]:
        yield module.__name__

    def _cell(self, cell: CellType) -> Iterator[bytes | str]:
        try:
            yield self.digest(cell.cell_contents)
        except ValueError:  # not filled yet
            yield "empty"

    def _code(self, code: CodeType) -> Iterator[bytes | str]:
        yield code.co_code
        yield repr((code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_varnames, code.co_names))
        yield from self._all(code.co_consts)

    def _function(self, function: FunctionType) -> Iterator[bytes | str]:
        own = self._is_own(function.__module__)
        if not own:
            yield f"{function.__module__}.{function.__qualname__}"
            if _importable(function):
                return
        yield from self._all((function.__defaults__, function.__kwdefaults__, function.__dict__))
        yield from self._all(function.__closure__ or ())
        if not own:  # made by an installed package for the caller: its values count, its code is the package's
            return
        yield self.digest(function.__code__)
        names = sorted(set(_names(function.__code__)))
        for name in (name for name in names if name in function.__globals__):
            found = function.__globals__[name]
            yield name
            yield self.digest(found)
            if isinstance(found, ModuleType) and self._is_own(found.__name__):
                used = {item: vars(found)[item] for item in names if item in vars(found)}
                yield self.digest(used)

    def _class(self, kind: type) -> Iterator[bytes | str]:
        for base in kind.__mro__:
            yield base.__qualname__
            if not self._is_own(base.__module__):
                yield base.__module__
                continue
            for name, member in sorted(vars(base).items()):
                if not _UNTOLD.fullmatch(name) and not isinstance(member, (GetSetDescriptorType, MemberDescriptorType)):
                    yield name
                    yield self.digest(member)

    def _wrapper(self, value: Any) -> Iterator[bytes]:
        yield self.digest(value.__func__)

    def _property(self, value: property) -> Iterator[bytes]:
        yield from self._all((value.fget, value.fset, value.fdel))

    def _cached(self, value: Any) -> Iterator[bytes]:
        yield self.digest(value.__wrapped__)

    def _object(self, value: Any) -> Iterator[bytes | str]:
        """By its type and what it is pickled as; what is not pickled stays out, for no worker gets it either."""
        yield self.digest(type(value))
        try:
            reduce = CloudPickler.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception:  # noqa: BLE001 - a lock, a generator: nothing of it can be told, and any type may be raised
            return
        if isinstance(reduced, str):
            yield reduced
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        yield from self._all((make, arguments, state))
        yield from self._all((list(items or ()), list(pairs or ())))

    def _is_own(self, module: str | None) -> bool:
        """Whether code is the caller's: of the package that the walk began in, or not installed at all."""
        if module is None or _package(module) == self._home:
            return True
        loaded = sys.modules.get(module)
        if loaded is None or module == "__main__":
            return True
        path = getattr(loaded, "__file__", None)  # what is compiled into the interpreter has none
        return path is not None and not path.startswith(_STANDARD) and not _SITE & set(path.split(os.sep))


_EXACT: dict[type, Any] = {
    **dict.fromkeys((tuple, list), _Walk._all),
    **dict.fromkeys((set, frozenset), _Walk._unordered),
    **dict.fromkeys((dict, MappingProxyType), _Walk._mapping),
    np.ndarray: _Walk._array,
    CellType: _Walk._cell,
    CodeType: _Walk._code,
    FunctionType: _Walk._function,
    property: _Walk._property,
    functools._lru_cache_wrapper: _Walk._cached,
}
_KINDS: tuple[tuple[Any, Any], ...] = (
    (type, _Walk._class),
    (ModuleType, _Walk._module),
    ((staticmethod, classmethod), _Walk._wrapper),
    ((pa.Array, pa.ChunkedArray, pa.Table, pa.RecordBatch), _Walk._arrow),
    ((pa.DataType, pa.Field, pa.Schema), _Walk._type),
)


def _hashed(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        found = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(memoryview(found).nbytes.to_bytes(8, "big"))
        digest.update(found)
    return digest.digest()


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _importable(function: FunctionType) -> bool:
    """Whether the name of a function leads to it, and so says all about it."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
