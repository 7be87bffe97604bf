"""The examples do what they show, and leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from examples import quickstart

ROWS = pa.table({"city": ["Ulm", "Graz", "Ulm"], "year": [1999, 2004, None]})


@pytest.fixture(scope="module")
def running_ray():
    with quickstart.local_ray():
        yield


@pytest.fixture
def own_files(tmp_path):
    pq.write_table(ROWS, tmp_path / "a.parquet")
    pacsv.write_csv(ROWS, tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_text('{"city": "Graz", "year": 1}\n{"city": "Wien", "year": null}\n')
    return [str(tmp_path / name) for name in ("a.parquet", "b.csv", "c.jsonl")]


def rows_of_step(output: str, name: str) -> int:
    """The number of rows in the line that the quickstart printed for a step."""
    found = re.search(rf"^{re.escape(name)} +([\d,]+) rows", output, re.MULTILINE)
    assert found, f"no line for {name!r} in:\n{output}"
    return int(found[1].replace(",", ""))


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_the_quickstart_makes_a_table_of_this_machines_python_files_in_two_commits(tmp_path, capsys):
    quickstart.main(["--limit", "40", "--output", str(tmp_path)])
    table = lance.dataset(str(tmp_path / "quickstart.lance"))
    rows = table.to_table().to_pylist()
    assert (len(rows), len(table.versions())) == (80, 2)
    assert "80 rows" in capsys.readouterr().out
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 128)
    for row in rows:
        content = Path(row["path"]).read_bytes()
        assert (row["size"], row["lines"]) == (len(content), content.count(b"\n"))
        assert np.array_equal(row["vector"], quickstart.token_vector(content))


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_the_quickstart_reads_the_same_rows_by_sql_and_by_expression(capsys):
    quickstart.main(["--limit", "400"])
    output = capsys.readouterr().out
    found = rows_of_step(output, "read where lines >= 1000 AND package <> 'test'")
    assert 0 < found < rows_of_step(output, "read everything") == 800
    assert rows_of_step(output, "the same by ds.filter(expr=...)") == found


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_the_quickstart_takes_parquet_csv_and_jsonl_of_the_caller(own_files, tmp_path, capsys):
    quickstart.main(["--input", *own_files, "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert [rows_of_step(output, step) for step in ("create a.parquet", "append b.csv", "append c.jsonl")] == [3, 3, 2]
    assert re.findall(r"^  (Graz|Ulm|Wien) +(\d)$", output, re.MULTILINE)[0] == ("Ulm", "4")
    assert "8 rows" in output
    assert "3 versions" in output


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_the_quickstart_removes_its_own_folder_and_no_other(monkeypatch, tmp_path, own_files):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    quickstart.main(["--input", *own_files])
    assert list(scratch.glob("lance-ray-*")) == []
    assert all(Path(path).is_file() for path in own_files)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "0"], "--limit 0: must be positive"),
        (["--input", "no_such.parquet"], "--input no_such.parquet: no such file"),
        (["--input", __file__], "not one of .parquet, .csv, .jsonl"),
    ],
)
def test_the_quickstart_refuses_what_cannot_work_before_it_starts_ray(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as exit_of_parser:
        quickstart.main(arguments)
    assert exit_of_parser.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_token_vector_has_length_one_and_depends_on_the_tokens_alone():
    vector = quickstart.token_vector(b"for x in range(3): print(x)")
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert np.array_equal(vector, quickstart.token_vector(b"for x in\n\trange 3 print x"))
    assert not np.array_equal(vector, quickstart.token_vector(b"for y in range(3): print(y)"))
    assert not quickstart.token_vector(b"").any()


def test_every_example_is_run_and_listed_in_reading_order():
    folder = Path(quickstart.__file__ or "").parent
    tests = "\n".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_examples*.py"))
    listed = re.findall(r"^\d+\. \[(\w+)\.py\]", (folder / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py"))
    assert [name for name in listed if not re.search(rf"\b{name}\.main\(|examples/{name}\.py", tests)] == []
