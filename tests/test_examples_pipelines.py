"""The examples after the quickstart: each does what it shows, at small size."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lance
import pytest

from examples import backfill, documents, ingest, job, neighbors

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]
on_ray = pytest.mark.usefixtures("ray_session")


@on_ray
def test_documents_become_blobs_and_paragraphs_and_a_question_finds_its_place(tmp_path, capsys):
    source = tmp_path / "notes"
    source.mkdir()
    (source / "a.md").write_text("the lease is renewed by hand\n\nnothing to see here\n\n")
    (source / "b.txt").write_text("cats and dogs\n\nrain and snow")
    arguments = ["--input", str(source), "--output", str(tmp_path), "--question", "how the lease is renewed"]
    documents.main(arguments)
    output = capsys.readouterr().out.splitlines()
    assert [line.split() for line in output[:2]] == [["files", "2"], ["paragraphs", "4"]]
    assert output[4].endswith("a.md: the lease is renewed by hand")
    files = lance.dataset(str(tmp_path / "files.lance"))
    assert sorted(len(data or b"") for _, data in files.read_blobs("content", indices=[0, 1])) == [28, 51]


@on_ray
def test_neighbours_are_found_and_label_new_rows(capsys):
    neighbors.main(["--rows", "600"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nearest to a fish:    Counter({'fish': 5})"
    assert lines[1].startswith("the nearest birds:    5 at")
    assert lines[2] == "nearest to each kind: ['bird', 'fish', 'plant']"
    assert lines[3] == "labelled by a vote:   200 of 200 right"


@on_ray
def test_a_backfill_goes_on_where_it_broke(capsys):
    backfill.main([])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"first run    \w+Error; the table is as it was: \['id', 'price'\]", lines[0])
    found = re.fullmatch(r"second run   8 fragments, of which (\d) were finished before", lines[1])
    assert found
    assert int(found[1]) > 0
    assert lines[2] == "what is new  100 rows"


@on_ray
def test_batches_land_once_and_the_table_stays_in_shape(capsys):
    ingest.main(["--batches", "5", "--every", "2"])
    output = capsys.readouterr().out
    assert output.count("batch ") == 5
    assert "published: 400 rows; appended: 500" in output
    assert "500 rows" in output
    assert "2 fragment(s)" in output


@on_ray
def test_a_job_prints_its_report_and_is_done_once(tmp_path, capsys):
    for skipped in (False, True):
        job.main(["--table", str(tmp_path / "numbers"), "--rows", "10", "--job-id", "one"])
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (report["skipped"], report["version"]) == (skipped, 1)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True)
class Cluster:
    """A Ray of its own, and the environment in which commands reach it."""

    dashboard: str
    environment: dict[str, str] = field(repr=False)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, gcs = free.getsockname()[1], other.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")
    # Ray asks for a token wherever the user has one: a cluster of a test has its own, and leaves the user's alone.
    token = Path(folder) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={port}", "--num-cpus=2"]
    command += ["--disable-usage-stats", f"--temp-dir={folder}/ray", "--dashboard-host=127.0.0.1"]
    log = Path(folder) / "head.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=environment, start_new_session=True, stdout=out, stderr=out) as head,
    ):
        try:
            deadline = time.monotonic() + 90
            while not answers(port):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield Cluster(f"http://127.0.0.1:{port}", environment)
        finally:
            head.send_signal(signal.SIGTERM)  # ends all that it started
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_job_is_submitted_to_a_cluster(cluster: Cluster, tmp_path: Path):
    table = str(tmp_path / "numbers")
    program = [sys.executable, str(ROOT / "examples/job.py")]

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", "--address", cluster.dashboard, "--", *program, *arguments]
        deadline = time.monotonic() + 90
        while True:
            done = subprocess.run(
                command, env=cluster.environment, capture_output=True, text=True, timeout=120, check=False
            )
            # The dashboard answers before the agent that starts jobs is there.
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    for _ in range(2):
        done = submit("--table", table, "--rows", "100", "--job-id", "one")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout
        assert lance.dataset(table).version == 1
    assert lance.dataset(table).count_rows() == 100
    assert submit("--no-such").returncode != 0
