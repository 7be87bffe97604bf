"""When and how often a failed step is tried again: the only retry loop of the package, and the only backoff.

The decision goes by the *type* of an error (:func:`is_transient`), never by its text. What is tried again starts from
its beginning: :meth:`RetryPolicy.call` takes a factory and :meth:`RetryPolicy.iterate` a function that opens the
stream at a row, so a half-consumed reader cannot be handed to a second attempt.

With the environment variable ``LANCE_RAY_NO_BACKOFF`` set (to anything) no attempt waits for another, here and in
worker processes that inherit it; test suites use that.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Final, TypeVar

from lance_ray.errors import InvalidArgumentError, LanceRayError, StorageError, redact
from lance_ray.options import check_positive

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_BROKEN_CONNECTION = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, TimeoutError)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later.

    True for a retryable :class:`~lance_ray.errors.StorageError` and for connections that broke or timed out. False
    for everything else: a commit conflict needs a new plan, a refused connection or a missing bucket another address.
    """
    if isinstance(error, LanceRayError):
        return isinstance(error, StorageError) and error.retryable
    return isinstance(error, _BROKEN_CONNECTION)


def is_interruption(error: BaseException) -> bool:
    """The same for a store that has answered in this job: also true when nobody answers just now.

    The engine reports a reset connection and a refused one alike, so only the first contact can tell a wrong address.
    """
    return is_transient(error) or (isinstance(error, StorageError) and error.kind == "unreachable")


class _End:
    """The type of the end of a stream, which no item can be mistaken for."""


_END: Final = _End()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how fast and for how long a failed step is tried again.

    Attributes:
        max_attempts: attempts in all, the first included; 1 never retries.
        base_delay: seconds before the second attempt; each further wait is twice as long.
        max_delay: the longest wait between two attempts, in seconds.
        total_seconds: no attempt starts later than this after the first failure.
        jitter: the part of each wait that is random, 0 to 1, so that many workers do not come back together.
        texts: errors with one of these texts in their message are retried too, whatever their type.

    Raises:
        InvalidArgumentError: a value is out of range.
    """

    max_attempts: int = 10
    base_delay: float = 0.2
    max_delay: float = 8.0
    total_seconds: float = 120.0
    jitter: float = 0.5
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive("max_attempts", self.max_attempts, optional=False)
        for name in ("base_delay", "max_delay", "total_seconds"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidArgumentError(name, getattr(self, name), "must be 0 or more seconds")
        if not (_is_number(self.jitter) and 0 <= self.jitter <= 1):
            raise InvalidArgumentError("jitter", self.jitter, "must be between 0 and 1")
        if not all(isinstance(text, str) and text for text in self.texts):
            raise InvalidArgumentError("texts", self.texts, "must be texts of errors")

    def next_delay(self, attempt: int, failing_for: float) -> float | None:
        """Seconds to wait after a failed attempt, or ``None`` when it was the last one.

        Args:
            attempt: the number of the attempt that failed, from 1.
            failing_for: seconds since the first failure.
        """
        if attempt >= self.max_attempts:
            return None
        delay = 0.0
        if "LANCE_RAY_NO_BACKOFF" not in os.environ:
            doubled = self.base_delay * 2.0 ** min(attempt - 1, 60)
            delay = min(self.max_delay, doubled) * (1 - self.jitter * random.random())
        return delay if failing_for + delay <= self.total_seconds else None

    def call(
        self,
        factory: Callable[[], T],
        *,
        retry_on: Callable[[BaseException], bool] = is_transient,
        what: str = "request",
        secrets: Iterable[str] = (),
    ) -> T:
        """The result of the first attempt that succeeds.

        Args:
            factory: does the whole step; called once for each attempt, so it must be safe to repeat.
            retry_on: which errors are worth another attempt.
            what: names the step in the log.
            secrets: values that errors may hold and the log must not.

        Raises:
            Exception: the last attempt's error, with a note on how many there were.
        """
        attempt, failing_since = 0, None
        while True:
            attempt += 1
            try:
                return factory()
            except Exception as error:  # the predicate decides by type; what it does not name is raised
                now = monotonic()
                failing_since = now if failing_since is None else failing_since
                retried = retry_on(error) or any(text in str(error) for text in self.texts)
                delay = self.next_delay(attempt, now - failing_since) if retried else None
                if delay is None:
                    _note_attempts(error, what, attempt, now - failing_since)
                    raise
                log_retry(what, attempt, delay, error, secrets)
            sleep(delay)

    def iterate(
        self,
        open_stream: Callable[[int], Iterator[T]],
        *,
        size: Callable[[T], int],
        retry_on: Callable[[BaseException], bool] = is_transient,
        what: str = "stream",
    ) -> Iterator[T]:
        """Every item of a stream once and in order, across failures while it is opened and while it is read.

        Each item is progress: attempts and waiting are counted anew after it. Items of size 0 hold nothing and are
        left out (a stream that only repeats them would otherwise never be given up).

        Args:
            open_stream: returns the stream from a row on; its argument is the number of rows already yielded.
            size: the number of rows of an item.
            retry_on: which errors are worth opening the stream again.
            what: names the stream in the log.

        Raises:
            Exception: the last attempt's error, with a note on how many there were.
        """
        stream: Iterator[T] | None = None
        rows = 0

        def advance() -> T | _End:
            nonlocal stream
            try:
                stream = open_stream(rows) if stream is None else stream
                return next((item for item in stream if size(item)), _END)
            except BaseException:  # also when interrupted: what broke is not read on
                stream = None
                raise

        while not isinstance(item := self.call(advance, retry_on=retry_on, what=what), _End):
            rows += size(item)
            yield item


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _note_attempts(error: Exception, what: str, attempts: int, seconds: float) -> None:
    if attempts > 1:
        error.add_note(f"{what}: gave up after {attempts} attempts in {seconds:.1f} s")


def log_retry(what: str, attempt: int, delay: float, error: BaseException, secrets: Iterable[str] = ()) -> None:
    """Log, once and without secrets, that an attempt failed and when the next one follows."""
    reason = redact(f"{type(error).__name__}: {error}", secrets)
    _LOG.info("%s: attempt %d failed, next in %.1f s (%s)", what, attempt, delay, reason)
