"""What implementations of Lance Namespaces do each in their own way: how they are installed, fail, list and are shared.

The plugins of catalogs (``lance-namespace-impls``, ``lance-dlf``) raise types of their own, or plain errors with a
text. Here alone it is decided what any of it means. It matters most for one answer: only "there is no such table" lets
a write create one, and a catalog that is down, refuses, or says anything that is not known never counts as that.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lance_namespace
from lance_namespace import errors as namespace_errors

from lance_ray.errors import (
    InvalidArgumentError,
    LanceRayError,
    StorageError,
    StorageErrorKind,
    TableExistsError,
    TableNotFoundError,
    UnsupportedCallError,
    storage_error_kind,
    tidy,
)

PACKAGES = {
    **dict.fromkeys(("glue", "hive2", "hive3", "polaris", "unity"), "lance_namespace_impls"),
    "dlf": "lance_dlf",
}
"""Which package an implementation comes from, and registers itself with when it is imported."""

_Meaning = Literal["no table", "a table", "no namespace", "unsupported", "refused"]

_BY_TYPE: tuple[tuple[type[Exception], _Meaning], ...] = (
    (namespace_errors.TableNotFoundError, "no table"),
    (namespace_errors.TableAlreadyExistsError, "a table"),
    (namespace_errors.NamespaceNotFoundError, "no namespace"),
    (namespace_errors.UnsupportedOperationError, "unsupported"),
    (NotImplementedError, "unsupported"),
    (namespace_errors.InvalidInputError, "refused"),
)
# Types of the plugins, which need not be installed.
_BY_NAME: dict[str, _Meaning] = {
    "TableNotFoundException": "no table",
    "TableAlreadyExistsException": "a table",
    "NamespaceNotFoundException": "no namespace",
    "InvalidInputException": "refused",
}
# Of errors that say it only in words, and stand at the beginning: what a server's answer quotes decides nothing.
_BY_TEXT: tuple[tuple[re.Pattern[str], _Meaning], ...] = (
    (re.compile(r"Table (?:does not exist|\[?.*\]? does not exist|not found)", re.IGNORECASE), "no table"),
    (re.compile(r"Table (?:already exists|\[?.*\]? already exists)", re.IGNORECASE), "a table"),
    (re.compile(r"\w+ identifier must have|Glue namespace requires|Invalid (?:namespace )?identifier"), "refused"),
)
_OTHER_FORMAT = re.compile(r"is not a lance table", re.IGNORECASE)
_UNITY_EXISTS = re.compile(r'"error_code"\s*:\s*"(?:[A-Z]+_)?ALREADY_EXISTS"')  # with whichever HTTP status

_KINDS: tuple[tuple[type[Exception], StorageErrorKind], ...] = (
    (namespace_errors.PermissionDeniedError, "denied"),
    (namespace_errors.UnauthenticatedError, "denied"),
    (namespace_errors.ThrottlingError, "transient"),
    (namespace_errors.ServiceUnavailableError, "transient"),
    (namespace_errors.NamespaceNotFoundError, "missing"),
)
_KINDS_BY_NAME: dict[str, StorageErrorKind] = {
    **dict.fromkeys(("NotAuthorizedException", "ForbiddenException"), "denied"),
    **dict.fromkeys(("ServiceUnavailableException", "ServiceFailureException"), "transient"),
    **dict.fromkeys(("NamespaceNotFoundException", "EntityNotFoundException", "NoSuchResourceException"), "missing"),
    **dict.fromkeys(("NoSuchObjectException", "InvalidObjectException"), "missing"),  # both of Hive
}
_HTTP_STATUS = re.compile(r"(?:status=|HTTP )(\d{3})\b")
_STATUS_KINDS: dict[str, StorageErrorKind] = {"401": "denied", "403": "denied", "404": "missing", "429": "transient"}
_NO_NAMESPACE = re.compile(r"Namespace .*does not exist")
_NOT_SENT = re.compile(r"tcp connect error")  # of the engine's client, which tries once
_NO_CONNECTION = re.compile(r"Could not connect to (?:any of|the endpoint)|Failed to establish a new connection")


def connect(impl: str, properties: dict[str, str], secrets: Iterable[str]) -> Any:
    """A namespace of a registered name or a class path.

    Raises:
        InvalidArgumentError: there is none, its package is missing, or it refuses the properties.
        StorageError: it asked its server, which did not answer or refused.
    """
    package = PACKAGES.get(impl)
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError:
            wanted = "lance-dlf" if impl == "dlf" else f"lance-namespace-impls[{impl}]"
            raise InvalidArgumentError(
                "namespace_impl", impl, f"needs the package {package!r}: pip install '{wanted}'"
            ) from None
    try:
        return lance_namespace.connect(impl, properties)
    except Exception as error:  # noqa: BLE001  # implementations raise what they like while they connect
        message = _message(error, secrets)
        kind = next((kind for led in _chain(error) if (kind := _known_kind(led, str(led))) is not None), None)
        if kind is not None:
            raise StorageError(f"connect to {impl}: {message}", kind=kind, target=impl) from None
        raise InvalidArgumentError("namespace_impl", impl, f"cannot be connected: {message}") from None


def for_one_call(namespace: Any) -> Any:
    """The object to call: those of Hive keep the connection of the call that runs, so each call has a copy."""
    return copy.copy(namespace) if type(namespace).__name__ in ("Hive2Namespace", "Hive3Namespace") else namespace


def lister(namespace: Any) -> Callable[[list[str]], list[str]] | None:
    """A function that lists all tables of a namespace, for plugins that keep the first page and drop the rest."""
    listers = {"DLFNamespace": ("_api", _dlf_tables), "UnityNamespace": ("rest_client", _unity_tables)}
    attribute, function = listers.get(type(namespace).__name__, ("", None))
    if function is None or not hasattr(namespace, attribute):
        return None
    return lambda database: function(namespace, database)


def _dlf_tables(namespace: Any, database: list[str]) -> list[str]:
    found: list[str] = []
    token: str | None = None
    while True:
        page = namespace._api.list_tables_paged(
            namespace._resolve_namespace(database), page_token=token, table_type="lance-table"
        )
        found += page.elements
        if not page.next_page_token or page.next_page_token == token:
            return found
        token = page.next_page_token


def _unity_tables(namespace: Any, database: list[str]) -> list[str]:
    if len(database) != 2:
        raise InvalidArgumentError("namespace_id", database, "must be the names of a catalog and a schema")
    asked = {"catalog_name": database[0], "schema_name": database[1]}
    found: list[str] = []
    token = ""
    while True:
        page = namespace.rest_client.get("/tables", {**asked, **({"page_token": token} if token else {})}) or {}
        found += [item["name"] for item in page.get("tables") or () if _is_lance(item.get("properties") or {})]
        if not page.get("next_page_token") or page["next_page_token"] == token:
            return found
        token = page["next_page_token"]


def _is_lance(properties: dict[str, Any]) -> bool:
    return str(properties.get("table_type")).lower() == "lance"


def translated(
    error: Exception, table_id: tuple[str, ...], what: str, target: str, secrets: Iterable[str]
) -> LanceRayError:
    """The error of this package for whatever an implementation raised.

    Args:
        error: what it raised.
        table_id: the table or the namespace that was asked for.
        what: what was asked, beginning with the method's name.
        target: the table, for messages.
        secrets: values that must not appear in a message.
    """
    message = _message(error, secrets)
    meaning = _meaning(error, message)
    if meaning == "no namespace" and what.startswith("describe_table"):
        meaning = "no table"
    if meaning == "no table":
        return TableNotFoundError(target)
    if meaning == "a table":
        return TableExistsError(target)
    if meaning == "unsupported":
        return UnsupportedCallError(f"{what}: {message}")
    if meaning == "refused":
        return InvalidArgumentError("table_id", list(table_id), message)
    return StorageError(f"{what}: {message}", kind=_known_kind(error, message) or "unreachable", target=target)


def failure_kind(error: BaseException) -> StorageErrorKind | None:
    """What kind of failure of the catalog an implementation raised; None for an answer, and for any other error."""
    message = str(error)
    return _known_kind(error, message) if _meaning(error, message) is None else None


def was_not_sent(error: BaseException) -> bool:
    """Whether a call certainly did not reach the catalog, so that it may be repeated whatever it does."""
    return _NOT_SENT.search(str(error)) is not None


def _meaning(error: BaseException, message: str) -> _Meaning | None:
    if _OTHER_FORMAT.search(message):  # which DLF raises as a table that is not there
        return "refused"
    for cls, meaning in _BY_TYPE:
        if isinstance(error, cls):
            return meaning
    name = type(error).__name__
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name == "InternalException" and _UNITY_EXISTS.search(message):
        return "a table"
    if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, namespace_errors.LanceNamespaceError):
        return next((meaning for pattern, meaning in _BY_TEXT if pattern.match(message)), None)
    return None


def _known_kind(error: BaseException, message: str) -> StorageErrorKind | None:
    """What kind of failure it is; None where nothing tells."""
    if storage_error_kind(message) == "unreachable" or _NO_CONNECTION.search(message):
        return "unreachable"  # before its type, since a refused connection is "unavailable" too
    kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), None)
    kind = kind or _KINDS_BY_NAME.get(type(error).__name__)
    if kind is None and storage_error_kind(message) == "denied":
        return "denied"
    if kind is None and _NO_NAMESPACE.match(message):
        return "missing"
    status = _HTTP_STATUS.search(message)
    if kind is None and status is not None:
        return _STATUS_KINDS.get(status[1], "transient" if status[1].startswith("5") else "other")
    return kind


def _message(error: Exception, secrets: Iterable[str]) -> str:
    """What it says, and what led to it where it does not say so itself, as the client of DLF does not."""
    message = ""
    for led in _chain(error):
        if str(led) not in message:
            message += f": {led}" if message else str(led)
    return tidy(message, secrets)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it, a few steps back."""
    found = [error]
    while (led := found[-1].__cause__ or found[-1].__context__) is not None and len(found) < 5:
        found.append(led)
    return found
