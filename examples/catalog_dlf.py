"""A table in Alibaba Cloud DLF, on OSS, with the credentials that DLF vends: nothing is set in the environment.

    python examples/catalog_dlf.py                                     # print what a configuration looks like
    python examples/catalog_dlf.py --config dlf.json --database default

Needs ``pip install '.[dlf]'``. The table has a name of its own and is dropped at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

import lance_ray

CONFIG = {
    "uri": "http://<dlf-endpoint>",
    "warehouse": "<catalog>",
    "token.provider": "dlf",
    "dlf.region": "<region>",
    "dlf.access-key-id": "<access-key-id>",
    "dlf.access-key-secret": "<access-key-secret>",
    "dlf.oss-endpoint": "<oss-endpoint, only from outside of the region's network>",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Create a table, append to it, read it and compact it, as one of the catalog's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON, as this program prints it without arguments")
    parser.add_argument("--database", default="default")
    parser.add_argument("--storage-options", type=json.loads, metavar="JSON", help="more options for the engine")
    args = parser.parse_args(argv)
    if args.config is None:
        print(json.dumps(CONFIG, indent=4))
        return
    catalog = lance_ray.connect("dlf", json.loads(args.config.read_text(encoding="utf-8")))
    name = f"lance_ray_example_{time.time_ns()}"
    use_table({"namespace_impl": catalog, "table_id": [args.database, name], "storage_options": args.storage_options})


def use_table(table: dict[str, Any]) -> None:
    """Every function takes the table by its name in the catalog, and asks DLF for credentials when it needs them."""
    first = pa.table({"f0": [201, 202, 203], "f1": ["ray-a", "ray-b", "ray-c"]})
    report = lance_ray.write_lance(ray.data.from_arrow(first), mode="create", **table)
    try:
        print(f"created    {'.'.join(table['table_id'])}, version {report.version}")
        report = lance_ray.write_lance(ray.data.from_items([{"f0": 204, "f1": "ray-d"}]), mode="append", **table)
        print(f"appended   {report.rows} row, version {report.version}")
        rows = lance_ray.read_lance(**table, filter="f0 > 201").take_all()
        print(f"read       {sorted((row['f0'], row['f1']) for row in rows)}")
        lance_ray.compact_files(**table, progress=False)
        described = lance_ray.describe_table(**table)
        print(f"described  {described}")
        print(f"vended     {', '.join(described.storage_option_names)}")
    finally:
        lance_ray.drop_table(table["table_id"], namespace_impl=table["namespace_impl"])
    print("dropped")


if __name__ == "__main__":
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says much about each dataset
    main()
