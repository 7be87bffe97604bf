"""Compaction: what each row of the table in README.md measures, against one process."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from benchmarks.harness import Case, cached, restored
from lance_ray import CompactionReport, compact_files


def small_fragments(uri: str, fragments: int, *, deleted: bool = False) -> None:
    """Fragments of 500 rows; a fifth of the rows deleted, if asked for."""

    def table(number: int) -> pa.Table:
        ids = np.arange(number * 500, (number + 1) * 500)
        random = np.random.default_rng(number)
        return pa.table({"id": ids, "value": random.random(500), "text": [f"row {item} of the table" for item in ids]})

    written = [lance.fragment.write_fragments(table(number), uri)[0] for number in range(fragments)]
    dataset = lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(table(0).schema, written))
    if deleted:
        dataset.delete("id % 5 = 0")


def wide_fragments(uri: str, fragments: int, megabytes: float) -> None:
    """Fragments of 768-float vectors."""
    rows = max(10, int(megabytes * 1e6 / 768 / 4))
    random = np.random.default_rng(0)
    for number in range(fragments):
        values = random.random(rows * 768, dtype=np.float32)
        ids = np.arange(number * rows, (number + 1) * rows)
        table = pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values, 768)})
        lance.write_dataset(table, uri, mode="append" if number else "create")


def _layout(uri: str) -> int:
    return len(lance.dataset(uri).get_fragments())


def _engine(uri: str, target: int | None) -> int:
    lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=target)
    return _layout(uri)


def _ours(uri: str, target: int | None, **options: int) -> int:
    if target is not None:
        options["target_rows_per_fragment"] = target
    report = compact_files(uri, compaction_options=options, progress=False)
    if not isinstance(report, CompactionReport) or report.failed:
        raise RuntimeError(f"not compacted: {report}")
    return _layout(uri)


def cases(folder: Path, scale: float) -> Iterator[Case]:
    """All cases of compaction, at a scale of the published sizes. Both sides must leave as many fragments."""
    count = max(20, int(2000 * scale))
    wide = max(0.2, 200 * scale)
    rows = max(10, int(wide * 1e6 / 768 / 4))
    name = f"compact {count:,} fragments of 500 rows"
    small = cached(folder, f"small_{count}", functools.partial(small_fragments, fragments=count))
    yield _case(name, small, folder, None)
    deleted = cached(folder, f"deleted_{count}", functools.partial(small_fragments, fragments=count, deleted=True))
    yield _case(f"{name}, 20 % deleted", deleted, folder, None)
    vectors = cached(folder, f"wide_{rows}", functools.partial(wide_fragments, fragments=20, megabytes=wide))
    case = _case(f"compact 20 wide fragments of {wide:g} MB", vectors, folder, 5 * rows)
    yield case
    cores = os.cpu_count() or 1
    threads = functools.partial(_ours, str(folder / "compacted"), 5 * rows, num_threads=cores)
    yield dataclasses.replace(case, name=f"the same, 1 thread a task against {cores}", engine=threads)


def _case(name: str, source: str, folder: Path, target: int | None) -> Case:
    uri = str(folder / "compacted")
    return Case(
        name,
        functools.partial(_engine, uri, target),
        functools.partial(_ours, uri, target),
        1.0,
        0.6,
        before=functools.partial(restored, source, uri),
    )
