"""One call of a public function by a task of a cluster: for commands that need no Ray by themselves.

A cluster may reach a store, or have the credentials of one, that the machine of the command does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lance_ray.runner import RunOptions, run_tasks


def call_there(function: Callable[..., Any], keywords: Mapping[str, Any]) -> Any:
    """What the function returns there; raises what it raised."""
    options = RunOptions(ray_remote_args={"num_cpus": 0}, progress=False, on_failure="report")
    with run_tasks(call, [dict(keywords)], shared=function, options=options, operation="lance_ray.command") as run:
        (outcome,) = run
    if outcome.error is not None:
        raise outcome.error.__cause__ or outcome.error
    return outcome.result


def call(function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    """Runs on a worker."""
    return function(**keywords)
