"""How far an operation is: one event type, and who shows it (a bar on a terminal, else a log line now and then)."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from lance_ray.errors import InvalidArgumentError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of an operation at one moment; the last one is its summary.

    Attributes:
        operation: what runs ("compact_files").
        done: units that succeeded.
        total: units in all, or ``None`` when the plan is not known beforehand.
        unit: what is counted.
        rows: rows of the finished units, as far as their results say.
        bytes: bytes of the finished units, as far as their results say.
        seconds: wall time since the operation began.
        retried: attempts beyond each unit's first.
        failed: units given up.
    """

    operation: str
    done: int = 0
    total: int | None = None
    unit: str = "tasks"
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    retried: int = 0
    failed: int = 0

    def __str__(self) -> str:
        of_total = "" if self.total is None else f" of {self.total}"
        counts = [f"{self.operation}: {self.done}{of_total} {self.unit}"]
        counts += [f"{self.rows:,} rows"] if self.rows else []
        counts += [f"{self.bytes / 1e6:,.1f} MB"] if self.bytes else []
        counts += [f"{self.retried} retried"] if self.retried else []
        counts += [f"{self.failed} failed"] if self.failed else []
        return ", ".join([*counts, f"{self.seconds:.1f} s"])


@runtime_checkable
class Reporter(Protocol):
    """Shows progress. Both methods run in the driver, between two tasks: they must be quick."""

    def report(self, event: Progress) -> None:
        """Take note of a new state; called at the beginning and whenever a unit finished, failed or is retried."""

    def close(self) -> None:
        """The operation is over, whether it succeeded or not; called once."""


class SilentReporter:
    """Shows nothing."""

    def report(self, event: Progress) -> None:
        """Drop the event."""

    def close(self) -> None:
        """Nothing to release."""


class LogReporter:
    """Logs at INFO, at most one line every ``every`` seconds and one at the end."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._logged_at = monotonic()
        self._latest: Progress | None = None

    def report(self, event: Progress) -> None:
        """Log the event if the last line is old enough."""
        self._latest = event
        if monotonic() - self._logged_at >= self._every:
            self._logged_at = monotonic()
            _LOG.info("%s", event)

    def close(self) -> None:
        """Log the last state."""
        if self._latest is not None:
            _LOG.info("%s (end)", self._latest)


class BarReporter:
    """A progress bar on standard error."""

    def __init__(self, operation: str, total: int | None) -> None:
        self._bar = tqdm(desc=operation, total=total, unit="task", dynamic_ncols=True)

    def report(self, event: Progress) -> None:
        """Move the bar; failed units count as worked off and are named behind it."""
        counts = {"rows": event.rows, "retried": event.retried, "failed": event.failed}
        self._bar.set_postfix({name: count for name, count in counts.items() if count}, refresh=False)
        self._bar.update(event.done + event.failed - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def check_progress(progress: Any) -> None:
    """Refuse what can report nothing."""
    if progress is not None and not isinstance(progress, (bool, Reporter)):
        raise InvalidArgumentError("progress", progress, "must be True, False or a reporter")


def reporter_for(operation: str, total: int | None, progress: bool | Reporter | None) -> Reporter:
    """The reporter of an operation.

    Args:
        operation: the operation's name.
        total: units in all, if known.
        progress: a reporter of one's own, ``False`` for silence, ``True`` or ``None`` for a bar when standard error
            is a terminal and log lines otherwise.
    """
    if progress is False:
        return SilentReporter()
    if progress is None or progress is True:
        return BarReporter(operation, total) if sys.stderr.isatty() else LogReporter()
    return progress
