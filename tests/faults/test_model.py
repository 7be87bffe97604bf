"""Any sequence of operations, others in between, against a plain Python model: rows, row ids, indexes and versions."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.faults.model import Model, local_tasks
from tests.faults.stores import Place

OTHERS = st.sampled_from(["", "", "append", "delete", "update", "compact"])
UPKEEP = st.sampled_from(["refresh_index", "optimize_indices", "drop_index"])
SMALL = st.integers(2, 5)


class Operations(RuleBasedStateMachine):
    """Chooses what is done, and what others do between its plan and its commit."""

    local = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="lance-ray-model")
        self.model = Model(Place(f"{self.folder}/table"))
        self.stack = ExitStack()
        if self.local:
            self.stack.enter_context(local_tasks())

    def teardown(self) -> None:
        self.stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @initialize(count=st.integers(1, 120))
    def create(self, count: int) -> None:
        self.model.write("create", count)

    @rule(count=st.integers(0, 50), other=OTHERS)
    def append(self, count: int, other: str) -> None:
        self.model.write("append", count, other)

    @rule(count=st.integers(1, 50))
    def overwrite(self, count: int) -> None:
        self.model.write("overwrite", count)

    @rule(divisor=SMALL, rest=st.integers(0, 1))
    def delete(self, divisor: int, rest: int) -> None:
        self.model.delete(divisor, rest)

    @precondition(lambda self: len(self.model.state.extra) < 3)
    @rule(factor=SMALL, other=OTHERS)
    def add_column(self, factor: int, other: str) -> None:
        self.model.add_column(factor, other)

    @precondition(lambda self: len(self.model.state.extra) < 3)
    @rule(factor=SMALL, other=OTHERS)
    def merge_column(self, factor: int, other: str) -> None:
        self.model.merge_column(factor, other)

    @rule(divisor=SMALL, other=OTHERS)
    def update_column(self, divisor: int, other: str) -> None:
        self.model.update_column(divisor, other)

    @rule(other=OTHERS)
    def compact(self, other: str) -> None:
        self.model.compact(other)

    @rule(other=OTHERS)
    def index(self, other: str) -> None:
        self.model.index(other)

    @rule(what=UPKEEP, other=OTHERS)
    def index_upkeep(self, what: str, other: str) -> None:
        self.model.index_upkeep(what, other)

    @precondition(lambda self: self.model.history)
    @rule(which=st.integers(0, 50))
    def restore(self, which: int) -> None:
        self.model.restore(which)

    @precondition(lambda self: self.model.history)
    @rule(which=st.integers(0, 50))
    def travel(self, which: int) -> None:
        self.model.travel(which)

    @rule(action=st.sampled_from(["append", "delete", "update", "compact"]))
    def outside(self, action: str) -> None:
        self.model.outside(action)

    @invariant()
    def holds(self) -> None:
        self.model.check()


class OnRay(Operations):
    """The same with tasks of Ray."""

    local = False


def run(machine: type[Operations], examples: int, steps: int, **more: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, **more
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_RAY_NO_BACKOFF", "1")


def test_a_few_sequences_of_operations_do_what_the_model_does() -> None:
    run(Operations, 8, 10, derandomize=True, database=None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_sequences_of_operations_do_what_the_model_does() -> None:
    run(Operations, 100, 25)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(900)
def test_a_sample_of_sequences_on_ray_does_what_the_model_does() -> None:
    run(OnRay, 6, 10)
