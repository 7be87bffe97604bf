"""What a change of columns commits, and what it makes of changes by others. :mod:`lance_ray.commit` sends it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import FragmentMetadata
from lance.schema import LanceSchema

from lance_ray.commit import Operation, field_identities
from lance_ray.errors import LanceRayError, SnapshotChangedError, translate_errors
from lance_ray.planning.columns import ColumnResult
from lance_ray.table import PinnedTable


def fragments_of(dataset: lance.LanceDataset) -> dict[int, dict[str, Any]]:
    """What the manifest says of each fragment, as values that JSON keeps."""
    return {item.fragment_id: json.loads(json.dumps(item.metadata.to_json())) for item in dataset.get_fragments()}


def schema_digest(dataset: lance.LanceDataset) -> str:
    """Tells the columns of a version from those of another: with the ids by which files know them.

    The largest id in use belongs to it: from there on the engine counts the ids of new columns, and only files that
    were written with the same ids go together.
    """
    text = repr((field_identities(dataset), dataset.max_field_id))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ColumnsOperation(Operation):
    """Results for the fragments of a table, of which each must be there and still fit.

    Attributes:
        table: the table, to look at the version of a result.
        output: the columns that are written.
        results: by fragment.
        complete: whether every fragment of the newest version needs a result.
    """

    table: PinnedTable
    output: pa.Schema
    results: Mapping[int, ColumnResult]
    complete: bool = True
    reads_what_it_replaces: ClassVar[bool] = False
    """Whether a file holds the values of all rows, so that not even a deletion may come between."""

    @abstractmethod
    def refuse(self, base: lance.LanceDataset) -> None:
        """Raise SnapshotChangedError if the columns cannot be committed to this version, whatever is computed."""

    def fitting(self, base: lance.LanceDataset | None) -> list[tuple[dict[str, Any], ColumnResult | None]]:
        """Each fragment of the newest version with its result.

        Raises:
            SnapshotChangedError: some fragment has none, or has changed since.
        """
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        self.refuse(base)
        now = fragments_of(base)
        stale = self.stale(base)
        if stale:
            text = f"{len(stale)} fragment(s) or the table's columns were added or changed, such as {stale[:10]}"
            raise self._changed(text, base)
        return [(metadata, self.results.get(item)) for item, metadata in now.items()]

    def stale(self, base: lance.LanceDataset) -> list[int]:
        """The fragments to compute (again): those without a result, and those whose rows or columns are others."""
        now, digest = fragments_of(base), schema_digest(base)
        wanted = now if self.complete else self.results
        return [item for item in wanted if item not in now or not self._fits(item, now[item], digest, base)]

    def _fits(self, item: int, now: Mapping[str, Any], digest: str, base: lance.LanceDataset) -> bool:
        result = self.results.get(item)
        if result is None or result.digest != digest:
            return False
        if result.stands_on(now):
            return True
        if result.has_file and self.reads_what_it_replaces:
            return False
        return result.stands_but_for_deletions(now) and _covers(self.table, result, base)

    def _changed(self, text: str, base: lance.LanceDataset) -> SnapshotChangedError:
        planned = max((result.version for result in self.results.values()), default=self.table.version)
        return SnapshotChangedError(text, planned=planned, current=base.version)


def _covers(table: PinnedTable, result: ColumnResult, newest: lance.LanceDataset) -> bool:
    """Whether all rows of the fragment were there when it was computed: more deletions do no harm, fewer do."""
    try:
        planned = table.open_at(result.version)
        before, now = (live_rows(dataset, result.fragment) for dataset in (planned, newest))
    except LanceRayError:  # cleaned up, or not readable now: to compute it again is always right
        return False
    return bool(np.isin(now, before).all())


def live_rows(dataset: lance.LanceDataset, fragment: int) -> np.ndarray:
    """The addresses of the rows of a fragment that are not deleted, in its order."""
    found: Any = dataset.get_fragment(fragment)
    with translate_errors("scan", dataset.uri):
        table = dataset.scanner(columns=[], with_row_address=True, fragments=[found]).to_table()
    return np.asarray(table.column("_rowaddr"))


@dataclass(frozen=True)
class AddColumns(ColumnsOperation):
    """New columns: each fragment gets the file with its values, or null without one. Deleted rows stay deleted."""

    def refuse(self, base: lance.LanceDataset) -> None:
        """Others may have added columns of these names."""
        if existing := sorted(set(self.output.names) & set(base.schema.names)):
            raise self._changed(f"others added columns {existing} meanwhile", base)

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's merge: the newest schema with the new columns, whatever else was changed in it meanwhile."""
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        fragments: list[FragmentMetadata] = []
        added: tuple[str, ...] = ()
        for metadata, result in self.fitting(base):
            files = [] if result is None else result.new_files
            added = added or (() if result is None else result.added)
            fragments.append(_fragment({**metadata, "files": [*metadata["files"], *files]}))
        fields = [bytes.fromhex(item) for item in added] or _fields_for(self.output, base)
        # Rows that are appended beside it have null: right only where all rows have.
        return lance.LanceOperation.Merge(
            fragments, _with_fields(base.lance_schema, fields), preserves_nullability=not (added or self.complete)
        )


@dataclass(frozen=True)
class UpdateColumns(ColumnsOperation):
    """Other values in columns that exist: each fragment with matching rows gets a file that replaces these columns."""

    reads_what_it_replaces: ClassVar[bool] = True

    def refuse(self, base: lance.LanceDataset) -> None:
        """Others may have dropped or cast a column."""
        now: pa.Schema = base.schema
        changed = [
            item.name for item in self.output if item.name not in now.names or now.field(item.name).type != item.type
        ]
        if changed:
            raise self._changed(f"others dropped or cast columns {changed} meanwhile", base)

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's update of columns."""
        changed = [result for _, result in self.fitting(base) if result is not None and result.has_file]
        return lance.LanceOperation.Update(
            updated_fragments=[_fragment(result.updated) for result in changed],
            fields_modified=sorted({item for result in changed for item in result.fields}),
            update_mode="rewrite_columns",
            updated_fragment_offsets={result.fragment: bytes.fromhex(result.offsets) for result in changed},
        )


def _fragment(metadata: Mapping[str, Any]) -> FragmentMetadata:
    return FragmentMetadata.from_json(json.dumps(metadata))


# A schema with field ids is read and made by what it is pickled as; pylance offers nothing else. See the unit tests.


def added_fields(schema: LanceSchema, before: LanceSchema) -> tuple[str, ...]:
    """The fields that a schema has beyond those of ``before``, ids included, as text."""
    return tuple(field.hex() for field in _fields(schema)[len(_fields(before)) :])


def _fields(schema: LanceSchema) -> list[bytes]:
    parts: Any = schema.__reduce__()[1]
    return list(parts[1:])


def _with_fields(schema: LanceSchema, fields: Sequence[bytes]) -> LanceSchema:
    pickled: Any = schema.__reduce__()
    made: LanceSchema = pickled[0](*pickled[1], *fields)
    return made


def _fields_for(columns: pa.Schema, base: lance.LanceDataset) -> list[bytes]:
    """New columns as the engine describes them, with the next ids: it counts them through a schema from 0 on."""
    taken = base.max_field_id + 1
    padding = [pa.field(f"{item} is taken", pa.null()) for item in range(taken)]
    return _fields(LanceSchema.from_pyarrow(pa.schema([*padding, *columns])))[taken:]


def as_dict(result: ColumnResult) -> dict[str, Any]:
    """For the ledger."""
    return dataclasses.asdict(result)
