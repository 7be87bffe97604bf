"""The benchmarks run, at a size that only shows that they do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chart, peers
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.mark.ray
def test_every_case_runs_at_smoke_size_and_is_written_as_a_json_line(ray_session: object, tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"

    results = main(["--smoke", "--data", str(tmp_path / "tables"), "--json", str(lines)])

    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [item["name"] for item in written] == [result.name for result in results]
    assert len(results) == 35
    assert all(result.ours.wall > 0 and result.rows > 0 for result in results)


def finished(*arguments: str) -> list[str]:
    """The lines that a benchmark prints in a process of its own, since a process has one Ray only."""
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_chart_of_the_lines_is_a_picture(tmp_path: Path) -> None:
    timing = {"wall": 0.5}
    lines: list[dict[str, Any]] = [
        {"name": "by ratio", "required": 2, "stretch": 1, "absolute": False, "engine": {"wall": 1.0}, "ours": timing},
        {
            "name": "by seconds",
            "required": 2,
            "stretch": 1,
            "absolute": True,
            "figures": {"engine": timing, "ray": timing},
        },
        {"name": "no engine", "required": 2, "stretch": 1, "absolute": True, "figures": {"ours": timing}},
    ]

    chart.draw(lines, tmp_path / "chart.png")

    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    rows = [chart.row_of(line) for line in lines]
    assert rows[0] == chart.Row("by ratio", 2, 1, {"ours": 0.5})
    assert rows[1] == chart.Row("by seconds", 4, 2, {"ray": 1.0})
    assert rows[2] is None


@pytest.mark.slow
def test_a_side_that_fails_or_takes_too_long_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    work = peers.Work("nothing", "count", {"uri": str(tmp_path / "missing")}, 1.0, 1.0)
    with peers.Side("engine", sys.executable, tmp_path) as side:
        found = peers.compared(work, [side], 1, 60, memory=False).figures["engine"]
        assert "was not found" in found.error
        assert side.ask("prepare", {"kind": "vectors", "count": 99, "rows": 10**6, "width": 100}, 0.5) == {
            "error": "over 0.5 s"
        }
        assert side.ask("prepare", {"kind": "small", "count": 2, "rows": 10, "width": 1}, 60)["rows"] == 20


@pytest.mark.slow
def test_the_sides_of_this_project_do_the_same_work_and_find_the_same_rows(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    arguments = ["--sides", "engine,ours,ray", "--scale", "0.002", "--repeats", "1", "--json", str(lines)]

    finished("benchmarks.peers", *arguments)

    found = [json.loads(line)["figures"] for line in lines.read_text().splitlines()]
    assert len(found) == 28
    assert all(item["ours"]["wall"] > 0 and "rows" not in item["ours"]["note"] for item in found)
    assert any(item["ray"]["error"] == "has none" for item in found)


@pytest.mark.slow
def test_data_ten_times_larger_than_the_object_store_is_worked_on_without_spilling(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    works = ["write", "read", "read, map, write", "compact", "flat search, 100 queries"]

    finished("benchmarks.memory", "--store", "80", "--json", str(lines), "--only", *works)

    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [item["name"] for item in found] == works
    assert all(item["kept"] for item in found), found


@pytest.mark.slow
def test_four_nodes_that_share_nothing_but_the_store_work_on_one_table(tmp_path: Path) -> None:
    found = json.loads(finished("benchmarks.cluster", "--rows", "20000", "--s3")[-1])

    assert found["nodes"] == {"write": 4, "read": 4}
    assert len(found["steps"]) == 7
