"""Places for tables, on disk and behind a faulty S3, and what must be true of a table after any fault."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import boto3
import lance
import pyarrow as pa
import pytest

from lance_ray.ledger import FOLDER, JobRef, WrittenPath
from lance_ray.table import PinnedTable, TableRef
from tests.faults.proxy import FaultProxy
from tests.leaks import secret

SECRET = secret("the key of the S3 server", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY")
KEY_ID = "AKIAEXAMPLEKEYID1234"
BUCKET = "faults"


@dataclass(frozen=True)
class S3:
    """An S3 server in this process, and the proxy that everything but these tests' own checks goes through."""

    proxy: FaultProxy
    server: str

    def options(self, **changes: str) -> dict[str, str]:
        """Storage options that lead to the proxy."""
        return {
            "aws_access_key_id": KEY_ID,
            "aws_secret_access_key": SECRET,
            "aws_region": "us-east-1",
            "aws_endpoint": self.proxy.url,
            "allow_http": "true",
        } | changes

    def client(self) -> Any:
        """A client of the server itself, past the proxy."""
        keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.server, **keys)

    def keys(self, prefix: str) -> set[str]:
        """The objects below a prefix, relative to it."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return {item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", ())}


@dataclass(frozen=True)
class Place:
    """An address where a table is, or will be; how to reach it; and the server behind it, if any."""

    uri: str
    options: dict[str, str] | None = field(default=None, repr=False)
    s3: S3 | None = None

    @property
    def to(self) -> dict[str, Any]:
        """The address as the keywords of ``read_lance`` and ``write_lance``."""
        return {"uri": self.uri, "storage_options": self.options}

    @property
    def impatient(self) -> Place:
        """The same place with an engine that gives up at the first failure of a request."""
        return Place(self.uri, (self.options or {}) | {"client_max_retries": "0"}, self.s3)

    def pinned(self) -> PinnedTable:
        """The address for the parts of the package below its public functions."""
        return TableRef.fold(self.uri, {"storage_options": self.options}).unpinned()

    def job(self, job_id: str = "job", since: int = 0) -> JobRef:
        """A run of a job at this place."""
        return JobRef(self.pinned(), job_id, since)

    def open(self, version: int | None = None) -> lance.LanceDataset:
        """The table by plain pylance, past the proxy."""
        return lance.dataset(self.uri, version, storage_options=self._direct())

    def write(self, table: pa.Table, mode: str = "create", **options: Any) -> lance.LanceDataset:
        """Write by plain pylance, past the proxy."""
        return lance.write_dataset(table, self.uri, mode=mode, storage_options=self._direct(), **options)

    def _direct(self) -> dict[str, str] | None:
        return None if self.s3 is None else self.s3.options(aws_endpoint=self.s3.server)

    def ids(self) -> list[int]:
        """The oracle: the column ``id`` by plain pylance, sorted."""
        return sorted(self.open().to_table(columns=["id"]).column("id").to_pylist())

    def files(self) -> set[str]:
        """Everything below the address."""
        if self.s3 is not None:
            return self.s3.keys(self.uri.removeprefix(f"s3://{BUCKET}/"))
        root = Path(self.uri)
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def data_files(self) -> set[str]:
        """Every file in the data folder, whatever its name."""
        return {name for name in self.files() if name.startswith("data/")}

    def referenced(self) -> set[str]:
        """The data files that versions refer to."""
        versions = [self.open(item["version"]) for item in self.open().versions()]
        fragments = [fragment for version in versions for fragment in version.get_fragments()]
        return {f"data/{file.path}" for fragment in fragments for file in fragment.metadata.files}

    def orphans(self) -> set[str]:
        """Data files that no version refers to."""
        return self.data_files() - self.referenced()

    def ledger(self) -> set[str]:
        """What is left of ledgers."""
        return {name for name in self.files() if name.startswith(f"{FOLDER}/")}

    def put_data_file(self, number: int) -> WrittenPath:
        """A file as a worker would have left it, that no version refers to."""
        name = f"{number:032x}.lance"
        if self.s3 is not None:
            key = f"{self.uri.removeprefix(f's3://{BUCKET}/')}/data/{name}"
            self.s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"rows")
        else:
            folder = Path(self.uri) / "data"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"rows")
        return WrittenPath(name)

    def assert_holds(self, ids: Iterable[int]) -> None:
        """The table has exactly these rows, every data file belongs to it, no ledger is left, and it can be used."""
        expected = sorted(ids)
        assert self.ids() == expected
        assert self.orphans() == set()
        assert self.ledger() == set()
        schema = self.open().schema
        one_more = pa.table(
            [pa.array([-1 if item.name == "id" else None], item.type) for item in schema], schema=schema
        )
        usable = self.write(one_more, "append")
        assert usable.count_rows() == len(expected) + 1

    def assert_empty(self) -> None:
        """There is no table, and no file of one that was not to be."""
        assert self.data_files() | self.ledger() == set()
        assert not any(name.startswith("_versions/") for name in self.files())


def rows(first: int, count: int) -> pa.Table:
    """Rows with the ids ``first`` and up."""
    return pa.table({"id": pa.array(range(first, first + count), pa.int64())})


@contextmanager
def failing_with(*types: type[BaseException], match: str | None = None) -> Iterator[pytest.ExceptionInfo[Any]]:
    """As ``pytest.raises``; the error and all that led to it must not show a secret."""
    with pytest.raises(types, match=match) as caught:
        yield caught
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Fail when the block takes longer, however it ends."""
    started = monotonic()
    try:
        yield
    finally:
        took = monotonic() - started
        assert took < seconds, f"took {took:.1f} s, more than {seconds} s"
