"""Namespaces for the tests: one that vends credentials which expire, and one that a user might have written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lance
import lance_namespace
from lance_namespace import (
    DeclareTableRequest,
    DeclareTableResponse,
    DescribeTableRequest,
    DescribeTableResponse,
    ListTablesRequest,
    ListTablesResponse,
)
from lance_namespace.errors import ServiceUnavailableError, TableAlreadyExistsError, TableNotFoundError

from tests.leaks import secret

VENDED = secret("a vended key", "vended-secret-access-key")


class Own(lance_namespace.LanceNamespace):
    """Tables below a folder, known by files of their names; with a password that must not come out. Pickles."""

    def __init__(self, root: str, password: str = "") -> None:
        self.root, self.password = root, password

    def namespace_id(self) -> str:
        return f"Own({self.root})"

    def _entry(self, table_id: list[str]) -> Path:
        return Path(self.root) / f"{'.'.join(table_id)}.entry"

    def describe_table(self, request: DescribeTableRequest) -> DescribeTableResponse:
        assert request.id is not None  # a plugin is given requests, whoever asks
        entry = self._entry(request.id)
        if not entry.exists():
            raise TableNotFoundError(f"no {request.id} for {self.password}")
        return DescribeTableResponse(location=entry.read_text(), storage_options=self.vended())

    def declare_table(self, request: DeclareTableRequest) -> DeclareTableResponse:
        assert request.id is not None
        entry = self._entry(request.id)
        if entry.exists():
            raise TableAlreadyExistsError(f"{request.id} exists")
        entry.parent.mkdir(parents=True, exist_ok=True)
        location = request.location or self.location(request.id)
        entry.write_text(location)
        return DeclareTableResponse(location=location, storage_options=self.vended())

    def list_tables(self, request: ListTablesRequest) -> ListTablesResponse:
        names = sorted(path.name.removesuffix(".entry") for path in Path(self.root).glob("*.entry"))
        prefix = "".join(f"{part}." for part in request.id or [])
        return ListTablesResponse(tables=[name.removeprefix(prefix) for name in names if name.startswith(prefix)])

    def location(self, table_id: list[str]) -> str:
        return str(Path(self.root) / f"{'.'.join(table_id)}.lance")

    def vended(self) -> dict[str, str] | None:
        return None


class Vending(Own):
    """Tables on S3, with keys that say in their name when they end. ``log`` counts how often it was asked.

    While there is a file ``down`` it does not answer.
    """

    def __init__(self, root: str, bucket: str, endpoint: str, life: str, log: str, down: str = "") -> None:
        super().__init__(root)
        self.down = down
        self.bucket, self.endpoint, self.life, self.log = bucket, endpoint, float(life), Path(log)

    def location(self, table_id: list[str]) -> str:
        return f"s3://{self.bucket}/{'/'.join(table_id)}"

    def vended(self) -> dict[str, str]:
        if self.down and Path(self.down).exists():
            raise ServiceUnavailableError("the catalog is down")
        with self.log.open("a") as file:
            file.write("asked\n")
        ends = int((time.time() + self.life) * 1000)
        return {
            "aws_access_key_id": f"KEY{ends}",
            "aws_secret_access_key": VENDED,
            "aws_region": "us-east-1",
            "aws_endpoint": self.endpoint,
            "allow_http": "true",
            "expires_at_millis": str(ends),
        }


def is_alive(key: str) -> bool:
    """Whether a key that :class:`Vending` vended has not ended."""
    return key.startswith("KEY") and time.time() * 1000 < int(key.removeprefix("KEY"))


class Failing(lance_namespace.LanceNamespace):
    """Raises what it is told to, as plugins do."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def namespace_id(self) -> str:
        return "Failing"

    def describe_table(self, request: Any) -> Any:
        raise self.error

    def declare_table(self, request: Any) -> Any:
        raise self.error


class Hanging(lance_namespace.LanceNamespace):
    """Does not answer."""

    def namespace_id(self) -> str:
        return "Hanging"

    def describe_table(self, request: Any) -> Any:
        time.sleep(30)
        raise AssertionError


def tables_at(uri: str) -> list[dict[str, Any]]:
    """The rows of a table, by plain pylance."""
    found: list[dict[str, Any]] = lance.dataset(uri).to_table().to_pylist()
    return found
