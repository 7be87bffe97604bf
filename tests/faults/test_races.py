"""Jobs that meet at one table at the same time: exactly one create wins, every append lands, nothing stays behind."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray.data

from lance_ray import TableExistsError, WriteReport, cleanup_orphans, commit, write_lance
from lance_ray.errors import LanceRayError
from tests.faults.driver import BLOCK, Orders, driver, outcome, wait_for
from tests.faults.stores import SECRET, Place, rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Ray Data leaves a log file open when datasets run in several threads.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*ray-data:pytest.PytestUnraisableExceptionWarning"),
]


def one_write(place: Place, first: int, mode: str, **options: Any) -> WriteReport:
    ds = ray.data.from_arrow([rows(first, BLOCK), rows(first + BLOCK, BLOCK)])
    return write_lance(ds, **place.to, mode=mode, min_rows_per_file=BLOCK, **options)


def ids_from(first: int) -> range:
    return range(first, first + 2 * BLOCK)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes so many jobs of this process wait for each other before they commit."""

    def use(count: int) -> None:
        barrier, apply, passed = threading.Barrier(count), commit.apply, threading.local()

        def meet(*args: Any, **kwargs: Any) -> Any:
            if not getattr(passed, "once", False):
                passed.once = True
                barrier.wait(timeout=60)
            return apply(*args, **kwargs)

        monkeypatch.setattr(commit, "apply", meet)

    return use


def race(jobs: list[Callable[[], WriteReport]]) -> list[WriteReport | LanceRayError]:
    """What each job ended with; all run at once."""

    def end_of(job: Callable[[], WriteReport]) -> WriteReport | LanceRayError:
        try:
            return job()
        except LanceRayError as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(end_of, jobs))


def writes(place: Place, count: int, mode: str) -> list[Callable[[], WriteReport]]:
    return [functools.partial(one_write, place, number * 1000, mode) for number in range(count)]


def test_of_four_racing_creates_one_wins_and_the_files_of_the_others_go(everywhere: Place, together):
    together(4)
    ends = race(writes(everywhere, 4, "create"))
    winners = [number for number, end in enumerate(ends) if isinstance(end, WriteReport)]
    assert len(winners) == 1
    assert all(isinstance(end, TableExistsError) for end in ends if not isinstance(end, WriteReport))
    assert everywhere.open().version == 1
    everywhere.assert_holds(ids_from(winners[0] * 1000))


def test_a_write_that_ignores_what_exists_skips_when_it_loses_the_race(on_disk: Place, together):
    together(3)
    ends = race([*writes(on_disk, 2, "create"), lambda: one_write(on_disk, 2000, "ignore")])
    (winner,) = [number for number, end in enumerate(ends) if isinstance(end, WriteReport) and not end.skipped]
    assert isinstance(ends[2], WriteReport)
    on_disk.assert_holds(ids_from(winner * 1000))


@pytest.mark.slow
def test_eight_racing_appends_all_land(everywhere: Place, together):
    everywhere.write(rows(-1, 1).slice(1))
    together(8)
    ends = race(writes(everywhere, 8, "append"))
    assert sorted(end.version for end in ends if isinstance(end, WriteReport)) == list(range(2, 10))
    everywhere.assert_holds(number for first in range(0, 8000, 1000) for number in ids_from(first))


def test_racing_overwrites_of_nothing_leave_the_rows_of_exactly_one(on_disk: Place, together):
    together(4)
    ends = race(writes(on_disk, 4, "overwrite"))
    versions = {end.version: number for number, end in enumerate(ends) if isinstance(end, WriteReport)}
    assert sorted(versions) == [1, 2, 3, 4]
    on_disk.assert_holds(ids_from(versions[4] * 1000))


def test_an_append_beside_an_overwrite_lands_before_it_or_after_it(on_disk: Place, together):
    on_disk.write(rows(-50, 50))
    together(2)
    appended, overwritten = race([*writes(on_disk, 1, "append"), lambda: one_write(on_disk, 1000, "overwrite")])
    assert isinstance(overwritten, WriteReport)
    after = isinstance(appended, WriteReport) and appended.version > overwritten.version
    on_disk.assert_holds([*(ids_from(0) if after else ()), *ids_from(1000)])


# Drivers in processes of their own


@pytest.fixture
def crew(tmp_path: Path) -> Callable[..., Any]:
    """Starts drivers, lets them begin at the same moment, and tells what they ended with."""

    @contextmanager
    def start(place: Place, count: int, **changes: Any) -> Iterator[Callable[[], dict[int, dict[str, Any]]]]:
        base = Orders(ray.get_runtime_context().gcs_address, str(tmp_path), place.uri, place.options, hold="start")
        team = [dataclasses.replace(base, first=number * 1000, **changes) for number in range(1, count + 1)]
        with ExitStack() as stack:
            processes = [(orders.first, stack.enter_context(driver(orders))) for orders in team]
            for orders in team:
                wait_for(orders.sign("ready"))
            base.go.touch()
            yield lambda: {first: outcome(process) for first, process in processes}

    return start


@pytest.mark.slow
def test_of_four_creates_by_four_drivers_one_wins(place: Place, crew):
    with crew(place, 4, mode="create") as ends_of:
        ends = ends_of()
    winners = [first for first, end in ends.items() if "error" not in end]
    assert len(winners) == 1
    assert {end["error"] for first, end in ends.items() if first not in winners} == {"TableExistsError"}
    assert all(SECRET not in end["printed"] for end in ends.values())
    place.assert_holds(ids_from(winners[0]))


@pytest.mark.slow
def test_eight_appends_of_three_drivers_land_while_clean_ups_go_on(on_disk: Place, crew):
    on_disk.write(rows(-1, 1).slice(1))
    with crew(on_disk, 2, repeat=2) as ends_of, ThreadPoolExecutor(1) as cleaner:
        over = threading.Event()

        def clean() -> int:
            removed = 0
            while not over.is_set():
                removed += len(cleanup_orphans(**on_disk.to).files)
                over.wait(0.1)
            return removed

        cleaning = cleaner.submit(clean)
        try:
            own = race([functools.partial(one_write, on_disk, first, "append") for first in range(3000, 7000, 1000)])
            ends = ends_of()
        finally:
            over.set()
        assert cleaning.result() == 0
    assert [end for end in own if not isinstance(end, WriteReport)] == []
    assert [end["rows"] for end in ends.values()] == [4 * BLOCK, 4 * BLOCK]
    assert all(SECRET not in end["printed"] for end in ends.values())
    others = [number for first in (1000, 2000) for number in range(first, first + 4 * BLOCK)]
    on_disk.assert_holds([*others, *(number for first in range(3000, 7000, 1000) for number in ids_from(first))])
