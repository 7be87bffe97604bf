"""The job ledger: which files a running job has written, kept beside the table until the job is over.

On failure Ray hands the driver only an exception, not what finished tasks returned, and a killed driver hands over
nothing. So each worker records the name of every finished file under ``<table>/_lance_ray/<job id>/`` before its task
returns. A job that ends removes its ledger; what a killed job leaves is read by :func:`cleanup_orphans` and by the next
run of the same job id.

Protocol. The driver writes ``job.json`` first and renews its heartbeat. A worker writes its entry, *then* looks for
``job.json``; the driver (or a clean-up) removes ``job.json``, *then* lists the entries. So an entry is either seen by
the one who removes, or its worker notices that the job is over and takes its own file back. Before the commit the
driver looks for ``job.json`` too: a job that was cleaned up can no longer commit. Only files named in entries are ever
deleted, after it is certain that no version of the table refers to them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lance.file import LanceFileSession

from lance_ray.errors import LanceRayError, StorageError, TableNotFoundError, translate_errors
from lance_ray.table import PinnedTable, is_local

logger = logging.getLogger(__name__)

FOLDER = "_lance_ray"
HEARTBEAT_SECONDS = 30.0
DEAD_AFTER_SECONDS = 300.0
_DELETE_THREADS = 16
# The names that the engine gives to data files; anything else in a ledger is not deleted.
_DATA_FILE = re.compile(r"[A-Za-z0-9_-]{8,128}\.lance")


@dataclass(frozen=True, slots=True)
class WrittenPath:
    """One data file: its name in a ``data`` folder, and the base that it lies in (None for the table itself)."""

    name: str
    base: str | None = None


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job of one table; what a worker needs to record its files."""

    table: PinnedTable
    job_id: str

    def record(self, files: Iterable[WrittenPath]) -> None:
        """Note finished files (called by a worker before its task returns).

        Raises:
            LanceRayError: the job was ended meanwhile; the files given have been removed.
        """
        written = tuple(files)
        store = _Store(self.table)
        entry = f"{FOLDER}/{self.job_id}/{uuid.uuid4().hex}.json"
        store.write(entry, {"files": [{"name": file.name, "base": file.base} for file in written]})
        if not store.contains(self._header):
            delete_files(self.table, written)
            store.delete(entry)
            raise LanceRayError(f"job {self.job_id} was ended while this task was still writing")

    def is_open(self) -> bool:
        """Whether the job still may commit."""
        return _Store(self.table).contains(self._header)

    @property
    def _header(self) -> str:
        return f"{FOLDER}/{self.job_id}/job.json"

    @contextmanager
    def running(self, operation: str, read_version: int) -> Iterator[None]:
        """Open the ledger and keep its heartbeat while the block runs. Ending it is the caller's decision."""
        store = _Store(self.table)
        header = {
            "operation": operation,
            "read_version": read_version,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": time.time(),
        }
        store.write(self._header, {**header, "heartbeat": time.time()})
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                with suppress(StorageError):  # the next beat tries again, and a missed one is allowed for
                    store.write(self._header, {**header, "heartbeat": time.time()})

        thread = threading.Thread(target=beat, name="lance-ray-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=HEARTBEAT_SECONDS)

    def close(self, kept: Iterable[str]) -> None:
        """End a job that committed: remove its ledger, and files of attempts that Ray ran again.

        Args:
            kept: names of the files that the commit holds.
        """
        names = frozenset(kept)
        self._remove(lambda: self._superfluous(names))

    def discard(self) -> int:
        """End a job that certainly did not commit: remove the files that it recorded, then the ledger.

        Returns:
            The number of data files removed.
        """
        return self._remove(self.recorded)

    def discard_untracked(self) -> int:
        """The same for a job of unknown history: files that any version of the table refers to are kept."""
        return self._remove(lambda: _untracked(self.table, self.recorded()))

    def recorded(self) -> tuple[WrittenPath, ...]:
        """The files named in the entries."""
        store = _Store(self.table)
        entries = [store.read(name) for name in store.list(f"{FOLDER}/{self.job_id}") if not name.endswith("job.json")]
        return tuple(
            WrittenPath(item["name"], item.get("base")) for entry in entries if entry for item in entry["files"]
        )

    def _superfluous(self, kept: frozenset[str]) -> tuple[WrittenPath, ...]:
        entries = [name for name in _Store(self.table).list(f"{FOLDER}/{self.job_id}") if name != self._header]
        if len(entries) <= len(kept):  # the usual case: one entry for each file, nothing to read
            return ()
        return tuple(file for file in self.recorded() if file.name not in kept)

    def _remove(self, orphans: Callable[[], tuple[WrittenPath, ...]]) -> int:
        store = _Store(self.table)
        store.delete(self._header)
        doomed = orphans()
        delete_files(self.table, doomed)
        names = store.list(f"{FOLDER}/{self.job_id}")
        with ThreadPoolExecutor(min(_DELETE_THREADS, len(names) or 1)) as pool:
            list(pool.map(store.delete, names))
        store.prune(f"{FOLDER}/{self.job_id}", FOLDER)
        return len(doomed)


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
    table: PinnedTable, target: str, *, dry_run: bool, landed: Callable[[str, int], bool]
) -> CleanupReport:
    """Remove what dead jobs left; :func:`lance_ray.cleanup_orphans` is its public face.

    Args:
        table: the table; it need not exist (a create that died before its commit).
        target: its address for the report.
        dry_run: only look.
        landed: whether the job of this id committed after this version.
    """
    store = _Store(table)
    names = store.list(FOLDER)
    ids = sorted({parts[1] for parts in (name.split("/") for name in names) if len(parts) == 3})
    jobs: list[JobState] = []
    removed: list[str] = []
    for job_id in ids:
        job = JobRef(table, job_id)
        header = store.read(f"{FOLDER}/{job_id}/job.json")
        state = _state_of(job_id, header, landed)
        orphans = _untracked(table, job.recorded()) if state != "running" else ()
        if state != "running" and not dry_run:
            job.discard_untracked()
        paths = tuple(_path_of(file) for file in orphans)
        removed.extend(paths)
        details = header or {}
        jobs.append(JobState(job_id, details.get("operation", "unknown"), state, paths, details.get("started")))
    return CleanupReport(target, tuple(jobs), tuple(removed), dry_run)


def _state_of(job_id: str, header: dict[str, Any] | None, landed: Callable[[str, int], bool]) -> str:
    if header is None:
        return "dead"
    if _is_alive(header):
        return "running"
    return "committed" if landed(job_id, int(header["read_version"])) else "dead"


def _is_alive(header: dict[str, Any]) -> bool:
    if header["host"] == socket.gethostname():
        start = _process_start(int(header["pid"]))
        return start is not None and start == header["process_start"]
    return time.time() - float(header["heartbeat"]) < DEAD_AFTER_SECONDS


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


def _untracked(table: PinnedTable, files: tuple[WrittenPath, ...]) -> tuple[WrittenPath, ...]:
    """Those of ``files`` that no version of the table refers to."""
    if not files:
        return ()
    try:
        dataset = table.open_latest()
    except TableNotFoundError:
        return files
    names = {file.name for file in files}
    for batch in dataset.tracked_files():
        names.difference_update(str(path).rpartition("/")[2] for path in batch.column("path").to_pylist())
    return tuple(file for file in files if file.name in names)


def _path_of(file: WrittenPath) -> str:
    return f"{file.base.rstrip('/') + '/' if file.base else ''}data/{file.name}"


def delete_files(table: PinnedTable, files: Iterable[WrittenPath]) -> None:
    """Delete data files by name, and the folder of blobs that belongs to each. Names of another form are refused."""
    by_base: dict[str | None, list[str]] = {}
    for file in files:
        if not _DATA_FILE.fullmatch(file.name):
            raise LanceRayError(f"{file.name!r} in the ledger of {table.uri} is not the name of a data file")
        by_base.setdefault(file.base, []).append(file.name)
    for base, names in by_base.items():
        store = _Store(table, base)
        blobs = [path for name in names for path in store.list(f"data/{name.removesuffix('.lance')}")]
        with ThreadPoolExecutor(min(_DELETE_THREADS, len(names))) as pool:
            list(pool.map(store.delete, [f"data/{name}" for name in names] + blobs))
        store.prune(*(f"data/{name.removesuffix('.lance')}" for name in names), "data", "")


class _Store:
    """Small JSON files and deletions beside a table, on any store that the engine reaches."""

    def __init__(self, table: PinnedTable, base: str | None = None) -> None:
        self._uri = base or table.uri
        self._secrets = table.secrets
        kwargs = table.write_kwargs()
        params = kwargs.pop("base_store_params") or {}
        if base in params:
            kwargs["storage_options"] = params[base]
        with self._translated("open"):
            self._session = LanceFileSession(self._uri, **kwargs)

    def _translated(self, action: str) -> Any:
        return translate_errors(f"{action} the job ledger of", self._uri, secrets=self._secrets)

    def write(self, name: str, content: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder, self._translated("write"):
            local = Path(folder) / "entry.json"
            local.write_text(json.dumps(content))
            self._session.upload_file(local, name)

    def read(self, name: str) -> dict[str, Any] | None:
        """The content, or None when the file is gone or was cut short by a crash."""
        with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder, self._translated("read"):
            if not self._session.contains(name):
                return None
            local = Path(folder) / "entry.json"
            self._session.download_file(name, local)
            try:
                content = json.loads(local.read_text())
            except ValueError:
                return None
        return content if isinstance(content, dict) else None

    def contains(self, name: str) -> bool:
        with self._translated("read"):
            return bool(self._session.contains(name))

    def list(self, folder: str) -> list[str]:
        with self._translated("list"):
            return [path if path.startswith(folder) else f"{folder}/{path}" for path in self._session.list(folder)]

    def delete(self, name: str) -> None:
        """Delete one file; one that is gone already is fine."""
        try:
            with self._translated("delete from"):
                self._session.delete_file(name)
        except StorageError as error:
            if error.kind != "missing" and self.contains(name):
                raise

    def prune(self, *folders: str) -> None:
        """Remove folders that are empty now; object stores have none."""
        if is_local(self._uri):
            for folder in folders:
                with suppress(OSError):  # not empty, or gone: both are fine
                    (Path(self._uri) / folder).rmdir()
