"""Tables for the tests of reading, what plain pylance says is in them, and reads with and without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import DataContext, Dataset

import lance_ray
from lance_ray.datasource import LanceDatasource


def numbers(rows: int, start: int = 0) -> pa.Table:
    """``id`` counts from ``start``; ``x``, ``text`` and ``group`` follow from it."""
    ids = np.arange(start, start + rows)
    return pa.table(
        {"id": ids, "x": ids / 2, "text": [f"row {item}" for item in ids], "group": (ids % 7).astype(np.int32)}
    )


def write(uri: Path, table: pa.Table, *, fragments: int = 1, **options: Any) -> lance.LanceDataset:
    """The table in so many fragments of equal size, as version 1."""
    rows = max(1, -(-table.num_rows // fragments))
    return lance.write_dataset(table, str(uri), max_rows_per_file=rows, **options)


def write_many_fragments(uri: Path, table: pa.Table, fragments: int) -> lance.LanceDataset:
    """A table of many fragments that share one data file, so that making it takes no time."""
    written = lance.fragment.write_fragments(table, str(uri))[0].to_json()
    copies = (json.dumps({**written, "id": item}) for item in range(fragments))
    metadata = [lance.FragmentMetadata.from_json(copy) for copy in copies]
    return lance.LanceDataset.commit(str(uri), lance.LanceOperation.Overwrite(table.schema, metadata))


def expected(table: Path | lance.LanceDataset, **scanner: Any) -> pa.Table:
    """The rows that plain pylance reads, in table order."""
    dataset = table if isinstance(table, lance.LanceDataset) else lance.dataset(str(table))
    return dataset.scanner(**scanner).to_table()


def rows(dataset: Dataset) -> pa.Table:
    """All rows of a Ray Dataset in the order of its blocks, which Ray is asked to preserve."""
    dataset.context.execution_options.preserve_order = True
    blocks = ray.get(dataset.to_arrow_refs())
    return pa.concat_tables([block for block in blocks if block.num_rows] or blocks[:1])


def source_of(*args: Any, **kwargs: Any) -> LanceDatasource:
    """What ``read_lance`` with these arguments hands to Ray. Starts no Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "read_datasource", lambda source, **_: source)
        patch.setattr("lance_ray.datasource.start_in_full", lambda dataset: dataset)
        source: Any = lance_ray.read_lance(*args, **kwargs)
    assert isinstance(source, LanceDatasource)
    return source


def tasks_of(source: LanceDatasource) -> list[Any]:
    """The read tasks as Ray gets them for the run."""
    return source.get_read_tasks(1, None, DataContext.get_current())


def run_here(source: LanceDatasource) -> pa.Table:
    """The rows of all tasks, run in this process one after the other."""
    blocks = [block for task in tasks_of(source) for block in task() if block.num_rows]
    schema: Any = source.get_read_tasks(1)[0].schema
    return pa.concat_tables(blocks) if blocks else schema.empty_table()


def read_here(*args: Any, **kwargs: Any) -> pa.Table:
    """The rows that ``read_lance`` with these arguments gives, read in this process."""
    return run_here(source_of(*args, **kwargs))


def assert_same(actual: pa.Table, wanted: pa.Table) -> None:
    """The same columns, types and rows in the same order; how the rows are chunked does not matter."""
    assert actual.schema.names == wanted.schema.names
    assert actual.schema.types == wanted.schema.types
    assert actual.num_rows == wanted.num_rows
    differing = [name for name in wanted.schema.names if actual[name].to_pylist() != wanted[name].to_pylist()]
    assert not differing, differing
