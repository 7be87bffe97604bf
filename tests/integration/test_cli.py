"""The command line: what it prints, what it does, and the exit code of every kind of failure."""

from __future__ import annotations

import bz2
import gzip
import json
import os
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
import typer
from typer.testing import CliRunner

import lance_ray
from lance_ray import cli
from lance_ray.errors import CommitConflictError, CommitOutcomeUnknownError, LanceRayError, StorageError
from lance_ray.table import PinnedTable

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]


@pytest.fixture
def table(tmp_path: Path) -> str:
    """20 rows in 4 fragments: ``id``, ``text`` and ``vector`` of four numbers from 4 * id on."""
    uri = str(tmp_path / "table.lance")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(80, dtype=np.float32)), 4)
    texts = ["red fox" if item % 5 == 0 else "grey goose" for item in range(20)]
    lance.write_dataset(pa.table({"id": range(20), "text": texts, "vector": vectors}), uri, max_rows_per_file=5)
    return uri


def run(*arguments: str, code: int = 0) -> str:
    """What a command prints; its exit code must be this."""
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, (result.output, result.stderr)
    return result.stdout


def told(*arguments: str, code: int = 0) -> Any:
    """The JSON document that a command prints."""
    return json.loads(run(*arguments, "--json", code=code))


def refusal(*arguments: str, code: int = cli.BAD_ARGUMENT) -> str:
    """What a command that fails says: one line."""
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_info_shows_version_columns_and_size(table: str):
    text = run("info", table)
    assert "version 1, 20 rows" in text
    assert "  vector: fixed_size_list<item: float>[4]" in text
    found = told("info", table)
    assert (found["version"], found["rows"], found["fragments"]) == (1, 20, 4)
    assert found["schema"]["id"] == "int64"
    assert "table_id" not in found


def test_health_tells_what_a_compaction_would_do_and_checks_on_demand(table: str):
    assert "4 fragment(s)" in run("health", table)
    assert told("health", table)["small_files"] == 4
    run("health", table, "--check", code=cli.NEEDS_CARE)
    run("health", table, "--check", "--compaction-option", "target_rows_per_fragment=5", code=0)


def test_compact_merges_fragments_and_says_so(table: str):
    assert told("compact", table, "--dry-run")["fragments"] == 4
    assert lance.dataset(table).version == 1
    found = told("compact", table, "--max-tasks", "5", "--num-workers", "1")
    assert (found["fragments_removed"], found["fragments_added"]) == (4, 1)
    assert len(lance.dataset(table).get_fragments()) == 1
    assert run("compact", table).strip() == "nothing to do"
    assert told("compact", table) is None


def test_cleanup_removes_old_versions_or_what_killed_jobs_left(table: str):
    lance.dataset(table).delete("id = 1")
    assert "would remove 1 version(s)" in run("cleanup", table, "--older-than", "0s", "--dry-run")
    assert told("cleanup", table, "--retain-versions", "1")["old_versions"] == 1
    assert len(lance.dataset(table).versions()) == 1
    assert "0 orphaned file(s)" in run("cleanup", table, "--orphans")
    run("cleanup", table, "--orphans", "--older-than", "1d", code=cli.BAD_ARGUMENT)
    run("cleanup", table, "--older-than", "soon", code=cli.BAD_ARGUMENT)


def test_search_by_vector_text_and_both(table: str, tmp_path: Path):
    assert [row["id"] for row in told("search", table, "--vector", "[8, 9, 10, 11]", "-k", "2", "--columns", "id")] == [
        *(2, 1)
    ]
    np.save(tmp_path / "q.npy", np.array([8, 9, 10, 11], np.float32))
    (tmp_path / "q.json").write_text("[8, 9, 10, 11]")
    for name in ("q.npy", "q.json"):
        rows = told("search", table, "--vector", f"@{tmp_path / name}", "-k", "1", "--filter", "id <> 2")
        assert [row["id"] for row in rows] == [1]
    lance.dataset(table).create_scalar_index("text", "INVERTED")
    assert {row["id"] for row in told("search", table, "--text", "fox", "--text-columns", "text")} == {0, 5, 10, 15}
    both = told("search", table, "--text", "fox", "--vector", "[0, 1, 2, 3]", "-k", "1", "--columns", "id")
    assert [row["id"] for row in both] == [0]
    lines = run("search", table, "--vector", "[0,1,2,3]", "-k", "1", "--nearest-option", "metric=l2").splitlines()
    assert lines[0].split("\t") == ["id", "text", "vector", "_distance"]
    assert lines[1].startswith("0\tred fox\t")
    run("search", table, code=cli.BAD_ARGUMENT)
    run("search", table, "--vector", "one", code=cli.BAD_ARGUMENT)
    run("search", table, "--vector", f"@{tmp_path}/absent", code=cli.BAD_ARGUMENT)


def test_indexes_are_built_listed_refreshed_merged_and_dropped(table: str):
    assert run("index", "list", table).strip() == "no indexes"
    made = told("index", "create", table, "--column", "id", "--type", "btree", "--num-segments", "2")
    assert (made["name"], made["kind"], made["rows"]) == ("id_idx", "BTREE", 20)
    options = ("--option", "metric=cosine", "--option", "num_partitions=2", "--num-workers", "1")
    vectors = told("index", "create", table, "--column", "vector", "--type", "IVF_FLAT", "--name", "near", *options)
    assert vectors["name"] == "near"
    lance.write_dataset(lance.dataset(table).to_table(), table, mode="append")
    assert {item["unindexed_rows"] for item in told("index", "list", table)} == {20}
    assert len(told("index", "refresh", table)) == 2
    assert {item["unindexed_rows"] for item in told("index", "list", table)} == {0}
    assert told("index", "optimize", table, "--name", "id_idx", "--num-segments", "1")[0]["segments"] == 1
    assert told("index", "drop", table, "--name", "near")["version"] == lance.dataset(table).version
    assert [item["name"] for item in told("index", "list", table)] == ["id_idx"]
    assert [item["kind"] for item in told("health", table)["indices"]] == ["BTREE"]
    run("index", "drop", table, "--name", "near", code=cli.BAD_ARGUMENT)
    run("index", "create", table, "--column", "id", "--type", "nonsense", code=cli.BAD_ARGUMENT)


@pytest.mark.slow
def test_copy_takes_any_format_of_ray_to_lance_and_back(table: str, tmp_path: Path):
    out = str(tmp_path / "out.parquet")
    run("copy", table, out, "--columns", "id,text", "--filter", "id < 4")
    assert pq.read_table(out).sort_by("id").to_pydict() == {
        "id": [0, 1, 2, 3],
        "text": ["red fox", "grey goose", "grey goose", "grey goose"],
    }
    back = str(tmp_path / "back")
    found = told("copy", out, back, "--filter", "id > 0", "--columns", "id", "--limit", "2")
    assert (found["rows"], found["version"]) == (2, 1)
    assert lance.dataset(back).schema.names == ["id"]
    assert told("copy", out, back, "--mode", "append", "--columns", "id")["version"] == 2
    run("copy", out, back, code=cli.CONFLICT)
    run("copy", out, str(tmp_path / "none"), "--filter", "no_such > 1", code=cli.BAD_ARGUMENT)
    csv = str(tmp_path / "folder")
    run("copy", back, csv, "--to", "csv", "--quiet")
    assert sum(file.read_text().count("\n") - 1 for file in Path(csv).glob("*.csv")) == 6
    again = told("copy", csv, str(tmp_path / "again"), "--from", "csv", "--write-option", "max_rows_per_file=2")
    assert again["rows"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", "nonsense"),
        ("--to", "nonsense"),
        ("--to", "csv", "--job-id", "nightly"),
        ("--to", "csv", "--mode", "nonsense"),
        ("--to", "csv", "--write-option", "mode=append"),
        ("--to", "csv", "--write-option", "nonsense=1"),
        ("--to", "numpy", "--write-option", "nonsense=1"),
        ("--to", "parquet", "--columns", "nope"),
        ("--write-option", "mode=append"),
        ("--write-option", "nonsense=1"),
        ("--read-option", "nonsense"),
        ("--read-option", "nonsense=1"),
        ("--read-option", "columns=id"),
        ("--columns", "nope"),
        ("--address", "127.0.0.1:9"),
        ("--address", "ray://127.0.0.1:9"),
        ("--address", "nowhere"),
        ("--storage-option", "key=env:NO_SUCH_VARIABLE"),
    ],
)
def test_copy_refuses_what_cannot_be_done(
    table: str, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    if arguments[0] == "--address":
        monkeypatch.setattr(ray, "is_initialized", lambda: False)  # or the address would not be needed
    assert refusal("copy", table, str(tmp_path / "target"), *arguments).startswith(f"lance-ray: {arguments[-2]} ")
    assert not (tmp_path / "target").exists()


def test_copy_to_files_creates_adds_replaces_or_leaves_as_it_is_told(table: str, tmp_path: Path):
    out = str(tmp_path / "out.parquet")

    def ids() -> list[int]:
        return sorted(pq.read_table(out)["id"].to_pylist())

    assert told("copy", table, out, "--filter", "id < 3") == {"target": out, "rows": 3}
    assert "--mode" in refusal("copy", table, out, code=cli.CONFLICT)
    assert ids() == [0, 1, 2]
    assert told("copy", table, out, "--filter", "id = 7", "--mode", "append")["rows"] == 1
    assert told("copy", table, out, "--mode", "ignore")["rows"] is None
    assert ids() == [0, 1, 2, 7]
    assert told("copy", table, out, "--filter", "id = 9", "--mode", "overwrite")["rows"] == 1
    assert ids() == [9]
    for source, target in ((out, out), (out, table)):
        refusal("copy", source, target, "--to", "parquet", "--mode", "overwrite")
    assert (ids(), lance.dataset(table).count_rows()) == ([9], 20)


def test_copy_tells_formats_by_their_ends_and_asks_where_it_cannot(table: str, tmp_path: Path):
    for end, opened in ((".csv.gz", gzip.open), (".csv.bz2", bz2.open)):
        with opened(tmp_path / f"in{end}", "wt") as file:
            file.write("id\n1\n2\n")
        assert told("copy", str(tmp_path / f"in{end}"), str(tmp_path / f"to{end[5:]}.lance"))["rows"] == 2
    with bz2.open(tmp_path / "in.jsonl.bz2", "wt") as file:
        file.write('{"id": 1}\n')
    assert told("copy", str(tmp_path / "in.jsonl.bz2"), str(tmp_path / "lines"))["rows"] == 1
    for name in ("a.orc", "a.txt", "a.parquet.gz"):
        assert "say --from" in refusal("copy", str(tmp_path / name), str(tmp_path / "new"))
        assert "say --to" in refusal("copy", table, str(tmp_path / name))
    assert "say --to" in refusal("copy", table, str(tmp_path / "a.csv.gz"))


@pytest.mark.slow
def test_a_copy_of_what_is_not_there_says_so_and_leaves_nothing(table: str, tmp_path: Path):
    for source in ("none.parquet", "none.csv", "none.lance", "none.json"):
        for target in ("new.lance", "new.csv"):
            assert "none." in refusal("copy", str(tmp_path / source), str(tmp_path / target), code=cli.NOT_FOUND)
            assert not (tmp_path / target).exists()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "in.parquet")
    for target in ("new.lance", "new.csv"):
        for arguments in (("--columns", "nope"), ("--filter", "nope = 1")):
            said = refusal("copy", str(tmp_path / "in.parquet"), str(tmp_path / target), *arguments)
            assert said.startswith(f"lance-ray: {arguments[0]} ")
            assert not (tmp_path / target).exists()


def test_messages_name_what_was_typed(table: str):
    assert refusal("info").startswith("lance-ray: TABLE ")
    assert refusal("search", table, "--vector", "[1, 2]").startswith("lance-ray: --vector ")
    assert refusal("search", table, "--text", " ", "--text-columns", "text").startswith("lance-ray: --text ")
    assert refusal("health", table, "--compaction-option", "no=1").startswith("lance-ray: --compaction-option")
    assert refusal("index", "create", table, "--column", "id", "--type", "no").startswith("lance-ray: --type ")
    index = ("index", "create", table, "--column", "id", "--type", "btree")
    assert refusal(*index, "--option", "no=1").startswith("lance-ray: --option no=1: ")
    assert "_In" not in refusal("search", table, "--text", "fox", "--text-columns", "id")


def test_a_copy_with_a_job_id_is_done_once(table: str, tmp_path: Path):
    for skipped in (False, True):
        assert told("copy", table, str(tmp_path / "copy"), "--job-id", "nightly")["skipped"] is skipped
    assert lance.dataset(str(tmp_path / "copy")).count_rows() == 20


def test_tables_of_a_catalog_are_named_by_their_parts(tmp_path: Path):
    place: dict[str, Any] = {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}}
    lance_ray.create_table(data=pa.table({"id": [1, 2]}), table_id=["things"], **place)
    options = ("--namespace-impl", "dir", "--namespace-property", f"root={tmp_path}", "--table-id", "things")
    found = told("info", *options)
    assert (found["rows"], found["table_id"]) == (2, ["things"])


def test_secrets_come_from_the_environment_and_are_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_SECRET", "wJalrXUtnFEMI")
    options = ("--storage-option", "aws_secret_access_key=env:MY_SECRET")
    assert cli._pairs("--storage-option", options[1:]) == {"aws_secret_access_key": "wJalrXUtnFEMI"}
    more = ("aws_region=us-east-1", "aws_access_key_id=x", "aws_endpoint=http://127.0.0.1:9", "allow_http=true")
    result = CliRunner().invoke(
        cli.app, ["info", "s3://bucket/table", *options, *(f"--storage-option={item}" for item in more), "--json"]
    )
    assert result.exit_code == cli.STORAGE
    assert json.loads(result.stderr)["error"] == "StorageError"
    assert "wJalrXUtnFEMI" not in result.output + result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("the disk is full", kind="full"), cli.STORAGE),
        (CommitConflictError("others won", retryable=True), cli.CONFLICT),
        (CommitOutcomeUnknownError("no answer", operation_id="x"), cli.UNKNOWN),
        (LanceRayError("something else"), cli.FAILED),
        (RuntimeError("no error of the package"), cli.FAILED),
        (KeyboardInterrupt(), cli.INTERRUPTED),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    table: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
):
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(lance_ray, "table_health", fail)
    run("health", table, code=code)


def commands() -> dict[str, Any]:
    """Each command with its parameters."""
    group: Any = typer.main.get_command(cli.app)
    found = {name: item for name, item in group.commands.items() if name != "index"}
    return found | {f"index {name}": item for name, item in group.commands["index"].commands.items()}


@pytest.mark.parametrize("name", commands())
def test_every_command_takes_a_cluster_and_prints_json_on_demand(name: str):
    options = {option for item in commands()[name].params for option in item.opts}
    assert {"--address", "--json", "--storage-option"} <= options


def test_a_command_that_needs_no_ray_is_run_by_a_task_of_the_cluster_that_is_named(
    table: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(table).parent)
    there = ("--address", "auto")
    for words in (("info",), ("health",), ("index", "list"), ("cleanup", "--older-than", "1d", "--dry-run")):
        here = told(*words, Path(table).name)
        with monkeypatch.context() as patch:
            patch.setattr(PinnedTable, "open_at", lambda *_: pytest.fail("opened here"))
            assert told(*words, Path(table).name, *there) == here
    refusal("info", f"{table}x", *there, code=cli.NOT_FOUND)
    refusal("index", "drop", table, "--name", "nope", *there)


def test_a_missing_table_and_a_bad_option_are_told_apart(table: str, tmp_path: Path):
    run("info", str(tmp_path / "none"), code=cli.NOT_FOUND)
    run("health", table, "--version", "99", code=cli.NOT_FOUND)
    run("health", table, "--storage-option", "novalue", code=cli.BAD_ARGUMENT)
    run("health", table, "--no-such-option", code=2)
    assert "compact" in run("--help")


def test_a_compaction_that_failed_in_part_says_so_by_its_exit_code(table: str, monkeypatch: pytest.MonkeyPatch):
    failure = lance_ray.CompactionFailure((0, 1), 10, lance_ray.TaskFailedError("rewrite 0", 3, "no memory"))
    report = lance_ray.CompactionReport(table, failures=(failure,))
    monkeypatch.setattr(lance_ray, "compact_files", lambda **_: report)
    run("compact", table, code=cli.PARTIAL)


@pytest.mark.slow
def test_the_installed_command_prints_nothing_but_its_result(table: str):
    command = [str(Path(sys.executable).with_name("lance-ray")), "info", table, "--json"]
    if not Path(command[0]).exists():  # a checkout that was not installed since the command came
        command[:1] = [sys.executable, "-m", "lance_ray.cli"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 20


@pytest.mark.slow
def test_the_command_says_how_to_install_what_it_needs():
    script = "import sys; sys.modules['typer'] = None; from lance_ray.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lance-ray: the command line needs typer: pip install 'lance-ray[cli]'\n"


@pytest.mark.slow
def test_the_installed_command_runs_in_a_process_with_a_ray_of_its_own(table: str, tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = "/tmp"
    command = [sys.executable, "-m", "lance_ray.cli", "copy", table, str(tmp_path / "copy"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 20
    assert lance.dataset(str(tmp_path / "copy")).count_rows() == 20
