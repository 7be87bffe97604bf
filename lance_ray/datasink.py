"""Ray's Datasinks for Lance: what ``write_lance`` gives to Ray, and two for ``Dataset.write_datasink``.

:class:`LanceDatasink` writes blocks to files and commits them; :class:`LanceFragmentCommitter` commits the rows that
:class:`lance_ray.LanceFragmentWriter` returned from a ``map_batches``. Both make one commit, or leave the table as it
was.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
from lance.fragment import FragmentMetadata
from lance.schema import LanceSchema
from ray.data import DataContext
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from lance_ray import commit, fragment_pickles
from lance_ray.arrow import check_fits, in_file, reads_as, unify
from lance_ray.catalog import LanceRestConfig
from lance_ray.commit import CommitReceipt, Landing
from lance_ray.errors import (
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    SchemaMismatchError,
    TableExistsError,
)
from lance_ray.ledger import JobRef, delete_files, untracked
from lance_ray.memory import object_store_share
from lance_ray.options import CommitOptions, WriteOptions, pairs
from lance_ray.preflight import check_cluster
from lance_ray.retry import RetryPolicy
from lance_ray.runner import run_tasks
from lance_ray.table import TableRef, WriteTarget, address_of
from lance_ray.write import WriteSpec, WrittenFile, format_of, paths_of, places_of, rewrite_file, write_blocks

logger = logging.getLogger(__name__)

FRAGMENT_COLUMNS = ("fragment", "schema", "rows", "bytes", "metadata")
"""What :class:`lance_ray.LanceFragmentWriter` returns for each file."""


class TableSink(Datasink[list[WrittenFile]]):
    """The Ray side of one write. Tasks write files; the driver commits them once, or removes them."""

    def __init__(self, spec: WriteSpec, options: CommitOptions) -> None:
        self._spec = spec
        self._options = options
        self._receipt: CommitReceipt | None = None
        self._written: tuple[WrittenFile, ...] = ()
        self._keep_files = False
        self.fallback_schema: pa.Schema | None = None

    def get_name(self) -> str:
        """The name that Ray shows for the write: ``Lance``."""
        return "Lance"

    @property
    def min_rows_per_write(self) -> int | None:
        """Rows of a task's bundle, when the caller wants files by rows."""
        return self._spec.options.min_rows_per_file if self._spec.options.rows_decide else None

    @property
    def min_bytes_per_write(self) -> int | None:
        """Bytes of a task's bundle, the default: as many as have room in the object store until the task reads them."""
        return None if self._spec.options.rows_decide else min(self._spec.options.bundle_bytes, object_store_share())

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:  # noqa: ARG002 - Ray's signature
        """Runs on a worker: blocks to files."""
        return write_blocks(self._spec, blocks)

    def on_write_complete(self, write_result: WriteResult[list[WrittenFile]]) -> None:
        """Runs on the driver: one commit."""
        files = [file for returned in write_result.write_returns for file in returned or ()]
        self._written = tuple(file for file in files if file.rows)
        self._receipt = commit_files(self, self._spec, files, self._options)

    def on_write_failed(self, error: Exception) -> None:
        """Runs on the driver: removes the job's files when it is certain that they are not in the table."""
        self.abandon(error)

    def abandon(self, error: BaseException) -> None:
        """End the job after a failure or an interrupt. Keeps every file while the outcome of a commit is unknown."""
        job = self._spec.job
        if job is None or self._receipt is not None or self._keep_files or isinstance(error, CommitOutcomeUnknownError):
            return
        self._keep_files = True  # once only: Ray may call twice
        job.end(None)

    def committing(self) -> None:
        """From now on an interrupt leaves the outcome open."""
        self._keep_files = True

    def settled(self) -> None:
        """The outcome is known again."""
        self._keep_files = False

    @property
    def receipt(self) -> CommitReceipt | None:
        """The commit, once there is one."""
        return self._receipt

    @property
    def written(self) -> tuple[WrittenFile, ...]:
        """What the tasks wrote."""
        return self._written


def commit_files(
    sink: TableSink,
    spec: WriteSpec,
    files: Sequence[WrittenFile],
    options: CommitOptions,
    landing: Landing | None = None,
) -> CommitReceipt | None:
    """One commit of all files, under the job's own id by default; None when there is nothing to append."""
    schema, fragments = _final_fragments(spec, files, sink.fallback_schema)
    if spec.target.mode == "append" and not fragments:
        return None
    job = spec.job
    if job is not None:
        job.check_open()
    landing = landing or Landing(options.operation_id, spec.target.base_version)
    sink.committing()
    try:
        receipt = _apply(spec, schema, fragments, options, landing)
    except CommitOutcomeUnknownError:
        raise
    except Exception:  # apply() has made certain that nothing was committed; it goes on to the caller
        sink.settled()
        raise
    sink.settled()
    return receipt


def _apply(
    spec: WriteSpec, schema: pa.Schema, fragments: Sequence[FragmentMetadata], options: CommitOptions, landing: Landing
) -> CommitReceipt:
    target, stable = spec.target, spec.options.enable_stable_row_ids or None
    if target.mode == "append" and target.base is not None:
        append = commit.Append(commit.field_identities(target.base.open()), fragments)
        return commit.apply(target.table, append, options, landing)
    if target.base is None:
        create = commit.Create(schema, fragments, spec.options.initial_bases)
        try:
            return commit.apply(target.table, create, options, landing, enable_stable_row_ids=stable)
        except TableExistsError:
            if target.mode != "overwrite":
                raise
    return commit.apply(
        target.table, commit.Overwrite(schema, fragments), options, landing, enable_stable_row_ids=stable
    )


def _final_fragments(
    spec: WriteSpec, files: Sequence[WrittenFile], fallback: pa.Schema | None
) -> tuple[pa.Schema, list[FragmentMetadata]]:
    """The table's schema and the fragments with that schema's field ids."""
    schema = spec.schema
    if schema is None:
        schemas = [file.arrow_schema for file in files if file.rows] or [file.arrow_schema for file in files]
        found = [item for item in schemas if len(item)] or ([fallback] if fallback is not None else [])
        schema = unify(found) if found else spec.target.schema
    if schema is None:
        raise InvalidArgumentError("schema", None, "the dataset is empty and has no schema; give one")
    if spec.target.mode == "append":
        return schema, [file.metadata() for file in files if file.fragment]
    whole = [file for file in files if file.rows]
    unfit = [index for index, file in enumerate(whole) if not _fits(file, schema)]
    if not unfit:
        return schema, [_with_ids_of(spec, schema, file) for file in whole]
    with run_tasks(
        rewrite_file, [whole[index] for index in unfit], shared=dataclasses.replace(spec, schema=schema)
    ) as run:
        rewritten = {unfit[outcome.index]: outcome.unwrap().metadata() for outcome in run}
    return schema, [rewritten.get(index) or _with_ids_of(spec, schema, file) for index, file in enumerate(whole)]


def _fits(file: WrittenFile, schema: pa.Schema) -> bool:
    """Whether a file can be committed under a schema that blocks of other files have widened."""
    return file.fragment is not None and reads_as(_typed(file.arrow_schema), schema)


def _typed(schema: pa.Schema) -> pa.Schema:
    return pa.schema([item for item in schema if not pa.types.is_null(item.type)])


def written_schema(spec: WriteSpec, file: WrittenFile) -> pa.Schema:
    """The columns that are in the file: those of the declared schema, or those of known type."""
    declared = spec.schema is not None and file.arrow_schema.equals(spec.schema)
    return file.arrow_schema if declared else in_file(file.arrow_schema)


def _with_ids_of(spec: WriteSpec, schema: pa.Schema, file: WrittenFile) -> FragmentMetadata:
    written = written_schema(spec, file)
    if written.equals(schema):
        return file.metadata()
    target = field_ids(LanceSchema.from_pyarrow(schema))
    ids = {field_id: target[path] for path, field_id in field_ids(LanceSchema.from_pyarrow(written)).items()}
    return commit.remap_fields(file.metadata(), ids)


def field_ids(schema: LanceSchema) -> dict[tuple[str, ...], int]:
    """Field ids by path, depth first, which is how the engine numbers the fields of a new schema."""

    def walk(fields: Iterable[Any], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        for item in fields:
            path = (*prefix, item.name())
            yield path, item.id()
            yield from walk(item.children(), path)

    return dict(walk(schema.fields(), ()))


def write_retry() -> RetryPolicy:
    """How often a worker tries to write a file, as Ray's context says."""
    config = DataContext.get_current().lance_config
    return RetryPolicy(config.write_fragments_max_attempts, max_delay=config.write_fragments_retry_max_backoff_s)


def check_workers(ledger: JobRef) -> None:
    """Refuse a cluster that cannot write to the table; the ledger is closed then."""
    try:
        check_cluster([ledger.table], witness=ledger.witness)
    except BaseException:  # whatever it is, also an interrupt: it goes on
        ledger.discard()
        raise


def check_target(target: WriteTarget, options: WriteOptions) -> None:
    """Refuse options that do not go with the table, now that it is known."""
    dataset = None if target.base is None else target.base.open()
    if dataset is not None and options.initial_bases:
        given = [base.path for base in options.initial_bases]
        raise InvalidArgumentError("initial_bases", given, "the table exists; only a new one can have bases registered")
    places_of(target, options)
    version = options.data_storage_version
    storage_format = None if version is None else format_of(version)
    if dataset is None:
        return
    if options.enable_stable_row_ids and not dataset.has_stable_row_ids:
        raise InvalidArgumentError("enable_stable_row_ids", True, "the table exists, and was made without them")
    if storage_format not in (None, dataset.data_storage_version):  # which no commit of the engine changes
        raise InvalidArgumentError("data_storage_version", version, f"the table has {dataset.data_storage_version}")


def files_schema(target: WriteTarget, options: WriteOptions) -> pa.Schema | None:
    """What every file must have: the table's schema for an append, else the declared one where there is one."""
    declared = None if options.schema is None else unify([options.schema])
    if target.mode != "append":
        return declared
    if declared is not None and target.schema is not None:
        check_fits(declared, target.schema)
    return target.schema


def resolve_target(ref: TableRef, options: WriteOptions) -> WriteTarget:
    """The table to write, looked at now.

    Raises:
        InvalidArgumentError: an option does not go with it, or the mode is ``ignore``, which is no write.
        TableExistsError, TableNotFoundError: by the mode.
    """
    if options.mode == "ignore":
        raise InvalidArgumentError("mode", options.mode, "must be 'create', 'append' or 'overwrite' for these two")
    target = WriteTarget.resolve(ref, options.mode)
    check_target(target, options)
    return target


class LanceDatasink(TableSink):
    """A sink for ``Dataset.write_datasink``: rows to files on the workers, then one commit on the driver.

    ``ds.write_datasink(LanceDatasink(uri, mode="append"))`` does what ``write_lance(ds, uri, mode="append")`` does, but
    for the report, a job id, and the removal of files after Ctrl-C, which Ray does not tell a sink of: those then go
    with :func:`lance_ray.cleanup_orphans` once the process has ended.
    """

    def __init__(
        self,
        uri: Any = None,
        table_id: Sequence[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        mode: Any = "create",
        min_rows_per_file: int = 1024 * 1024,
        max_rows_per_file: int = 64 * 1024 * 1024,
        max_bytes_per_file: int | None = None,
        data_storage_version: str | None = None,
        enable_stable_row_ids: bool = False,
        storage_options: Any = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        initial_bases: Sequence[Any] | None = None,
        target_bases: Sequence[str] | None = None,
        target_all_bases: bool | None = None,
        external_blob_mode: str = "reference",
        allow_external_blob_outside_bases: bool = False,
        namespace_impl: Any = None,
        namespace_properties: dict[str, str] | None = None,
        rest_config: LanceRestConfig | None = None,
        io_config: Any = None,
        commit_message: str | None = None,
        transaction_properties: dict[str, str] | None = None,
    ) -> None:
        """See :func:`lance_ray.write_lance`. Resolves and checks the table at once, on the driver."""
        address = address_of(locals())
        self._ref = TableRef.fold(uri, address)
        self._given = WriteOptions(
            mode,
            schema,
            min_rows_per_file,
            max_rows_per_file,
            max_bytes_per_file,
            data_storage_version,
            enable_stable_row_ids,
            initial_bases,
            target_bases,
            external_blob_mode,
            allow_external_blob_outside_bases,
            target_all_bases=target_all_bases,
        )
        self._commit = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or ())
        self._stop: Callable[[], Any] | None = None
        super().__init__(*self._resolved())

    def _resolved(self) -> tuple[WriteSpec, CommitOptions]:
        """A new run: a sink that has written may write again."""
        target = resolve_target(self._ref, self._given)
        bases = tuple(str(base.path) for base in self._given.initial_bases or ())
        ledger = JobRef(target.table, self._commit.operation_id, target.base_version, bases=bases)
        spec = WriteSpec(target, self._given, files_schema(target, self._given), ledger, write_retry())
        return spec, dataclasses.replace(self._commit, job_id=ledger.job_id)

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Runs on the driver before the first task: opens the ledger of the job."""
        if self._receipt is not None or self._keep_files:
            super().__init__(*self._resolved())
        self.fallback_schema = schema if isinstance(schema, pa.Schema) else None
        ledger = self._spec.job
        assert ledger is not None  # noqa: S101 - _resolved() gives it one
        running = ExitStack()
        running.enter_context(ledger.running(f"write ({self._given.mode})"))
        # Ray does not tell a sink of an interrupt: the heartbeat ends with the sink at the latest.
        self._stop = weakref.finalize(self, running.close)
        check_workers(ledger)

    def on_write_complete(self, write_result: WriteResult[list[WrittenFile]]) -> None:
        """Runs on the driver: one commit, and the end of the ledger."""
        if self._stop is None:  # Ray starts no sink for a dataset without blocks
            self.on_write_start()
        super().on_write_complete(write_result)
        ledger = self._spec.job
        assert ledger is not None  # noqa: S101 - _resolved() gives it one
        ledger.end(sum(1 for file in self._written if file.rows))
        self._end()

    def on_write_failed(self, error: Exception) -> None:
        """Runs on the driver: removes the job's files when it is certain that they are not in the table."""
        if self._stop is not None:
            super().on_write_failed(error)
            self._end()

    def _end(self) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stop": None}


class LanceFragmentCommitter(TableSink):
    """The sink for rows that :class:`LanceFragmentWriter` returned: collects them and commits once on the driver.

    Rows of a job's own writer that has only lance-ray's columns ``fragment`` and ``schema`` are taken, too. Their
    pickles may name a fragment's metadata and Arrow types; anything else in them is refused and not run.

    After a failure of the job, the files that reached the committer are removed when it is certain that they were not
    committed.
    """

    def __init__(
        self,
        uri: Any = None,
        table_id: Sequence[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        mode: Any = "create",
        enable_stable_row_ids: bool = False,
        storage_options: Any = None,
        base_store_params: dict[str, dict[str, str]] | None = None,
        initial_bases: Sequence[Any] | None = None,
        target_bases: Sequence[str] | None = None,
        namespace_impl: Any = None,
        namespace_properties: dict[str, str] | None = None,
        rest_config: LanceRestConfig | None = None,
        io_config: Any = None,
        commit_message: str | None = None,
        transaction_properties: dict[str, str] | None = None,
    ) -> None:
        """See :func:`lance_ray.write_lance`. Resolves and checks the table at once, on the driver."""
        address = address_of(locals())
        ref = TableRef.fold(uri, address)
        options = WriteOptions(
            mode,
            schema,
            enable_stable_row_ids=enable_stable_row_ids,
            initial_bases=initial_bases,
            target_bases=target_bases,
        )
        target = resolve_target(ref, options)
        commit = CommitOptions(commit_message, pairs(transaction_properties, "transaction_properties") or ())
        spec = WriteSpec(target, options, files_schema(target, options))
        super().__init__(spec, dataclasses.replace(commit, job_id=commit.operation_id))

    def get_name(self) -> str:
        """The name that Ray shows for the commit."""
        return f"LanceCommitter({self._spec.options.mode})"

    @property
    def min_rows_per_write(self) -> int | None:
        """None: the rows are few and small."""
        return None

    @property
    def min_bytes_per_write(self) -> int | None:
        """None: as above."""
        return None

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[WrittenFile]:  # noqa: ARG002 - Ray's signature
        """Runs on a worker: hands the rows on to the driver."""
        return [file for block in blocks for file in _from_rows(BlockAccessor.for_block(block).to_arrow())]

    def on_write_complete(self, write_result: WriteResult[list[WrittenFile]]) -> None:
        """Runs on the driver: one commit, after a look at whether the files were written for it."""
        self._written = tuple(file for files in write_result.write_returns for file in files or ())
        for file in self._written:
            if file.rows:
                _check_file(self._spec, file)
        super().on_write_complete(write_result)

    def on_write_failed(self, error: Exception) -> None:
        """Runs on the driver. Removes what reached the committer, if it is certain that it was not committed."""
        super().on_write_failed(error)
        spec = self._spec
        if self._receipt is None and not self._keep_files:
            metadata = [file.metadata() for file in self._written if file.fragment]
            table = spec.target.table
            delete_files(table, untracked(table, paths_of(spec, metadata), spec.target.base_version))


def _check_file(spec: WriteSpec, file: WrittenFile) -> None:
    """Refuse a file that its writer made for another target: the engine would read other columns than it has.

    Raises:
        SchemaMismatchError: the file does not have the columns of the table, or of the committer's schema.
        InvalidArgumentError: the mode of the writer was another one, or the table has changed since.
    """
    base = spec.target.base if spec.target.mode == "append" else None
    schema = file.arrow_schema
    if spec.schema is not None:
        fitting = schema if base is not None else unify([spec.schema, schema])
        if not fitting.equals(spec.schema):
            differing = [item for item in schema if item not in list(spec.schema)]
            raise SchemaMismatchError(
                f"the writer's files do not have the schema of the committer: {[str(item) for item in differing]}"
                f" instead of {[str(item) for item in spec.schema]}",
                columns=[item.name for item in differing],
                expected=str(spec.schema),
                actual=str(schema),
            )
    if file.fragment is None:
        return
    numbered = LanceSchema.from_pyarrow(written_schema(spec, file)) if base is None else base.open().lance_schema
    found = [item for part in file.metadata().files for item in part.fields]
    if found != [item for item in field_ids(numbered).values() if item in set(found)]:
        raise InvalidArgumentError(
            "mode", spec.target.mode, "the files were written for another mode, or for another version of the table"
        )


def _from_rows(rows: pa.Table) -> list[WrittenFile]:
    names = set(rows.schema.names)
    if names >= set(FRAGMENT_COLUMNS):
        return [file_of_row(item) for item in rows.to_pylist()]
    if names >= set(fragment_pickles.COLUMNS):  # a job's own writer, or lance-ray's
        return [fragment_pickles.file_of_pickles(item) for item in rows.to_pylist()]
    if rows.num_rows:
        raise InvalidArgumentError(
            "ds", rows.schema.names, f"must be what LanceFragmentWriter returns, with columns {list(FRAGMENT_COLUMNS)}"
        )
    return []


def row_of_file(file: WrittenFile) -> dict[str, Any]:
    """A file as a row of :data:`FRAGMENT_COLUMNS`: the first two are for code that unpickles them itself."""
    return {
        "fragment": None if file.fragment is None else pickle.dumps(file.metadata()),
        "schema": pickle.dumps(file.arrow_schema),
        "rows": file.rows,
        "bytes": file.size_bytes,
        "metadata": json.dumps({"fragment": file.fragment, "schema": base64.b64encode(file.schema).decode()}),
    }


def file_of_row(row: dict[str, Any]) -> WrittenFile:
    """The file again. Nothing is unpickled."""
    told = json.loads(row["metadata"])
    return WrittenFile(row["rows"], row["bytes"], base64.b64decode(told["schema"]), told["fragment"])
