"""A run in which a secret comes out fails, whatever its tests say."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import leaks

ROOT = Path(__file__).parents[1]

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
import pytest
from tests import leaks

VALUE = leaks.secret("the test's own", "of-a-run-" + "in-a-run")

@pytest.fixture(scope="session", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs")
    yield path
    assert leaks.look_through(path) == len(list(path.iterdir()))

def test_of_one_thing(folder):
    {statement}
"""


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        ("print('nothing', VALUE[:6])", ""),
        ("print('key', VALUE)", "stdout"),
        ("sys.stderr.write(VALUE)", "stderr"),
        ("logging.getLogger('x').warning('options %s', [VALUE])", "log"),
        ("raise ValueError(VALUE)", "failure"),
        ("(folder / 'worker.out').write_text(f'args: {VALUE}')", "worker.out"),
    ],
)
def test_a_run_fails_where_a_secret_comes_out(tmp_path: Path, statement: str, place: str):
    (tmp_path / "test_inner.py").write_text(PROGRAM.replace("{statement}", statement))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.leaks", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "looked for" in done.stdout
    assert (done.returncode != 0) == bool(place)
    assert ("SECRET LEAKED: the test's own in" in done.stdout) == bool(place)
    assert place in done.stdout.partition("SECRET LEAKED")[2]


def test_a_secret_is_known_in_the_forms_that_output_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaks, "_KNOWN", {})
    value = leaks.secret("one", 'a/b+c="d"/e+f')
    encoded = base64.b64encode(value.encode()).decode()
    for text in (value, quote(value, safe=""), json.dumps({"k": value}), f"Basic {encoded}"):
        assert leaks.names_in(f"... {text} ...") == {"one"}
    assert leaks.names_in("a/b+c=") == set()
    with pytest.raises(AssertionError):
        leaks.secret("short", "abc")
