"""Print a pip constraint for each dependency in pyproject.toml: exactly its declared floor.

Floors hold on the oldest Python that the project supports; newer ones have no builds of them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

FLOOR = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?>=(?P<version>[0-9][^,;\s]*)")


def floors(project: dict[str, Any]) -> list[str]:
    """``name==version`` for each runtime and test dependency; one without a floor is an error."""
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"]]
    found = [FLOOR.match(requirement) for requirement in wanted]
    missing = [requirement for requirement, floor in zip(wanted, found, strict=True) if floor is None]
    if missing:
        raise SystemExit(f"no floor declared: {', '.join(missing)}")
    return [f"{floor['name']}=={floor['version']}" for floor in found if floor]


def main() -> None:
    """Check the interpreter, then print."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != oldest:
        raise SystemExit(f"this is Python {running}, floors are proved on the oldest: make PYTHON=python{oldest} ...")
    print("\n".join(floors(project)))


if __name__ == "__main__":
    main()
