"""The only place that talks to Lance Namespaces: connect, describe, declare, and whose storage options win.

Every process has one client for each namespace, wrapped (:class:`CatalogClient`) so that all implementations behave
alike: a call has a time limit, a question is asked again while a catalog that has answered before does not, errors
carry no secret, and what ``describe_table`` vended is asked for again only when it is about to expire, however many
readers and writers of the process want it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lance_namespace

from lance_ray import plugins
from lance_ray.errors import (
    UNAVAILABLE,
    InvalidArgumentError,
    LanceRayError,
    StorageError,
    UnsupportedCallError,
    redact,
)
from lance_ray.options import Pairs, check_mapping, normalize_uri, pairs
from lance_ray.retry import RetryPolicy

CALL_SECONDS = 120.0
"""How long one answer of a namespace is waited for, where nothing else is said."""

PATIENCE = RetryPolicy(max_attempts=8, max_delay=4.0, total_seconds=30.0)
"""How long a catalog that has answered before is asked again when it does not: 7 to 14 s where it refuses at once."""

_QUESTIONS = ("describe_", "list_")  # what the methods begin with that change nothing, and so may be called twice

EXPIRES, REFRESH_OFFSET = "expires_at_millis", "refresh_offset_millis"

_CACHE_SIZE = int(os.environ.get("LANCE_RAY_NAMESPACE_CACHE_SIZE", "16"))
_SECRET_KEY = re.compile(r"key|secret|token|password|credential|auth|header|sas|signature", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LanceRestConfig:
    """A REST namespace server, for ``rest://namespace/table`` addresses.

    Args:
        base_url: where the server is, with ``http://`` or ``https://``.
        api_key: sent as the header ``x-api-key``.
        timeout: seconds that one answer is waited for; 120 by default.
        headers: further headers of each request.

    Raises:
        InvalidArgumentError: no URL, or a timeout that is not positive.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base_url, str) or "://" not in self.base_url:
            raise InvalidArgumentError("base_url", self.base_url, "must be a URL with http:// or https://")
        if self.timeout is not None and not (isinstance(self.timeout, (int, float)) and self.timeout > 0):
            raise InvalidArgumentError("timeout", self.timeout, "must be more than 0 seconds")

    def namespace(self) -> NamespaceRef:
        """The namespace that the server is."""
        headers = {**(self.headers or {}), **({} if self.api_key is None else {"x-api-key": self.api_key})}
        named = {f"header.{name}": value for name, value in headers.items()}
        properties = pairs({"uri": self.base_url.rstrip("/"), **named}, "rest_config") or ()
        return NamespaceRef("rest", properties, timeout=self.timeout or CALL_SECONDS)


@dataclass(frozen=True, slots=True)
class NamespaceRef:
    """Which namespace: hashable, so that each process keeps one client, and shipped to workers instead of a client.

    A namespace object of the caller's is shipped itself where it pickles. Where it does not (those of the engine hold
    a connection), workers go by what the driver resolved, which is refused when that would expire.
    """

    impl: str
    properties: Pairs = field(default=(), repr=False)
    timeout: float = CALL_SECONDS
    token: str = ""
    """Tells one object of a caller's from another."""
    connected: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def fold(cls, impl: Any, properties: Any) -> NamespaceRef:
        """The namespace of a name, a class path or a connected object.

        Raises:
            InvalidArgumentError: it is none of these.
        """
        if isinstance(impl, NamespaceRef):
            return impl
        if isinstance(impl, str) and impl:
            check_mapping("namespace_properties", properties)
            given = dict(properties or {})
            if impl == "dir" and isinstance(given.get("root"), (str, os.PathLike)):
                given["root"] = normalize_uri(given["root"], "namespace_properties")  # the same on every node
            return cls(impl, pairs(given, "namespace_properties") or ())
        if not callable(getattr(impl, "describe_table", None)):
            allowed = "must be the name of an implementation, a class path, or a connected namespace"
            raise InvalidArgumentError("namespace_impl", type(impl).__name__, allowed)
        if isinstance(impl, CatalogClient):
            return impl.ref
        if properties:
            raise InvalidArgumentError("namespace_properties", sorted(properties), "the namespace is connected already")
        return cls(type(impl).__name__, token=f"{id(impl)}-{time.monotonic_ns()}", connected=impl)

    def __reduce__(self) -> tuple[Any, ...]:
        connected = self.connected if self.ships else None
        return NamespaceRef, (self.impl, self.properties, self.timeout, self.token, connected)

    @property
    def ships(self) -> bool:
        """Whether workers can have a client of this namespace."""
        return not self.token or (self.connected is not None and _pickles(self.connected))

    def client(self) -> CatalogClient | None:
        """The connected client of this process; None on a worker that cannot have one."""
        return None if self.token and self.connected is None else _client(self)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that may be credentials, for :func:`lance_ray.errors.redact`."""
        return secret_values(self.properties)


def secret_values(options: Pairs | None) -> tuple[str, ...]:
    """The values of storage options that may be credentials."""
    return tuple(value for key, value in options or () if _SECRET_KEY.search(key))


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001  # whatever an object of the caller's raises: it does not
        return type(value).__module__ == "__main__"  # Ray ships such a class by value
    return True


@functools.lru_cache(maxsize=max(1, _CACHE_SIZE))
def _client(ref: NamespaceRef) -> CatalogClient:
    return CatalogClient(ref, ref.connected if ref.token else _connect(ref))


def _connect(ref: NamespaceRef) -> Any:
    what = f"connect to {ref.impl}"
    return _within(lambda: plugins.connect(ref.impl, dict(ref.properties), ref.secrets), ref.timeout, what)


class CatalogClient(lance_namespace.LanceNamespace):
    """A namespace of any kind, for the package and for the engine alike.

    The engine calls it from threads of its own, with plain dicts in the place of requests.
    """

    def __init__(self, ref: NamespaceRef, inner: Any) -> None:
        self.ref = ref
        self._inner = inner
        self._lock = threading.Lock()
        self._asking: dict[tuple[str, ...], threading.Lock] = {}
        self._described: dict[tuple[str, ...], _Described] = {}
        self._answered = False
        """Whether it is there at all: only then does it make sense to wait for it."""

    @property
    def is_native(self) -> bool:
        """Whether it is the engine's own, which understands what the engine sends."""
        return type(self._inner).__module__.partition(".")[0] == "lance"

    @property
    def lister(self) -> Callable[[list[str]], list[str]] | None:
        """Lists all tables of a namespace, where the implementation itself would lose some."""
        call = plugins.lister(self._inner)
        if call is None:
            return None
        return lambda database: _within(lambda: call(database), self.ref.timeout, f"list_tables of {self.ref.impl}")

    def namespace_id(self) -> str:
        """Tells this client from one with other credentials, which the engine must not mix up."""
        text = repr((self.ref.properties, self.ref.token))
        return f"{self._inner.namespace_id()} {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def describe_table(self, request: Any) -> Any:
        """What the namespace says of a table; the last answer as long as its credentials last."""
        asked = _as_request("describe_table", request)
        key = (*asked.id, str(asked.version or ""))
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:  # one question for all that wait for the same answer; other tables do not wait
            known = self._described.get(key)
            if known is None or not known.is_fresh():
                known = self._described[key] = self._ask(asked)
        return known.unwrap()

    def fresh(self, method: str, request: Any) -> Any:
        """An answer of now, for what is decided by it. Raises what the implementation raises."""
        answer = self._within(method, request)
        if method == "describe_table":
            self._described[*request.id, str(request.version or "")] = _Described(answer, None)
        return answer

    def _ask(self, request: Any) -> _Described:
        try:
            return _Described(self._within("describe_table", request), None)
        except Exception as error:  # noqa: BLE001  # raised again for all who ask within a moment
            text = redact(f"{type(error).__name__}: {error}", self.ref.secrets)
            # The engine hands on no more than the text, and whether it may pass is not to be lost.
            passing = plugins.failure_kind(error) in ("transient", "unreachable")
            return _Described(None, RuntimeError(f"{UNAVAILABLE}{text}" if passing else text))

    def _within(self, method: str, request: Any) -> Any:
        what = f"{method} of {self.ref.impl}"

        def once() -> Any:
            call = getattr(plugins.for_one_call(self._inner), method)
            answer = _within(lambda: call(request), self.ref.timeout, what)
            self._answered = True
            return answer

        def may_pass(error: BaseException) -> bool:
            if not self._answered or isinstance(error, LanceRayError):  # what took too long is waited for once
                return False
            if not method.startswith(_QUESTIONS):
                return plugins.was_not_sent(error)
            return plugins.failure_kind(error) in ("transient", "unreachable")

        try:
            return PATIENCE.call(once, retry_on=may_pass, what=what, secrets=self.ref.secrets)
        except Exception as error:
            if may_pass(error):  # waited for in vain: until it answers again, that is told at once
                self._answered = False
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _client, (self.ref,)

    def __repr__(self) -> str:
        return f"CatalogClient({self.ref.impl!r})"


def _delegated(name: str) -> Callable[[CatalogClient, Any], Any]:
    def call(self: CatalogClient, request: Any) -> Any:
        return self._within(name, request if self.is_native else _as_request(name, request))

    return call


for _name in dir(lance_namespace.LanceNamespace):
    _takes = "".join(part.title() for part in _name.split("_")) + "Request"
    if _name != "describe_table" and hasattr(lance_namespace, _takes):
        setattr(CatalogClient, _name, _delegated(_name))


def _as_request(method: str, request: Any) -> Any:
    if hasattr(request, "id") or not isinstance(request, Mapping):
        return request
    kind = getattr(lance_namespace, "".join(part.title() for part in method.split("_")) + "Request")
    return kind.from_dict({key: value for key, value in request.items() if value is not None})


class _Described:
    """An answer, or a failure, and until when it holds."""

    _STATIC_SECONDS, _FAILED_SECONDS = 5.0, 1.0

    def __init__(self, answer: Any, failure: Exception | None) -> None:
        self._answer, self._failure = answer, failure
        now = time.time()
        options = (getattr(answer, "storage_options", None) or {}) if answer is not None else {}
        self._until = now + (self._STATIC_SECONDS if failure is None else self._FAILED_SECONDS)
        if EXPIRES in options:
            expires = int(options[EXPIRES]) / 1000
            self._until = expires - refresh_margin(expires - now)

    def is_fresh(self) -> bool:
        return time.time() < self._until

    def unwrap(self) -> Any:
        if self._failure is not None:
            raise self._failure
        return self._answer


def refresh_margin(lifetime: float) -> float:
    """How many seconds before their end credentials are renewed: a fifth of their life, a minute at most."""
    return max(0.0, min(60.0, lifetime / 5))


def _within(call: Callable[[], Any], seconds: float, what: str) -> Any:
    """The result of a call that may hang; its thread is left behind when it does.

    Raises:
        StorageError: no answer in time.
    """
    ended: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:  # noqa: BLE001  # raised again where the call was made
            ended.put((None, error))

    threading.Thread(target=run, name="lance-ray-namespace", daemon=True).start()
    try:
        result, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise StorageError(f"{what}: no answer within {seconds:g} s", kind="unreachable", target=what) from None
    if error is not None:
        raise error
    return result


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
    return _location(ref, _call(ref, table_id, "describe_table", request))


def declare(ref: NamespaceRef, table_id: tuple[str, ...], location: str | None = None) -> TableLocation:
    """Reserve a table that does not exist yet, and where it shall lie. Raises TableExistsError when it does."""
    request = lance_namespace.DeclareTableRequest(id=list(table_id), location=location, vend_credentials=True)
    return _location(ref, _call(ref, table_id, "declare_table", request))


def register(ref: NamespaceRef, table_id: tuple[str, ...], location: str) -> None:
    """Enter a table that exists into the namespace.

    Raises:
        TableExistsError: there is one of this id.
        StorageError: it did not answer, or refused.
    """
    request = lance_namespace.RegisterTableRequest(id=list(table_id), location=location)
    try:
        _call(ref, table_id, "register_table", request)
    except UnsupportedCallError:
        declare(ref, table_id, location)  # which is how implementations without the call take one


def drop(ref: NamespaceRef, table_id: tuple[str, ...]) -> None:
    """Remove a table and its files.

    Raises:
        TableNotFoundError: there is none.
        UnsupportedCallError: the implementation cannot.
    """
    _call(ref, table_id, "drop_table", lance_namespace.DropTableRequest(id=list(table_id)))


def deregister(ref: NamespaceRef, table_id: tuple[str, ...]) -> None:
    """Remove a table from the namespace, and leave its files."""
    _call(ref, table_id, "deregister_table", lance_namespace.DeregisterTableRequest(id=list(table_id)))


def list_tables(ref: NamespaceRef, database: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The ids of all tables directly in a namespace, in the order that it names them.

    Raises:
        StorageError: it did not answer, or refused, or there is no such namespace.
    """
    client = ref.client()
    pages = None if client is None else client.lister
    if pages is not None:
        return [(*database, name) for name in _asked(ref, database, "list_tables", lambda: pages(list(database)))]
    found: list[tuple[str, ...]] = []
    token = None
    # Others find out what is only declared by opening each table, without its credentials.
    declared = client is None or not client.is_native
    while True:
        request = lance_namespace.ListTablesRequest(id=list(database), page_token=token, include_declared=declared)
        response = _call(ref, database, "list_tables", request)
        found += [(*database, str(name)) for name in response.tables]
        if not response.page_token or response.page_token == token:
            return found
        token = response.page_token


def merge_options(callers: Pairs | None, vended: Pairs | None) -> Pairs | None:
    """The caller's options with the namespace's on top; None, never empty, when there are none."""
    return tuple(sorted({**dict(callers or ()), **dict(vended or ())}.items())) or None


def _location(ref: NamespaceRef, response: Any) -> TableLocation:
    if not response.location:
        raise LanceRayError("the namespace gave no location for the table")
    options = {str(key): str(value) for key, value in (response.storage_options or {}).items()}
    if EXPIRES in options:
        if not ref.ships:
            raise InvalidArgumentError(
                "namespace_impl",
                ref.impl,
                "vends credentials that expire, and this object cannot be sent to workers, which would have to renew"
                " them: give its name and namespace_properties",
            )
        # The engine's own margin of a minute would have it ask before each request where they live shorter.
        margin = refresh_margin(int(options[EXPIRES]) / 1000 - time.time())
        options.setdefault(REFRESH_OFFSET, str(int(margin * 1000)))
    managed = getattr(response, "managed_versioning", None) is True
    return TableLocation(response.location, tuple(sorted(options.items())) or None, managed)


def _call(ref: NamespaceRef, table_id: tuple[str, ...], method: str, request: Any) -> Any:
    client = ref.client()
    if client is None:
        raise InvalidArgumentError("namespace_impl", ref.impl, "this connected object cannot be used on workers")
    return _asked(ref, table_id, method, lambda: client.fresh(method, request))


def _asked(ref: NamespaceRef, table_id: tuple[str, ...], method: str, call: Callable[[], Any]) -> Any:
    target = f"{ref.impl} namespace {'' if method == 'list_tables' else 'table '}{'.'.join(table_id)}"
    try:
        return call()
    except LanceRayError:
        raise
    except Exception as error:  # noqa: BLE001  # implementations raise what their client library raises
        raise plugins.translated(error, table_id, f"{method} of {target}", target, ref.secrets) from None
