"""The job ledger: which files a running job has written, kept beside the table until the job is over.

On failure Ray hands the driver only an exception, not what finished tasks returned, and a killed driver hands over
nothing. So each worker records the name of every finished file under ``<table>/_lance_ray/<job id>/<run>/`` before its
task returns. A job that ends removes its ledger; what a killed job leaves is read by :func:`cleanup_orphans` and by the
next run of the same job id.

Protocol. The driver writes ``job.json`` first, once; ``beat.json`` is its heartbeat. A worker writes its entry, *then*
looks for ``job.json``; the driver (or a clean-up) removes ``job.json``, *then* lists the entries. So an entry is either
seen by the one who removes, or its worker notices that the job is over and takes its own file back. Before the commit
the driver looks for ``job.json`` too: a run that was cleaned up can no longer commit, and since nobody writes
``job.json`` a second time and each run has a folder of its own, nothing brings it back. Only files named in entries are
ever deleted, after it is certain that no version of the table refers to them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lance_ray.errors import (
    InvalidArgumentError,
    LanceRayError,
    StorageError,
    TableNotFoundError,
    translate_errors,
)
from lance_ray.retry import RetryPolicy, is_interruption
from lance_ray.table import PinnedTable, is_local

logger = logging.getLogger(__name__)

FOLDER = "_lance_ray"
HEARTBEAT_SECONDS = 30.0
DEAD_AFTER_SECONDS = 300.0
_HEADER, _BEAT = "job.json", "beat.json"
_THREADS = 16
_ONCE = RetryPolicy(max_attempts=1)
# The names that the engine gives to data files; anything else in a ledger is not deleted.
_DATA_FILE = re.compile(r"[A-Za-z0-9_-]{8,128}\.lance")
_SEGMENT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
INDICES = "_indices"


@dataclass(frozen=True, slots=True)
class WrittenPath:
    """One data file: its name, the base that it lies in (None for the table itself), and the folder there.

    Or one segment of an index: its UUID, which is the name of its own folder in :data:`INDICES`.
    """

    name: str
    base: str | None = None
    folder: str = "data"

    @classmethod
    def segment(cls, uuid: str) -> WrittenPath:
        """A segment of an index."""
        return cls(uuid, folder=INDICES)

    @property
    def path(self) -> str:
        """Where it lies in its base."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def is_segment(self) -> bool:
        """Whether it is the folder of a segment."""
        return self.folder == INDICES and self.base is None and _SEGMENT.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class JobRef:
    """One run of a job of one table; what a worker needs to record its files."""

    table: PinnedTable
    job_id: str
    since: int = 0
    """The version that the job started from: only later ones can hold its files."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    bases: tuple[str, ...] = ()
    """Bases of files that this run's driver knows of beside those of the table: of a create, its initial ones."""

    def record(self, files: Iterable[WrittenPath], result: Mapping[str, Any] | None = None) -> None:
        """Note finished files (called by a worker before its task returns).

        Args:
            files: what was written.
            result: what a later run of the same job needs to use them.

        Raises:
            LanceRayError: the job was ended meanwhile, or the note could not be written; the files have been removed.
        """
        written = tuple(files)
        store = _Store(self.table)
        entry = f"{self._folder}/{uuid.uuid4().hex}.json"
        try:
            store.write(entry, {"files": [dataclasses.asdict(file) for file in written], "result": result})
        except LanceRayError:
            with suppress(LanceRayError):  # what is told is why the note failed, not what followed
                delete_files(self.table, written)
            raise
        if not store.contains(self._header):
            delete_files(self.table, written)
            store.delete(entry)
            raise LanceRayError(f"job {self.job_id} was ended while this task was still writing")

    def is_open(self) -> bool:
        """Whether this run still may commit."""
        return _Store(self.table).contains(self._header)

    def check_open(self) -> None:
        """Raise LanceRayError if a clean-up has ended this run: its files may be gone."""
        if not self.is_open():
            raise LanceRayError(f"job {self.job_id} was ended by a clean-up before it could commit")

    @property
    def _folder(self) -> str:
        return f"{FOLDER}/{self.job_id}/{self.run}"

    @property
    def _header(self) -> str:
        return f"{self._folder}/{_HEADER}"

    @property
    def witness(self) -> str:
        """A file that is there while the run is open, relative to the table."""
        return self._header

    @contextmanager
    def running(
        self, operation: str, *, exclusive: bool = False, plan: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Open the ledger and keep its heartbeat while the block runs. Ending it is the caller's decision.

        Args:
            operation: for the report of a clean-up.
            exclusive: refuse to run beside another run of the same job id.
            plan: what a later run of the same job must share to take over the results of this one.

        Raises:
            InvalidArgumentError: there is one.
        """
        store = _Store(self.table)
        header = {
            "plan": plan,
            "operation": operation,
            "read_version": self.since,
            "processes": _process_space(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": time.time(),
        }
        _running[self.run] = None  # before anybody can find it: a clean-up in another thread would take it for dead
        try:
            store.write(self._header, header)
            beat = _running[self.run] = _Heartbeat(store, f"{self._folder}/{_BEAT}")
            try:
                if exclusive:
                    self._refuse_rivals()
                yield
            finally:
                beat.stop()
        finally:
            _running.pop(self.run, None)

    def _refuse_rivals(self) -> None:
        # Both of two that start at once may see the other and give up; never do both go on.
        try:
            for found in _runs(self.table, self.job_id):
                found.refuse_beside(self)
        except InvalidArgumentError:
            self.discard()
            raise

    def earlier_plans(self) -> list[dict[str, Any]]:
        """The plans of earlier runs of the same job id, which have ended.

        Raises:
            InvalidArgumentError: one of them is under way.
        """
        plans = []
        for found in _runs(self.table, self.job_id):
            found.refuse_beside(self)
            if found.job.run != self.run and found.header.get("plan"):
                plans.append(found.header["plan"])
        return plans

    def take_over(self) -> list[dict[str, Any]]:
        """Results of earlier runs of the same job id, which belong to this run from now on; their ledgers go.

        Only results whose files are all still there.
        """
        results: list[dict[str, Any]] = []
        for found in _runs(self.table, self.job_id):
            if found.job.run == self.run:
                continue
            found.refuse_beside(self)
            store = _Store(self.table)
            for name in found.job._entries(store):
                entry = store.read(name) or {}
                files = self._files_of(entry.get("files", ()))
                if entry.get("result") and all(_Store(self.table, file.base).contains(file.path) for file in files):
                    self.record(files, entry["result"])
                    store.delete(name)
                    results.append(entry["result"])
            found.job.discard()
        return results

    def end_earlier_runs(self) -> None:
        """Remove what earlier runs of the same job id left behind.

        Raises:
            InvalidArgumentError: one of them is under way.
        """
        for found in _runs(self.table, self.job_id):
            if found.job.run != self.run:
                found.refuse_beside(self)
                dataclasses.replace(found.job, bases=self.bases).discard()

    def close(self, committed: int) -> None:
        """End a job that committed: remove its ledger, and files that no version refers to.

        Those are of attempts that Ray ran again, and of files that were written again with a wider schema.

        Args:
            committed: how many files the job's commits hold.
        """
        self._remove(lambda: self._superfluous(committed))

    def discard(self) -> tuple[WrittenPath, ...]:
        """End a job that did not commit, or that died: remove the files that it recorded, then the ledger.

        Files that a version of the table refers to are kept whatever the caller believes.

        Returns:
            The data files removed.
        """
        return self._remove(self.orphans)

    def end(self, committed: int | None) -> None:
        """:meth:`close` the job, or with None :meth:`discard` it.

        A failure is logged, not raised: what the caller must hear is how the job went.
        """
        try:
            if committed is not None:
                self.close(committed)
            else:
                logger.info("removed %d file(s) of the failed job %s", len(self.discard()), self.job_id)
        except LanceRayError as failure:
            logger.warning("files of job %s are left for cleanup_orphans(): %s", self.job_id, failure)

    def orphans(self) -> tuple[WrittenPath, ...]:
        """The recorded files that no version of the table refers to."""
        return untracked(self.table, self.recorded(), self.since)

    def recorded(self) -> tuple[WrittenPath, ...]:
        """The files named in the entries."""
        store = _Store(self.table)
        entries = _each(store.read, self._entries(store))
        return self._files_of([item for entry in entries for item in (entry or {}).get("files", ())])

    def _files_of(self, items: Sequence[Mapping[str, Any]]) -> tuple[WrittenPath, ...]:
        """Files named in entries. Whoever may write beside the table may write entries: none may lead elsewhere."""
        files = tuple(
            WrittenPath(str(item["name"]), item.get("base"), str(item.get("folder", "data"))) for item in items
        )
        for file in files:
            _check_name(file, self.table.uri)
        bases = {file.base for file in files if file.base is not None}
        if foreign := sorted(bases - self._known_bases()) if bases else []:
            raise LanceRayError(
                f"the ledger of {self.table.uri} names files in {foreign}, which are no bases of the table;"
                " name them in base_store_params if they are those of a table that was never created"
            )
        return files

    def _known_bases(self) -> set[str]:
        known = {*self.bases, *(base for base, _ in self.table.ref.base_store_params)}
        try:
            return known | {str(base.path) for base in self.table.open_latest().base_paths().values()}
        except TableNotFoundError:
            return known

    def _entries(self, store: _Store) -> list[str]:
        return [name for name in store.notes(self._folder) if not name.endswith((f"/{_HEADER}", f"/{_BEAT}"))]

    def _superfluous(self, committed: int) -> tuple[WrittenPath, ...]:
        if len(self._entries(_Store(self.table))) <= committed:
            return ()  # the usual case: one entry for each file, nothing to read
        return self.orphans()

    def _remove(self, orphans: Callable[[], tuple[WrittenPath, ...]]) -> tuple[WrittenPath, ...]:
        beat = _running.get(self.run)
        if beat is not None:
            beat.stop()  # or it would write into a folder that is being removed
        store = _Store(self.table)
        store.delete(self._header)
        doomed = orphans()
        delete_files(self.table, doomed)
        _each(store.delete, store.list(self._folder))
        store.prune(self._folder, f"{FOLDER}/{self.job_id}", FOLDER)
        return doomed


class _Heartbeat:
    """A thread that renews a small file, until it is stopped."""

    def __init__(self, store: _Store, name: str) -> None:
        self._store, self._name = store, name
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lance-ray-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(LanceRayError, OSError):  # the next beat tries again, and a missed one is allowed for
                self._store.write(self._name, {"heartbeat": time.time()}, _ONCE)

    def stop(self) -> None:
        """Return when no beat is under way any more."""
        self._stopped.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)


_running: dict[str, _Heartbeat | None] = {}
"""The runs of this process, from before their ledger can be found."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A run found in the ledger, and what its driver last wrote."""

    job: JobRef
    header: dict[str, Any]
    heartbeat: float

    @property
    def is_alive(self) -> bool:
        """Whether its driver is at work: certain for a process of this machine, by the heartbeat elsewhere."""
        if self.job.run in _running:
            return True
        fresh = bool(self.header) and time.time() - self.heartbeat < DEAD_AFTER_SECONDS
        if not fresh or self.header.get("processes") != _process_space():
            return fresh
        pid, start = int(self.header["pid"]), self.header["process_start"]
        return pid != os.getpid() and start is not None and _process_start(pid) == start

    def refuse_beside(self, other: JobRef) -> None:
        """Raise InvalidArgumentError if this is another run than ``other``, and alive."""
        if self.job.run != other.run and self.is_alive:
            raise InvalidArgumentError(
                "job_id",
                self.job.job_id,
                f"another run of this job is under way: process {self.header.get('pid')} of"
                f" {str(self.header.get('processes')).split()[0]}, last heard of {time.time() - self.heartbeat:.0f} s"
                f" ago (on another machine it counts as dead after {DEAD_AFTER_SECONDS:.0f} s)",
            )


def _runs(table: PinnedTable, job_id: str | None = None) -> list[_Run]:
    """The runs in the ledger: of one job, or of all."""
    store = _Store(table)
    names = set(store.notes(FOLDER if job_id is None else f"{FOLDER}/{job_id}"))
    places = sorted({tuple(parts[1:3]) for parts in (name.split("/") for name in names) if len(parts) == 4})
    found = []
    for job, run in places:
        place = f"{FOLDER}/{job}/{run}"
        header = (store.read(f"{place}/{_HEADER}") if f"{place}/{_HEADER}" in names else None) or {}
        beat = (store.read(f"{place}/{_BEAT}") if f"{place}/{_BEAT}" in names else None) or {}
        seen = max(float(header.get("started", 0)), float(beat.get("heartbeat", 0)))
        found.append(_Run(JobRef(table, job, int(header.get("read_version", 0)), run), header, seen))
    return found


def _each(do: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    with ThreadPoolExecutor(min(_THREADS, len(names) or 1)) as pool:
        return list(pool.map(do, names))


@dataclass(frozen=True, slots=True)
class JobState:
    """A job found in the ledger. ``state``: ``running``, ``committed`` (ledger left over) or ``dead``."""

    job_id: str
    operation: str
    state: str
    files: tuple[str, ...] = ()
    started: float | None = None


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What :func:`cleanup_orphans` found and, unless it was a dry run, removed."""

    target: str
    jobs: tuple[JobState, ...]
    files: tuple[str, ...] = field(default=())
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "would remove" if self.dry_run else "removed"
        lines = [f"{self.target}: {verb} {len(self.files)} orphaned file(s) of {len(self.jobs)} job(s) in the ledger"]
        lines += [f"  {job.job_id}: {job.operation}, {job.state}, {len(job.files)} file(s)" for job in self.jobs]
        return "\n".join(lines)


def cleanup_jobs(
    table: PinnedTable,
    target: str,
    *,
    dry_run: bool,
    landed: Callable[[str, int], bool],
    keep_resumable: bool = False,
) -> CleanupReport:
    """Remove what dead jobs left; :func:`lance_ray.cleanup_orphans` is its public face.

    Args:
        table: the table; it need not exist (a create that died before its commit).
        target: its address for the report.
        dry_run: only look.
        landed: whether the job of this id committed after this version.
        keep_resumable: leave dead jobs alone that a run of the same id can go on with.
    """
    jobs: list[JobState] = []
    removed: list[str] = []
    for found in _runs(table):
        if keep_resumable and found.header.get("plan"):
            continue
        orphans: tuple[WrittenPath, ...] = ()
        state = "running" if found.is_alive else "dead"
        if state == "dead":
            state = "committed" if landed(found.job.job_id, found.job.since) else "dead"
            orphans = found.job.orphans() if dry_run else found.job.discard()
        paths = tuple(_path_of(file) for file in orphans)
        removed.extend(paths)
        operation = found.header.get("operation", "unknown")
        jobs.append(JobState(found.job.job_id, operation, state, paths, found.header.get("started")))
    return CleanupReport(target, tuple(jobs), tuple(removed), dry_run)


def _process_space() -> str:
    """Where a process id means the same process: this boot of this machine, and this container of it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process of this machine started (clock ticks since boot), or None when there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's process: it exists
    return "unknown"


def untracked(table: PinnedTable, files: Iterable[WrittenPath], since: int = 0) -> tuple[WrittenPath, ...]:
    """Those of ``files`` that no version of the table after ``since`` refers to."""
    found = tuple(files)
    if not found:
        return ()
    try:
        dataset = table.open_latest()
    except TableNotFoundError:
        return found
    names = {file.name for file in found}
    with translate_errors("list the files of", table.uri, secrets=table.secrets):
        for batch in dataset.tracked_files(min_version=since):
            for path in batch.column("path").to_pylist():
                names.difference_update(str(path).split("/"))  # the name of a file, or the folder of a segment
    return tuple(file for file in found if file.name in names)


def _path_of(file: WrittenPath) -> str:
    return f"{file.base.rstrip('/') + '/' if file.base else ''}{file.path}"


def _check_name(file: WrittenPath, uri: str) -> None:
    if not file.is_segment and not (_DATA_FILE.fullmatch(file.name) and file.folder in ("data", "")):
        raise LanceRayError(f"{file.path!r} in the ledger of {uri} names neither a data file nor a segment")


def delete_files(table: PinnedTable, files: Iterable[WrittenPath]) -> None:
    """Delete data files by name, with the folder of blobs that belongs to each, and segments of indexes.

    Names of another form are refused.
    """
    by_base: dict[str | None, list[str]] = {}
    for file in files:
        _check_name(file, table.uri)
        by_base.setdefault(file.base, []).append(file.path)
    for base, paths in by_base.items():
        _each(_Store(table, base).delete_data, paths)


def segment_exists(table: PinnedTable, uuid: str) -> bool:
    """Whether there is a folder of this segment, whoever made it."""
    return bool(_Store(table).list(WrittenPath.segment(uuid).path))


def trim_segment(table: PinnedTable, uuid: str, files: Sequence[str]) -> None:
    """Delete what a segment of this job does not consist of: the engine's intermediate files in its folder."""
    store, folder = _Store(table), WrittenPath.segment(uuid).path
    kept = {f"{folder}/{name}" for name in files}
    doomed = [name for name in store.list(folder) if name not in kept]
    _each(store.delete, doomed)
    store.prune(*sorted({name.rpartition("/")[0] for name in doomed} - {folder}, reverse=True))


class _Store:
    """Small JSON files and deletions beside a table, on any store that the engine reaches."""

    def __init__(self, table: PinnedTable, base: str | None = None) -> None:
        self._uri = base or table.uri
        self._secrets = table.secrets
        self._session = table.file_session(base)

    def _translated(self, action: str) -> Any:
        return translate_errors(f"{action} the job ledger of", self._uri, secrets=self._secrets)

    def write(self, name: str, content: dict[str, Any], retry: RetryPolicy = RetryPolicy()) -> None:
        with self._translated("write"), tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
            local = Path(folder) / "entry.json"
            local.write_text(json.dumps(content))
            retry.call(lambda: self._upload(local, name), retry_on=self._may_pass)

    def _upload(self, local: Path, name: str) -> None:
        with self._translated("write"):
            self._session.upload_file(local, name)

    def _may_pass(self, error: BaseException) -> bool:
        # A job that ends beside this one removes folders that are empty, perhaps the one just made for this file.
        pruned = isinstance(error, StorageError) and error.kind == "missing" and is_local(self._uri)
        return pruned or is_interruption(error)

    def read(self, name: str) -> dict[str, Any] | None:
        """The content, or None when the file is gone or was cut short by a crash."""
        with self._translated("read"), tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
            local = Path(folder) / "entry.json"
            try:
                with self._translated("read"):
                    self._session.download_file(name, local)
                content = json.loads(local.read_text())
            except StorageError:
                if self.contains(name):
                    raise
                return None
            except ValueError:
                return None
        return content if isinstance(content, dict) else None

    def contains(self, name: str) -> bool:
        with self._translated("read"):
            return bool(self._session.contains(name))

    def list(self, folder: str) -> list[str]:
        with self._translated("list"):
            return [path if path.startswith(folder) else f"{folder}/{path}" for path in self._session.list(folder)]

    def notes(self, folder: str) -> Sequence[str]:
        """The finished JSON files below a folder: on disk the engine begins each under another name.

        A run of which only such a beginning is there is about to write its header, and not one that died.
        """
        return [name for name in self.list(folder) if name.endswith(".json")]

    def delete(self, name: str) -> None:
        """Delete one file; one that is gone already is fine."""
        try:
            with self._translated("delete from"):
                self._session.delete_file(name)
        except StorageError as error:
            if error.kind != "missing" and self.contains(name):
                raise

    def delete_data(self, path: str) -> None:
        """Delete a data file and the blobs that belong to it, or all files of a segment."""
        folder = path.removesuffix(".lance")
        inside = self.list(folder)
        for name in inside if folder == path else (path, *inside):
            self.delete(name)
        self.prune(*sorted({name.rpartition("/")[0] for name in inside} - {folder}, reverse=True), folder)

    def prune(self, *folders: str) -> None:
        """Remove folders that are empty now; object stores have none."""
        if is_local(self._uri):
            for folder in folders:
                with suppress(OSError):  # not empty, or gone: both are fine
                    (Path(self._uri) / folder).rmdir()
