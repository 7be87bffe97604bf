"""Lance tables in Ray: parallel reads, safe writes, one commit.

    import ray, lance_ray

    ds = ray.data.read_lance("s3://bucket/table", columns=["id", "text"], filter="lang = 'en'")
    report = ds.write_lance("s3://bucket/english", mode="create")

How the package is built. Every operation is *plan* (pure values), *run* (module-level worker functions on a pinned
version) and *commit* (one module), and each question has one file:

====================  ==================================================================================
``errors``            the error tree; the only translation of what pylance, namespaces and Ray raise
``options``           frozen option groups; every check of an argument that needs no table
``stores``            options of object stores, in every form that users write them
``store_keys``        the table of these options: names, the engine's keys, and what is refused
``store_values``      how one value changes into the engine's
``store_options``     whole sets of options by that table
``catalog``           the only place that talks to namespaces
``plugins``           what implementations of namespaces do each in their own way, and what their errors mean
``table``             which table: asked for, resolved, about to be written; the only place that opens
``arrow``             blocks to Arrow, one schema, alignment by name and type
``predicates``        Ray expressions to Lance SQL, where both mean the same
``retry``             the only retry loop
``progress``          bars on a terminal, sparse log lines elsewhere
``runner``            tasks of its own: a bounded window, retried by type, cancelled together
``executors``         where they run: threads, Ray tasks, Ray actors
``memory``            what workers do with memory that they have freed; how much of the object store a task fills
``full_start``        executions of Ray Data that begin with all CPUs, not with one task
``preflight``         whether every node can do the work
``ledger``            which files a running job has written; what a dead one left
``commit``            the only place that commits: committed, not committed, or unknown
``planning``          how scans are cut into tasks (values in, values out)
``read``              the worker side of reading
``blobs``             blob columns as bytes, ranges, handles
``blob_ingest``       ``ingest_blobs``: payloads from URLs
``datasource``        ``read_lance`` and Ray's Datasource
``write``             the worker side of writing
``datasink``          Ray's Datasinks: blocks to files, files to one commit
``block_refs``        datasets of very many small blocks, written from references
``writing``           ``write_lance``: a write as tasks, as a stream, or in this process
``fragment``          writers made by hand
``fragment_pickles``  what rows of lance-ray's own writer tell, read without running what they name
``cleanup``           ``cleanup_orphans``
``namespaces``        catalogs for users: connect, create, register, list, describe, drop
``transforms``        what computes columns: SQL, functions, classes
``fingerprints``      what tells one of those from another across processes
``column_commits``    what a change of columns commits, and what it makes of changes by others
``columns``           ``add_columns``, ``merge_columns``, ``update_columns``
``column_jobs``       such a job on its way: rounds of tasks, the commit, what an earlier run has finished
``column_values``     its worker side: the values of one fragment as one new file
``column_merge``      ``merge_columns_from``, ``add_columns_from``, ``update_columns_from``: values from a Ray Dataset
``upsert``            ``merge_into``: rows replaced by key, and others added
``changes``           ``drop_columns``, ``alter_columns``, ``delete``, ``restore``
``vectors``           which rows may be the nearest of many queries: a matrix product, and what rounding does to it
``nearest``           the worker side of a vector search: one shard of it
``search``            ``vector_search``: shards, where they run, one answer
``text_search``       ``full_text_search``, ``hybrid_search``
``nearest_join``      neighbours for each row of a Ray Dataset
``lookup``            ``take``: rows by position, row id or key
``pools``             workers that stay warm between calls
``index``             ``create_scalar_index``, ``create_index``
``index_build``       segments of an index: built and merged on workers, committed, rebuilt where others won
``index_models``      what segments of a vector index share: trained from samples, read from segments
``index_upkeep``      ``refresh_index``, ``optimize_indices``, ``list_indices``, ``drop_index``, ``prewarm``
``compaction``        ``compact_files`` and its worker side
``maintenance``       ``compact_database``, ``cleanup_old_versions``, ``cleanup_database_old_versions``
``health``            ``table_health``
``cli``, ``cli_copy`` the command line ``lance-ray``, which starts in ``__main__``; ``cli_cluster`` runs a call there
``ray_patch``         ``ray.data.read_lance`` and ``Dataset.write_lance``
``io``, ``pool``,     lance-ray's modules of these names, for code that imports from them
``pandas``
====================  ==================================================================================

Importing makes ``ray.data.read_lance`` and ``Dataset.write_lance`` this connector, unless the environment says
``LANCE_RAY_PATCH_RAY_DATA=0``; :func:`restore_ray_data` undoes it. It never starts Ray and opens no file.
"""

from lance_ray.blob_ingest import ingest_blobs
from lance_ray.blobs import BlobHandle, open_blobs
from lance_ray.catalog import LanceRestConfig
from lance_ray.changes import ChangeReport, alter_columns, delete, drop_columns, restore
from lance_ray.cleanup import cleanup_orphans
from lance_ray.column_jobs import ColumnsReport
from lance_ray.column_merge import add_columns_from, merge_columns_from, update_columns_from
from lance_ray.columns import add_columns, merge_columns, update_columns
from lance_ray.compaction import (
    CompactionFailure,
    CompactionPreview,
    CompactionReport,
    PlannedRewrite,
    compact_files,
)
from lance_ray.datasink import LanceFragmentCommitter
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
    UnsupportedCallError,
    UnsupportedVersionError,
    VersionNotFoundError,
    WorkerEnvironmentError,
)
from lance_ray.fragment import LanceFragmentWriter
from lance_ray.health import FragmentHealth, IndexHealth, TableHealth, table_health
from lance_ray.index import create_index, create_scalar_index
from lance_ray.index_build import IndexReport
from lance_ray.index_upkeep import (
    IndexInfo,
    PrewarmReport,
    drop_index,
    list_indices,
    optimize_indices,
    prewarm,
    refresh_index,
)
from lance_ray.ledger import CleanupReport
from lance_ray.lookup import take
from lance_ray.maintenance import (
    TableCleanup,
    TableCompaction,
    VersionCleanupReport,
    cleanup_database_old_versions,
    cleanup_old_versions,
    compact_database,
)
from lance_ray.namespaces import (
    TableDescription,
    connect,
    create_lance_table_rest,
    create_table,
    describe_table,
    drop_table,
    list_tables,
    register_lance_table_rest,
    register_table,
)
from lance_ray.nearest_join import nearest_join
from lance_ray.pools import WarmWorkers, clear_global_pool, get_global_pool, init_global_pool, set_global_pool
from lance_ray.ray_patch import patch_ray_data, patch_unless_switched_off, restore_ray_data
from lance_ray.search import vector_search
from lance_ray.stores import AzureConfig, GCSConfig, IOConfig, OSSConfig, S3Config
from lance_ray.text_search import full_text_search, hybrid_search
from lance_ray.upsert import MergeReport, merge_into
from lance_ray.writing import WriteReport, write_lance

__version__ = "0.1.0"

__all__ = [
    "AzureConfig",
    "BlobHandle",
    "ChangeReport",
    "CleanupReport",
    "ColumnsReport",
    "CommitConflictError",
    "CommitOutcomeUnknownError",
    "CompactionFailure",
    "CompactionPreview",
    "CompactionReport",
    "FragmentHealth",
    "GCSConfig",
    "IOConfig",
    "IndexHealth",
    "IndexInfo",
    "IndexReport",
    "InvalidArgumentError",
    "LanceFragmentCommitter",
    "LanceFragmentWriter",
    "LanceRayError",
    "LanceRestConfig",
    "MergeReport",
    "OSSConfig",
    "OperationFailedError",
    "PlannedRewrite",
    "PrewarmReport",
    "RowCoverageError",
    "S3Config",
    "SchemaMismatchError",
    "SnapshotChangedError",
    "StorageError",
    "TableCleanup",
    "TableCompaction",
    "TableDescription",
    "TableExistsError",
    "TableHealth",
    "TableNotFoundError",
    "TaskFailedError",
    "UnsupportedCallError",
    "UnsupportedVersionError",
    "VersionCleanupReport",
    "VersionNotFoundError",
    "WarmWorkers",
    "WorkerEnvironmentError",
    "WriteReport",
    "add_columns",
    "add_columns_from",
    "alter_columns",
    "cleanup_database_old_versions",
    "cleanup_old_versions",
    "cleanup_orphans",
    "clear_global_pool",
    "compact_database",
    "compact_files",
    "connect",
    "create_index",
    "create_lance_table_rest",
    "create_scalar_index",
    "create_table",
    "delete",
    "describe_table",
    "drop_columns",
    "drop_index",
    "drop_table",
    "full_text_search",
    "get_global_pool",
    "hybrid_search",
    "ingest_blobs",
    "init_global_pool",
    "list_indices",
    "list_tables",
    "merge_columns",
    "merge_columns_from",
    "merge_into",
    "nearest_join",
    "open_blobs",
    "optimize_indices",
    "patch_ray_data",
    "prewarm",
    "read_lance",
    "refresh_index",
    "register_lance_table_rest",
    "register_table",
    "restore",
    "restore_ray_data",
    "set_global_pool",
    "table_health",
    "take",
    "update_columns",
    "update_columns_from",
    "vector_search",
    "write_lance",
]

patch_unless_switched_off()
