"""New columns of a table, fragment by fragment: which are computed, and which still have to be. Values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ColumnResult:
    """The new values of one fragment, written but not committed.

    Attributes:
        fragment: its id.
        version: the version that the values were computed on.
        digest: of the table's columns there, see :func:`lance_ray.column_commits.schema_digest`.
        planned: the fragment there, as JSON.
        updated: the fragment with the new file, as JSON; the same as ``planned`` where no row was concerned.
        added: the new columns as the engine describes them, in hexadecimal digits; empty for an update.
        fields: the ids of the fields that an update rewrote.
        offsets: the rows that an update matched, as the engine's bitmap in hexadecimal digits.
        rows: rows computed.
        bytes: size of the new file.
    """

    fragment: int
    version: int
    planned: Mapping[str, Any] = field(repr=False)
    updated: Mapping[str, Any] = field(repr=False)
    digest: str = ""
    added: tuple[str, ...] = field(default=(), repr=False)
    fields: tuple[int, ...] = ()
    offsets: str = field(default="", repr=False)
    rows: int = 0
    bytes: int = 0

    @classmethod
    def read(cls, text: Mapping[str, Any]) -> ColumnResult:
        """The result as the ledger keeps it; what an older release wrote fits no version."""
        known = {item.name for item in dataclasses.fields(cls)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in text.items() if name in known
        }
        return cls(**given)

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
