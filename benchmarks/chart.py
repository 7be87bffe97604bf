"""Figures as pictures: ``python -m benchmarks.chart LINES.jsonl FILE.png`` (needs the extra ``plot``).

Times are drawn as multiples of the engine's, on a logarithmic axis, with what is asked of this package. The lines are
those of ``python -m benchmarks --json`` or ``python -m benchmarks.peers --json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKERS = {
    "ours": ("o", "tab:blue"),
    "ray": ("s", "tab:orange"),
    "lance-ray": ("^", "tab:red"),
    "daft-lance": ("D", "tab:purple"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of work: multiples of the engine's seconds."""

    name: str
    required: float
    stretch: float
    ratios: dict[str, float]


def row_of(line: Mapping[str, Any]) -> Row | None:
    """What a JSON line says, or None where the engine has no time to compare with."""
    figures: dict[str, Any] = line.get("figures") or {"engine": line["engine"], "ours": line["ours"]}
    engine = figures.get("engine", {}).get("wall")
    if not engine:
        return None
    scale = engine if line["absolute"] else 1.0
    walls = {name: figure["wall"] for name, figure in figures.items() if name != "engine" and figure["wall"]}
    ratios = {name: wall / engine for name, wall in walls.items()}
    return Row(line["name"], line["required"] / scale, line["stretch"] / scale, ratios)


def draw(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A row of marks for each piece of work; the vertical line is the engine."""
    pyplot = _pyplot()
    rows = [row for row in map(row_of, lines) if row is not None]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.32 * len(rows)))
    places = range(len(rows))
    axes.axvline(1.0, color="black", linewidth=1, zorder=0, label="engine")
    axes.scatter([row.required for row in rows], places, marker="|", s=160, color="tab:gray", label="required")
    axes.scatter([row.stretch for row in rows], places, marker="|", s=160, color="tab:green", label="stretch")
    for name, (marker, color) in MARKERS.items():
        points = [(row.ratios[name], place) for place, row in enumerate(rows) if name in row.ratios]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=36, color=color, label=name, alpha=0.85)
    axes.set_yticks(list(places), [row.name for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("wall seconds, as a multiple of one process of pylance (left is faster)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / (1.2 + 0.32 * len(rows))), ncols=7)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


Curves = Mapping[str, Sequence[tuple[float, float]]]


def curves(panels: Mapping[str, tuple[str, Curves]], file: Path) -> None:
    """A panel for each title, with the name of its horizontal axis and a curve for each name; logarithmic axes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for place, (title, (xlabel, named)) in zip(axes[0], panels.items(), strict=True):
        for name, points in named.items():
            place.plot(*zip(*points, strict=True), marker="o", label=name)
        place.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
        place.grid(alpha=0.3)
        place.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl  # an extra, needed for pictures alone

    mpl.use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    return pyplot


if __name__ == "__main__":
    draw([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()], Path(sys.argv[2]))
