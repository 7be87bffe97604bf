"""One Ray instance and one S3 server for all tests that need them. Whatever tests do, no secret may come out."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from moto.server import ThreadedMotoServer

from tests import leaks
from tests.faults.proxy import FaultProxy
from tests.faults.stores import BUCKET, S3
from tests.leaks import pytest_configure, pytest_make_parametrize_id  # noqa: F401 - hooks, which look for secrets


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
    assert leaks.look_through(Path(directory)) > 0
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    proxy = FaultProxy(address)
    store = S3(proxy, address)
    store.client().create_bucket(Bucket=BUCKET)
    yield store
    proxy.close()
    server.stop()


@pytest.fixture
def s3(s3_server: S3, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[S3]:
    """The S3 server without any fault yet; afterwards, nothing that was printed or logged may show its secret."""
    caplog.set_level(logging.INFO)
    s3_server.proxy.reset()
    yield s3_server
    s3_server.proxy.reset()
    printed = capfd.readouterr()
    assert leaks.names_in(printed.out + printed.err + caplog.text) == set()
