"""The only place that commits. A commit has three outcomes, and they are different types.

* committed: a :class:`CommitReceipt`. An answer that was lost is found again by the job's own id, which every commit
  carries in its ``transaction_properties``;
* certainly not committed: the error that says why (:class:`~lance_ray.errors.CommitConflictError`,
  :class:`~lance_ray.errors.TableExistsError`, ...). Only then may the files of the job be deleted;
* unknown: :class:`~lance_ray.errors.CommitOutcomeUnknownError`. No file is deleted.

The loop is: take the newest version, let the operation check itself against it and build on it, commit; on a retryable
conflict do it again, within :class:`~lance_ray.options.CommitOptions`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import random
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import lance
import pyarrow as pa
from lance.dataset import LANCE_COMMIT_MESSAGE_KEY, Index
from lance.fragment import FragmentMetadata
from lance.optimize import Compaction, CompactionOptions, RewriteResult

from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    SchemaMismatchError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    VersionNotFoundError,
    translate_errors,
)
from lance_ray.options import CommitOptions
from lance_ray.planning.compaction import Rewrite
from lance_ray.table import PinnedTable, is_local

logger = logging.getLogger(__name__)

OPERATION_ID = "lance_ray.operation_id"
"""Key of the job's own id in ``transaction_properties``."""

HISTORY = 256
"""How many of the newest versions are searched for a job id that left no ledger behind."""

_MAX_BACKOFF_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class CommitReceipt:
    """A commit that is in the table."""

    version: int
    attempts: int = 1
    schema_changes: tuple[str, ...] = ()
    """Columns that others added between the plan and the commit; the rows of this commit have null there."""
    recovered: bool = False
    """Whether the commit was found by its id instead of by its answer."""


class Operation(ABC):
    """What :func:`apply` commits, on which version, and what it makes of changes by others."""

    strict: ClassVar[bool] = False
    """Whether the commit must come directly after the version that it was built on."""

    def base(self, table: PinnedTable) -> lance.LanceDataset | None:
        """The version to build on, read now; None when there is no table."""
        return table.open_latest()

    @abstractmethod
    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's operation on that version. Raises an error of this package when it no longer fits."""

    def changes(self, dataset: lance.LanceDataset) -> tuple[str, ...]:  # noqa: ARG002 - most operations replace all
        """What others changed that the caller should hear of; raises SchemaMismatchError if the commit does not fit."""
        return ()


@dataclass(frozen=True)
class Create(Operation):
    """The first version of a table, in one commit that loses against any other table at the same address."""

    schema: pa.Schema
    fragments: Sequence[FragmentMetadata]
    initial_bases: Sequence[Any] | None = None
    strict: ClassVar[bool] = True

    def base(self, table: PinnedTable) -> None:
        """Nothing: the table must not exist."""

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:  # noqa: ARG002 - there is no base
        """An overwrite of nothing, which is what the engine calls the first version."""
        bases = [base.engine() for base in self.initial_bases] if self.initial_bases else None
        return lance.LanceOperation.Overwrite(self.schema, list(self.fragments), initial_bases=bases)


@dataclass(frozen=True)
class Overwrite(Operation):
    """All rows and the schema replaced, in one commit, whatever was committed meanwhile."""

    schema: pa.Schema
    fragments: Sequence[FragmentMetadata]

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:  # noqa: ARG002 - all of it goes
        """The engine's overwrite."""
        return lance.LanceOperation.Overwrite(self.schema, list(self.fragments))


@dataclass(frozen=True)
class Append(Operation):
    """Rows added to the newest version, if the columns that were written still mean the same there."""

    written: tuple[FieldIdentity, ...]
    fragments: Sequence[FragmentMetadata]

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's append, after a look at the newest schema."""
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        self.changes(base)
        return lance.LanceOperation.Append(list(self.fragments))

    def changes(self, dataset: lance.LanceDataset) -> tuple[str, ...]:
        """Columns that others added; raises SchemaMismatchError for any other change of the schema."""
        return additive_changes(self.written, field_identities(dataset))


@dataclass(frozen=True)
class PutIndex(Operation):
    """Segments of one index put in the place of others of it, as of the version that they were built on.

    The engine carries it over appends, deletes and updates, and takes a fragment whose column was rewritten out of the
    segments; another index build or a compaction is a conflict. A column that is gone or was cast it does not notice.

    Attributes:
        column: the id of the indexed field, and its type.
        segments: what the index has afterwards, beyond what it keeps.
        replaced: what it has no longer.
    """

    column: tuple[int, str]
    segments: Sequence[Any]
    replaced: Sequence[Any] = ()

    def base(self, table: PinnedTable) -> lance.LanceDataset:
        """The version that was built on, so that the engine compares with everything since."""
        self.check(table.open_latest())
        return table.open()

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:  # noqa: ARG002 - see base()
        """The engine's change of the list of indexes."""
        return lance.LanceOperation.CreateIndex(list(self.segments), list(self.replaced))

    def check(self, dataset: lance.LanceDataset) -> None:
        """Raise SchemaMismatchError if the column is not there any more, or is of another type."""
        number, kind = self.column
        now = {identity: text for _, identity, text in field_paths(dataset)}
        if now.get(number) != kind:
            raise SchemaMismatchError(
                f"the indexed column was dropped or cast in {dataset.uri} while the index was built",
                columns=[str(number)],
                expected=kind,
                actual=now.get(number, "no such column"),
            )


@dataclass(frozen=True)
class DropIndex(Operation):
    """An index taken out of the newest version, or only some segments of it.

    Attributes:
        name: of the index.
        uuids: of the segments; None for all that it has by then.
    """

    name: str
    uuids: frozenset[str] | None = None

    def build(self, base: lance.LanceDataset | None) -> lance.LanceOperation.BaseOperation:
        """The engine's change of the list of indexes."""
        assert base is not None  # noqa: S101 - base() of this class opens or raises
        found = [item for item in described_indices(base) if item.name == self.name]
        parts = [(item, part) for item in found for part in item.segments]
        gone = [bare_segment(*pair) for pair in parts if self.uuids is None or str(pair[1].uuid) in self.uuids]
        if not gone:
            raise InvalidArgumentError("name", self.name, f"is no index of {base.uri} any more")
        return lance.LanceOperation.CreateIndex([], gone)


def described_indices(dataset: lance.LanceDataset) -> list[Any]:
    """What the manifest says of the indexes, the engine's own among them."""
    with translate_errors("read the indexes of", dataset.uri):
        return list(dataset.describe_indices())


def bare_segment(described: Any, part: Any) -> Any:
    """A segment in the engine's form, as far as the manifest's own description tells."""
    make: Any = Index  # its stub wants a bitmap where it takes any set
    return make(
        uuid=str(part.uuid),
        name=described.name,
        fields=list(described.fields),
        dataset_version=part.dataset_version_at_last_update,
        fragment_ids=set(part.fragment_ids),
        index_version=part.index_version,
        index_details=(described.type_url, b""),
    )


_PLAIN = re.compile(r"[^.`\s]+")


def field_paths(dataset: lance.LanceDataset) -> Iterator[tuple[str, int, str]]:
    """All columns, those in structs and lists too: path (odd names in backticks), id of the field, type."""

    def below(fields: Iterator[Any] | Sequence[Any], prefix: str) -> Iterator[tuple[str, int, str]]:
        for item in fields:
            name = item.name()
            path = prefix + (name if _PLAIN.fullmatch(name) else f"`{name}`")
            yield path, item.id(), str(item.to_arrow().type)
            yield from below(item.children(), f"{path}.")

    yield from below(dataset.lance_schema.fields(), "")


@dataclass(frozen=True, slots=True)
class FieldIdentity:
    """A top-level column as data files know it: by the ids of the field and of its children."""

    name: str
    ids: tuple[int, ...]
    type: str
    nullable: bool = field(compare=False)


def field_identities(dataset: lance.LanceDataset) -> tuple[FieldIdentity, ...]:
    """The columns of a version, in order."""
    types = dataset.schema
    return tuple(
        FieldIdentity(
            item.name(), tuple(_ids(item)), str(types.field(item.name()).type), types.field(item.name()).nullable
        )
        for item in dataset.lance_schema.fields()
    )


def _ids(item: Any) -> Iterator[int]:
    yield item.id()
    for child in item.children():
        yield from _ids(child)


def additive_changes(written: Sequence[FieldIdentity], newest: Sequence[FieldIdentity]) -> tuple[str, ...]:
    """The columns that the newest version has beyond those written.

    Raises:
        SchemaMismatchError: a written column is gone or became another one, or a new one cannot be null.
    """
    now = {column.name: column for column in newest}
    changed = [column.name for column in written if now.get(column.name) != column]
    added = [column for column in newest if column.name not in {item.name for item in written}]
    required = [column.name for column in added if not column.nullable]
    if changed or required:
        raise SchemaMismatchError(
            "the table's schema changed while the rows were written:"
            + (f" columns {changed} are gone or are other columns now" if changed else "")
            + (f" columns {required} were added and must not be null" if required else ""),
            columns=[*changed, *required],
            expected=", ".join(f"{column.name}: {column.type}" for column in newest),
            actual=", ".join(f"{column.name}: {column.type}" for column in written),
        )
    return tuple(column.name for column in added)


@dataclass(frozen=True, slots=True)
class Landing:
    """Where to look for the job's own commit: its id, and the version that it started from."""

    operation_id: str
    since: int


def find_operation(
    newest: lance.LanceDataset, operation_id: str, since: int, secrets: Sequence[str] = ()
) -> int | None:
    """The version after ``since`` whose transaction carries the id, or None. One small read for each version.

    Raises:
        StorageError: the store did not answer, so nobody knows.
    """
    found = history(newest, since, secrets)
    return next((version for version, properties in found if properties[OPERATION_ID] == operation_id), None)


def history(
    newest: lance.LanceDataset, since: int, secrets: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """The commits of this package after ``since``, newest first: their versions and transaction properties."""
    for version in range(newest.version, since, -1):
        try:
            with translate_errors("read the history of", newest.uri, secrets=secrets, version=version):
                transaction = newest.read_transaction(version)
        except (VersionNotFoundError, TableNotFoundError):
            return  # cleaned up; what is older is gone too
        except TypeError:  # pylance 14 cannot tell of a compaction that rewrote an index, which is never one of ours
            continue
        properties = dict(transaction.transaction_properties or {}) if transaction else {}
        if OPERATION_ID in properties:
            yield version, properties


def apply(
    table: PinnedTable,
    operation: Operation,
    options: CommitOptions,
    landing: Landing,
    *,
    enable_stable_row_ids: bool | None = None,
) -> CommitReceipt:
    """Commit, or find out what became of the commit.

    Args:
        table: where; its version does not matter.
        operation: what.
        options: message, properties, limits.
        landing: the id that the commit carries, and since which version it can have landed.
        enable_stable_row_ids: for a new table.

    Raises:
        CommitConflictError, TableExistsError, SchemaMismatchError, StorageError: certainly not committed.
        CommitOutcomeUnknownError: not known; keep all files.
    """
    deadline = time.monotonic() + options.timeout_seconds
    for attempt in range(1, options.max_attempts + 1):
        base = operation.base(table)
        found = None if base is None else find_operation(base, landing.operation_id, landing.since, table.secrets)
        if found is not None:
            raise LanceRayError(f"another run of job {landing.operation_id} committed version {found} of {table.uri}")
        transaction = lance.Transaction(
            base.version if base is not None else 0,
            operation.build(base),
            str(uuid.uuid4()),
            _properties(options, landing.operation_id),
        )
        try:
            dataset = _send(table, base, transaction, operation, enable_stable_row_ids, deadline)
        except CommitConflictError as conflict:
            found = _resolve(table, operation, landing, conflict)
            if found is not None:
                return CommitReceipt(found, attempt, recovered=True)
            if not conflict.retryable or attempt == options.max_attempts or time.monotonic() > deadline:
                raise
            logger.info("commit to %s lost against another one, attempt %d: %s", table.ref.target, attempt, conflict)
            time.sleep(random.uniform(0, min(_MAX_BACKOFF_SECONDS, 0.05 * 2**attempt)))
        except Exception as error:  # the commit was sent: whatever was raised, only the table knows its outcome
            found = _resolve(table, operation, landing, error)
            if found is None:
                raise
            logger.warning("the answer of a commit to %s was lost; it is version %d", table.ref.target, found)
            return CommitReceipt(found, attempt, recovered=True)
        else:
            return CommitReceipt(dataset.version, attempt, _landed_changes(operation, dataset, landing))
    raise CommitConflictError(f"commit {table.uri}: gave up", retryable=True)  # pragma: no cover - the loop ends above


def _properties(options: CommitOptions, operation_id: str) -> dict[str, str]:
    properties = {**dict(options.properties), **dict(options.notes), OPERATION_ID: operation_id}
    if options.message is not None:
        properties[LANCE_COMMIT_MESSAGE_KEY] = options.message
    return properties


def _send(
    table: PinnedTable,
    base: lance.LanceDataset | None,
    transaction: lance.Transaction,
    operation: Operation,
    enable_stable_row_ids: bool | None,
    deadline: float,
) -> lance.LanceDataset:
    if base is None:
        table = table.renewed()  # the engine renews credentials for a table that it has opened, and there is none yet
    with translate_errors("commit", table.uri, secrets=table.secrets):
        return lance.LanceDataset.commit(
            table.uri if base is None else base,
            transaction,
            commit_lock=table.ref.open_options.commit_lock,
            max_retries=0 if operation.strict else 20,
            enable_stable_row_ids=enable_stable_row_ids,
            commit_timeout=dt.timedelta(seconds=max(1.0, deadline - time.monotonic())),
            **table.store_kwargs(),
        )


def _landed_changes(operation: Operation, dataset: lance.LanceDataset, landing: Landing) -> tuple[str, ...]:
    # The engine carries an append over a change of the schema that came after the last look at it.
    try:
        return operation.changes(dataset)
    except SchemaMismatchError as mismatch:
        raise CommitOutcomeUnknownError(
            f"the rows are in version {dataset.version} of {dataset.uri}, without the values of columns"
            f" {list(mismatch.columns)}: {mismatch}",
            operation_id=landing.operation_id,
        ) from mismatch


def _resolve(table: PinnedTable, operation: Operation, landing: Landing, error: Exception) -> int | None:
    """The version that the commit landed in, or None when it certainly did not.

    Raises:
        TableExistsError: it did not, because another table was first.
        CommitOutcomeUnknownError: neither is certain.
    """
    try:
        found = find_operation(table.open_latest(), landing.operation_id, landing.since, table.secrets)
    except TableNotFoundError:
        exists, found = False, None
    except LanceRayError as failure:
        raise _unknown(table, landing, failure) from error
    else:
        exists = True
    if found is not None:
        return found
    if exists and operation.strict:
        raise TableExistsError(table.ref.target) from error  # the place that this commit needs is taken
    if not _certain(error) and not _over(table):
        raise _unknown(table, landing, error) from error
    return None


def _over(table: PinnedTable) -> bool:
    """Whether a commit that raised cannot land any more: what is on its way to a store or to a catalog can."""
    return is_local(table.uri) and not table.managed_versioning


def _certain(error: Exception) -> bool:
    """Whether the store's answer itself says that nothing was committed."""
    if isinstance(error, StorageError):
        return error.kind in ("denied", "missing", "full", "invalid")
    known = (CommitConflictError, TableExistsError, TableNotFoundError, SchemaMismatchError, InvalidArgumentError)
    return isinstance(error, known)


def _unknown(table: PinnedTable, landing: Landing, error: Exception) -> CommitOutcomeUnknownError:
    return CommitOutcomeUnknownError(
        f"the answer of a commit to {table.uri} was lost ({error}); it may be in the table, so all files were kept."
        f" Look for {OPERATION_ID}={landing.operation_id} in the newest transactions, or run the job again with"
        f" job_id={landing.operation_id!r}",
        operation_id=landing.operation_id,
    )


def remap_fields(fragment: FragmentMetadata, ids: dict[int, int]) -> FragmentMetadata:
    """The fragment with the field ids of its files replaced, for files written with another schema's ids."""
    for file in fragment.files:
        file.fields = [ids.get(item, item) for item in file.fields]
    return dataclasses.replace(fragment, files=list(fragment.files))


# Compaction. Its commits take no id; they are found again by the names of data files that nothing else refers to.


@dataclass(frozen=True, slots=True)
class RewriteReceipt:
    """What became of some rewrites. Those overtaken are certainly not in the table, the others are."""

    committed: tuple[Rewrite, ...] = ()
    overtaken: tuple[Rewrite, ...] = ()
    version: int = 0
    """The version that holds those committed."""
    recovered: bool = False


def index_names(dataset: lance.LanceDataset) -> frozenset[str]:
    """The names of the indexes that the user made."""
    return frozenset(item.name for item in described_indices(dataset)) - {FRAGMENT_REUSE}


FRAGMENT_REUSE = "__lance_frag_reuse"
"""What the engine keeps of compactions that left the indexes for later."""


def commit_rewrites(
    table: PinnedTable,
    rewrites: Sequence[Rewrite],
    engine_options: Mapping[str, Any],
    planned_indices: frozenset[str],
    options: CommitOptions,
) -> RewriteReceipt:
    """Commit those rewrites whose fragments nobody changed meanwhile; the others come back as overtaken.

    The newest version is opened for each attempt, because the engine takes from it which indexes to remap. What makes
    that safe is that every source fragment is in it exactly as it was planned, deletions included; what comes after it
    the engine checks. The engine's own look at everything since the plan is left on until it objects to something
    that concerns no fragment (an index that was rebuilt); then the rewrites are committed as of the newest version.

    Args:
        table: where; ``table.version`` is the plan's version.
        rewrites: what.
        engine_options: the options that they were planned with.
        planned_indices: the indexes at the plan: rows were not traced for others.
        options: limits.

    Raises:
        CommitConflictError, StorageError: certainly not committed.
        CommitOutcomeUnknownError: not known; keep all files.
    """
    deadline = time.monotonic() + options.timeout_seconds
    rebased = False
    for attempt in range(1, options.max_attempts + 1):
        newest = table.open_latest()
        standing = _standing(table, newest, rewrites, planned_indices)
        overtaken = tuple(item for item in rewrites if item not in standing)
        if not standing:
            return RewriteReceipt((), overtaken)
        try:
            version = _send_rewrites(table, newest, standing, engine_options, rebased=rebased)
            return RewriteReceipt(standing, overtaken, version)
        except Exception as error:  # the commit was sent: whatever was raised, only the table knows its outcome
            found = _landed_rewrites(table, standing, error, options)
            if found is not None:
                logger.warning(
                    "the answer of a compaction commit to %s was lost; it is version %d", table.ref.target, found
                )
                return RewriteReceipt(standing, overtaken, found, recovered=True)
            late = attempt == options.max_attempts or time.monotonic() > deadline
            if not isinstance(error, CommitConflictError) or not error.retryable or late:
                raise
            logger.info("compaction commit to %s lost against another one: %s", table.ref.target, error)
            rebased = _standing(table, table.open_latest(), standing, planned_indices) == standing
            time.sleep(random.uniform(0, min(_MAX_BACKOFF_SECONDS, 0.05 * 2**attempt)))
    raise CommitConflictError(f"commit {table.uri}: gave up", retryable=True)  # pragma: no cover - the loop ends above


def _standing(
    table: PinnedTable, newest: lance.LanceDataset, rewrites: Sequence[Rewrite], planned_indices: frozenset[str]
) -> tuple[Rewrite, ...]:
    """The rewrites that still fit the newest version. A new index fits none: it would lose the rows they moved."""
    if newest.version == table.version:
        return tuple(rewrites)
    if not index_names(newest) <= planned_indices:
        return ()
    planned, now = manifest_of(table.open()), manifest_of(newest)
    return tuple(rewrite for rewrite in rewrites if rewrite.task.stands(planned, now))


def manifest_of(dataset: lance.LanceDataset) -> dict[int, FragmentMetadata]:
    """What the manifest says of each fragment, by its id."""
    return {fragment.fragment_id: fragment.metadata for fragment in dataset.get_fragments()}


def _send_rewrites(
    table: PinnedTable,
    newest: lance.LanceDataset,
    rewrites: Sequence[Rewrite],
    engine_options: Mapping[str, Any],
    *,
    rebased: bool,
) -> int:
    results = [item.done.result for item in rewrites]
    if rebased:
        results = [json.dumps({**json.loads(item), "read_version": newest.version}) for item in results]
    with translate_errors("commit the compaction of", table.uri, secrets=table.secrets):
        parsed = [RewriteResult.from_json(item) for item in results]  # type: ignore[attr-defined] # not in the stub
        Compaction.commit(newest, parsed, cast("CompactionOptions", dict(engine_options)))
    return newest.version  # the engine moves the handle to the version that it made


def _landed_rewrites(
    table: PinnedTable, rewrites: Sequence[Rewrite], error: Exception, options: CommitOptions
) -> int | None:
    """The version that the rewrites landed in, or None when they certainly did not."""
    landing = Landing(options.operation_id, table.version)
    try:
        found = _version_holding(table, {name for item in rewrites for name in item.done.files})
    except LanceRayError as failure:
        raise _unknown(table, landing, failure) from error
    if found is None and not _certain(error) and not _over(table):
        raise _unknown(table, landing, error) from error
    return found


def _version_holding(table: PinnedTable, names: set[str]) -> int | None:
    """The first version after the plan that refers to one of these data files."""
    newest, versions = table.open_latest(), []
    with translate_errors("list the files of", table.uri, secrets=table.secrets):
        for batch in newest.tracked_files(min_version=table.version):
            found = zip(batch.column("version").to_pylist(), batch.column("path").to_pylist(), strict=True)
            versions += [version for version, path in found if str(path).rpartition("/")[2] in names]
    return min(versions, default=None)
