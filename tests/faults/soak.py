"""A long mix of all operations under faults, on disk and on S3, with a plain Python model as the judge.

``make soak``, or ``python -m tests.faults.soak --minutes 30 --seed 1``. Operations run one after the other on a table
of each store, with tasks in this process; others change the tables between plan and commit; stores fail now and then.
After each operation the table holds what the model says: an operation that ended with an error is in it as a whole or
not at all. Ends with an error at the first difference.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lance
import pytest
from lance.optimize import Compaction
from moto.server import ThreadedMotoServer

import lance_ray
from lance_ray import commit
from lance_ray.errors import LanceRayError
from tests.faults.model import Model, assert_rows, local_tasks
from tests.faults.proxy import FaultProxy, Rule
from tests.faults.stores import BUCKET, S3, Place
from tests.tables import read_here

OTHERS = ("append", "delete", "update", "compact")
STEP_SECONDS = 150.0
"""No operation may take longer, whatever the store does."""


class Soak:
    """Tables under operations and faults, and what was counted."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.changed = 0
        self.last: Rule | None = None
        self.orphans: dict[str, set[str]] = {}

    def run(self, minutes: float) -> None:
        """Operate until time is up."""
        until = time.monotonic() + minutes * 60
        with ExitStack() as stack:
            stack.enter_context(local_tasks())
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lance-ray-soak-"))
            models = [
                Model(Place(f"{folder}/table")),
                Model(Place(f"s3://{BUCKET}/soak", *stack.enter_context(server()))),
            ]
            for model in models:
                model.write("create", 100)
                model.check()
            while time.monotonic() < until:
                self.step(self.random.choice(models))
            for model in models:
                model.check()
                self.counts["rows at the end"] += len(model.state.rows)

    def step(self, model: Model) -> None:
        """One operation, perhaps under a fault, perhaps beside somebody else's."""
        faulty = self.random.random() < 0.5
        other = "" if faulty or self.random.random() < 0.5 else self.random.choice(OTHERS)
        name, operation = self.choose(model, other)
        before = copy.deepcopy((model.state, model.next_id, model.added))
        started = time.monotonic()
        try:
            with self.fault(model.place) if faulty else ExitStack():
                operation()
        except LanceRayError as error:
            if not faulty:
                raise
            self.counts[f"refused: {type(error).__name__}"] += 1
            self.settle(model, before, operation)
        self.slowest = max(self.slowest, time.monotonic() - started)
        assert time.monotonic() - started < STEP_SECONDS, name
        if faulty:
            lance_ray.cleanup_orphans(**model.place.to)
            self.count_orphans(model.place, name)
        self.counts["operations"] += 1
        self.counts[name] += 1
        self.changed += len(model.state.rows)
        model.check()

    def count_orphans(self, place: Place, name: str) -> None:
        """No data file is left that no version refers to, but those that nobody could know of.

        A file that arrived and whose answer was lost until the engine gave up has a name that only the engine knew; and
        a clean-up of old versions that the store refuses half-way has forgotten the version and not yet the files. Nor
        can a file be known whose note in the ledger the store refuses, and then its removal as well.
        """
        known = self.orphans.setdefault(place.uri, set())
        found = place.orphans() - known
        known |= found
        self.counts["files left to the engine's own clean-up"] += len(found)
        rule = self.last
        blind = rule is not None and all(re.fullmatch(rule.method, method) for method in ("PUT", "POST"))
        forgivable = name == "cleanup_old_versions" or blind or (rule is not None and rule.lose_answer)
        assert not found or forgivable, (name, place.uri, self.last, found)

    def settle(self, model: Model, before: Any, operation: Callable[[], None]) -> None:
        """Find out whether an operation that ended with an error is in the table: as a whole, or not at all."""
        model.state, model.next_id, model.added = copy.deepcopy(before)
        lance_ray.cleanup_orphans(**model.place.to)
        try:
            model.compare(model.place.open(), model.state)
        except AssertionError:
            model.only_model = True
            try:
                operation()
            finally:
                model.only_model = False
            model.compare(model.place.open(), model.state)  # it raises if neither is what the table holds
            self.counts["refused, and yet committed"] += 1

    def choose(self, model: Model, other: str) -> tuple[str, Callable[[], None]]:
        """An operation and its name."""
        pick = self.random
        number, small, which = pick.randint(1, 60), pick.randint(2, 5), pick.randint(0, 50)
        upkeep = pick.choice(["refresh_index", "optimize_indices", "drop_index"])
        columns: list[tuple[str, Callable[[], None]]] = [
            ("add_columns", lambda: model.add_column(small, other)),
            ("merge_columns", lambda: model.merge_column(small, other)),
        ]
        common: list[tuple[str, Callable[[], None]]] = [
            ("append", lambda: model.write("append", number, other)),
            ("append", lambda: model.write("append", 4 * number, other)),
            ("append", lambda: model.write("append", 4 * number, other)),
            ("append", lambda: model.write("append", 4 * number, other)),
            ("delete", lambda: model.delete(small + 3, which % 2)),
            ("update_columns", lambda: model.update_column(small, other)),
            ("compact_files", lambda: model.compact(other)),
            ("create_index", lambda: model.index(other)),
            (upkeep, lambda: model.index_upkeep(upkeep, other)),
            ("read", lambda: assert_rows(read_here(**model.place.to), model.state)),
            ("read an old version", lambda: model.travel(which)),
            ("take", lambda: self.take(model)),
            ("restore", lambda: model.restore(which)),
            ("overwrite", lambda: model.write("overwrite", number)),
            ("cleanup_old_versions", lambda: model.clean_up(4)),
        ]
        return pick.choice(common + (columns if len(model.state.extra) < 3 else []))

    def take(self, model: Model) -> None:
        """Rows by their ids."""
        keys = self.random.sample(sorted(model.state.rows), min(5, len(model.state.rows)))
        found = lance_ray.take(**model.place.to, keys=keys, on="id")
        assert found.to_pylist() == [
            {**dict.fromkeys(found.column_names), "id": key, **model.state.rows[key]} for key in keys
        ]

    @contextmanager
    def fault(self, place: Place) -> Iterator[None]:
        """Something fails while the block runs."""
        self.counts["faults set up"] += 1
        self.last = None
        if place.s3 is None:
            with self.bad_disk():
                yield
            return
        self.last = self.rule()
        with place.s3.proxy.failing(self.last) as rule:
            yield
        self.counts["requests that failed on S3"] += int(max(0, min(rule.hits - rule.skip, rule.count)))

    def rule(self) -> Rule:
        """What a store does now and then."""
        pick = self.random
        count, skip = pick.choice([1, 1, 2, 5, 25]), pick.choice([0, 0, 1, 2, 4, 8])
        where: dict[str, Any] = {"method": pick.choice(["GET", "PUT|POST", "HEAD", "DELETE|POST", "GET|HEAD", ".*"])}
        if pick.random() < 0.3:
            where = {"method": "PUT", "path": "/_versions/"}
        what: dict[str, Any] = pick.choice(
            [
                {"status": 503},
                {"status": 500, "code": "InternalError"},
                {"status": 429, "code": "TooManyRequests"},
                {"status": 403, "code": "AccessDenied"},
                {"reset": True},
                {"lose_answer": True},
                {"cut_body": 20},
                {"delay": 0.3},
            ]
        )
        return Rule(**where, **what, count=count, skip=skip)

    @contextmanager
    def bad_disk(self) -> Iterator[None]:
        """The next commit is refused, or done and its answer lost."""
        real = lance.LanceDataset.commit
        done, left = self.random.random() < 0.5, [1]

        def fail(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not left:
                    return original(*args, **kwargs)
                left.pop()
                self.counts["commits that failed on disk"] += 1
                if done:
                    original(*args, **kwargs)
                raise OSError("LanceError(IO): connection reset by peer")

            return call

        class Rewrites:
            commit = staticmethod(fail(Compaction.commit))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lance.LanceDataset, "commit", staticmethod(fail(real)))
            patch.setattr(commit, "Compaction", Rewrites)
            yield


@contextmanager
def server() -> Iterator[tuple[dict[str, str], S3]]:
    """An S3 server in this process behind the faulty proxy, and options that lead there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    proxy = FaultProxy(f"http://{host}:{port}")
    store = S3(proxy, f"http://{host}:{port}")
    store.client().create_bucket(Bucket=BUCKET)
    try:
        yield store.options(client_max_retries="2"), store
    finally:
        proxy.close()
        moto.stop()


def main() -> None:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    os.environ.setdefault("LANCE_RAY_NO_BACKOFF", "1")
    soak, started = Soak(asked.seed), time.monotonic()
    print(f"seed {asked.seed}", flush=True)
    try:
        soak.run(asked.minutes)
        print("losses: 0, doubled rows: 0")
    finally:
        print(f"{(time.monotonic() - started) / 60:.1f} minutes; slowest operation {soak.slowest:.1f} s")
        print(f"rows compared with the model: {soak.changed:,}")
        for name, count in sorted(soak.counts.items()):
            print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
