"""Stand-ins for catalogs that run elsewhere: each speaks to the real client package as its service does.

DLF, Unity and Polaris are small HTTP servers, a Hive metastore is a thrift server made of the classes that its client
package brings. All keep their tables in memory, want the credentials that they were started with, and page their lists
after two tables, so that what reads only a first page is found out.
"""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request
from lance_namespace import CreateNamespaceRequest
from werkzeug.serving import make_server

import lance_ray
from tests.faults.stores import BUCKET, KEY_ID, S3, SECRET
from tests.leaks import secret

PAGE = 2
"""How many names a list has at most."""

TOKEN = secret("the token of catalogs", "catalog-token-Zx81Qm-never-shown")
"""What Unity and Polaris are asked with."""

DLF_KEY, DLF_SECRET = "LTAI-catalog-key-77aa", secret("the key of DLF", "catalog-secret-access-key-88bb")


@dataclass
class Tables:
    """What a catalog knows: namespaces, and what was entered in them. ``asked`` has every call."""

    namespaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fail: int | None = None
    """The HTTP status that everything is answered with."""

    def page(self, names: list[str], token: str | None) -> tuple[list[str], str | None]:
        """A page of a list, and the token of the next."""
        first = int(token or 0)
        rest = len(names) > first + PAGE
        return sorted(names)[first : first + PAGE], str(first + PAGE) if rest else None


@contextmanager
def serving(app: Flask) -> Iterator[str]:
    """The address of a server that answers by an app while the block runs."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _app(tables: Tables, refused: Callable[[], bool], error: Callable[[int, str], Response]) -> Flask:
    app = Flask("catalog")

    @app.before_request
    def before() -> Response | None:
        tables.asked.append(f"{request.method} {request.path}")
        if tables.fail is not None:
            return error(tables.fail, "as it was told to")
        return error(401, "who are you?") if refused() else None

    return app


def _no_bearer() -> bool:
    return request.headers.get("Authorization") != f"Bearer {TOKEN}"


# DLF


def _dlf_error(status: int, message: str, kind: str = "TABLE") -> Response:
    answer = jsonify(message=message, code=status, resourceType=kind, resourceName="")
    answer.status_code = status
    return answer


def dlf(tables: Tables, root: str, vend: Callable[[], tuple[dict[str, str], int]]) -> Flask:
    """A DLF catalog (the REST catalog of Paimon), which keeps its tables below ``root`` and vends what it is told."""

    def refused() -> bool:
        return f"Credential={DLF_KEY}/" not in request.headers.get("Authorization", "")

    app = _app(tables, refused, _dlf_error)

    @app.get("/v1/config")
    def config() -> Any:
        return {"defaults": {"prefix": request.args["warehouse"]}}

    @app.post("/v1/<_warehouse>/databases")
    def create_database(_warehouse: str) -> Any:
        return _created(tables, request.get_json()["name"], lambda text: _dlf_error(409, text, "DATABASE"))

    @app.get("/v1/<_warehouse>/databases/<database>/tables")
    def list_tables(_warehouse: str, database: str) -> Any:
        if database not in tables.namespaces:
            return _dlf_error(404, f"no {database}", "DATABASE")
        kind = request.args.get("tableType")
        known = [name for name, table in tables.namespaces[database].items() if table["type"] == kind or not kind]
        names, token = tables.page(known, request.args.get("pageToken"))
        return {"tables": names, "nextPageToken": token}

    _dlf_tables(app, tables, root, vend)
    return app


def _dlf_tables(app: Flask, tables: Tables, root: str, vend: Callable[[], tuple[dict[str, str], int]]) -> None:
    @app.post("/v1/<_warehouse>/databases/<database>/tables")
    def create_table(_warehouse: str, database: str) -> Any:
        given = request.get_json()
        name = given["identifier"]["object"]
        if database not in tables.namespaces:
            return _dlf_error(404, f"no {database}", "DATABASE")
        if name in tables.namespaces[database]:
            return _dlf_error(409, f"{name} exists")
        tables.namespaces[database][name] = {"path": f"{root}/{database}.db/{name}", **given["schema"]["options"]}
        return {}

    def of_table(database: str, name: str, answer: Callable[[dict[str, Any]], Any]) -> Any:
        table = tables.namespaces.get(database, {}).get(name)
        return _dlf_error(404, f"no {database}.{name}") if table is None else answer(table)

    @app.get("/v1/<_warehouse>/databases/<database>/tables/<name>")
    def get_table(_warehouse: str, database: str, name: str) -> Any:
        schema: dict[str, Any] = {"fields": [], "partitionKeys": [], "primaryKeys": []}
        said = {"id": name, "name": name, "isExternal": False, "schemaId": 0}
        return of_table(
            database, name, lambda table: said | {"path": table["path"], "schema": schema | {"options": table}}
        )

    @app.get("/v1/<_warehouse>/databases/<database>/tables/<name>/token")
    def token(_warehouse: str, database: str, name: str) -> Any:
        vended, ends = vend()
        return of_table(database, name, lambda _: {"token": vended, "expiresAtMillis": ends})

    @app.post("/v1/<_warehouse>/databases/<database>/tables/<name>")
    def alter_table(_warehouse: str, database: str, name: str) -> Any:
        return of_table(database, name, lambda _: {})

    @app.delete("/v1/<_warehouse>/databases/<database>/tables/<name>")
    def drop_table(_warehouse: str, database: str, name: str) -> Any:
        return of_table(database, name, lambda _: tables.namespaces[database].pop(name) and {})


def _created(tables: Tables, name: str, exists: Callable[[str], Response]) -> Any:
    if name in tables.namespaces:
        return exists(f"{name} exists")
    tables.namespaces[name] = {}
    return {}


# Unity


def _unity_error(status: int, code: str) -> Response:
    answer = jsonify(error_code=code, message=f"{code}, says the server")
    answer.status_code = status
    return answer


def unity(tables: Tables) -> Flask:
    """A Unity Catalog, which knows only the catalog ``main``."""
    app = _app(tables, _no_bearer, lambda status, _: _unity_error(status, "UNAUTHENTICATED"))
    base = "/api/2.1/unity-catalog"

    @app.post(f"{base}/schemas")
    def create_schema() -> Any:
        given = request.get_json()
        name = f"{given['catalog_name']}.{given['name']}"
        return _created(tables, name, lambda _: _unity_error(409, "SCHEMA_ALREADY_EXISTS")) or {
            "name": given["name"],
            "catalog_name": given["catalog_name"],
        }

    @app.post(f"{base}/tables")
    def create_table() -> Any:
        given = request.get_json()
        known = tables.namespaces.get(f"{given['catalog_name']}.{given['schema_name']}")
        if known is None:
            return _unity_error(404, "SCHEMA_NOT_FOUND")
        if given["name"] in known:
            return _unity_error(400, "TABLE_ALREADY_EXISTS")
        known[given["name"]] = given
        return given

    @app.get(f"{base}/tables")
    def list_tables() -> Any:
        known = tables.namespaces.get(f"{request.args['catalog_name']}.{request.args['schema_name']}")
        if known is None:
            return _unity_error(404, "SCHEMA_NOT_FOUND")
        names, token = tables.page(list(known), request.args.get("page_token"))
        return {"tables": [known[name] for name in names], "next_page_token": token}

    def of_table(name: str, answer: Callable[[dict[str, Any], str], Any]) -> Any:
        schema, _, table = name.rpartition(".")
        known = tables.namespaces.get(schema, {})
        return answer(known, table) if table in known else _unity_error(404, "TABLE_NOT_FOUND")

    @app.get(f"{base}/tables/<name>")
    def get_table(name: str) -> Any:
        return of_table(name, lambda known, table: known[table])

    @app.delete(f"{base}/tables/<name>")
    def delete_table(name: str) -> Any:
        return of_table(name, lambda known, table: known.pop(table) and "200 OK")

    return app


# Polaris


def _polaris_error(status: int, kind: str) -> Response:
    answer = jsonify(error={"message": f"{kind}, says the server", "type": kind, "code": status})
    answer.status_code = status
    return answer


def polaris(tables: Tables) -> Flask:
    """A Polaris catalog, with its generic tables."""
    app = _app(tables, _no_bearer, _polaris_error)
    base = "/api/catalog/polaris/v1/<catalog>/namespaces/<namespace>/generic-tables"

    @app.post("/api/catalog/v1/<catalog>/namespaces")
    def create_namespace(catalog: str) -> Any:
        given = request.get_json()
        name = f"{catalog}.{'.'.join(given['namespace'])}"
        return _created(tables, name, lambda _: _polaris_error(409, "AlreadyExistsException")) or given

    @app.post(base)
    def create_table(catalog: str, namespace: str) -> Any:
        given = request.get_json()
        known = tables.namespaces.get(f"{catalog}.{namespace}")
        if known is None:
            return _polaris_error(404, "NoSuchNamespaceException")
        if given["name"] in known:
            return _polaris_error(409, "AlreadyExistsException")
        known[given["name"]] = given
        return {"table": given}

    @app.get(base)
    def list_tables(catalog: str, namespace: str) -> Any:
        known = tables.namespaces.get(f"{catalog}.{namespace}")
        if known is None:
            return _polaris_error(404, "NoSuchNamespaceException")
        return {"identifiers": [{"namespace": [namespace], "name": name} for name in known]}

    def of_table(catalog: str, namespace: str, name: str, answer: Callable[[dict[str, Any]], Any]) -> Any:
        known = tables.namespaces.get(f"{catalog}.{namespace}", {})
        return answer(known) if name in known else _polaris_error(404, "NoSuchTableException")

    @app.get(f"{base}/<name>")
    def get_table(catalog: str, namespace: str, name: str) -> Any:
        return of_table(catalog, namespace, name, lambda known: {"table": known[name]})

    @app.delete(f"{base}/<name>")
    def delete_table(catalog: str, namespace: str, name: str) -> Any:
        return of_table(catalog, namespace, name, lambda known: known.pop(name) and ("", 204))

    return app


# Hive


class Metastore:
    """What a Hive metastore does when it is called. As it does, it leaves the files of external tables where they are.

    ``pause`` seconds pass within each answer, so that calls meet.
    """

    def __init__(self, tables: Tables, pause: float = 0.0) -> None:
        from thrift_files.libraries.thrift_hive_metastore_client import ttypes

        self._types, self._tables, self._pause = ttypes, tables, pause

    def set_ugi(self, user_name: str, group_names: Any) -> list[str]:
        self._tables.asked.append(f"set_ugi {user_name}")
        return []

    def create_database(self, database: Any) -> None:
        if database.name in self._tables.namespaces:
            raise self._types.AlreadyExistsException(f"Database {database.name} already exists")
        self._tables.namespaces[database.name] = {}

    def create_table(self, tbl: Any) -> None:
        known = self._tables.namespaces.get(tbl.dbName)
        if known is None:
            raise self._types.InvalidObjectException(tbl.dbName)
        if tbl.tableName in known:
            raise self._types.AlreadyExistsException(f"Table {tbl.tableName} already exists")
        known[tbl.tableName] = tbl

    def get_table(self, dbname: str, tbl_name: str) -> Any:
        self._tables.asked.append(f"get_table {dbname}.{tbl_name}")
        time.sleep(self._pause)
        if tbl_name not in self._tables.namespaces.get(dbname, {}):
            raise self._types.NoSuchObjectException(f"{dbname}.{tbl_name} table not found")
        return self._tables.namespaces[dbname][tbl_name]

    def get_all_tables(self, db_name: str) -> list[str]:
        if db_name not in self._tables.namespaces:
            raise self._types.MetaException(f"no database {db_name}")
        return list(self._tables.namespaces[db_name])

    def drop_table(self, dbname: str, name: str, deleteData: bool) -> None:  # noqa: N803 - the name of the protocol
        del self._tables.namespaces[dbname][name]


@contextmanager
def metastore(handler: Metastore) -> Iterator[str]:
    """The address of a thrift server in front of a metastore while the block runs."""
    from thrift.protocol.TBinaryProtocol import TBinaryProtocol
    from thrift.transport.TSocket import TSocket
    from thrift.transport.TTransport import TBufferedTransport, TTransportException
    from thrift_files.libraries.thrift_hive_metastore_client.ThriftHiveMetastore import Processor

    processor = Processor(handler)

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            channel = TSocket()
            channel.setHandle(self.request)
            protocol = TBinaryProtocol(TBufferedTransport(channel))
            try:
                while True:
                    processor.process(protocol, protocol)
            except (TTransportException, OSError):
                """The client has hung up."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

    server = Server(("127.0.0.1", 0), Connection)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"thrift://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# All of them alike


@dataclass(frozen=True)
class Catalog:
    """A catalog that runs, with an empty database, as the keywords of this package name it."""

    impl: str
    properties: dict[str, str] = field(repr=False)
    database: tuple[str, ...]
    storage_options: dict[str, str] | None = field(default=None, repr=False)
    tables: Tables | None = None
    """Of a stand-in: what it knows."""

    @property
    def namespace(self) -> dict[str, Any]:
        """The keywords for the catalog."""
        return {"namespace_impl": self.impl, "namespace_properties": self.properties}

    def table(self, name: str) -> dict[str, Any]:
        """The keywords for a table in its database."""
        options = {} if self.storage_options is None else {"storage_options": self.storage_options}
        return {**self.namespace, "table_id": [*self.database, name], **options}


PLUGINS = ("glue", "dlf", "unity", "polaris", "hive2", "hive3")


@contextmanager
def running(impl: str, folder: Path, s3: S3, life: float = 3600.0) -> Iterator[Catalog]:
    """A catalog of each kind of plugin while the block runs; those of Glue and DLF keep their tables in the S3 server.

    Args:
        impl: which plugin.
        folder: where the others keep their tables.
        s3: the server, and its proxy.
        life: for how many seconds the credentials hold that DLF vends.
    """
    with ExitStack() as stack:
        catalog = _STARTERS[impl](stack, folder, s3, life)
        properties = {"location": f"s3://{BUCKET}/glue{time.monotonic_ns()}"} if impl == "glue" else {}
        client = lance_ray.connect(**catalog.namespace)
        client.create_namespace(CreateNamespaceRequest(id=list(catalog.database), properties=properties))
        yield catalog


def _glue(stack: ExitStack, folder: Path, s3: S3, life: float) -> Catalog:
    keys = {"access_key_id": KEY_ID, "secret_access_key": SECRET, "region": "us-east-1", "endpoint": s3.server}
    storage = {f"storage.{name}": value for name, value in s3.options().items()}
    return Catalog("glue", keys | storage, (f"db{time.monotonic_ns()}",))


def _dlf(stack: ExitStack, folder: Path, s3: S3, life: float) -> Catalog:
    def vend() -> tuple[dict[str, str], int]:
        ends = int((time.time() + life) * 1000)
        key = {"fs.oss.accessKeyId": f"KEY{ends}", "fs.oss.accessKeySecret": SECRET}
        return key | {"fs.oss.securityToken": TOKEN, "fs.oss.endpoint": s3.proxy.url}, ends

    tables = Tables()
    url = stack.enter_context(serving(dlf(tables, f"oss://{BUCKET}/dlf{time.monotonic_ns()}", vend)))
    properties = {
        "uri": url,
        "warehouse": "lake",
        "token.provider": "dlf",
        "dlf.region": "cn-hangzhou",
        "dlf.access-key-id": DLF_KEY,
        "dlf.access-key-secret": DLF_SECRET,
    }
    return Catalog("dlf", properties, ("db",), {"addressing_style": "path"}, tables)  # the server has no names


def _unity(stack: ExitStack, folder: Path, s3: S3, life: float) -> Catalog:
    tables = Tables()
    url = stack.enter_context(serving(unity(tables)))
    properties = {"unity.endpoint": url, "unity.root": str(folder), "unity.auth_token": TOKEN}
    return Catalog("unity", properties, ("main", "db"), None, tables)


def _polaris(stack: ExitStack, folder: Path, s3: S3, life: float) -> Catalog:
    tables = Tables()
    url = stack.enter_context(serving(polaris(tables)))
    properties = {"polaris.endpoint": url, "polaris.root": str(folder), "polaris.auth_token": TOKEN}
    return Catalog("polaris", properties, ("main", "db"), None, tables)


def _hive(impl: str, database: tuple[str, ...]) -> Callable[[ExitStack, Path, S3, float], Catalog]:
    def start(stack: ExitStack, folder: Path, s3: S3, life: float) -> Catalog:
        tables = Tables()
        url = stack.enter_context(metastore(Metastore(tables, pause=0.01)))
        return Catalog(impl, {"uri": url, "root": str(folder), "ugi": "ada:staff"}, database, None, tables)

    return start


_STARTERS = {
    "glue": _glue,
    "dlf": _dlf,
    "unity": _unity,
    "polaris": _polaris,
    "hive2": _hive("hive2", ("db",)),
    "hive3": _hive("hive3", ("hive", "db")),
}
