"""Azurite, the emulator of Azure Blob Storage, from npm: installed once into a cache folder, run while it is needed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

import lance_ray
from tests.leaks import secret

VERSION = "3.35.0"
ACCOUNT = "devstoreaccount1"
KEY = secret(
    "the key of Azurite", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The key that is the same in every emulator, and published; it is still looked for in all output."""
CONTAINER = "tables"


def installed() -> Path:
    """The program; skips the test, with the reason, where it can neither be found nor installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-ray-tests" / f"azurite-{VERSION}"
    program = cache / "node_modules" / ".bin" / "azurite-blob"
    if program.exists():
        return program
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Azurite needs npm, which is not installed")
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(cache), f"azurite@{VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"Azurite cannot be installed: {done.stderr.strip()[-300:]}")
    return program


@contextmanager
def running() -> Iterator[lance_ray.AzureConfig]:
    """How to reach an emulator that has one empty container."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--loose"]
    command = [str(installed()), "--blobHost", "127.0.0.1", "--blobPort", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _create_container(endpoint, process)
        yield lance_ray.AzureConfig(storage_account=ACCOUNT, access_key=KEY, endpoint_url=endpoint)
    finally:
        process.terminate()
        process.wait(20)


def _create_container(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(_signed_put(endpoint), timeout=10):
                return
        except urllib.error.HTTPError as error:
            raise AssertionError(f"no container: {error.code} {error.read()[:300]!r}") from None
        except OSError:
            assert process.poll() is None, "Azurite has ended"
            assert time.monotonic() < deadline, "Azurite does not listen"
            time.sleep(0.2)


def _signed_put(endpoint: str) -> urllib.request.Request:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = f"PUT{chr(10) * 12}{named}/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers["Content-Length"] = "0"
    return urllib.request.Request(f"{endpoint}/{CONTAINER}?restype=container", method="PUT", headers=headers)
