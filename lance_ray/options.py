"""Frozen option groups. Every check of an argument that needs no table lives here, in ``__post_init__``.

Public functions take flat keywords and fold them into these values in their first statement, so that an option is
declared, checked and documented once and internal functions stay small.
"""

from __future__ import annotations

import datetime as dt
import inspect
import itertools
import operator
import os
import random
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.dataset import ScannerBuilder
from lance.query import FullTextQuery

from lance_ray.errors import InvalidArgumentError

Pairs = tuple[tuple[str, str], ...]
"""A mapping of strings as a sorted tuple: hashable and picklable, which a dict and a proxy are not."""

MODES = ("create", "append", "overwrite", "ignore")
_SAVE_MODES = {"error": "create", "errorifexists": "create", **{mode: mode for mode in MODES}}
_OWN_PROPERTIES = "lance_ray."
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def pairs(options: Mapping[str, Any] | None, parameter: str) -> Pairs | None:
    """A mapping of options as :data:`Pairs`, or None for None and for an empty mapping.

    An empty set must not reach the engine as a dict: it would switch the refresh of vended credentials off.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise InvalidArgumentError(parameter, type(options).__name__, "must be a mapping of strings")
    bad = sorted({type(key).__name__ for key in options if not isinstance(key, str)})
    if bad:
        raise InvalidArgumentError(parameter, bad, "keys must be strings")
    return tuple(sorted((key, str(value)) for key, value in options.items() if value is not None)) or None


def nested_pairs(options: Mapping[str, Mapping[str, Any]] | None, parameter: str) -> tuple[tuple[str, Pairs], ...]:
    """``base_store_params``: a mapping of base URI to storage options, hashable."""
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(base, str) for base in options)):
        raise InvalidArgumentError(parameter, type(options).__name__, "must map base URIs to storage options")
    return tuple(sorted((base, pairs(inner, parameter) or ()) for base, inner in (options or {}).items()))


def check_positive(parameter: str, value: Any, *, optional: bool = True, zero: bool = False) -> None:
    """Refuse what is not a whole number above zero (or at least zero)."""
    if value is None and optional:
        return
    low = 0 if zero else 1
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # also of an array, which has the method and no such value
        number = None
    if number is None or number < low:
        raise InvalidArgumentError(parameter, value, f"must be a whole number of at least {low}")
    if number >= 2**63:
        raise InvalidArgumentError(parameter, value, "is too big: the engine's numbers end below 2**63")


def check_seconds(parameter: str, value: Any, *, optional: bool = True) -> None:
    """Refuse what is not a time above zero."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InvalidArgumentError(parameter, value, "must be more than 0 seconds")


def check_choice(parameter: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse what is none of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise InvalidArgumentError(parameter, value, f"must be one of {sorted(allowed)}")


def check_flag(parameter: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(parameter, value, "must be True or False")


def check_mapping(parameter: str, value: Any) -> None:
    """Refuse what is no mapping of names to values; None is none given."""
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgumentError(parameter, type(value).__name__, "must be a mapping of options")


def check_schema(parameter: str, value: Any) -> None:
    """Refuse what is no schema; None is none given."""
    if value is not None and not isinstance(value, pa.Schema):
        raise InvalidArgumentError(parameter, type(value).__name__, "must be a pyarrow.Schema")


def check_text(parameter: str, value: Any, *, optional: bool = True) -> None:
    """Refuse what is no text, or says nothing."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.strip():
        raise InvalidArgumentError(parameter, value, "must be text that is not empty")


def check_version(parameter: str, value: Any) -> None:
    """Refuse what is neither a number of a version nor a tag; None is the newest."""
    if isinstance(value, str) and not value:
        raise InvalidArgumentError(parameter, value, "must be a number or the name of a tag")
    if value is not None and not isinstance(value, str):
        check_positive(parameter, value)


def strings(parameter: str, value: Any) -> tuple[str, ...]:
    """A list of names as a tuple. Refuses a text, which would be taken for its letters."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed or not all(isinstance(item, str) for item in value):
        raise InvalidArgumentError(parameter, value, "must be a list of strings")
    return tuple(value)


READ_PARAMS = ("cache_repetition_index", "validate_on_decode")


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a dataset is opened, on the driver and on every worker alike."""

    block_size: int | None = None
    index_cache_size_bytes: int | None = None
    metadata_cache_size_bytes: int | None = None
    default_scan_options: Mapping[str, Any] | None = field(default=None, hash=False, compare=False)
    commit_lock: Any = field(default=None, hash=False, compare=False)
    read_params: Mapping[str, bool] | None = field(default=None, hash=False, compare=False)
    """Switches of the engine's decoder: :data:`READ_PARAMS`."""
    session: Any = field(default=None, hash=False, compare=False, repr=False)
    """The caller's own, for this process; others have theirs."""

    def __post_init__(self) -> None:
        self._fold_read_params()
        kind = lance.Session  # type: ignore[attr-defined] # exported, but not declared so
        if self.session is not None and not isinstance(self.session, kind):
            raise InvalidArgumentError("session", type(self.session).__name__, "must be a lance.Session")
        check_positive("block_size", self.block_size)
        check_positive("index_cache_size_bytes", self.index_cache_size_bytes, zero=True)
        check_positive("metadata_cache_size_bytes", self.metadata_cache_size_bytes, zero=True)
        if self.commit_lock is not None and not callable(self.commit_lock):
            raise InvalidArgumentError("commit_lock", self.commit_lock, "must be callable")
        check_mapping("default_scan_options", self.default_scan_options)
        if self.default_scan_options is not None:
            object.__setattr__(self, "default_scan_options", dict(self.default_scan_options))

    def _fold_read_params(self) -> None:
        check_mapping("read_params", self.read_params)
        if unknown := sorted(set(self.read_params or ()) - set(READ_PARAMS), key=str):
            raise InvalidArgumentError("read_params", unknown, f"known keys are {list(READ_PARAMS)}")
        for name, value in sorted((self.read_params or {}).items()):
            check_flag(f"read_params[{name!r}]", value)
        if self.read_params is not None:
            object.__setattr__(self, "read_params", dict(sorted(self.read_params.items())) or None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the lock and the session: only the driver commits, and neither is of use in another process.
        sizes = (self.block_size, self.index_cache_size_bytes, self.metadata_cache_size_bytes)
        return OpenOptions, (*sizes, self.default_scan_options, None, self.read_params)


_FOLDED_KEYS = frozenset({"columns", "filter", "limit", "offset", "with_row_id", "with_row_address", "fragments"})
_SCANNER_KEYS = _FOLDED_KEYS | set(inspect.signature(lance.LanceDataset.scanner).parameters) - {"self"}
BLOB_MODES = ("bytes", "descriptors", "handles")
BLOB_BATCH_BYTES = 32 * 1024**2
"""Payload of blobs that a task holds at a time."""

_SEARCH_KEYS = ("nearest", "full_text_query")
_SPECIAL_FILTER = "a Lance filter: SQL text, a pyarrow expression, or for searches a query object or dict"


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """What a read asks of Lance's scanner; the part that the planner needs is folded into fields of its own."""

    columns: tuple[str, ...] | None = None
    expressions: Pairs = ()
    """Columns computed by SQL, as (name, expression); then ``columns`` is None."""
    filter: Any = None
    limit: int | None = None
    offset: int = 0
    with_row_id: bool = False
    with_row_address: bool = False
    with_fragment_id: bool = False
    fragment_ids: tuple[int, ...] | None = None
    scanner: Mapping[str, Any] = field(default_factory=dict)
    blobs: str = "descriptors"
    """How blob columns come out: one of :data:`BLOB_MODES`."""
    blob_range: tuple[int, int] | None = None
    blob_batch_bytes: int = BLOB_BATCH_BYTES

    @classmethod
    def fold(
        cls,
        scanner_options: Mapping[str, Any] | None,
        *,
        defaults: Mapping[str, Any] | None = None,
        **flat: Any,
    ) -> ScanOptions:
        """One value from flat keywords, ``scanner_options`` and ``default_scan_options``, in that precedence."""
        for parameter, options in (("scanner_options", scanner_options), ("default_scan_options", defaults)):
            check_mapping(parameter, options)
            if unknown := sorted(set(options or ()) - _SCANNER_KEYS, key=str):
                raise InvalidArgumentError(parameter, unknown, f"known keys are {sorted(_SCANNER_KEYS)}")
        merged = {**(defaults or {}), **(scanner_options or {})}
        merged.update({key: value for key, value in flat.items() if value is not None and value is not False})
        fragments = merged.pop("fragments", None)
        if fragments is not None and merged.get("fragment_ids") is None:
            merged["fragment_ids"] = [getattr(item, "fragment_id", item) for item in fragments]
        rest = {key: merged.pop(key) for key in _SCANNER_KEYS - _FOLDED_KEYS if merged.get(key) is not None}
        if any(key in rest for key in _SEARCH_KEYS):
            rest.setdefault("prefilter", True)
        if isinstance(rest.get("nearest"), Mapping):
            rest["nearest"] = _fold_nearest(rest["nearest"])
        if merged.get("blobs") is not None:
            _fold_blobs(merged, rest)
        columns = merged.pop("columns", None)
        computed = isinstance(columns, Mapping)
        return cls(
            columns=None if computed or columns is None else _fold_columns(columns),
            expressions=_fold_expressions(columns) if computed else (),
            offset=_or_zero(merged.pop("offset", None)),
            fragment_ids=_fold_fragment_ids(merged.pop("fragment_ids", None)),
            scanner=rest,
            **{key: value for key, value in merged.items() if value is not None},
        )

    def __post_init__(self) -> None:
        check_positive("limit", self.limit, zero=True)
        check_positive("offset", self.offset, optional=False, zero=True)
        for name in ("batch_size", "batch_size_bytes", "io_buffer_size", "batch_readahead", "fragment_readahead"):
            check_positive(name, self.scanner.get(name))
        check_flag("with_row_id", self.with_row_id)
        check_flag("with_row_address", self.with_row_address)
        query = self.is_search and (isinstance(self.filter, (Mapping, FullTextQuery)) or callable(self.filter))
        if self.filter is not None and not self.has_condition and not query:
            raise InvalidArgumentError("filter", type(self.filter).__name__, f"must be {_SPECIAL_FILTER}")
        _check_text_query(self.scanner.get("full_text_query"))
        if isinstance(self.filter, str) and not self.filter.strip():
            raise InvalidArgumentError("filter", self.filter, "must not be empty; leave it out to read every row")
        self._check_blobs()
        if all(self.scanner.get(key) is not None for key in _SEARCH_KEYS):
            raise InvalidArgumentError("nearest", "...", "cannot be combined with full_text_query in one read")

    def _check_blobs(self) -> None:
        check_choice("blobs", self.blobs, BLOB_MODES)
        check_positive("blob_batch_bytes", self.blob_batch_bytes, optional=False)
        wanted = self.blob_range
        if wanted is None:
            return
        if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(type(item) is int for item in wanted)):
            raise InvalidArgumentError("blob_range", wanted, "must be (offset, length)")
        check_positive("blob_range", wanted[1], zero=True)
        if self.blobs != "bytes":
            raise InvalidArgumentError("blob_range", wanted, "needs blobs='bytes'")
        if self.is_search:
            raise InvalidArgumentError("blob_range", wanted, "cannot be combined with nearest or full_text_query")

    @property
    def is_search(self) -> bool:
        """Whether the rows come from a ranking (vector or text), not from a scan in table order."""
        return any(self.scanner.get(key) is not None for key in _SEARCH_KEYS)

    @property
    def has_condition(self) -> bool:
        """Whether the filter is a condition on columns, and not a query that a search is told to filter by."""
        return isinstance(self.filter, (str, pc.Expression))

    @property
    def is_single_task(self) -> bool:
        """Whether only one scanner over the whole table gives the right rows: a ranking, or a global order."""
        return self.is_search or self.scanner.get("order_by") is not None

    @property
    def refuses_predicates(self) -> bool:
        """Whether a later filter must see exactly the rows selected here, and so may not be pushed below them."""
        return self.is_single_task or self.limit is not None or self.offset > 0

    @property
    def names(self) -> tuple[str, ...] | None:
        """The selected output columns, or None for all."""
        return tuple(name for name, _ in self.expressions) if self.expressions else self.columns


def default_blobs(scanner_options: Any, default: str) -> str:
    """How blobs come out where the caller has not said it in ``blobs``: as the scanner's own option says."""
    handling = scanner_options.get("blob_handling") if isinstance(scanner_options, Mapping) else None
    if handling is None:
        return default
    return "bytes" if handling == "all_binary" else "descriptors"


def _fold_blobs(merged: dict[str, Any], rest: dict[str, Any]) -> None:
    """``blobs`` and the scanner's ``blob_handling`` as one: the engine's way has no bound on memory, so only a search,
    which finds few rows, takes it.
    """
    mode, handling = merged["blobs"], rest.get("blob_handling")
    check_choice("blobs", mode, BLOB_MODES)
    if isinstance(merged.get("blob_range"), list):
        merged["blob_range"] = tuple(merged["blob_range"])
    if handling is not None and mode != ("bytes" if handling == "all_binary" else "descriptors"):
        raise InvalidArgumentError("blobs", mode, f"contradicts blob_handling={handling!r} of scanner_options")
    searched = any(key in rest for key in _SEARCH_KEYS)
    if searched and mode == "handles":
        raise InvalidArgumentError("blobs", mode, "cannot be combined with nearest or full_text_query")
    if mode == "bytes":
        rest.pop("blob_handling", None)
        if searched:
            rest["blob_handling"] = "all_binary"


def _check_text_query(query: Any) -> None:
    if query is None or isinstance(query, (Mapping, FullTextQuery)) or callable(query):
        return
    if not isinstance(query, str) or not query.strip():
        allowed = "must be text that is not empty, a query of lance.query, what makes one, or a dict"
        raise InvalidArgumentError("full_text_query", query, allowed)


_NEAREST_KEYS = frozenset(inspect.signature(ScannerBuilder.nearest).parameters) - {"self"}


def _fold_nearest(nearest: Mapping[str, Any]) -> dict[str, Any]:
    missing, unknown = {"column", "q"} - set(nearest), set(nearest) - _NEAREST_KEYS
    if missing or unknown:
        allowed = f"needs 'column' and 'q', and may have {sorted(_NEAREST_KEYS - {'column', 'q'})}"
        raise InvalidArgumentError("nearest", sorted(unknown or nearest, key=str), allowed)
    check_positive("nearest['k']", nearest.get("k"))
    query = nearest["q"]
    if isinstance(query, (pa.Array, pa.ChunkedArray)) and pa.types.is_nested(query.type):
        query = query.to_pylist()
    if isinstance(query, Sized) and not len(query):
        raise InvalidArgumentError("nearest['q']", query, "must not be empty")
    matrix = as_matrix(query)
    return {**nearest, "q": query if matrix is None else matrix}


def as_matrix(value: Any) -> np.ndarray | None:
    """Several query vectors as a matrix; None for a single one, and for what is left to the engine to refuse."""
    if isinstance(value, np.ndarray):
        return value if value.ndim == 2 else None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return None
    rows = [np.asarray(item) for item in value if isinstance(item, (Sequence, np.ndarray, pa.Array))]
    same = len(rows) == len(value) and len({row.shape for row in rows}) == 1 and rows[0].ndim == 1
    return np.stack(rows) if same else None


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value


def fold_dataset_options(given: Mapping[str, Any] | None, **flat: Any) -> tuple[Any, Any, OpenOptions]:
    """``version``, ``asof`` and how to open, from lance-ray's ``dataset_options`` and flat keywords, which win."""
    check_mapping("dataset_options", given)
    merged = {**(given or {}), **{key: value for key, value in flat.items() if value is not None}}
    entries = merged.pop("index_cache_size", None)
    if entries is not None:  # the engine's older unit, of 20 MiB
        check_positive("index_cache_size", entries, zero=True)
        merged.setdefault("index_cache_size_bytes", entries * 20 * 1024**2)
    unknown = sorted(set(merged) - set(flat), key=str)
    if unknown:
        raise InvalidArgumentError("dataset_options", unknown, f"known keys are {sorted({*flat, 'index_cache_size'})}")
    version, asof = merged.pop("version", None), merged.pop("asof", None)
    return version, asof, OpenOptions(**merged)


def split_base_params(given: Any, flat: Any) -> tuple[Any, Any]:
    """``dataset_options`` without ``base_store_params``, and those: they may be given in either place."""
    check_mapping("dataset_options", given)
    inner = (given or {}).get("base_store_params")
    if None not in (inner, flat) and inner != flat:
        raise InvalidArgumentError("base_store_params", "...", "is not what dataset_options has of it")
    rest = {key: value for key, value in (given or {}).items() if key != "base_store_params"}
    return rest or None, inner if flat is None else flat


def fold_seed(shuffle: Any) -> int | None:
    """``shuffle`` as a seed: None for no, a new one for True."""
    if shuffle is None or shuffle is False:
        return None
    if shuffle is True:
        return random.SystemRandom().randrange(2**31)
    check_positive("shuffle", shuffle, zero=True)
    return int(shuffle)


def _fold_expressions(columns: Mapping[str, str]) -> Pairs:
    bad = [name for name, sql in columns.items() if not (isinstance(name, str) and isinstance(sql, str))]
    if bad or not columns:
        raise InvalidArgumentError("columns", bad or columns, "a dict maps new names to SQL expressions")
    return tuple(columns.items())


def _fold_columns(columns: Any) -> tuple[str, ...]:
    names = strings("columns", columns)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidArgumentError("columns", repeated, "each column may be named once")
    return names


def _fold_fragment_ids(fragment_ids: Any) -> tuple[int, ...] | None:
    if fragment_ids is None:
        return None
    if not isinstance(fragment_ids, Iterable) or isinstance(fragment_ids, (str, bytes)):
        raise InvalidArgumentError("fragment_ids", fragment_ids, "must be a list of fragment ids")
    values = tuple(fragment_ids)
    for value in values:
        check_positive("fragment_ids", value, optional=False, zero=True)
    return tuple(int(value) for value in dict.fromkeys(values))


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a read is cut into tasks."""

    fragment_group_size: int | None = None
    override_num_blocks: int | None = None
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        check_positive("fragment_group_size", self.fragment_group_size)
        check_positive("override_num_blocks", self.override_num_blocks)


def normalize_uri(uri: Any, parameter: str = "uri") -> str:
    """``uri`` as it means the same on every node: ``~``, relative paths and ``file://`` become absolute paths."""
    if not isinstance(uri, (str, os.PathLike)):
        raise InvalidArgumentError(parameter, type(uri).__name__, "must be a path, a URI or a LanceDataset")
    text = os.fspath(uri)
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgumentError(parameter, text, "must not be empty")
    scheme = urlsplit(text).scheme
    if scheme == "file":
        return unquote(urlsplit(text).path)
    if len(scheme) > 1 and "://" in text:
        alias = _SCHEMES.get(scheme)
        return text if alias is None else f"{alias}{text[len(scheme) :]}"
    return str(Path(text).expanduser().absolute())


_SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "abfss"}
"""Names that other libraries have for what the engine knows."""


@dataclass(frozen=True, slots=True)
class BasePath:
    """A further place for files. The engine's own class does not pickle, and without an id it is another base in the
    files than in the commit.
    """

    id: int
    path: str
    name: str | None = None
    is_dataset_root: bool = False

    @classmethod
    def fold(cls, given: Sequence[Any]) -> tuple[BasePath, ...]:
        """The same bases, each with an id and a path that means the same on every node."""
        free = (number for number in itertools.count(1) if number not in {base.id for base in given})
        return tuple(
            cls(base.id or next(free), normalize_uri(base.path, "initial_bases"), base.name, base.is_dataset_root)
            for base in given
        )

    def engine(self) -> lance.DatasetBasePath:
        """As the engine wants it."""
        return lance.DatasetBasePath(self.path, self.name, self.is_dataset_root, self.id)


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How rows become files, and what the commit says."""

    mode: str = "create"
    schema: pa.Schema | None = None
    min_rows_per_file: int = 1024 * 1024
    max_rows_per_file: int = 64 * 1024 * 1024
    max_bytes_per_file: int | None = None
    data_storage_version: str | None = None
    enable_stable_row_ids: bool = False
    initial_bases: Sequence[Any] | None = None
    target_bases: Sequence[str] | None = None
    external_blob_mode: str = "reference"
    allow_external_blob_outside_bases: bool = False
    max_rows_per_group: int | None = None
    """Of the legacy file format, which alone has groups."""
    target_all_bases: bool | None = None
    """Files to all bases in turn: with the table's own folder (True), or without it (False)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", _fold_mode(self.mode))
        if self.schema is not None and not isinstance(self.schema, pa.Schema):
            to_pyarrow = getattr(self.schema, "to_pyarrow", None)
            if to_pyarrow is None:
                raise InvalidArgumentError("schema", type(self.schema).__name__, "must be a pyarrow.Schema")
            object.__setattr__(self, "schema", to_pyarrow())
        check_positive("min_rows_per_file", self.min_rows_per_file, optional=False)
        check_positive("max_rows_per_file", self.max_rows_per_file, optional=False)
        check_positive("max_bytes_per_file", self.max_bytes_per_file)
        check_positive("max_rows_per_group", self.max_rows_per_group)
        if self.rows_decide and self.min_rows_per_file > self.max_rows_per_file:
            raise InvalidArgumentError(
                "min_rows_per_file", self.min_rows_per_file, f"exceeds max_rows_per_file={self.max_rows_per_file}"
            )
        check_flag("enable_stable_row_ids", self.enable_stable_row_ids)
        check_flag("allow_external_blob_outside_bases", self.allow_external_blob_outside_bases)
        check_choice("external_blob_mode", self.external_blob_mode, ("reference", "ingest"))
        if self.allow_external_blob_outside_bases and self.external_blob_mode == "ingest":
            raise InvalidArgumentError(
                "allow_external_blob_outside_bases", True, "needs external_blob_mode='reference'"
            )
        self._fold_bases()
        if self.data_storage_version is not None and not isinstance(self.data_storage_version, str):
            raise InvalidArgumentError("data_storage_version", self.data_storage_version, "must be text, such as '2.1'")

    def _fold_bases(self) -> None:
        if self.target_bases is not None:
            named = strings("target_bases", self.target_bases)  # a path means a folder beside the driver
            places = tuple(normalize_uri(place, "target_bases") if "/" in place else place for place in named)
            object.__setattr__(self, "target_bases", places or None)
        if self.target_all_bases is not None:
            check_flag("target_all_bases", self.target_all_bases)
            if self.target_bases is not None:
                raise InvalidArgumentError("target_all_bases", self.target_all_bases, "cannot go with target_bases")
        given = self.initial_bases
        if given is None:
            return
        if not isinstance(given, Sequence) or not all(
            isinstance(base, (lance.DatasetBasePath, BasePath)) for base in given
        ):
            shown = type(given).__name__  # may hold credentials
            raise InvalidArgumentError("initial_bases", shown, "must be a list of lance.DatasetBasePath")
        object.__setattr__(self, "initial_bases", BasePath.fold(given) or None)
        if given and self.mode == "append":
            raise InvalidArgumentError("initial_bases", given, "can only be given when a table is created")

    @property
    def rows_decide(self) -> bool:
        """Whether the caller asked for files by rows; by default bytes decide."""
        return self.min_rows_per_file != 1024 * 1024

    @property
    def bundle_bytes(self) -> int:
        """Bytes of blocks that one write task takes, and so about the size of a file in memory."""
        return min(self.max_bytes_per_file or DEFAULT_BUNDLE_BYTES, MAX_BUNDLE_BYTES)

    @property
    def file_bytes(self) -> int:
        """Upper bound in memory bytes for one output file, short of one slice."""
        return self.max_bytes_per_file or DEFAULT_FILE_BYTES


DEFAULT_BUNDLE_BYTES = 256 * 1024**2
DEFAULT_FILE_BYTES = 1024**3
MAX_BUNDLE_BYTES = 1024**3


def _fold_mode(mode: Any) -> str:
    text = str(getattr(mode, "value", mode)).lower()
    if text == "upsert":
        raise InvalidArgumentError(
            "mode",
            text,
            "an upsert needs key columns and row matching, which this writer does not have; allowed"
            " are 'create', 'append', 'overwrite' and 'ignore'",
        )
    if text not in _SAVE_MODES:
        raise InvalidArgumentError("mode", text, f"must be one of {sorted(_SAVE_MODES)}")
    return _SAVE_MODES[text]


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """What a commit carries, and how long it may take."""

    message: str | None = None
    properties: Pairs = ()
    """The caller's own."""
    job_id: str | None = None
    timeout_seconds: float = 600.0
    max_attempts: int = 20
    notes: Pairs = ()
    """Properties of this package, which it reads again."""

    def __post_init__(self) -> None:
        if self.message is not None and not isinstance(self.message, str):
            raise InvalidArgumentError("commit_message", self.message, "must be text")
        if taken := [key for key, _ in self.properties if key.startswith(_OWN_PROPERTIES)]:
            why = f"keys that start with {_OWN_PROPERTIES!r} are lance_ray's own"
            raise InvalidArgumentError("transaction_properties", taken, why)
        if self.job_id is not None and not (isinstance(self.job_id, str) and _JOB_ID.fullmatch(self.job_id)):
            raise InvalidArgumentError(
                "job_id", self.job_id, "must be 1 to 128 letters, digits, '.', '_' or '-', not starting with a sign"
            )

    @property
    def operation_id(self) -> str:
        """The caller's job id, or a new one."""
        return self.job_id or uuid.uuid4().hex


def fold_version(version: Any, asof: Any, branch: Any) -> tuple[int | str | None, dt.datetime | None, str | None]:
    """``version``, ``asof`` and ``branch`` checked; a time comes back aware (naive means local)."""
    if version is not None and asof is not None:
        raise InvalidArgumentError("asof", asof, f"cannot be combined with version={version!r}")
    check_version("version", version)
    if branch is not None and not (isinstance(branch, str) and branch):
        raise InvalidArgumentError("branch", branch, "must be the name of a branch")
    return version, None if asof is None else _fold_time(asof), branch


def _fold_time(asof: Any) -> dt.datetime:
    if isinstance(asof, str):
        try:
            asof = dt.datetime.fromisoformat(asof)
        except ValueError:
            raise InvalidArgumentError("asof", asof, "must be a datetime or an ISO 8601 string") from None
    if isinstance(asof, dt.date) and not isinstance(asof, dt.datetime):
        asof = dt.datetime(asof.year, asof.month, asof.day)
    if hasattr(asof, "to_pydatetime"):
        asof = asof.to_pydatetime()
    if not isinstance(asof, dt.datetime):
        raise InvalidArgumentError("asof", asof, "must be a datetime or an ISO 8601 string")
    return asof.astimezone()
