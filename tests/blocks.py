"""Rows to write, what a write leaves on disk, and stores that fail: shared by the tests of writing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import ray.data
from ray.data import Dataset

from lance_ray.options import WriteOptions
from lance_ray.table import TableRef, WriteTarget
from lance_ray.write import WriteSpec
from tests.leaks import secret

SECRET = secret("a secret of writing", "wJalrXUtnFEMIbPxRfiCY")
"""The key of every store that these tests pretend to have."""

TYPED = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])


def rows(first: int, count: int) -> pa.Table:
    """Rows with the ids ``first`` and up, and a text that follows from the id."""
    ids = range(first, first + count)
    return pa.table({"id": list(ids), "text": [f"row {number}" for number in ids]}, schema=TYPED)


def dataset(*blocks: Any) -> Dataset:
    """A dataset of exactly these blocks (Arrow or pandas)."""
    if all(isinstance(block, pa.Table) for block in blocks):
        return ray.data.from_arrow(list(blocks))
    return ray.data.from_pandas(list(blocks))


def produced(blocks: Callable[[int], Any], count: int) -> Dataset:
    """A dataset whose blocks come from ``blocks(0)`` to ``blocks(count - 1)`` on the workers, one by one."""
    return ray.data.range(count, override_num_blocks=count).map_batches(
        lambda batch: blocks(int(batch["id"][0])), batch_size=None
    )


def ids_of(uri: Any, version: int | None = None) -> list[int]:
    """The column ``id`` of a table, in table order."""
    found: list[int] = lance.dataset(str(uri), version).to_table(columns=["id"]).column("id").to_pylist()
    return found


def written_rows(uri: Any) -> list[dict[str, Any]]:
    """All rows of a table, in table order."""
    found: list[dict[str, Any]] = lance.dataset(str(uri)).to_table().to_pylist()
    return found


def rows_per_file(uri: Any) -> list[int]:
    """The rows of each fragment, in table order."""
    return [fragment.count_rows() for fragment in lance.dataset(str(uri)).get_fragments()]


def versions(uri: Any) -> list[int]:
    """The versions of a table."""
    return [item["version"] for item in lance.dataset(str(uri)).versions()]


def transaction(uri: Any, version: int) -> lance.Transaction:
    """The transaction that made a version."""
    found = lance.dataset(str(uri)).read_transaction(version)
    assert found is not None
    return found


def files_below(folder: Any) -> set[str]:
    """Every file below a folder, relative to it; empty when there is no folder."""
    root = Path(folder)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def data_files(uri: Any) -> set[str]:
    """The names of the data files on disk."""
    return {path.name for path in (Path(uri) / "data").glob("*.lance")}


def referenced_files(uri: Any) -> set[str]:
    """The names of the data files that some version refers to."""
    table = lance.dataset(str(uri))
    fragments = [item for number in versions(uri) for item in table.checkout_version(number).get_fragments()]
    return {Path(file.path).name for fragment in fragments for file in fragment.metadata.files}


def assert_nothing_left_over(uri: Any) -> None:
    """On disk are the files that versions refer to, all of them and no other, and no ledger."""
    assert data_files(uri) == referenced_files(uri)
    assert not (Path(uri) / "_lance_ray").exists()


def assert_no_table(uri: Any) -> None:
    """At the address is nothing at all, no data files and no ledger either."""
    assert files_below(uri) == set()


def spec_for(uri: Any, mode: str = "create", *, schema: pa.Schema | None = None, **options: Any) -> WriteSpec:
    """What the tasks of a write to this address share, with no ledger."""
    target = WriteTarget.resolve(TableRef.fold(str(uri), {}), mode)
    return WriteSpec(target, WriteOptions(mode, schema, **options), target.schema if mode == "append" else schema)


def s3_options(port: int, **more: str) -> dict[str, str]:
    """Storage options for a server on this machine that speaks S3, or should."""
    return {
        "aws_access_key_id": "AKIDOFTHETESTS",
        "aws_secret_access_key": SECRET,
        "aws_session_token": f"session-{SECRET}",
        "aws_region": "us-east-1",
        "aws_endpoint": f"http://127.0.0.1:{port}",
        "allow_http": "true",
        **more,
    }


def dead_s3() -> dict[str, str]:
    """Storage options for an endpoint where nobody listens."""
    return s3_options(9)


_ANSWERS = {
    403: "<Code>AccessDenied</Code><Message>Access Denied</Message>",
    404: "<Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message>",
    503: "<Code>SlowDown</Code><Message>Please reduce your request rate</Message>",
}


@contextmanager
def s3_answering(status: int) -> Iterator[dict[str, str]]:
    """Storage options for a server that gives every request the same answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error>{_ANSWERS[status]}</Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - the names that the base class looks for

        def log_message(self, *args: Any) -> None:
            """Nothing, instead of a line on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield s3_options(server.server_port, client_max_retries="1")
        server.shutdown()
