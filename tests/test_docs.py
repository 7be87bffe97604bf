"""The documentation: every Python block of every page runs, every public name is in the reference, the site builds."""

from __future__ import annotations

import datetime as dt
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from typer.testing import CliRunner

import lance_ray
from lance_ray import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks that are run, with their line in the page."""
    text = page.read_text("utf-8")
    found = BLOCK.finditer(text)
    return [
        (text[: block.start("code")].count("\n"), block["code"])
        for block in found
        if not NOT_RUN.fullmatch(block["before"])
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages read."""
    monkeypatch.chdir(tmp_path)
    ids = np.arange(2000)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(ids.astype(np.float32), 8)), 8)
    documents = pa.table(
        {
            "id": ids,
            "lang": ["de" if item % 3 else "en" for item in ids],
            "text": [f"text {item}" for item in ids],
            "length": ids % 50,
            "vector": vectors,
        }
    )
    lance.write_dataset(documents, "documents.lance", max_rows_per_file=500)
    Path("images").mkdir()
    for number in range(3):
        (Path("images") / f"{number}.bin").write_bytes(bytes([number]) * 100)
    Path("catalog").mkdir()
    return tmp_path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session", "folder")
@pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_its_top_to_its_end(page: Path):
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning")
def test_the_code_of_the_readme_runs_on_a_folder_in_place_of_the_bucket(folder: Path):
    documents = lance.dataset("documents.lance").to_table(columns=["id", "lang", "text"])
    documents = documents.append_column("length", documents["id"])
    ray.data.from_arrow(documents).write_parquet(str(folder / "raw"))
    ray.data.from_arrow(documents.slice(0, 30)).write_json(str(folder / "new"))
    ((_, code),) = blocks(ROOT / "README.md")
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)  # the table is younger than the day that the page names
    code, days = re.subn(r'(?<=asof=")[^"]+', tomorrow.isoformat(), code.replace("s3://bucket", str(folder)))
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert (days, names["report"].rows, lance.dataset(str(folder / "docs")).count_rows()) == (1, 2000, 2030)
    assert names["german"].count() == 1333 + 20
    assert names["long_ones"].count() == 999


SHELL = re.compile(r"^lance-ray (?P<words>[^#\n]*)(?:#.*?exit code (?P<code>\d+))?", re.MULTILINE)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if SHELL.search(page.read_text("utf-8"))], ids=lambda page: page.stem
)
def test_the_lines_for_a_shell_run_from_the_top_of_a_page_to_its_end(page: Path, folder: Path):
    (folder / "docs").symlink_to(folder / "documents.lance")
    documents = lance.dataset("documents.lance")
    pq.write_table(documents.to_table(columns=["id", "lang", "text"], limit=30), "raw.parquet")
    np.save("query.npy", np.full(8, 7, np.float32))
    for line in SHELL.finditer(page.read_text("utf-8")):
        words = [word.replace("s3://bucket", str(folder)) for word in shlex.split(line["words"])]
        done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert done.exit_code == int(line["code"] or 0), (line[0], done.stderr)
        assert done.stdout, line[0]
    assert lance.dataset("documents.lance").count_rows() == 2030


def test_the_exit_codes_of_the_page_are_those_of_the_commands():
    row = re.compile(r"^\|? *(\d+) +\|? *(.+?)(?: *\|)?$", re.MULTILINE)
    told = row.findall((ROOT / "docs/cli.md").read_text("utf-8"))
    codes = row.findall(cli.__doc__ or "")
    assert [(code, text.replace("`", "")) for code, text in told] == [
        (code, text.replace("`", "")) for code, text in codes
    ]
    assert {int(code) for code, _ in told} == {
        0,
        cli.FAILED,
        cli.INTERRUPTED,
        cli.NEEDS_CARE,
        *(code for _, code in cli._CODES),
    }


def test_a_block_that_is_not_run_says_why():
    for page in PAGES:
        text = page.read_text("utf-8")
        marks = re.findall(r"<!-- not run.*", text)
        assert [mark for mark in marks if not NOT_RUN.fullmatch(mark)] == [], page.name
        assert text.count("```python\n") == len(BLOCK.findall(text)), page.name


def test_every_public_name_is_in_the_reference():
    told = set(re.findall(r"^::: lance_ray\.(\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE))
    named = {name for name in lance_ray.__all__ if not name.endswith("Error")}
    assert named - told == set()
    assert "errors" in told


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    names = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    assert [name for name in names if f": {name}\n" not in menu] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "read_lance" in (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
