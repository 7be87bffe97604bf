"""``python -m benchmarks``: run the cases, print JSON lines and a table."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

import lance_ray
from benchmarks import chart, columns, compaction, indexing, planning, reading, searching, writing
from benchmarks.harness import Result, emit, environment, measure, table, warm_object_store

AREAS = {
    "reading": reading.cases,
    "writing": writing.cases,
    "compaction": compaction.cases,
    "columns": columns.cases,
    "searching": searching.cases,
    "indexing": indexing.cases,
}


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the cases that were asked for; returns what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("areas", nargs="*", help=f"any of planning, recall, {', '.join(AREAS)}; all by default")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published sizes (default 1)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one run: does everything work?")
    parser.add_argument("--data", type=Path, help="folder to keep the tables in (default: a temporary one)")
    parser.add_argument(
        "--memory", action="store_true", help="also sample the peak of private memory, in a run of its own"
    )
    parser.add_argument("--json", type=Path, help="file to append the JSON lines to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw the ratios to (curves of planning: beside it)")
    options = parser.parse_args(arguments)
    scale, repeats = (0.002, 1) if options.smoke else (options.scale, options.repeats)
    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",  # not a cluster that somebody else started on this machine
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=6 * 1024**3,
            logging_level=logging.ERROR,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    lance_ray.patch_ray_data()
    try:
        if not options.smoke:
            warm_object_store()
        results = list(_measured(options, scale, repeats))
    finally:
        if started:
            ray.shutdown()
    print(json.dumps(environment()))
    print(table(results))
    if options.chart is not None and results:
        chart.draw([json.loads(result.as_json()) for result in results], options.chart)
    return results


def _measured(options: argparse.Namespace, scale: float, repeats: int) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="lance-ray-bench-") as temporary:
        folder = options.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.areas or "planning" in options.areas:
            _plan(options, folder, scale)
        if "recall" in options.areas or (not options.areas and not options.smoke):
            print(searching.table(list(searching.recall(folder, scale))))
        areas = [area for area in AREAS if not options.areas or area in options.areas]
        for case in (case for area in areas for case in AREAS[area](folder, scale)):
            if options.only in case.name:
                result = measure(case, repeats, memory=options.memory)
                emit(result.as_json(), options.json)
                yield result


def _plan(options: argparse.Namespace, folder: Path, scale: float) -> None:
    rows = []
    for row in planning.run(folder, scale):
        print(planning.as_json(row), flush=True)
        rows.append(row)
    print(planning.table(rows))
    if options.chart is not None:
        planning.draw(rows, options.chart.with_stem(f"{options.chart.stem}-planning"))


if __name__ == "__main__":
    main(sys.argv[1:])
