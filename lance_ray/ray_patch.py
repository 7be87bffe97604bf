"""Puts this connector behind ``ray.data.read_lance`` and ``Dataset.write_lance``, and takes it away again."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import ray.data
from ray.data import Dataset

from lance_ray.datasource import read_lance
from lance_ray.errors import InvalidArgumentError
from lance_ray.options import default_blobs
from lance_ray.writing import WriteReport, write_lance

SWITCH = "LANCE_RAY_PATCH_RAY_DATA"
"""Environment variable: ``0`` leaves ``ray.data`` alone."""

_originals: dict[str, Callable[..., Any]] = {}


def patch_ray_data() -> None:
    """Make ``ray.data.read_lance`` and ``Dataset.write_lance`` this connector. Done by ``import lance_ray``."""
    if _originals:
        return
    _originals.update(read=ray.data.read_lance, write=Dataset.write_lance)
    _set(_read_lance, _write_lance)


def restore_ray_data() -> None:
    """Give ``ray.data.read_lance`` and ``Dataset.write_lance`` back to Ray's own code."""
    if not _originals:
        return
    _set(_originals.pop("read"), _originals.pop("write"))


def _set(read: Callable[..., Any], write: Callable[..., Any]) -> None:
    for owner, name, function in ((ray.data, "read_lance", read), (Dataset, "write_lance", write)):
        setattr(owner, name, function)


def patch_unless_switched_off() -> None:
    """What importing the package does."""
    if os.environ.get(SWITCH, "1") != "0":
        patch_ray_data()


@functools.wraps(read_lance)
def _read_lance(*args: Any, **kwargs: Any) -> Dataset:
    if kwargs.get("blobs") is None:  # as Ray does it
        kwargs["blobs"] = default_blobs(kwargs.get("scanner_options"), "descriptors")
    return read_lance(*args, **kwargs)


@functools.wraps(write_lance, assigned=("__doc__",))
def _write_lance(self: Dataset, path: Any = None, **kwargs: Any) -> WriteReport:
    # As in Ray, the address is ``path``, and ignored where a namespace is given.
    uri = kwargs.pop("uri", path)
    if path is not None and uri is not path:
        raise InvalidArgumentError("uri", uri, f"cannot be combined with path={path!r}")
    if kwargs.get("namespace_impl") is not None:
        uri = None
    return write_lance(self, uri, **kwargs)
