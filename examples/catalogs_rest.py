"""A table in a REST catalog, from its creation to its end.

    python examples/catalogs_rest.py                                   # a server of its own, gone afterwards
    python examples/catalogs_rest.py --server http://catalog:10024     # yours; $LANCE_API_KEY is sent where it is set

The table is ``lance_ray_example/cities``; a server that has one already is left alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lance_namespace
import pyarrow as pa
import ray
from lance.namespace import RestAdapter

import lance_ray

NAMESPACE, TABLE = "lance_ray_example", "cities"
ADDRESS = f"rest://{NAMESPACE}/{TABLE}"
SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("people", pa.int64())])
CITIES = [
    {"name": "Graz", "people": 303_000},
    {"name": "Linz", "people": 213_000},
    {"name": "Wien", "people": 2_006_000},
]


def main(argv: Sequence[str] | None = None) -> None:
    """Create, write, read, change, compact, describe and drop one table, by its address in the catalog."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", metavar="URL", help="a REST namespace server that runs already")
    given = parser.parse_args(argv).server
    with catalog_server(given) as url:
        server = lance_ray.LanceRestConfig(base_url=url, api_key=os.environ.get("LANCE_API_KEY"), timeout=30)
        make_namespace(server)
        use_table(server)


def make_namespace(server: lance_ray.LanceRestConfig) -> None:
    """What is not about tables is asked of the connected namespace itself."""
    client = lance_ray.connect(rest_config=server)
    client.create_namespace(lance_namespace.CreateNamespaceRequest(id=[NAMESPACE], mode="exist_ok"))


def use_table(server: lance_ray.LanceRestConfig) -> None:
    """Every function takes the address and the server; no path of a file is needed."""
    lance_ray.create_lance_table_rest(server, NAMESPACE, TABLE, SCHEMA)
    try:
        report = lance_ray.write_lance(ray.data.from_items(CITIES), ADDRESS, mode="append", rest_config=server)
        print(f"written    {report.rows} rows, version {report.version}")
        large = lance_ray.read_lance(ADDRESS, filter="people > 250000", columns=["name"], rest_config=server)
        print(f"read       {', '.join(sorted(row['name'] for row in large.take_all()))}")
        lance_ray.add_columns(ADDRESS, transform={"thousands": "people / 1000"}, rest_config=server, progress=False)
        lance_ray.compact_files(ADDRESS, rest_config=server, progress=False)
        print(f"listed     {lance_ray.list_tables([NAMESPACE], rest_config=server)}")
        print(f"described  {lance_ray.describe_table(ADDRESS, rest_config=server)}")
    finally:
        lance_ray.drop_table([NAMESPACE, TABLE], rest_config=server)
    print("dropped")


@contextmanager
def catalog_server(given: str | None) -> Iterator[str]:
    """The address of the caller's server, or of one over a folder that is gone afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
        adapter = RestAdapter("dir", {"root": folder}, port=0)
        adapter.start()  # type: ignore[no-untyped-call] # pylance declares nothing here
        try:
            yield f"http://127.0.0.1:{adapter.port}"
        finally:
            adapter.stop()  # type: ignore[no-untyped-call] # pylance declares nothing here


if __name__ == "__main__":
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says much about each dataset
    main()
