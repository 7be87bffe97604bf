"""The error tree, and the only place that translates failures of pylance, namespaces and Ray.

Classes answer "what would a handler do?"::

    LanceRayError
    ├── InvalidArgumentError        (ValueError)         a bad or contradictory argument; .parameter .value
    ├── TableNotFoundError          (FileNotFoundError)  there is no such table; .target
    ├── VersionNotFoundError        (LookupError)        the table has no such version, tag or branch; .target .version
    ├── TableExistsError            (FileExistsError)    create found a table; .target
    ├── SchemaMismatchError         (ValueError)         data does not fit the schema; .columns .expected .actual
    ├── StorageError                (OSError)            the store failed; .kind says whether a retry can help
    ├── SnapshotChangedError                             a plan no longer applies; .planned .current
    ├── TaskFailedError                                  one unit of work failed; .task .attempts, cause kept
    ├── OperationFailedError                             units of work failed; .failures .completed
    ├── RowCoverageError            (ValueError)         .duplicate .unknown .missing .examples
    ├── CommitConflictError                              certainly NOT committed; .retryable .read_version
    ├── CommitOutcomeUnknownError                        may be committed, no file is deleted; .operation_id
    ├── WorkerEnvironmentError                           a node cannot do the work; .problems
    ├── UnsupportedCallError        (NotImplementedError)  a catalog does not have this call
    └── UnsupportedVersionError     (NotImplementedError)  .package .installed .required

Every error survives pickling with its data, because Ray carries errors between processes, and none carries a
secret: messages of the engine pass through :func:`redact` on their way.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

StorageErrorKind = Literal["transient", "denied", "missing", "unreachable", "full", "invalid", "other"]


def _rebuild(cls: type[LanceRayError], message: str, data: dict[str, Any]) -> LanceRayError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(data)
    return error


class LanceRayError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(_without_passwords(message))
        self.__dict__.update({key: _without_passwords(value) for key, value in data.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidArgumentError(LanceRayError, ValueError):
    """An argument is wrong, or contradicts another one. Nothing was started."""

    parameter: str
    value: Any

    def __init__(self, parameter: str, value: Any, allowed: str) -> None:
        super().__init__(f"{parameter}={_brief(value)}: {allowed}", parameter=parameter, value=_brief(value))


class TableNotFoundError(LanceRayError, FileNotFoundError):
    """There is no Lance table at the address (the store answered, and holds none)."""

    target: str

    def __init__(self, target: str, detail: str = "") -> None:
        super().__init__(f"no Lance table at {target}{_suffix(detail)}", target=target)


class VersionNotFoundError(LanceRayError, LookupError):
    """The table exists, the requested version, tag, branch or time does not."""

    target: str
    version: Any

    def __init__(self, target: str, version: Any, detail: str = "") -> None:
        super().__init__(f"{target} has no version {version!r}{_suffix(detail)}", target=target, version=version)


class TableExistsError(LanceRayError, FileExistsError):
    """``create`` found a table at the address. Nothing of it was touched."""

    target: str

    def __init__(self, target: str, detail: str = "") -> None:
        super().__init__(
            f"a Lance table already exists at {target}; use mode='append' or mode='overwrite'{_suffix(detail)}",
            target=target,
        )


class SchemaMismatchError(LanceRayError, ValueError):
    """Data does not fit the schema it must have. Nothing was committed."""

    columns: tuple[str, ...]
    expected: str
    actual: str

    def __init__(self, message: str, *, columns: Iterable[str] = (), expected: str = "", actual: str = "") -> None:
        super().__init__(message, columns=tuple(columns), expected=expected, actual=actual)


class RowCoverageError(LanceRayError, ValueError):
    """Values do not belong to the rows of the table one to one: counts, and examples of each kind. Nothing was done."""

    duplicate: int
    unknown: int
    missing: int
    examples: dict[str, list[Any]]

    def __init__(
        self, *, duplicate: int = 0, unknown: int = 0, missing: int = 0, examples: dict[str, list[Any]]
    ) -> None:
        counts = {"duplicate": duplicate, "unknown": unknown, "missing": missing}
        told = [f"{count:,} {name} (such as {examples.get(name, [])})" for name, count in counts.items() if count]
        super().__init__(f"rows do not match the table: {', '.join(told)}", **counts, examples=examples)


class StorageError(LanceRayError, OSError):
    """The store failed. ``kind`` tells a handler what to do; only ``transient`` is worth a retry.

    Kinds: ``transient`` (throttling, resets, timeouts, server errors), ``denied`` (credentials), ``missing``
    (bucket or object), ``unreachable`` (nobody answers), ``full``, ``invalid`` (path or configuration), ``other``.
    """

    kind: StorageErrorKind
    target: str

    def __init__(self, message: str, *, kind: StorageErrorKind = "other", target: str = "") -> None:
        super().__init__(message, kind=kind, target=target)

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind == "transient"


class SnapshotChangedError(LanceRayError):
    """The table moved on in a way that voids the plan. Nothing was committed."""

    planned: int
    current: int

    def __init__(self, message: str, *, planned: int, current: int) -> None:
        super().__init__(message, planned=planned, current=current)


class TaskFailedError(LanceRayError):
    """One unit of distributed work failed for good; ``__cause__`` is the last attempt's error."""

    task: str
    attempts: int

    def __init__(self, task: str, attempts: int, cause: BaseException | str) -> None:
        super().__init__(f"{task} failed after {attempts} attempt(s): {cause}", task=task, attempts=attempts)


class OperationFailedError(LanceRayError):
    """One or more units of an operation failed; ``failures`` are :class:`TaskFailedError`, ``completed`` a count."""

    failures: tuple[TaskFailedError, ...]
    completed: int

    def __init__(self, message: str, *, failures: Iterable[TaskFailedError] = (), completed: int = 0) -> None:
        super().__init__(message, failures=tuple(failures), completed=completed)


class CommitConflictError(LanceRayError):
    """A concurrent commit won. This one is certainly not in the table; ``retryable`` says whether to plan again."""

    retryable: bool
    read_version: int | None

    def __init__(self, message: str, *, retryable: bool, read_version: int | None = None) -> None:
        super().__init__(message, retryable=retryable, read_version=read_version)


class CommitOutcomeUnknownError(LanceRayError):
    """The commit was sent and its answer lost. It may be in the table, so no file was deleted.

    Look for ``operation_id`` in the ``transaction_properties`` of the table's recent transactions
    (``dataset.get_transactions()``) once the store answers again, or run the same ``job_id`` again.
    """

    operation_id: str

    def __init__(self, message: str, *, operation_id: str) -> None:
        super().__init__(message, operation_id=operation_id)


class WorkerEnvironmentError(LanceRayError):
    """A node of the cluster cannot do the work; ``problems`` has one line for each node concerned."""

    problems: tuple[str, ...]

    def __init__(self, problems: Iterable[str]) -> None:
        lines = tuple(problems)
        super().__init__("the cluster cannot run this job:\n  " + "\n  ".join(lines), problems=lines)


class UnsupportedCallError(LanceRayError, NotImplementedError):
    """The namespace implementation does not have this call. Nothing was done."""


class UnsupportedVersionError(LanceRayError, NotImplementedError):
    """An installed package is too old for what was asked."""

    package: str
    installed: str
    required: str

    def __init__(self, package: str, installed: str, required: str) -> None:
        super().__init__(
            f"{package} {installed} is installed, {required} is needed",
            package=package,
            installed=installed,
            required=required,
        )


def _without_passwords(value: Any) -> Any:
    """Text without passwords in URLs. Whatever an error says, this much is certain."""
    return _PASSWORD.sub(r"\1***", value) if isinstance(value, str) else value


def _brief(value: Any, limit: int = 200) -> str:
    text = redact(repr(value))
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _suffix(detail: str) -> str:
    return f" ({detail})" if detail else ""


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without the given secrets and without what looks like a credential in a URL or header.

    Args:
        text: any message.
        secrets: values of storage options and namespace properties; short ones (under 6 characters) are left, since
            they would blank out ordinary words.
    """
    for secret in sorted((s for s in secrets if len(s) >= 6), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _without_passwords(text)
    return _CREDENTIAL.sub(lambda found: f"{found[found.lastindex or 0]}***", text)


_CREDENTIAL = re.compile(
    r"(?<![a-z])(?:"
    r"(Authorization[\"']?\s*[=:]\s*[\"']?)[^\"'\n]+"
    r"|(Bearer\s+)[\w.~+/=-]{8,}"
    r"|((?:X-Amz-(?:Signature|Credential|Security-Token)|sig|Signature|AWSAccessKeyId|api[_-]?key)[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s&\"',)]+)",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"(://[^/\s:@]+:)[^\s@\"']+(?=@)")

# The engine reports by text, not by type: a missing table and an unreachable store are both ValueError. These are
# the only string matches on engine messages in the package; tests/unit/test_errors.py pins each to what pylance says.
_SOURCE_LOCATION = re.compile(r",?\s*(?:/|\bsrc/)\S+\.rs:\d+:\d+")
_NOT_FOUND = re.compile(r"Dataset at path .* was not found|Table .*(?:not found|does not exist)", re.DOTALL)
_VERSION_NOT_FOUND = re.compile(
    r"\.manifest was not found|Ref not found|Ref is invalid|Version .*not found|does not exist", re.DOTALL
)
_UNKNOWN_OUTCOME = re.compile(r"Commit result for version \d+ is unknown")  # whatever it says after that of a conflict
_EXISTS = re.compile(r"Dataset already exists")
_CONFLICT = re.compile(
    r"(?<![\w/.=-])[Cc]onflict(?![\w/.%-])|concurrent commit|Too many concurrent|CommitConflict"
    r"|Incompatible transaction"
)
_RETRYABLE_CONFLICT = re.compile(r"[Rr]etryable commit conflict|please retry|Too many concurrent")
_NO_STORE = "No object store provider"
_NO_OBJECT = "Not found: "
UNAVAILABLE = "Service unavailable: "
"""How an error of a catalog begins that may pass by itself."""
_OF_CATALOG = "Namespace error: "  # what a catalog that keeps the versions told the engine
_OF_STORES = ("LanceError(IO)", _NO_STORE, _NO_OBJECT, _OF_CATALOG)
_USER_INPUT = re.compile(r"Invalid user input|Error resolving filter|No field named")
_STATUS = re.compile(r"status code: (\d{3})")
_STATUS_KINDS: dict[str, StorageErrorKind] = {"401": "denied", "403": "denied", "404": "missing", "408": "transient"}
_KINDS: tuple[tuple[StorageErrorKind, re.Pattern[str]], ...] = (
    ("full", re.compile(r"No space left|os error 28|QuotaExceeded|quota exceeded", re.IGNORECASE)),
    (
        "denied",
        re.compile(
            r"AccessDenied|InvalidAccessKey|SignatureDoesNotMatch|ExpiredToken|InvalidToken|authentication credentials"
            r"|lacked the required privileges|Permission denied|os error 13\b|os error 30\b",
            re.IGNORECASE,
        ),
    ),
    ("missing", re.compile(r"NoSuchBucket|NoSuchKey|os error 2\b|^Not found: |: Not found: ")),
    (
        "transient",
        re.compile(
            rf"SlowDown|throttl|{UNAVAILABLE}(?!.*connect error)"
            r"|connection reset|reset by peer|broken pipe|incomplete message|connection closed"
            r"|unexpected end of file|(?<!retry_)timed? ?out|error decoding response body|temporarily unavailable",
            re.IGNORECASE,
        ),
    ),
    ("unreachable", re.compile(r"error sending request|connect error|connection refused|dns error", re.IGNORECASE)),
    (
        "invalid",
        re.compile(r"os error (?:20|21|36)\b|Not a directory|Is a directory|Config error|No object store provider"),
    ),
)


def storage_error_kind(message: str) -> StorageErrorKind:
    """Which :class:`StorageError` kind a failure text of the engine or the operating system belongs to."""
    status = _STATUS.search(message)
    if status and status[1] in _STATUS_KINDS:
        return _STATUS_KINDS[status[1]]
    if status and (status[1] == "429" or status[1].startswith("5")):
        return "transient"
    return next((kind for kind, pattern in _KINDS if pattern.search(message)), "other")


def tidy(message: str, secrets: Iterable[str] = ()) -> str:
    """What the engine says, without secrets and without places in its source."""
    return redact(_SOURCE_LOCATION.sub("", message).strip().rstrip(","), secrets)


@contextmanager
def translate_errors(action: str, target: str, *, secrets: Iterable[str] = (), version: Any = None) -> Iterator[None]:
    """Run engine calls so that what they raise becomes an error of this package, with the original as its cause.

    Args:
        action: what was being done, for the message ("open", "commit").
        target: the table's address without secrets.
        secrets: values that must not appear in a message.
        version: the version asked for, if one was.

    Raises:
        LanceRayError: the translation. Errors of this package, and errors that the engine did not raise, pass.
    """
    try:
        yield
    except LanceRayError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        translated = translate(error, action, target, secrets=secrets, version=version)
        if translated is error:
            raise
        raise translated from _without_secrets(error, secrets)


def translate(
    error: Exception, action: str, target: str, *, secrets: Iterable[str] = (), version: Any = None
) -> Exception:
    """The error of this package that stands for ``error``, or ``error`` itself when it is none of the engine's."""
    message, target = tidy(str(error), secrets), redact(target, secrets)
    if isinstance(error, FileNotFoundError) and error.errno == errno.ENOENT and not message.startswith("LanceError"):
        return error
    if _UNKNOWN_OUTCOME.search(message):
        return StorageError(f"{action} {target}: {message}", target=target)
    if _EXISTS.search(message):
        return TableExistsError(target)
    if version is not None and _VERSION_NOT_FOUND.search(message):
        return VersionNotFoundError(target, version, message)
    if _NOT_FOUND.search(message):
        return TableNotFoundError(target)
    if _USER_INPUT.search(message) and _NO_STORE not in message:
        return InvalidArgumentError(action, target, message)
    if type(error).__name__ == "CommitConflictError" or _CONFLICT.search(message):
        retryable = bool(getattr(error, "retryable", False)) or bool(_RETRYABLE_CONFLICT.search(message))
        return CommitConflictError(f"{action} {target}: {message}", retryable=retryable)
    if isinstance(error, OSError) or any(text in message for text in _OF_STORES):
        kind = _os_kind(error) or storage_error_kind(message)
        return StorageError(f"{action} {target}: {message}", kind=kind, target=target)
    if message.startswith("LanceError("):
        return LanceRayError(f"{action} {target}: {message}")
    return error


def _os_kind(error: Exception) -> StorageErrorKind | None:
    if isinstance(error, PermissionError):
        return "denied"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, TimeoutError)):
        return "transient"
    return "full" if getattr(error, "errno", None) == errno.ENOSPC else None


def _without_secrets(error: Exception, secrets: Iterable[str]) -> Exception:
    """``error`` itself, or a stand-in of a plain type when its text holds a secret (a cause is printed too)."""
    text = str(error)
    cleaned = redact(text, secrets)
    return error if cleaned == text else OSError(cleaned)


def unwrap(error: BaseException) -> BaseException:
    """The error of this package inside what Ray raised for it, or ``error`` itself.

    Ray wraps what a task raised (``RayTaskError.cause``), and Ray Data wraps once more (``__cause__``).
    """
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop(0)
        if found is None or found in seen:
            continue
        if isinstance(found, LanceRayError) and not hasattr(found, "cause"):
            return found
        seen.append(found)
        pending += [getattr(found, "cause", None), found.__cause__, found.__context__]
    return error
