"""Executions of Ray Data that begin with all the CPUs they may use, instead of with one task for the first second.

Ray's scheduler asks once a second what resources there are, and the answer arrives a moment after the first question:
until the second one it knows of none, and runs one task at a time so that there is progress at all. Work of a second or
two is done by then. :func:`start_in_full` has a dataset's executions wait for that answer before they begin, a few
milliseconds in a cluster that has run something before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ray.data import Dataset

D = TypeVar("D", bound=Dataset)

_PATIENCE_S, _PAUSE_S = 0.1, 0.001
"""How long to wait: in a new cluster, what answers the question has to be started first, which takes longer."""


class KnownResources:
    """For ``DataContext.custom_execution_callback_classes``: begin when it is known what resources there are.

    What answers is no public part of Ray. A version that has it elsewhere begins as it always did.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Wait for the cluster's answer, for a tenth of a second at most.

        Not where a limit is in the plan: there the first small task often is all that has to run.
        """
        steps = getattr(executor, "_topology", ())
        if not any(type(step).__name__ == "LimitOperator" for step in steps):
            wait_for(getattr(getattr(executor, "_cluster_autoscaler", None), "get_total_resources", None))

    def on_execution_step(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


def wait_for(resources: Callable[[], Any] | None) -> None:
    """Ask until there are CPUs or GPUs, or it has taken too long."""
    until = time.monotonic() + _PATIENCE_S
    while resources is not None and time.monotonic() < until:
        known = resources()
        if known.cpu or known.gpu:
            return
        time.sleep(_PAUSE_S)


def start_in_full(ds: D) -> D:
    """The dataset, whose executions and those of what is made of it begin with all the CPUs they may use."""
    classes: list[Any] = ds.context.custom_execution_callback_classes
    if KnownResources not in classes:
        classes.append(KnownResources)
    return ds
