"""New columns of a table, fragment by fragment: which are computed, and which still have to be. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ColumnResult:
    """The new values of one fragment, written but not committed.

    Attributes:
        fragment: its id.
        version: the version that the values were computed on.
        planned: the fragment there, as JSON.
        updated: the fragment with the new file, as JSON; the same as ``planned`` where no row was concerned.
        schema: the table's schema with the new columns, as text; empty for an update.
        fields: the ids of the fields that an update rewrote.
        offsets: the rows that an update matched, as the engine's bitmap in hexadecimal digits.
        rows: rows computed.
        bytes: size of the new file.
    """

    fragment: int
    version: int
    planned: Mapping[str, Any] = field(repr=False)
    updated: Mapping[str, Any] = field(repr=False)
    schema: str = field(default="", repr=False)
    fields: tuple[int, ...] = ()
    offsets: str = field(default="", repr=False)
    rows: int = 0
    bytes: int = 0

    @property
    def has_file(self) -> bool:
        """Whether anything was written."""
        return self.planned != self.updated

    @property
    def new_files(self) -> list[Mapping[str, Any]]:
        """The files beyond those of the plan."""
        known = {file["path"] for file in self.planned["files"]}
        return [file for file in self.updated["files"] if file["path"] not in known]

    def stands_on(self, now: Mapping[str, Any]) -> bool:
        """Whether the fragment is as it was planned."""
        return dict(self.planned) == dict(now)

    def stands_but_for_deletions(self, now: Mapping[str, Any]) -> bool:
        """Whether all that may have changed is which rows are deleted."""
        return {**self.planned, "deletion_file": None} == {**now, "deletion_file": None}


def still_to_do(
    results: Mapping[int, ColumnResult], now: Mapping[int, Mapping[str, Any]], wanted: Sequence[int] | None = None
) -> list[int]:
    """The fragments without values that fit the manifest: those that nobody computed, and those that changed."""
    ids = now if wanted is None else [item for item in wanted if item in now]
    return [item for item in ids if item not in results or not results[item].stands_but_for_deletions(now[item])]
