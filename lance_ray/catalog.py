"""The only place that talks to Lance Namespaces: connect, describe, declare, and whose storage options win."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from typing import Any

import lance_namespace
from lance_namespace import errors as namespace_errors

from lance_ray.errors import (
    InvalidArgumentError,
    LanceRayError,
    StorageError,
    StorageErrorKind,
    TableExistsError,
    TableNotFoundError,
    redact,
    storage_error_kind,
)
from lance_ray.options import Pairs

_CACHE_SIZE = int(os.environ.get("LANCE_RAY_NAMESPACE_CACHE_SIZE", "16"))


@dataclass(frozen=True, slots=True)
class NamespaceRef:
    """Which namespace: hashable, so that each process keeps one client, and shipped to workers instead of a client."""

    impl: str
    properties: Pairs = field(default=(), repr=False)

    def client(self) -> Any:
        """The connected client of this process."""
        return _client(self)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that may be credentials, for :func:`lance_ray.errors.redact`."""
        return tuple(value for key, value in self.properties if _SECRET_KEY.search(key))


_SECRET_KEY = re.compile(r"key|secret|token|password|credential|auth|header|sas|signature", re.IGNORECASE)


def secret_values(options: Pairs | None) -> tuple[str, ...]:
    """The values of storage options that may be credentials."""
    return tuple(value for key, value in options or () if _SECRET_KEY.search(key))


@functools.lru_cache(maxsize=max(1, _CACHE_SIZE))
def _client(ref: NamespaceRef) -> Any:
    try:
        return lance_namespace.connect(ref.impl, dict(ref.properties))
    except (ValueError, ImportError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            "namespace_impl", ref.impl, f"cannot be connected: {redact(str(error), ref.secrets)}"
        ) from None


@dataclass(frozen=True, slots=True)
class TableLocation:
    """What a namespace says of a table: where it lies, with which options, and who keeps its versions."""

    uri: str
    storage_options: Pairs | None = field(default=None, repr=False)
    managed_versioning: bool = False


def describe(ref: NamespaceRef, table_id: tuple[str, ...]) -> TableLocation:
    """Where the table is, with vended credentials asked for.

    Raises:
        TableNotFoundError: the namespace answered that there is no such table.
        StorageError: it did not answer, or refused.
    """
    request = lance_namespace.DescribeTableRequest(id=list(table_id), vend_credentials=True)
    return _location(_call(ref, table_id, "describe_table", request))


def declare(ref: NamespaceRef, table_id: tuple[str, ...]) -> TableLocation:
    """Reserve a table that does not exist yet, and where it shall lie. Raises TableExistsError when it does."""
    request = lance_namespace.DeclareTableRequest(id=list(table_id), vend_credentials=True)
    return _location(_call(ref, table_id, "declare_table", request))


def list_tables(ref: NamespaceRef, database: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The ids of all tables directly in a namespace, in the order that it names them.

    Raises:
        StorageError: it did not answer, or refused, or there is no such namespace.
    """
    found: list[tuple[str, ...]] = []
    token = None
    while True:
        request = lance_namespace.ListTablesRequest(id=list(database), page_token=token, include_declared=False)
        response = _call(ref, database, "list_tables", request)
        found += [(*database, str(name)) for name in response.tables]
        token = response.page_token
        if not token:
            return found


def merge_options(callers: Pairs | None, vended: Pairs | None) -> Pairs | None:
    """The caller's options with the namespace's on top; None, never empty, when there are none."""
    return tuple(sorted({**dict(callers or ()), **dict(vended or ())}.items())) or None


def _location(response: Any) -> TableLocation:
    if not response.location:
        raise LanceRayError("the namespace gave no location for the table")
    options = tuple(sorted((str(k), str(v)) for k, v in (response.storage_options or {}).items())) or None
    return TableLocation(response.location, options, getattr(response, "managed_versioning", None) is True)


_KINDS: tuple[tuple[type[Exception], StorageErrorKind], ...] = (
    (namespace_errors.PermissionDeniedError, "denied"),
    (namespace_errors.UnauthenticatedError, "denied"),
    (namespace_errors.ThrottlingError, "transient"),
    (namespace_errors.ServiceUnavailableError, "transient"),
    (namespace_errors.NamespaceNotFoundError, "missing"),
)


def _call(ref: NamespaceRef, table_id: tuple[str, ...], method: str, request: Any) -> Any:
    target = f"{ref.impl} namespace table {'.'.join(table_id)}"
    client = ref.client()
    try:
        return getattr(client, method)(request)
    except namespace_errors.TableNotFoundError:
        raise TableNotFoundError(target) from None
    except namespace_errors.TableAlreadyExistsError:
        raise TableExistsError(target) from None
    except namespace_errors.InvalidInputError as error:
        raise InvalidArgumentError("table_id", list(table_id), redact(str(error), ref.secrets)) from None
    except (namespace_errors.LanceNamespaceError, OSError, RuntimeError, ValueError) as error:
        # Implementations raise what their client library raises; whatever it is, the catalog did not do its part.
        message = redact(str(error), ref.secrets)
        kinds: list[StorageErrorKind] = [kind for cls, kind in _KINDS if isinstance(error, cls)]
        if not kinds or storage_error_kind(message) == "unreachable":  # a refused connection is "unavailable" too
            kinds = ["unreachable"]
        raise StorageError(f"{method} of {target}: {message}", kind=kinds[0], target=target) from None
