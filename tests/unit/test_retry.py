"""Retries: what is worth one, how long they wait, and that a resumed stream neither loses nor repeats a row."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ray import retry
from lance_ray.errors import CommitConflictError, InvalidArgumentError, StorageError, TableNotFoundError
from lance_ray.retry import RetryPolicy, is_transient

THROTTLED = StorageError("SlowDown", kind="transient", target="s3://b/t")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is waited."""
    asked: list[float] = []
    monkeypatch.delenv("LANCE_RAY_NO_BACKOFF", raising=False)
    monkeypatch.setattr(retry, "sleep", asked.append)
    return asked


class Flaky:
    """Raises the given errors, one for each call, and then returns "done"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.mark.parametrize(
    "error",
    [THROTTLED, ConnectionResetError(), ConnectionAbortedError(), BrokenPipeError(), TimeoutError()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_may_pass_by_itself_is_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        StorageError("403", kind="denied"),
        StorageError("no space", kind="full"),
        StorageError("nobody there", kind="unreachable"),
        CommitConflictError("lost the race", retryable=True),
        TableNotFoundError("s3://b/t"),
        ConnectionRefusedError(),
        ValueError("bad row"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}-{getattr(error, 'kind', '')}",
)
def test_an_error_that_stays_is_not_transient(error: BaseException) -> None:
    assert not is_transient(error)


def test_call_repeats_until_it_succeeds() -> None:
    step = Flaky(THROTTLED, ConnectionResetError())
    assert RetryPolicy().call(step) == "done"
    assert step.calls == 3


def test_call_does_not_repeat_a_permanent_error(waits: list[float]) -> None:
    step = Flaky(StorageError("403", kind="denied"))
    with pytest.raises(StorageError) as caught:
        RetryPolicy().call(step)
    assert (step.calls, waits) == (1, [])
    assert not hasattr(caught.value, "__notes__")


def test_call_raises_the_last_error_and_notes_the_attempts() -> None:
    last = StorageError("third", kind="transient")
    step = Flaky(THROTTLED, THROTTLED, last)
    with pytest.raises(StorageError) as caught:
        RetryPolicy(max_attempts=3).call(step, what="read fragment 7")
    assert caught.value is last
    assert last.__notes__[0].startswith("read fragment 7: gave up after 3 attempts")


def test_a_permanent_error_after_a_transient_one_ends_the_attempts_and_tells_their_number() -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        RetryPolicy().call(Flaky(THROTTLED, ValueError("bad")))
    assert "after 2 attempts" in caught.value.__notes__[0]


def test_the_caller_may_say_what_is_worth_a_retry() -> None:
    step = Flaky(KeyError("not there yet"))
    assert RetryPolicy().call(step, retry_on=lambda error: isinstance(error, KeyError)) == "done"


def test_waits_double_up_to_the_cap_without_jitter(waits: list[float]) -> None:
    RetryPolicy(jitter=0, base_delay=1, max_delay=5).call(Flaky(*[THROTTLED] * 5))
    assert waits == [1, 2, 4, 5, 5]


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1))
def test_jitter_only_shortens_a_wait(attempt: int, jitter: float) -> None:
    policy = RetryPolicy(max_attempts=10_000, jitter=jitter)
    longest = min(policy.max_delay, policy.base_delay * 2.0 ** min(attempt - 1, 60))
    delay = policy.next_delay(attempt, 0)
    assert delay is not None
    assert longest * (1 - jitter) <= delay <= longest


def test_no_attempt_starts_after_the_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(retry, "monotonic", lambda: next(clock))
    step = Flaky(*[THROTTLED] * 9)
    with pytest.raises(StorageError):
        RetryPolicy(total_seconds=120).call(step)
    assert step.calls == 4  # failures at 0, 50, 100 and 150 s


def test_the_no_backoff_switch_removes_waits_but_not_the_limit_of_attempts(
    monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")
    with pytest.raises(StorageError):
        RetryPolicy(max_attempts=3, base_delay=60).call(Flaky(*[THROTTLED] * 9))
    assert waits == [0, 0]


def test_each_retry_is_logged_once_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    leaky = StorageError("PUT ...?X-Amz-Signature=abcdef0123 reset", kind="transient")
    with caplog.at_level(logging.INFO, logger="lance_ray.retry"):
        RetryPolicy().call(Flaky(leaky, leaky), what="write")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[0].startswith("write: attempt 1 failed, next in")
    assert "abcdef0123" not in caplog.text


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("max_attempts", 0), ("base_delay", -1), ("max_delay", float("nan")), ("total_seconds", -0.1), ("jitter", 1.5)],
)
def test_a_policy_out_of_range_is_refused_by_name(parameter: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RetryPolicy(**{parameter: value})  # type: ignore[arg-type]  # a float is wrong for max_attempts
    assert caught.value.parameter == parameter


def test_a_policy_survives_pickling() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert pickle.loads(pickle.dumps(policy)) == policy


class Table:
    """Streams its rows in batches and breaks, once each, in front of the given rows; counts openings."""

    def __init__(self, rows: int, batch: int, breaks: set[int]) -> None:
        self.rows, self.batch, self.breaks = rows, batch, set(breaks)
        self.opened_at: list[int] = []

    def open(self, start: int) -> Iterator[list[int]]:
        self.opened_at.append(start)
        for begin in range(start, self.rows, self.batch):
            batch = list(range(begin, min(begin + self.batch, self.rows)))
            if broken := self.breaks.intersection(batch):
                self.breaks -= broken
                raise THROTTLED
            yield batch


@settings(deadline=None)
@given(rows=st.integers(0, 60), batch=st.integers(1, 9), breaks=st.sets(st.integers(0, 60)))
def test_a_stream_broken_anywhere_yields_every_row_once_and_in_order(rows: int, batch: int, breaks: set[int]) -> None:
    policy = RetryPolicy(base_delay=0, max_attempts=2)
    items = policy.iterate(Table(rows, batch, breaks).open, size=len)
    assert [row for item in items for row in item] == list(range(rows))


def test_a_stream_is_opened_again_at_the_first_row_not_yet_yielded() -> None:
    table = Table(10, 3, {0, 7})
    assert [len(item) for item in RetryPolicy().iterate(table.open, size=len)] == [3, 3, 3, 1]
    assert table.opened_at == [0, 0, 6]


def test_attempts_are_counted_anew_after_progress() -> None:
    breaks = set(range(10))  # ten failures, and never two in a row at the same place
    items = RetryPolicy(max_attempts=2).iterate(Table(10, 1, breaks).open, size=len)
    assert sum(map(len, items)) == 10


def test_a_stream_that_makes_no_progress_is_given_up_after_what_it_had() -> None:
    def dead_after_two(start: int) -> Iterator[list[int]]:
        if start == 0:
            yield [0, 1]
        raise THROTTLED

    items = RetryPolicy(max_attempts=4).iterate(dead_after_two, size=len)
    assert next(items) == [0, 1]
    with pytest.raises(StorageError) as caught:
        next(items)
    assert "after 4 attempts" in caught.value.__notes__[-1]


def test_empty_items_are_no_progress() -> None:
    opened = []

    def only_empty(start: int) -> Iterator[list[int]]:
        opened.append(start)
        yield []
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        list(RetryPolicy(max_attempts=3).iterate(only_empty, size=len))
    assert opened == [0, 0, 0]


def test_a_stream_is_opened_only_when_its_first_item_is_asked_for_and_closed_with_the_iteration() -> None:
    events = []

    def stream(start: int) -> Iterator[list[int]]:
        events.append("open")
        try:
            while True:
                yield [start]
        finally:
            events.append("closed")

    items = RetryPolicy().iterate(stream, size=len)
    assert events == []
    next(items)
    del items
    assert events == ["open", "closed"]
