"""Places for the tests of faults."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stores import BUCKET, S3, Place

_numbers = itertools.count()


@pytest.fixture
def on_s3(s3: S3) -> Place:
    """An address in the bucket, where nothing is."""
    return Place(f"s3://{BUCKET}/table{next(_numbers)}", s3.options(), s3)


@pytest.fixture
def on_disk(tmp_path: Path) -> Place:
    """An address on disk, where nothing is."""
    return Place(str(tmp_path / "table"))


@pytest.fixture(params=["disk", "s3"])
def everywhere(request: pytest.FixtureRequest) -> Place:
    """An address where nothing is, on disk and in the bucket."""
    found: Place = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> Place:
    """As ``everywhere``, for tests in which the store plays no part of its own."""
    found: Place = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a small file system needs privileges: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)
