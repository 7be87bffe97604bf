"""The secrets that tests use, and the search for them in all that a test run puts out. A find fails the run.

A module that has a secret names it by :func:`secret`. As a plugin of pytest (``-p tests.leaks``, and in
``tests/conftest.py``) this looks through what every test printed and logged, through the text of failures, and through
the folders that are handed to :func:`look_through`, such as that of Ray's logs.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

_KNOWN: dict[str, str] = {}
_FOUND: list[str] = []


def secret(name: str, value: str) -> str:
    """``value``, which from now on must not be seen under any name. At least eight characters."""
    assert len(value) >= 8, f"{name} is too short to be told from other text"
    _KNOWN[value] = name
    return value


def names_in(text: str) -> set[str]:
    """The names of the secrets that a text has, as they are, in a URL, in JSON, or in base64."""
    return {name for value, name in _KNOWN.items() if any(form in text for form in _forms(value))}


def name_of(value: str) -> str:
    """What a secret is called."""
    return _KNOWN[value]


def _forms(value: str) -> Iterator[str]:
    yield value
    yield quote(value, safe="")
    yield json.dumps(value)[1:-1]
    yield base64.b64encode(value.encode()).decode().rstrip("=")


def shown(value: object) -> str:
    """A value as a test's name may have it."""
    text = str(value)
    for known in _KNOWN:
        text = text.replace(known, "***")
    return text


def look_through(folder: Path) -> int:
    """Look for secrets in every file below a folder, and keep what is found for the end of the run.

    Returns:
        How many files were looked at.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        text = path.read_bytes().decode("utf-8", "replace")
        _FOUND.extend(f"{name} in {path.relative_to(folder)}" for name in sorted(names_in(text)))
    return len(files)


class Watch:
    """Looks through the reports of tests. ``seen`` says how much there was."""

    def __init__(self) -> None:
        self.seen = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for title, text in [("name", report.nodeid), *report.sections, ("failure", report.longreprtext)]:
            self.seen += len(text)
            _FOUND.extend(f"{name} in {title} of {report.nodeid}" for name in sorted(names_in(text)))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if _FOUND:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if _KNOWN:
            terminalreporter.write_line(f"looked for {len(_KNOWN)} secrets in the output of this run")
        for line in dict.fromkeys(_FOUND):
            terminalreporter.write_line(f"SECRET LEAKED: {line}", red=True)


def pytest_make_parametrize_id(val: object) -> str | None:
    """The name of a parameter that is or has a secret; pytest's own for others."""
    return shown(val) if isinstance(val, str) and names_in(val) else None


def pytest_configure(config: pytest.Config) -> None:
    """Watch, once per run and process."""
    if not config.pluginmanager.has_plugin("leaks-watch"):
        config.pluginmanager.register(Watch(), "leaks-watch")


# What the environment has is looked for as well: a run by CI has real ones.
for _name, _value in os.environ.items():
    if re.search(r"^(AWS|OSS|AZURE)_.*(SECRET|TOKEN|KEY)$", _name) and len(_value) >= 16:
        secret(f"${_name}", _value)
