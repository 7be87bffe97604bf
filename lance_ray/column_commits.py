"""What a change of columns commits, and what it makes of changes by others. :mod:`lance_ray.commit` sends it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
from lance.fragment import FragmentMetadata
from lance.schema import LanceSchema

from lance_ray.commit import Operation, field_identities
from lance_ray.errors import LanceRayError, SnapshotChangedError, translate_errors
from lance_ray.planning.columns import ColumnResult, still_to_do
from lance_ray.table import PinnedTable


def fragments_of(dataset: lance.LanceDataset) -> dict[int, dict[str, Any]]:
    """What the manifest says of each fragment, as values that JSON keeps."""
    return {item.fragment_id: json.loads(json.dumps(item.metadata.to_json())) for item in dataset.get_fragments()}


def schema_digest(dataset: lance.LanceDataset) -> str:
    """Tells the columns of a version, with the ids by which files know them, from those of another."""
    return hashlib.blake2b(repr(field_identities(dataset)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ColumnsOperation(Operation):
    """Results for the fragments of a table, of which each must be there and still fit.

    Attributes:
        table: the table, to look at the version of a result.
        digest: of the schema that the results were made for.
        results: by fragment.
        complete: whether every fragment of the newest version needs a result.
    """

    table: PinnedTable
    digest: str
    results: Mapping[int, ColumnResult]
    complete: bool = True

    def fitting(self, base: lance.LanceDataset | None) -> list[tuple[dict[str, Any], ColumnResult | None]]:
        """Each fragment of the newest version with its result.

        Raises:
            SnapshotChangedError: some fragment has none, or has changed since.
        """
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        now = fragments_of(base)
        planned = max((result.version for result in self.results.values()), default=base.version)
        if schema_digest(base) != self.digest:
            raise SnapshotChangedError("the table's columns changed", planned=planned, current=base.version)
        wanted = list(now) if self.complete else list(self.results)
        stale = set(self.stale(base, now, wanted)) | ({item for item in wanted if item not in now})
        if stale:
            raise SnapshotChangedError(
                f"fragments {sorted(stale)[:10]} ({len(stale)} in all) were added or changed",
                planned=planned,
                current=base.version,
            )
        return [(metadata, self.results.get(item)) for item, metadata in now.items()]

    def stale(self, base: lance.LanceDataset, now: Mapping[int, Mapping[str, Any]], wanted: Sequence[int]) -> list[int]:
        """The fragments to compute (again): those without a result, and those whose rows are not all in it."""
        todo = still_to_do(self.results, now, wanted)
        others = (item for item in wanted if item in now and item not in todo)
        grown = [item for item in others if not self.results[item].stands_on(now[item])]
        return todo + [item for item in grown if not _covers(self.table, self.results[item], base)]


def _covers(table: PinnedTable, result: ColumnResult, newest: lance.LanceDataset) -> bool:
    """Whether all rows of the fragment were there when it was computed: more deletions do no harm, fewer do."""
    try:
        planned = table.open_at(result.version)
        before, now = (_live(dataset, result.fragment) for dataset in (planned, newest))
    except LanceRayError:  # cleaned up, or not readable now: to compute it again is always right
        return False
    return bool(np.isin(now, before).all())


def _live(dataset: lance.LanceDataset, fragment: int) -> np.ndarray:
    found: Any = dataset.get_fragment(fragment)
    with translate_errors("scan", dataset.uri):
        table = dataset.scanner(columns=[], with_row_address=True, fragments=[found]).to_table()
    return np.asarray(table.column("_rowaddr"))


@dataclass(frozen=True)
class AddColumns(ColumnsOperation):
    """New columns: each fragment gets the file with its values. Rows deleted meanwhile stay deleted."""

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's merge."""
        fragments = []
        for metadata, result in self.fitting(base):
            files = [] if result is None else result.new_files
            fragments.append(_fragment({**metadata, "files": [*metadata["files"], *files]}))
        schema = next(result.schema for result in self.results.values() if result.schema)
        return lance.LanceOperation.Merge(fragments, read_schema(schema))


@dataclass(frozen=True)
class UpdateColumns(ColumnsOperation):
    """Other values in columns that exist: each fragment with matching rows gets a file that replaces these columns."""

    def stale(self, base: lance.LanceDataset, now: Mapping[int, Mapping[str, Any]], wanted: Sequence[int]) -> list[int]:
        """As for new columns, but what was read may not have changed at all where something was written."""
        todo = super().stale(base, now, wanted)
        rest = (item for item in wanted if item in now and item not in todo)
        return todo + [
            item for item in rest if self.results[item].has_file and not self.results[item].stands_on(now[item])
        ]

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


def schema_text(schema: LanceSchema) -> str:
    """The schema, field ids included, as text: the form in which it is pickled, which nothing else offers."""
    parts: Any = schema.__reduce__()[1]
    metadata, *fields = parts
    return json.dumps([metadata, *(field.hex() for field in fields)])


def read_schema(text: str) -> LanceSchema:
    """The schema that :func:`schema_text` wrote."""
    metadata, *fields = json.loads(text)
    return LanceSchema._from_protos(metadata, *map(bytes.fromhex, fields))


def as_dict(result: ColumnResult) -> dict[str, Any]:
    """For the ledger."""
    return dataclasses.asdict(result)
