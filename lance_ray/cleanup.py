"""What killed jobs left beside a table: found and removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lance_ray import commit
from lance_ray.catalog import LanceRestConfig
from lance_ray.errors import TableNotFoundError
from lance_ray.ledger import CleanupReport, cleanup_jobs
from lance_ray.maintenance import cleanup_database_old_versions, cleanup_old_versions
from lance_ray.options import check_flag
from lance_ray.table import TableRef, address_of

# lance-ray has the other two in its module of this name.
__all__ = ["cleanup_database_old_versions", "cleanup_old_versions", "cleanup_orphans"]


def cleanup_orphans(
    uri: Any = None,
    *,
    dry_run: bool = False,
    table_id: Sequence[str] | None = None,
    namespace_impl: Any = None,
    namespace_properties: dict[str, str] | None = None,
    rest_config: LanceRestConfig | None = None,
    io_config: Any = None,
    storage_options: Any = None,
    base_store_params: dict[str, dict[str, str]] | None = None,
) -> CleanupReport:
    """Remove the files that killed jobs left beside a table, by the names in their ledgers.

    A job counts as dead when its driver process is gone (on this machine), or has not renewed its heartbeat for five
    minutes (elsewhere); running jobs are left alone. A file goes only if no version of the table refers to it. The
    table need not exist: a ``create`` may have died before its commit.

    Args:
        uri: path or URI of the table.
        dry_run: report only.
        table_id: the table's name in a namespace, with ``namespace_impl``.
        namespace_impl: the namespace implementation, or a connected namespace.
        namespace_properties: what the namespace is connected with.
        rest_config: the server of a ``rest://`` address.
        io_config: another name of ``storage_options``.
        storage_options: for the object store, in any form that :func:`lance_ray.stores.storage_options_of` takes.
        base_store_params: storage options of further bases.

    Returns:
        The jobs found and the files removed (or to be removed).

    Raises:
        InvalidArgumentError, StorageError: nothing more is removed; calling again goes on.
    """
    check_flag("dry_run", dry_run)
    ref = TableRef.fold(uri, address_of(locals()))
    table = ref.unpinned()

    def landed(job_id: str, since: int) -> bool:
        try:
            newest = table.open_latest()
            since = max(since, newest.version - commit.HISTORY)
            return commit.find_operation(newest, job_id, since, table.secrets) is not None
        except TableNotFoundError:
            return False

    return cleanup_jobs(table, ref.target, dry_run=dry_run, landed=landed)
