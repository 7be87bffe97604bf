"""What ``lance-ray copy`` reads and writes beside Lance tables: formats, their arguments, and files as targets."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import ray
from pyarrow import orc, parquet
from ray.data import Dataset, SaveMode

import lance_ray
from lance_ray.errors import InvalidArgumentError, TableExistsError, TableNotFoundError, translate_errors
from lance_ray.table import in_memory

_FORMATS = {".lance": "lance", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".avro": "avro"}
_COMPRESSED = (".gz", ".zst", ".bz2")
MODES = ("create", "append", "overwrite", "ignore")
# Arguments that Ray hands on by ``**``: whose they are.
_HANDED_ON: dict[str, Callable[..., Any]] = {
    "read_parquet": pa.dataset.Fragment.to_batches,
    "write_parquet": parquet.write_table,
    "write_orc": orc.write_table,
    "write_json": pd.DataFrame.to_json,
}


class TargetExistsError(TableExistsError):
    """``create`` found files at the target."""

    def __init__(self, target: str) -> None:
        Exception.__init__(self, f"{target} exists; use --mode append, overwrite or ignore")
        self.target = target


class SourceNotFoundError(TableNotFoundError):
    """There is nothing at the source."""

    def __init__(self, target: str, reason: str) -> None:
        Exception.__init__(self, f"nothing to read at {target}: {reason}")
        self.target = target


def format_of(place: str, option: str) -> str:
    """The format that the end of a name tells; a Lance table where the name has no end.

    Raises:
        InvalidArgumentError: the end is none of those known.
    """
    path = Path(place.rstrip("/").rpartition("/")[2])
    end = path.suffix.lower()
    if not end:
        return "lance"
    if end in _COMPRESSED and option == "--from":
        found = _FORMATS.get(Path(path.stem).suffix.lower())
        if found in ("csv", "json"):
            return found
    if end not in _FORMATS:
        raise InvalidArgumentError(option, None, f"the name {path} does not tell the format; say {option} FORMAT")
    return _FORMATS[end]


@dataclasses.dataclass(frozen=True)
class Source:
    """What to read."""

    place: str
    format: str
    chosen: Mapping[str, Any]
    """``columns``, ``filter``, ``limit`` and ``storage_options``."""
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        taken = ("uri", "paths", *self.chosen)
        check_options("--read-option", self.options, self._reader(), taken)

    def _reader(self) -> Callable[..., Any]:
        if self.format == "lance":
            return lance_ray.read_lance
        reader: Callable[..., Any] | None = getattr(ray.data, f"read_{self.format}", None)
        if reader is None:
            known = sorted(name.removeprefix("read_") for name in dir(ray.data) if name.startswith("read_"))
            raise InvalidArgumentError("--from", self.format, f"Ray reads {known}")
        return reader

    def read(self) -> Dataset:
        """The rows, of which nothing but the schema is read yet."""
        if self.format == "lance":
            return lance_ray.read_lance(self.place, **self.chosen, **self.options)
        options = dict(self.options)
        if self.place.endswith(".bz2"):
            options.setdefault("file_extensions", None)  # Ray leaves such files out, though it reads them
        try:
            found: Dataset = self._reader()(self.place, **options)
            columns = self.chosen["columns"]
            if columns is not None:
                self._check_columns(found, columns)
        except FileNotFoundError as error:
            raise SourceNotFoundError(self.place, str(getattr(error, "cause", error)).splitlines()[0]) from None
        if self.chosen["filter"] is not None:
            found = found.map_batches(_Where(self.chosen["filter"]), batch_format="pyarrow", batch_size=None)
        if columns is not None:
            found = found.select_columns(columns)
        return found if self.chosen["limit"] is None else found.limit(self.chosen["limit"])

    def _check_columns(self, found: Dataset, columns: list[str]) -> None:
        schema = found.schema()
        unknown = [] if schema is None else [name for name in columns if name not in schema.names]
        if unknown:
            raise InvalidArgumentError("--columns", unknown, f"must be columns of the source: {schema.names}")


@dataclasses.dataclass(frozen=True)
class _Where:
    """The SQL of Lance for rows from elsewhere."""

    sql: str

    def __call__(self, table: pa.Table) -> pa.Table:
        if not table.num_rows:
            return table
        with translate_errors("--filter", self.sql):
            return in_memory(table).scanner(filter=self.sql).to_table()


@dataclasses.dataclass(frozen=True)
class Files:
    """Where to write with a writer of Ray."""

    place: str
    format: str
    mode: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        writer = getattr(Dataset, f"write_{self.format}", None)
        if writer is None:
            known = sorted(name.removeprefix("write_") for name in dir(Dataset) if name.startswith("write_"))
            raise InvalidArgumentError("--to", self.format, f"Ray writes {known}")
        names = [*inspect.signature(writer).parameters]  # from self and the place on
        check_options("--write-option", self.options, writer, (*names[:2], "mode"))
        if self.mode not in MODES:
            raise InvalidArgumentError("--mode", self.mode, f"must be one of {list(MODES)}")
        if not self._has_modes and self.mode != "create":
            raise InvalidArgumentError("--mode", self.mode, f"Ray's writer of {self.format} has no modes")

    @property
    def _has_modes(self) -> bool:
        parameters = inspect.signature(getattr(Dataset, f"write_{self.format}")).parameters
        return "mode" in parameters and "path" in parameters

    def check(self, source: str) -> None:
        """Refuse a target that ``create`` must not touch, and one that ``overwrite`` would take too much with.

        Raises:
            TargetExistsError: ``create`` found something there.
            InvalidArgumentError: ``overwrite`` would remove the source, or a Lance table.
        """
        if not self._has_modes:
            return
        if self.mode == "create" and _exists(self.place):
            raise TargetExistsError(self.place)
        if self.mode != "overwrite":
            return
        ours, theirs = (f"{_full(place)}/" for place in (self.place, source))
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise InvalidArgumentError("--mode", self.mode, f"would remove the source {source} before it is read")
        if _exists(f"{self.place.rstrip('/')}/_versions"):
            raise InvalidArgumentError(
                "--mode", self.mode, f"{self.place} is a Lance table, which files do not replace"
            )

    def write(self, ds: Dataset) -> int | None:
        """Write, and tell how many rows; None where ``ignore`` found the target, or the writer does not tell."""
        counted: list[int] = []
        _count_rows(ds, counted)
        mode = {"mode": SaveMode(self.mode)} if self._has_modes else {}
        with no_empty_folder(self.place):
            getattr(ds, f"write_{self.format}")(self.place, **mode, **self.options)
        return counted[0] if counted else None


@contextmanager
def no_empty_folder(place: str) -> Iterator[None]:
    """Where a copy fails that was to make this local folder, remove what is empty of it; files stay."""
    new = "://" not in place and not Path(place).exists()
    try:
        yield
    except BaseException:  # whatever it was, an empty folder is in the way of the next copy
        folders = [Path(place), *(item for item in Path(place).rglob("*") if item.is_dir())] if new else []
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # it has files, or never came to be
                folder.rmdir()
        raise


def _count_rows(ds: Dataset, counted: list[int]) -> None:
    """Have this dataset note how many rows it writes: Ray tells only the sink."""
    write = ds.write_datasink

    def write_and_note(sink: Any, **options: Any) -> None:
        class Noting(type(sink)):  # type: ignore[misc]  # a class that is known only now
            def on_write_complete(self, write_result: Any) -> None:
                super().on_write_complete(write_result)
                counted.append(int(write_result.num_rows))

        sink.__class__ = Noting
        write(sink, **options)

    ds.write_datasink = write_and_note


def _exists(place: str) -> bool:
    """Whether there is a file or folder; no for a place that Arrow cannot look at, which the writer judges itself."""
    try:
        if "://" not in place:
            return Path(place).exists()
        filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
        return filesystem.get_file_info(path).type is not pyarrow.fs.FileType.NotFound
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False


def _full(place: str) -> str:
    place = place.removeprefix("file://").rstrip("/")
    return place if "://" in place else str(Path(place).resolve())


def check_options(option: str, given: Mapping[str, Any], function: Callable[..., Any], taken: tuple[str, ...]) -> None:
    """Refuse unknown arguments of a reader or writer, and those that the command gives itself, by name."""
    for name in given:
        if name in taken:
            raise InvalidArgumentError(option, name, "the command has an option or argument of its own for it")
    parameters = inspect.signature(function).parameters.values()
    known = {item.name for item in parameters if item.kind is not item.VAR_KEYWORD} - {"self"}
    if function.__name__ in _HANDED_ON:
        known |= {*inspect.signature(_HANDED_ON[function.__name__]).parameters}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InvalidArgumentError(option, unknown[0], f"must be one of {sorted(known - set(taken))}")
