"""One Ray instance for all tests that need one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Path]:
    """Two CPUs, no dashboard, quiet; shut down at the end of the session. The folder has Ray's logs."""
    root = str(Path(__file__).parents[1])
    directory = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # Ray's sockets need paths of under 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        # Workers inherit it: they find the package in a checkout, and the functions of these tests.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=2 * 1024**3,
            log_to_driver=False,
            logging_level=40,
            _temp_dir=directory,
        )
        yield Path(directory)
        ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
