"""Which table: asked for (:class:`TableRef`), resolved (:class:`PinnedTable`), to be written (:class:`WriteTarget`).

The only place that opens datasets. Workers get a :class:`PinnedTable`: a physical URI and an integer version that the
driver resolved once. The serialised manifest is left out on purpose, so that what is shipped does not grow with the
number of fragments; each process opens the version once and keeps it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa
from lance.file import LanceFileSession

from lance_ray import catalog
from lance_ray.catalog import LanceRestConfig, NamespaceRef
from lance_ray.errors import (
    InvalidArgumentError,
    TableExistsError,
    TableNotFoundError,
    VersionNotFoundError,
    redact,
    translate_errors,
)
from lance_ray.options import OpenOptions, Pairs, fold_version, nested_pairs, normalize_uri, pairs, strings
from lance_ray.stores import check_form, storage_options_of

BaseParams = tuple[tuple[str, Pairs], ...]

_INDEX_CACHE_BYTES = 1024**3
_METADATA_CACHE_BYTES = 512 * 1024**2
_MAX_OPEN_DATASETS = 16
_MAX_SESSIONS = 4


@dataclass(frozen=True, slots=True)
class TableRef:
    """The table that the caller named, by exactly one addressing style."""

    uri: str | None = None
    namespace: NamespaceRef | None = None
    table_id: tuple[str, ...] = ()
    version: int | str | None = None
    asof: dt.datetime | None = None
    branch: str | None = None
    storage_options: Pairs | None = field(default=None, repr=False)
    base_store_params: BaseParams = field(default=(), repr=False)
    open_options: OpenOptions = field(default_factory=OpenOptions)
    store: Any = field(default=None, repr=False, compare=False)
    """Options of the store in another form than the engine's, until a namespace has said which store it is."""
    opened: str = ""
    """Of an opened dataset: which table its version is of; see :func:`_identity`."""

    @classmethod
    def fold(
        cls,
        uri: Any,
        address: dict[str, Any],
        *,
        version: Any = None,
        asof: Any = None,
        branch: Any = None,
        open_options: OpenOptions | None = None,
    ) -> TableRef:
        """The value for a public function's flat keywords.

        Args:
            uri: a path, URI, ``pathlib.Path`` or an opened ``LanceDataset`` (then its version is the default).
            address: what the caller gave of ``table_id``, ``namespace_impl``, ``namespace_properties``,
                ``rest_config``, ``storage_options``, ``io_config``, ``base_store_params``; see :func:`address_of`.
            version: number or tag.
            asof: time, inclusive; naive means local.
            branch: name of a branch.
            open_options: how to open it.

        Raises:
            InvalidArgumentError: both or neither of ``uri`` and a namespace, or another bad argument.
        """
        version, asof, branch = fold_version(version, asof, branch)
        opened, of_dataset = "", None
        if isinstance(uri, lance.LanceDataset):
            if version is None and asof is None and branch is None:
                version, opened = uri.version, _identity(uri)
            of_dataset = pairs(uri.latest_storage_options(), "storage_options")
            uri = uri.uri
        namespace, table_id = _fold_namespace(uri, address)
        uri = None if uri is None or namespace is not None else normalize_uri(uri)
        store, parameter = _fold_store(address)
        storage_options = of_dataset
        if store is not None and (uri is not None or isinstance(store, Mapping)):
            storage_options = storage_options_of(store, uri or "rest://", parameter) or of_dataset
            store = None
        return cls(
            uri=uri,
            namespace=namespace,
            table_id=table_id,
            version=version,
            asof=asof,
            branch=branch,
            storage_options=storage_options,
            base_store_params=_fold_bases(address.get("base_store_params")),
            open_options=open_options or OpenOptions(),
            store=store,
            opened=opened,
        )

    @property
    def target(self) -> str:
        """The address for messages, without secrets."""
        if self.uri is not None:
            return redact(self.uri)
        return f"{self.namespace.impl if self.namespace else '?'}:{'.'.join(self.table_id)}"

    def __repr__(self) -> str:
        return f"TableRef({self.target!r}, version={self.version!r}, asof={self.asof!r}, branch={self.branch!r})"

    def locate(self) -> catalog.TableLocation:
        """The physical address, asked of the namespace where there is one."""
        if self.namespace is None:
            assert self.uri is not None  # noqa: S101 - fold() lets exactly one addressing style pass
            return catalog.TableLocation(self.uri, self.storage_options)
        return self.placed(catalog.describe(self.namespace, self.table_id))

    def placed(self, found: catalog.TableLocation) -> catalog.TableLocation:
        """What a namespace said, with the caller's own options below those that it vended."""
        uri = normalize_uri(found.uri)
        given = self.storage_options if self.store is None else storage_options_of(self.store, uri)
        return dataclasses.replace(found, uri=uri, storage_options=catalog.merge_options(given, found.storage_options))

    def unpinned(self) -> PinnedTable:
        """The address alone, as version 0; whether there is a table is not looked at. For ledgers and commits.

        Raises:
            TableNotFoundError: the namespace has no such table.
        """
        location = self.locate()
        return PinnedTable(self, location.uri, 0, location.storage_options, location.managed_versioning)

    def pin(self) -> PinnedTable:
        """The version asked for, resolved now: one describe where there is a namespace, and one open.

        Raises:
            TableNotFoundError: there is no table at the address.
            VersionNotFoundError: it has no such version, tag or branch, or none as old as ``asof``.
            StorageError: the store could not be reached, or refused.
        """
        return self.at(self.locate())

    def at(self, location: catalog.TableLocation) -> PinnedTable:
        """The same for an address that the namespace was already asked for."""
        latest = PinnedTable(self, location.uri, 0, location.storage_options, location.managed_versioning)
        if self.branch is not None:
            latest = dataclasses.replace(latest, uri=self._branch_uri(latest))
        latest, dataset = self._opened_branch(latest) if self.opened else (latest, self._open(latest))
        version = dataset.version if self.asof is None else _version_asof(dataset, self.asof, self.target)
        if dataset.version != version:
            dataset = latest.open_at(version)
        pinned = dataclasses.replace(latest, version=version, stamp=_stamp(dataset))
        _OPENED.put(pinned.key, dataset)
        return pinned

    def _opened_branch(self, main: PinnedTable) -> tuple[PinnedTable, lance.LanceDataset]:
        """Where the version of an opened dataset lies: its address is the table's even when it shows a branch."""
        places = [main]
        places += [
            dataclasses.replace(main, uri=_branch_path(main.uri, name)) for name in main.open_at(None).branches.list()
        ]
        for place in places:
            try:
                dataset = place.open_at(self.version)
            except VersionNotFoundError:
                continue
            if _identity(dataset) == self.opened:
                return place, dataset
        raise VersionNotFoundError(self.target, self.version, "the opened dataset is of another table or branch")

    def _open(self, latest: PinnedTable) -> lance.LanceDataset:
        try:
            return latest.open_at(self.version)
        except VersionNotFoundError:
            latest.open_at(None)  # a missing table is another error than a missing version
            raise

    def _branch_uri(self, main: PinnedTable) -> str:
        dataset = main.open_at(None)
        if self.branch == "main":
            return main.uri
        if self.branch not in dataset.branches.list():
            raise VersionNotFoundError(self.target, self.branch, "no such branch")
        return _branch_path(main.uri, self.branch)


def _fold_namespace(uri: Any, address: dict[str, Any]) -> tuple[NamespaceRef | None, tuple[str, ...]]:
    impl, table_id, rest = (address.get(key) for key in ("namespace_impl", "table_id", "rest_config"))
    named = ("namespace_impl", "namespace_properties", "table_id")
    given = {key for key in named if address.get(key) is not None}
    if isinstance(uri, str) and uri.startswith(_REST):
        return _fold_rest(uri, rest, given)
    if rest is not None:
        raise InvalidArgumentError("rest_config", rest, "goes with a rest://namespace/table address")
    if uri is not None:
        if given:
            raise InvalidArgumentError("uri", str(uri), f"cannot be combined with {sorted(given)}")
        return None, ()
    if impl is None or table_id is None:
        raise InvalidArgumentError("uri", None, "give either uri, or namespace_impl and table_id")
    return NamespaceRef.fold(impl, address.get("namespace_properties")), fold_table_id(table_id)


def fold_table_id(given: Any) -> tuple[str, ...]:
    """The name of a table in a namespace, as its parts.

    Raises:
        InvalidArgumentError: it is no name, or an empty one.
    """
    parts = strings("table_id", (given,) if isinstance(given, str) else given)
    if not parts or not all(parts):
        raise InvalidArgumentError("table_id", given, "must be a non-empty list of names")
    return parts


_ADDRESS = (
    "table_id",
    "namespace_impl",
    "namespace_properties",
    "rest_config",
    "storage_options",
    "io_config",
    "base_store_params",
)


def address_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that name a table, out of the ``locals()`` of a function that has all of them."""
    return {name: given[name] for name in _ADDRESS}


_REST = "rest://"


def check_rest_config(config: Any, why: str = "must be a LanceRestConfig") -> None:
    """Refuse what does not say where a REST server is."""
    if not isinstance(config, LanceRestConfig):
        raise InvalidArgumentError("rest_config", type(config).__name__, why)


def _fold_rest(uri: str, config: Any, given: set[str]) -> tuple[NamespaceRef, tuple[str, ...]]:
    check_rest_config(config, f"must be a LanceRestConfig, for {uri}")
    if given:
        raise InvalidArgumentError("uri", uri, f"cannot be combined with {sorted(given)}")
    path = uri.removeprefix(_REST)
    parts = tuple(path.removeprefix("/").split("/"))
    if not all(parts):
        raise InvalidArgumentError("uri", uri, "must be rest://namespace/table, or rest:///table in the root namespace")
    return config.namespace(), parts


def _fold_store(address: dict[str, Any]) -> tuple[Any, str]:
    given = {name: address[name] for name in ("storage_options", "io_config") if address.get(name) is not None}
    if len(given) > 1:
        raise InvalidArgumentError("io_config", "...", "cannot be combined with storage_options")
    name, value = next(iter(given.items()), ("storage_options", None))
    check_form(value, name)
    return value, name


def _fold_bases(given: Any) -> BaseParams:
    # Refuses what is no mapping of base URIs; what each maps to may have any form.
    nested_pairs({base: {} for base in given} if isinstance(given, Mapping) else given, "base_store_params")
    named = {base: storage_options_of(inner, str(base), "base_store_params") for base, inner in (given or {}).items()}
    return tuple(sorted((base, options or ()) for base, options in named.items()))


def is_local(uri: str) -> bool:
    """Whether the table lies in a file system of the machine, where an operation ends when its call returns."""
    return "://" not in uri


@dataclass(frozen=True, slots=True)
class PinnedTable:
    """A table at one version: what may be shipped to a worker. Hashable, picklable, shows no secret."""

    ref: TableRef
    uri: str
    version: int
    storage_options: Pairs | None = field(default=None, repr=False)
    managed_versioning: bool = False
    stamp: str = ""
    """Tells a table from one dropped before it at the same address, whose versions had the same numbers."""

    def __repr__(self) -> str:
        return f"PinnedTable({redact(self.uri)!r}, version={self.version}, ref={self.ref!r})"

    @property
    def key(self) -> str:
        """Identity for caches, without secrets: credentials go in as a digest."""
        text = repr(
            (self.storage_options, self.ref.base_store_params, self.ref.namespace and self.ref.namespace.properties)
        )
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        options = self.ref.open_options
        return repr(
            (
                self.uri,
                self.version,
                self.stamp,
                self.ref.namespace,
                self.ref.table_id,
                digest,
                options,
                options.default_scan_options,
                None if options.session is None else id(options.session),  # which what is cached keeps alive
            )
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that must not appear in any message."""
        inner = [catalog.secret_values(options) for _, options in self.ref.base_store_params]
        namespace = self.ref.namespace.secrets if self.ref.namespace else ()
        return (
            *catalog.secret_values(self.storage_options),
            *namespace,
            *(value for values in inner for value in values),
        )

    def renewed(self) -> PinnedTable:
        """The same with credentials of now, where a namespace vended those that it has, and they expire."""
        if self.ref.namespace is None or catalog.EXPIRES not in dict(self.storage_options or ()):
            return self
        location = self.ref.locate()
        return dataclasses.replace(self, storage_options=location.storage_options)

    def open(self) -> lance.LanceDataset:
        """This snapshot, opened once per process."""
        key = self.key
        dataset: lance.LanceDataset | None = _OPENED.get(key)
        if dataset is None:
            dataset = self.open_at(self.version)
            _OPENED.put(key, dataset)
        return dataset

    def open_latest(self) -> lance.LanceDataset:
        """The newest version, never from a cache. For the driver's commit phase."""
        return self.open_at(None)

    def open_at(self, version: int | str | None) -> lance.LanceDataset:
        """Another version of the same table, never from a cache."""
        options = self.ref.open_options
        own = options.session
        if own is None:
            own = session(options.index_cache_size_bytes, options.metadata_cache_size_bytes)
        with translate_errors("open", self.uri, secrets=self.secrets, version=version):
            return lance.LanceDataset(
                self.uri,
                version,
                options.block_size,
                commit_lock=options.commit_lock,
                read_params=dict(options.read_params) if options.read_params else None,
                session=own,
                **self.store_kwargs(),
            )

    def store_kwargs(self) -> dict[str, Any]:
        """Keywords by which pylance reaches the store: options, namespace client for refresh, base credentials."""
        kwargs: dict[str, Any] = {
            "storage_options": dict(self.storage_options) if self.storage_options else None,
            "base_store_params": {base: dict(inner) for base, inner in self.ref.base_store_params} or None,
        }
        client = None if self.ref.namespace is None else self.ref.namespace.client()
        if client is not None:
            kwargs["namespace_client"] = client
            kwargs["table_id"] = list(self.ref.table_id)
            kwargs["namespace_client_managed_versioning"] = self.managed_versioning
        return kwargs

    def write_kwargs(self) -> dict[str, Any]:
        """:meth:`store_kwargs` for ``write_fragments``, which commits nothing and so takes no versioning flag."""
        kwargs = self.store_kwargs()
        kwargs.pop("namespace_client_managed_versioning", None)
        return kwargs

    def file_session(self, base: str | None = None) -> LanceFileSession:
        """Access to single files below the table, or below one of its further bases."""
        kwargs = self.write_kwargs()
        params = kwargs.pop("base_store_params") or {}
        if base in params:
            kwargs["storage_options"] = params[base]
        with translate_errors("open", base or self.uri, secrets=self.secrets):
            return LanceFileSession(base or self.uri, **kwargs)


def newest(table: PinnedTable) -> PinnedTable:
    """The same table at its newest version, whatever version was asked for."""
    ref = dataclasses.replace(table.ref, version=None, asof=None, opened="", branch=None)
    return ref.at(catalog.TableLocation(table.uri, table.storage_options, table.managed_versioning))


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """A table about to be written: what exists (``base``, None for nothing yet) and where the new files go."""

    table: PinnedTable
    base: PinnedTable | None
    mode: str

    @classmethod
    def resolve(cls, ref: TableRef, mode: str) -> WriteTarget:
        """The target, checked against the mode before any task starts.

        Raises:
            TableExistsError: mode ``create`` and there is a table.
            TableNotFoundError: mode ``append`` and there is none.
            StorageError: the store could not be reached, or refused.
        """
        if ref.opened:  # may show an old version, and its branch is found by it
            ref = dataclasses.replace(ref, uri=ref.pin().uri)
        ref = dataclasses.replace(ref, version=None, opened="")
        try:
            location = ref.locate()
        except TableNotFoundError:
            if mode == "append" or ref.namespace is None:
                raise
            location = ref.placed(catalog.declare(ref.namespace, ref.table_id))
        table = PinnedTable(ref, location.uri, 0, location.storage_options, location.managed_versioning)
        try:
            base = ref.at(location)
        except TableNotFoundError:
            if mode == "append":
                raise
            return cls(table, None, mode)
        if mode == "create":
            raise TableExistsError(ref.target)
        return cls(table if base.uri == table.uri else dataclasses.replace(table, uri=base.uri), base, mode)

    @property
    def base_version(self) -> int:
        """The version of the existing table, or 0 when there is none."""
        return 0 if self.base is None else self.base.version

    @property
    def schema(self) -> pa.Schema | None:
        """The schema of the existing table, or None when there is none."""
        return None if self.base is None else self.base.open().schema


def _branch_path(uri: str, branch: str) -> str:
    # The layout of branches is part of the table format: https://lance.org/format/table/branch_tag
    return f"{uri.rstrip('/')}/tree/{branch}"


def _identity(dataset: lance.LanceDataset) -> str:
    """Tells a version from one of the same number in another branch, or in a table made anew at the same address."""
    return f"{dict(dataset.get_version())['timestamp']} {_stamp(dataset)}"


def _stamp(dataset: lance.LanceDataset) -> str:
    """The name of the first data file, which no two tables share; an empty table has none, and no rows to confuse."""
    first = next(iter(dataset.fragment_ids()), None)
    fragment = None if first is None else dataset.get_fragment(first)
    return str(fragment.metadata.files[0].path) if fragment is not None else ""


def _version_asof(dataset: lance.LanceDataset, asof: dt.datetime, target: str) -> int:
    stamps: list[dict[str, Any]] = [dict(item) for item in dataset.versions()]
    versions: list[int] = [item["version"] for item in stamps if item["timestamp"].astimezone() <= asof]
    if not versions:
        raise VersionNotFoundError(target, asof.isoformat(), "the first version is newer than asof")
    return max(versions)


def in_memory(table: pa.Table) -> lance.LanceDataset:
    """The rows as a table that lives as long as the object; its row ids count from 0."""
    return lance.write_dataset(table, f"memory://{uuid.uuid4().hex}", max_rows_per_file=max(1, table.num_rows))


class _BoundedCache:
    """A small least-recently-used cache, safe between the threads of one process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._size:
                self._items.popitem(last=False)


_OPENED = _BoundedCache(_MAX_OPEN_DATASETS)
_SESSIONS = _BoundedCache(_MAX_SESSIONS)


def session(index_cache_bytes: int | None = None, metadata_cache_bytes: int | None = None) -> Any:
    """The session of this process for these cache sizes: caches are shared by all datasets and stay bounded."""
    key = (
        _INDEX_CACHE_BYTES if index_cache_bytes is None else index_cache_bytes,
        _METADATA_CACHE_BYTES if metadata_cache_bytes is None else metadata_cache_bytes,
    )
    found = _SESSIONS.get(key)
    if found is None:
        make = lance.Session  # type: ignore[attr-defined] # exported, but not declared so
        found = make(index_cache_size_bytes=key[0], metadata_cache_size_bytes=key[1])
        _SESSIONS.put(key, found)
    return found
