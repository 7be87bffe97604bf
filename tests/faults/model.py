"""What a table should hold after any sequence of operations: a plain Python model, operations on both, one comparison.

Used by the model-based test, which chooses the operations, and by the soak, which injects faults beneath them.
"""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_ray
from lance_ray import column_jobs, column_values, commit, compaction, index_build
from lance_ray.errors import CommitConflictError, SnapshotChangedError
from lance_ray.executors import LocalExecutor
from tests.faults.stores import Place
from tests.tables import read_here

Row = dict[str, int | None]
INDEX = "value_idx"
SMALL: dict[str, Any] = {"target_rows_per_fragment": 64}


@dataclass
class State:
    """The rows by id, the columns beside ``id`` and ``value``, and the row ids that were seen."""

    rows: dict[int, Row] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    row_ids: dict[int, int] = field(default_factory=dict)


@contextmanager
def local_tasks() -> Iterator[None]:
    """Tasks run one after the other in a thread of this process."""

    def executor(workers: column_jobs.ColumnWorkers, operation: str, *, stateful: bool) -> LocalExecutor:
        return LocalExecutor(1, column_values.load if stateful else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_jobs.ColumnWorkers, "executor", executor)
        patch.setattr(compaction, "RayExecutor", lambda *args, **kwargs: LocalExecutor(1))
        patch.setattr(index_build, "on_cluster", lambda *args: index_build.Where(LocalExecutor(1), 1))
        yield


class Model:
    """A table and what should be in it. Each operation changes both, and raises nothing but what it may raise."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.state = State()
        self.history: dict[int, State] = {}
        self.next_id = 0
        self.added = 0
        self.created = False
        self.only_model = False
        """Change the model alone: what an operation of which nobody knows the outcome would have made."""

    # Operations of the package

    def write(self, mode: str, count: int, outsider: str = "") -> None:
        """``create``, ``append`` or ``overwrite``, with all columns that the table has."""
        if mode == "overwrite" or not self.created:
            self.state.extra = []
        table, rows = self._new_rows(count)
        with self._meanwhile(outsider if self.created and mode == "append" else ""):
            self._call(lance_ray.create_table, data=table, mode=mode, enable_stable_row_ids=not self.created)
        if mode == "overwrite":
            self.state.rows, self.state.row_ids = {}, {}
        self.state.rows |= rows
        self.created = True

    def delete(self, divisor: int, rest: int) -> None:
        """Delete every so many-th id."""
        self._call(lance_ray.delete, predicate=f"id % {divisor} = {rest}")
        self._forget(divisor, rest)

    def add_column(self, factor: int, outsider: str = "") -> None:
        """A column that follows from ``value`` by SQL, also for rows that others add meanwhile."""
        name = self._name()
        if self._done(outsider, lance_ray.add_columns, transform={name: f"value * {factor}"}):
            self._fill(name, factor)

    def merge_column(self, factor: int, outsider: str = "") -> None:
        """The same by a function that returns its batch with one column more."""
        name = self._name()

        def more(batch: pa.RecordBatch) -> pa.Table:
            values = [None if item is None else item * factor for item in batch.column("value").to_pylist()]
            return pa.Table.from_batches([batch]).append_column(name, pa.array(values, pa.int64()))

        output = pa.schema([pa.field(name, pa.int64())])
        if self._done(outsider, lance_ray.merge_columns, transform=more, output_schema=output):
            self._fill(name, factor)

    def update_column(self, divisor: int, outsider: str = "") -> None:
        """New values for some rows."""
        keywords = {"transform": {"value": "value + 1"}, "columns": ["value"], "filter": f"id % {divisor} = 0"}
        if self._done(outsider, lance_ray.update_columns, **keywords):
            self._raise_values(divisor)

    def compact(self, outsider: str = "") -> None:
        """Fewer fragments, the same rows."""
        self._done(outsider, lance_ray.compact_files, compaction_options=SMALL)

    def index(self, outsider: str = "") -> None:
        """An index on ``value``, new or once more."""
        self._done(outsider, lance_ray.create_scalar_index, column="value", index_type="BTREE", name=INDEX)

    def index_upkeep(self, what: str, outsider: str = "") -> None:
        """``refresh_index``, ``optimize_indices`` or ``drop_index``, where there is an index."""
        if not self.indexes():
            return
        if what == "drop_index":
            self._call(lance_ray.drop_index, name=INDEX)
        else:
            self._done(outsider, getattr(lance_ray, what), **({"name": INDEX} if what == "refresh_index" else {}))

    def restore(self, which: int) -> None:
        """Make an old version the newest one."""
        version = sorted(self.history)[which % len(self.history)]
        self._call(lance_ray.restore, version=version)
        self.state = copy.deepcopy(self.history[version])

    # What others do, through plain pylance

    def outside(self, action: str) -> None:
        """One change by plain pylance, past the package."""
        dataset = self.place.open()
        if action == "append":
            table, rows = self._new_rows(7)
            self.place.write(table, "append")
            self.state.rows |= rows
        elif action == "delete":
            dataset.delete("id % 5 = 1")
            self._forget(5, 1)
        elif action == "update":
            dataset.update({"value": "value + 1"}, where="id % 3 = 0")
            self._raise_values(3)
        elif action == "compact":
            dataset.optimize.compact_files(target_rows_per_fragment=32)

    # The comparison

    def indexes(self) -> list[str]:
        """The names of the table's indexes."""
        return [item.name for item in lance_ray.list_indices(**self.place.to)]

    def check(self) -> None:
        """The table holds what the model says: rows, row ids, what an index answers; and no ledger is left."""
        if not self.created:
            return
        dataset = self.place.open()
        self.compare(dataset, self.state)
        found = dataset.to_table(columns=["id"], with_row_id=True)
        row_ids = dict(zip(found["id"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
        known = self.state.row_ids
        moved = {
            item: (known[item], row_ids[item]) for item in row_ids if item in known and known[item] != row_ids[item]
        }
        assert moved == {}, "row ids changed"
        self.state.row_ids = row_ids
        assert len(set(row_ids.values())) == len(row_ids)
        for value in sorted({row["value"] or 0 for row in self.state.rows.values()})[::7]:
            wanted = sorted(item for item, row in self.state.rows.items() if row["value"] == value)
            answer = dataset.to_table(columns=["id"], filter=f"value = {value}")
            assert sorted(answer["id"].to_pylist()) == wanted, value
        assert self.place.ledger() == set()
        assert dataset.version not in self.history or self.history[dataset.version].rows == self.state.rows
        self.history[dataset.version] = copy.deepcopy(self.state)

    def compare(self, dataset: lance.LanceDataset, state: State) -> None:
        """A version holds exactly the rows of a state."""
        assert set(dataset.schema.names) == {"id", "value", *state.extra}
        assert_rows(dataset.to_table(), state)

    def travel(self, which: int) -> None:
        """An old version, read by the package, is as it was."""
        version = sorted(self.history)[which % len(self.history)]
        assert_rows(read_here(**self.place.to, version=version), self.history[version])

    def clean_up(self, keep: int) -> None:
        """Remove old versions, all but some."""
        self._call(lance_ray.cleanup_old_versions, older_than=dt.timedelta(0), retain_versions=keep)
        left = {item["version"] for item in self.place.open().versions()}
        self.history = {version: state for version, state in self.history.items() if version in left}

    # Within

    def _call(self, operation: Callable[..., Any], **keywords: Any) -> None:
        if not self.only_model:
            operation(**self.place.to, **keywords)

    def _name(self) -> str:
        self.added += 1
        return f"c{self.added}"

    def _new_rows(self, count: int) -> tuple[pa.Table, dict[int, Row]]:
        ids = range(self.next_id, self.next_id + count)
        self.next_id += count
        rows: dict[int, Row] = {item: {"value": item % 23, **dict.fromkeys(self.state.extra, -item)} for item in ids}
        columns = {
            "id": list(rows),
            **{name: [row[name] for row in rows.values()] for name in ("value", *self.state.extra)},
        }
        return pa.table(columns, schema=pa.schema([(name, pa.int64()) for name in columns])), rows

    def _forget(self, divisor: int, rest: int) -> None:
        self.state.rows = {item: row for item, row in self.state.rows.items() if item % divisor != rest}

    def _raise_values(self, divisor: int) -> None:
        for item, row in self.state.rows.items():
            if item % divisor == 0 and (value := row["value"]) is not None:
                row["value"] = value + 1

    def _fill(self, name: str, factor: int) -> None:
        self.state.extra.append(name)
        for row in self.state.rows.values():
            value = row["value"]
            row[name] = None if value is None else value * factor

    def _done(self, outsider: str, operation: Callable[..., Any], **keywords: Any) -> bool:
        """Run an operation while others change the table; whether it was done. Only then may it be refused."""
        with self._meanwhile(outsider), suppress(*(CommitConflictError, SnapshotChangedError) if outsider else ()):
            self._call(operation, progress=False, **keywords)
            return True
        return False

    @contextmanager
    def _meanwhile(self, outsider: str) -> Iterator[None]:
        """Just before the first commit of the block, somebody else changes the table."""
        waiting = [outsider] if outsider else []

        def late(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if waiting:
                    self.outside(waiting.pop())
                return original(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("apply", "commit_rewrites"):
                patch.setattr(commit, name, late(getattr(commit, name)))
            yield


def assert_rows(table: pa.Table, state: State) -> None:
    """The table has exactly these rows, in any order."""
    found = sorted(table.to_pylist(), key=lambda row: row["id"])
    assert found == [{"id": item, **state.rows[item]} for item in sorted(state.rows)]
