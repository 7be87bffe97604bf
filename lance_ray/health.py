"""How a table is doing: its fragments, deletions, versions and indexes, and what a compaction would do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance

from lance_ray.catalog import LanceRestConfig
from lance_ray.compaction import (
    CompactionPreview,
    Workers,
    fold_engine_options,
    fold_job,
    fold_ref,
    plan_table,
    preview_of,
    target_rows,
)
from lance_ray.errors import UnsupportedVersionError, translate_errors
from lance_ray.index_build import kind_name
from lance_ray.planning.compaction import Budget
from lance_ray.table import PinnedTable, address_of


@dataclass(frozen=True, slots=True)
class FragmentHealth:
    """One fragment: live and deleted rows, and the size and number of its data files."""

    fragment_id: int
    rows: int
    deleted_rows: int
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class IndexHealth:
    """One index: its kind and columns, and how many of the live rows are in fragments that it covers."""

    name: str
    kind: str
    columns: tuple[str, ...]
    segments: int
    bytes: int
    indexed_rows: int
    unindexed_rows: int

    @property
    def coverage(self) -> float:
        """The share of live rows that it covers, 0 to 1; 1 for an empty table."""
        rows = self.indexed_rows + self.unindexed_rows
        return self.indexed_rows / rows if rows else 1.0

    def __str__(self) -> str:
        return f"{self.name}: {self.kind} on {', '.join(self.columns)}, covers {self.coverage:.0%} of the rows"


@dataclass(frozen=True, slots=True)
class TableHealth:
    """The state of a table at one version. ``print`` it, or ``plot()`` it."""

    target: str
    version: int
    versions: int
    """Versions that can still be read."""
    target_rows: int
    """Rows that a compaction wants a fragment to have."""
    fragments: tuple[FragmentHealth, ...] = field(repr=False)
    indices: tuple[IndexHealth, ...] = ()
    compaction: CompactionPreview | None = None
    """What :func:`lance_ray.compact_files` would do; None for nothing."""

    @property
    def rows(self) -> int:
        """Live rows."""
        return sum(fragment.rows for fragment in self.fragments)

    @property
    def deleted_rows(self) -> int:
        """Rows that are marked deleted, and still stored."""
        return sum(fragment.deleted_rows for fragment in self.fragments)

    @property
    def bytes(self) -> int:
        """Size of the data files of this version."""
        return sum(fragment.bytes for fragment in self.fragments)

    @property
    def small_files(self) -> int:
        """Fragments with fewer rows than the target."""
        return sum(fragment.rows + fragment.deleted_rows < self.target_rows for fragment in self.fragments)

    def __str__(self) -> str:
        stored = self.rows + self.deleted_rows
        deleted = f" ({self.deleted_rows / stored:.0%})" if self.deleted_rows else ""
        lines = [
            f"{self.target}, version {self.version} of {self.versions}",
            f"  {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB, {self.deleted_rows:,} deleted rows{deleted}",
            f"  {len(self.fragments):,} fragment(s), {self.small_files:,} with fewer than {self.target_rows:,} rows",
            *(f"  index {index}" for index in self.indices),
        ]
        plan = self.compaction
        if plan is None:
            return "\n".join([*lines, "  compaction: nothing to do"])
        return "\n".join(
            [
                *lines,
                f"  compaction: {len(plan.tasks)} task(s) over {plan.rows:,} rows ({plan.bytes / 1e6:,.1f} MB),"
                f" leaving {plan.fragments_after} fragment(s)",
            ]
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw live and deleted rows of each fragment, in table order.

        Args:
            axes: matplotlib axes to draw on; by default new ones.

        Returns:
            The axes.

        Raises:
            UnsupportedVersionError: matplotlib is not installed (``pip install matplotlib``).
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise UnsupportedVersionError("matplotlib", "nothing", "3.10.8 or newer") from error
        if axes is None:
            axes = pyplot.subplots(figsize=(10, 4), layout="constrained")[1]
        places = range(len(self.fragments))
        live = [fragment.rows for fragment in self.fragments]
        deleted = [fragment.deleted_rows for fragment in self.fragments]
        axes.bar(places, live, width=1.0, label="live rows", color="tab:blue")
        axes.bar(places, deleted, width=1.0, bottom=live, label="deleted rows", color="tab:red")
        if max([*map(sum, zip(live, deleted, strict=True)), 0]) >= self.target_rows / 10:
            axes.axhline(self.target_rows, color="gray", linestyle="--", label="target")
        axes.set(xlabel="fragment", ylabel="rows", title=f"{self.target}, version {self.version}")
        axes.legend()
        return axes


def table_health(
    uri: Any = None,
    *,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
    version: int | str | None = None,
    asof: Any = None,
    compaction_options: Mapping[str, Any] | None = None,
) -> TableHealth:
    """Look at a table, by its metadata alone: no data is read, no Ray started.

    Args:
        uri: path or URI of the table, or an opened dataset.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.
        version: number or tag.
        asof: time, inclusive.
        compaction_options: those that a compaction would run with.

    Returns:
        A :class:`TableHealth`: fragments, indexes, and what a compaction would do.

    Raises:
        InvalidArgumentError, TableNotFoundError, VersionNotFoundError, StorageError: as for reading.
    """
    address = address_of(locals())
    engine = fold_engine_options(compaction_options)
    job = fold_job(
        fold_ref(uri, address, version=version, asof=asof),
        engine,
        Budget(),
        Workers(),
        micro_commit_batch_size=None,
        on_failure="report",
        max_replans=0,
        progress=False,
    )
    table = job.ref.pin()
    plan = plan_table(table, engine)
    dataset = table.open()
    fragments = _fragments(dataset)
    with translate_errors("look at", table.uri, secrets=table.secrets):
        versions = len(dataset.version_refs())
        return TableHealth(
            job.ref.target,
            table.version,
            versions,
            target_rows(dataset, engine),
            fragments,
            _indices(table, fragments),
            preview_of(job, plan),
        )


def _fragments(dataset: lance.LanceDataset) -> tuple[FragmentHealth, ...]:
    found = (fragment.metadata for fragment in dataset.get_fragments())
    return tuple(
        FragmentHealth(
            item.id,
            item.num_rows,
            item.num_deletions,
            sum(file.file_size_bytes or 0 for file in item.files),
            len(item.files),
        )
        for item in found
    )


def _indices(table: PinnedTable, fragments: Sequence[FragmentHealth]) -> tuple[IndexHealth, ...]:
    rows = {fragment.fragment_id: fragment.rows for fragment in fragments}
    found = []
    for index in table.open().describe_indices():
        covered = {item for segment in index.segments for item in segment.fragment_ids}
        indexed = sum(count for item, count in rows.items() if item in covered)
        found.append(
            IndexHealth(
                index.name,
                kind_name(index),
                tuple(index.field_names),
                len(index.segments),
                index.total_size_bytes or 0,
                indexed,
                sum(rows.values()) - indexed,
            )
        )
    return tuple(found)
