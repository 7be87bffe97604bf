"""A faulty S3 for the tests of faults. Whatever they do, no secret may come out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tests.faults.proxy import FaultProxy
from tests.faults.stores import BUCKET, S3, SECRET, Place

_numbers = itertools.count()


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
    assert SECRET not in printed.out + printed.err + caplog.text


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
