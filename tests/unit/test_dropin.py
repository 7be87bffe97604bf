"""Calls written for lance-ray 0.5.0 and for Ray's own functions: every module, name, keyword, place and default.

The tables are what those packages have, written out here. Where a default differs, the reason stands beside it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import ray.data

import lance_ray

REQUIRED = inspect.Parameter.empty

# Where each name lives in lance-ray, and what it takes: positional ones first, then those by keyword.
LANCE_RAY = {
    "io.read_lance": (
        "uri=None",
        "table_id=None, columns=None, filter=None, storage_options=None, base_store_params=None, scanner_options=None,"
        "dataset_options=None, fragment_ids=None, namespace_impl=None, namespace_properties=None, ray_remote_args=None,"
        "concurrency=None, override_num_blocks=None, with_metadata=False",
    ),
    "io.write_lance": (
        "ds, uri=None",
        "table_id=None, schema=None, mode='create', min_rows_per_file=1048576, max_rows_per_file=67108864,"
        "data_storage_version=None, enable_stable_row_ids=False, storage_options=None, base_store_params=None,"
        "initial_bases=None, target_bases=None, external_blob_mode='reference',"
        "allow_external_blob_outside_bases=False, namespace_impl=None, namespace_properties=None,"
        "ray_remote_args=None, concurrency=None, stream=False, batch_size=None, resume_rows=0, max_bytes_per_file=None",
    ),
    "io.add_columns": (
        "uri=None",
        "transform, filter=None, read_columns=None, reader_schema=None, read_version=None, ray_remote_args=None,"
        "storage_options=None, namespace_impl=None, namespace_properties=None, table_id=None, batch_size=1024,"
        "concurrency=None",
    ),
    "io.add_columns_from": (
        "uri=None",
        "transform, read_columns=None, read_version=None, ray_remote_args=None, storage_options=None,"
        "namespace_impl=None, namespace_properties=None, table_id=None, batch_size=1024",
    ),
    "io.merge_columns_from": (
        "uri=None, ds=None",
        "read_version=None, ray_remote_args=None, storage_options=None, namespace_impl=None,"
        "namespace_properties=None, table_id=None, batch_size=1024, require_full_coverage=True",
    ),
    "search.vector_search": (
        "uri=None",
        "nearest, index_name=None, columns=None, filter=None, storage_options=None, block_size=None,"
        "namespace_impl=None, namespace_properties=None, table_id=None, num_workers=4, ray_remote_args=None,"
        "oversample_factor=1.0, include_unindexed=True, fast_search=False, analyze_plan=False, scanner_options=None",
    ),
    "compaction.compact_files": (
        "uri=None",
        "table_id=None, compaction_options=None, num_workers=4, storage_options=None, namespace_impl=None,"
        "namespace_properties=None, ray_remote_args=None",
    ),
    "compaction.compact_database": (
        "",
        "database, namespace_impl, namespace_properties=None, compaction_options=None, num_workers=4,"
        "storage_options=None, ray_remote_args=None",
    ),
    "pool.init_global_pool": ("processes, ray_remote_args=None", ""),
    "pool.set_global_pool": ("pool", ""),
    "pool.get_global_pool": ("", ""),
    "pool.clear_global_pool": ("", "close=False, join=True"),
    "pool.get_or_create_pool": ("", "processes, ray_remote_args"),
    "fragment.LanceFragmentWriter": (
        "uri",
        "transform=None, schema=None, max_rows_per_file=1048576, max_bytes_per_file=None, max_rows_per_group=None,"
        "data_storage_version=None, enable_stable_row_ids=False, use_legacy_format=False, storage_options=None,"
        "base_store_params=None, initial_bases=None, target_bases=None, external_blob_mode='reference',"
        "allow_external_blob_outside_bases=False, namespace_impl=None, namespace_properties=None, table_id=None,"
        "retry_params=None",
    ),
    "fragment.write_fragment": (
        "stream, uri",
        "schema=None, max_rows_per_file=67108864, max_bytes_per_file=None, max_rows_per_group=1024,"
        "data_storage_version=None, enable_stable_row_ids=False, storage_options=None, base_store_params=None,"
        "initial_bases=None, target_bases=None, external_blob_mode='reference',"
        "allow_external_blob_outside_bases=False, namespace_impl=None, namespace_properties=None, table_id=None,"
        "retry_params=None",
    ),
    "datasink.LanceFragmentCommitter": (
        "uri=None, table_id=None",
        "schema=None, mode='create', enable_stable_row_ids=False, storage_options=None, base_store_params=None,"
        "initial_bases=None, target_bases=None, namespace_impl=None, namespace_properties=None",
    ),
    "datasink.LanceDatasink": (
        "uri=None, table_id=None",
        "schema=None, mode='create', min_rows_per_file=1048576, max_rows_per_file=67108864, data_storage_version=None,"
        "enable_stable_row_ids=False, storage_options=None, base_store_params=None, initial_bases=None,"
        "target_bases=None, external_blob_mode='reference', allow_external_blob_outside_bases=False,"
        "namespace_impl=None, namespace_properties=None",
    ),
    "datasource.LanceDatasource": (
        "uri=None, table_id=None, columns=None, filter=None, storage_options=None, scanner_options=None,"
        "dataset_options=None, base_store_params=None, fragment_ids=None, namespace_impl=None,"
        "namespace_properties=None, with_metadata=False",
        "",
    ),
    "pandas.pd_to_arrow": ("df, schema", ""),
    "index.create_scalar_index": (
        "uri=None",
        "column, index_type, table_id=None, name=None, replace=True, train=True, fragment_ids=None, index_uuid=None,"
        "num_workers=4, num_segments=None, storage_options=None, block_size=None, namespace_impl=None,"
        "namespace_properties=None, ray_remote_args=None",
    ),
    "index.create_index": (
        "uri=None, column='', index_type='', name=None",
        "replace=True, num_workers=4, num_segments=None, storage_options=None, block_size=None, namespace_impl=None,"
        "namespace_properties=None, table_id=None, ray_remote_args=None, metric='l2', num_partitions=None,"
        "num_sub_vectors=None, sample_rate=256, ivf_centroids=None, pq_codebook=None, rabitq_model=None",
    ),
    "index.optimize_indices": (
        "uri=None",
        "table_id=None, indices=None, num_indices_to_merge=1, retrain=False, storage_options=None,"
        "namespace_impl=None, namespace_properties=None",
    ),
}

# What lance-ray has after 0.5.0, in its repository.
LATER = {
    "cleanup.cleanup_old_versions": (
        "uri=None",
        "table_id=None, older_than=None, retain_versions=None, delete_unverified=False,"
        "error_if_tagged_old_versions=True, delete_rate_limit=None, storage_options=None, namespace_impl=None,"
        "namespace_properties=None",
    ),
    "cleanup.cleanup_database_old_versions": (
        "",
        "database, namespace_impl, namespace_properties=None, older_than=None, retain_versions=None,"
        "delete_unverified=False, error_if_tagged_old_versions=True, delete_rate_limit=None, num_workers=4,"
        "storage_options=None, ray_remote_args=None",
    ),
    "io.update_columns": (
        "uri=None",
        "transform, columns, filter=None, read_columns=None, namespace_impl=None, namespace_properties=None,"
        "table_id=None, batch_size=1024, concurrency=None",
    ),
    "io.update_columns_from": (
        "uri=None, ds=None",
        "columns, read_version=None, ray_remote_args=None, storage_options=None, namespace_impl=None,"
        "namespace_properties=None, table_id=None, batch_size=1024",
    ),
    "io.write_lance": ("ds, uri=None", "target_bases=None, target_all_bases=None"),
    "upsert.merge_into": (
        "ds, uri=None",
        "on, table_id=None, namespace_impl=None, namespace_properties=None, storage_options=None, num_workers=4,"
        "num_partitions=None, ray_remote_args=None",
    ),
}

# What connectors before it had, and no installed one has any more.
BEFORE = {
    "compaction.compact_files": (
        "uri, io_config=None",
        "storage_options=None, version=None, asof=None, block_size=None, commit_lock=None, index_cache_size=None,"
        "default_scan_options=None, metadata_cache_size_bytes=None, compaction_options=None, num_partitions=None,"
        "concurrency=None, micro_commit_batch_size=None",
    ),
    "catalog.LanceRestConfig": ("base_url, api_key=None, timeout=None, headers=None", ""),
    "namespaces.create_lance_table_rest": ("rest_config, namespace, table_name, schema", ""),
    "namespaces.register_lance_table_rest": ("rest_config, namespace, table_name, table_uri", ""),
    "io.read_lance": ("uri", "rest_config=None"),
    "io.write_lance": ("ds, uri", "rest_config=None"),
}

# None lets the cluster decide the workers (4 raise an error on a cluster of 2 CPUs there), and the width of a row the
# rows of a batch (1024 of them cost ten times the time where rows are narrow).
BY_THE_CLUSTER, BY_THE_WIDTH = ("num_workers", 4), ("batch_size", 1024)

RAY_READ = (
    "uri",
    "version=None, columns=None, filter=None, storage_options=None, scanner_options=None, num_cpus=None, num_gpus=None,"
    "memory=None, concurrency=None, override_num_blocks=None, label_selector=None, fallback_strategy=None,"
    "max_calls=None, resources=None, accelerator_type=None, runtime_env=None, ray_remote_args=None",
)
RAY_WRITE = (
    "path",
    "schema=None, mode='create', min_rows_per_file=1048576, max_rows_per_file=67108864, data_storage_version=None,"
    "storage_options=None, table_id=None, namespace_impl=None, namespace_properties=None, ray_remote_args=None,"
    "concurrency=None",
)


def declared(told: tuple[str, str]) -> dict[str, inspect.Parameter]:
    """The parameters that a row of the table tells of."""
    positional, by_keyword = told
    star = f"*, {by_keyword}" if by_keyword else ""
    scope: dict[str, Any] = {}
    exec(f"def f({', '.join(filter(None, [positional, star]))}): ...", scope)
    return dict(inspect.signature(scope["f"]).parameters)


def differences(theirs: Mapping[str, inspect.Parameter], found: Any) -> list[str]:
    """What a call in their way would meet: a lacking keyword, another place, another default."""
    ours = inspect.signature(found).parameters
    told = [name for name in theirs if name not in ours]
    for name, parameter in theirs.items():
        if name in told:
            continue
        default = ours[name].default
        same = default == parameter.default or parameter.default is REQUIRED
        if not same and not (default is None and (name, parameter.default) in (BY_THE_CLUSTER, BY_THE_WIDTH)):
            told.append(f"{name}={default!r} instead of {parameter.default!r}")
    places = [name for name, item in theirs.items() if item.kind is not inspect.Parameter.KEYWORD_ONLY]
    here = [name for name, item in ours.items() if item.kind is not inspect.Parameter.KEYWORD_ONLY]
    return [*told, *(f"place of {name}" for name, other in zip(places, here, strict=False) if name != other)]


def found_as(name: str) -> Any:
    """What there is of this name, in the module that it is imported from."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"lance_ray.{module}"), attribute)


@pytest.mark.parametrize("name", LANCE_RAY)
def test_a_call_written_for_lance_ray_is_valid(name):
    assert differences(declared(LANCE_RAY[name]), found_as(name)) == []


@pytest.mark.parametrize("name", LATER)
def test_a_call_written_for_later_lance_ray_is_valid(name):
    assert differences(declared(LATER[name]), found_as(name)) == []
    assert getattr(lance_ray, name.rpartition(".")[2]) is found_as(name)


@pytest.mark.parametrize("name", BEFORE)
def test_a_call_written_for_connectors_before_it_is_valid(name):
    assert differences(declared(BEFORE[name]), found_as(name)) == []
    assert getattr(lance_ray, name.rpartition(".")[2]) is found_as(name)


# What callers read of a result, by attribute or by key.
READ = {
    "CompactionReport": ("fragments_removed", "fragments_added", "files_removed", "files_added"),
    "VersionCleanupReport": (
        *("bytes_removed", "old_versions", "data_files_removed", "transaction_files_removed", "index_files_removed"),
        "deletion_files_removed",
    ),
    "TableCompaction": ("table_id", "metrics"),
    "TableCleanup": ("table_id", "stats"),
    "ColumnsReport": ("version", "rows_updated"),
}
BY_KEY = ("VersionCleanupReport", "TableCompaction", "TableCleanup")


@pytest.mark.parametrize("name", READ)
def test_a_result_has_what_code_for_lance_ray_reads_of_it(name):
    found = getattr(lance_ray, name)
    assert [item for item in READ[name] if item not in (*found.__dataclass_fields__, *vars(found))] == []
    assert hasattr(found, "__getitem__") is (name in BY_KEY)


@pytest.mark.parametrize(
    "name",
    [
        *("add_columns", "add_columns_from", "clear_global_pool", "compact_database", "compact_files"),
        *("create_index", "create_scalar_index", "get_global_pool", "init_global_pool", "LanceFragmentCommitter"),
        *("LanceFragmentWriter", "merge_columns_from", "optimize_indices", "read_lance", "set_global_pool"),
        *("vector_search", "write_lance"),
    ],
)
def test_a_name_exported_there_is_exported_here(name):
    homes = [key for key in LANCE_RAY if key.endswith(f".{name}")]
    module = importlib.import_module(f"lance_ray.{homes[0].partition('.')[0]}")
    assert name in lance_ray.__all__
    assert getattr(lance_ray, name) is getattr(module, name)


@pytest.mark.parametrize(
    ("name", "told"), [("ray.data.read_lance", RAY_READ), ("ray.data.Dataset.write_lance", RAY_WRITE)]
)
def test_a_call_written_for_ray_is_valid(name, told):
    ours = lance_ray.read_lance if "read" in name else lance_ray.write_lance
    theirs = declared(told)
    theirs.pop("uri" if "read" in name else "path")
    assert differences(theirs, ours) == []


def test_ray_itself_has_the_keywords_that_the_table_tells_of():
    """The table is what the installed Ray has: a new Ray with new keywords is noticed here."""
    lance_ray.restore_ray_data()
    try:
        read = inspect.signature(ray.data.read_lance).parameters
        write = inspect.signature(ray.data.Dataset.write_lance).parameters
    finally:
        lance_ray.patch_ray_data()
    assert set(read) == set(declared(RAY_READ))
    assert set(write) - {"self"} == set(declared(RAY_WRITE))


@pytest.mark.slow
def test_the_number_of_cached_namespaces_is_set_by_their_environment_variable():
    program = "from lance_ray import catalog; print(catalog._client.cache_info().maxsize)"
    environment = {**os.environ, "LANCE_RAY_NAMESPACE_CACHE_SIZE": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "3\n"


@pytest.mark.parametrize("module", ["compaction", "index"])
def test_what_is_no_name_of_a_module_is_no_attribute(module):
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(f"lance_ray.{module}").no_such_name  # noqa: B018 - the look is the test
