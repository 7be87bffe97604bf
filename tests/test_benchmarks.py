"""The benchmarks run, at a size that only shows that they do."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main


@pytest.mark.ray
def test_every_case_runs_at_smoke_size_and_is_written_as_a_json_line(ray_session: object, tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"

    results = main(["--smoke", "--data", str(tmp_path / "tables"), "--json", str(lines)])

    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [item["name"] for item in written] == [result.name for result in results]
    assert len(results) == 34
    assert all(result.ours.wall > 0 and result.rows > 0 for result in results)
