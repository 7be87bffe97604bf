"""Lance tables in Ray: parallel reads, safe writes, one commit.

    import ray, lance_ray

    ds = ray.data.read_lance("s3://bucket/table", columns=["id", "text"], filter="lang = 'en'")
    report = ds.write_lance("s3://bucket/english", mode="create")

How the package is built. Every operation is *plan* (pure values), *run* (module-level worker functions on a pinned
version) and *commit* (one module), and each question has one file:

====================  ==================================================================================
``errors``            the error tree; the only translation of what pylance, namespaces and Ray raise
``options``           frozen option groups; every check of an argument that needs no table
``catalog``           the only place that talks to namespaces
``table``             which table: asked for, resolved, about to be written; the only place that opens
``arrow``             blocks to Arrow, one schema, alignment by name and type
``predicates``        Ray expressions to Lance SQL, where both mean the same
``retry``             the only retry loop
``progress``          bars on a terminal, sparse log lines elsewhere
``runner``            tasks of its own: a bounded window, retried by type, cancelled together
``executors``         where they run: threads, Ray tasks, Ray actors
``memory``            what worker processes do with memory that they have freed
``preflight``         whether every node can do the work
``ledger``            which files a running job has written; what a dead one left
``commit``            the only place that commits: committed, not committed, or unknown
``planning``          how scans are cut into tasks (values in, values out)
``read``              the worker side of reading
``datasource``        ``read_lance`` and Ray's Datasource
``write``             the worker side of writing
``datasink``          ``write_lance`` and Ray's Datasink
``fragment``          writers and committers made by hand
``cleanup``           ``cleanup_orphans``
``transforms``        what computes columns: SQL, functions, classes
``fingerprints``      what tells one of those from another across processes
``column_commits``    what a change of columns commits, and what it makes of changes by others
``columns``           ``add_columns``, ``merge_columns``, ``update_columns`` and their worker side
``column_merge``      ``merge_columns_from``, ``add_columns_from``: values from a Ray Dataset
``changes``           ``drop_columns``, ``alter_columns``, ``delete``, ``restore``
``compaction``        ``compact_files`` and its worker side
``maintenance``       ``compact_database``, ``cleanup_old_versions``
``health``            ``table_health``
``ray_patch``         ``ray.data.read_lance`` and ``Dataset.write_lance``
====================  ==================================================================================

Importing makes ``ray.data.read_lance`` and ``Dataset.write_lance`` this connector, unless the environment says
``LANCE_RAY_PATCH_RAY_DATA=0``; :func:`restore_ray_data` undoes it. It never starts Ray and opens no file.
"""

from lance_ray.changes import ChangeReport, alter_columns, delete, drop_columns, restore
from lance_ray.cleanup import cleanup_orphans
from lance_ray.column_merge import add_columns_from, merge_columns_from
from lance_ray.columns import ColumnsReport, add_columns, merge_columns, update_columns
from lance_ray.compaction import (
    CompactionFailure,
    CompactionPreview,
    CompactionReport,
    PlannedRewrite,
    compact_files,
)
from lance_ray.datasink import WriteReport, write_lance
from lance_ray.datasource import read_lance
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    OperationFailedError,
    RowCoverageError,
    SchemaMismatchError,
    SnapshotChangedError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    TaskFailedError,
    UnsupportedVersionError,
    VersionNotFoundError,
    WorkerEnvironmentError,
)
from lance_ray.fragment import LanceFragmentCommitter, LanceFragmentWriter
from lance_ray.health import FragmentHealth, IndexHealth, TableHealth, table_health
from lance_ray.ledger import CleanupReport
from lance_ray.maintenance import (
    TableCompaction,
    VersionCleanupReport,
    cleanup_old_versions,
    compact_database,
)
from lance_ray.ray_patch import patch_ray_data, patch_unless_switched_off, restore_ray_data

__version__ = "0.1.0"

__all__ = [
    "ChangeReport",
    "CleanupReport",
    "ColumnsReport",
    "CommitConflictError",
    "CommitOutcomeUnknownError",
    "CompactionFailure",
    "CompactionPreview",
    "CompactionReport",
    "FragmentHealth",
    "IndexHealth",
    "InvalidArgumentError",
    "LanceFragmentCommitter",
    "LanceFragmentWriter",
    "LanceRayError",
    "OperationFailedError",
    "PlannedRewrite",
    "RowCoverageError",
    "SchemaMismatchError",
    "SnapshotChangedError",
    "StorageError",
    "TableCompaction",
    "TableExistsError",
    "TableHealth",
    "TableNotFoundError",
    "TaskFailedError",
    "UnsupportedVersionError",
    "VersionCleanupReport",
    "VersionNotFoundError",
    "WorkerEnvironmentError",
    "WriteReport",
    "add_columns",
    "add_columns_from",
    "alter_columns",
    "cleanup_old_versions",
    "cleanup_orphans",
    "compact_database",
    "compact_files",
    "delete",
    "drop_columns",
    "merge_columns",
    "merge_columns_from",
    "patch_ray_data",
    "read_lance",
    "restore",
    "restore_ray_data",
    "table_health",
    "update_columns",
    "write_lance",
]

patch_unless_switched_off()
