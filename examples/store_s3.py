"""A table on S3, or on what speaks its protocol, with the store's options written in three ways.

    python examples/store_s3.py                                        # moto's server: pip install 'moto[server,s3]'
    python examples/store_s3.py --uri s3://bucket/cities --endpoint http://minio:9000

A store of your own is asked with ``$AWS_ACCESS_KEY_ID`` and ``$AWS_SECRET_ACCESS_KEY``; its table stays.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

import lance_ray

CITIES = [
    {"name": "Graz", "people": 303_000},
    {"name": "Linz", "people": 213_000},
    {"name": "Wien", "people": 2_006_000},
]


def main(argv: Sequence[str] | None = None) -> None:
    """Write a table by one way to give the options, append by another, read by a third."""
    args = parse_arguments(argv)
    with store(args) as (uri, endpoint, key, secret):
        config = lance_ray.IOConfig(
            s3=lance_ray.S3Config(endpoint_url=endpoint, region_name=args.region, key_id=key, access_key=secret)
        )
        report = lance_ray.write_lance(ray.data.from_items(CITIES), uri, mode="overwrite", io_config=config)
        print(f"written    {report.rows} rows, version {report.version}, by {config.s3!r}")

        client: dict[str, Any] = {"endpoint_url": endpoint, "region_name": args.region}
        options: dict[str, Any] = {"key": key, "secret": secret, "client_kwargs": client}
        more = ray.data.from_items([{"name": "Ulm", "people": 130_000}])
        report = lance_ray.write_lance(more, uri, mode="append", storage_options=options)
        print(f"appended   {report.rows} rows, version {report.version}, by the options of s3fs")

        options = {"aws_access_key_id": key, "aws_secret_access_key": secret, "aws_region": args.region}
        options |= {"aws_endpoint": endpoint, "allow_http": "true"} if endpoint else {}
        names = lance_ray.read_lance(uri, columns=["name"], filter="people < 250000", storage_options=options)
        print(f"read       {', '.join(sorted(row['name'] for row in names.take_all()))}, by the engine's own keys")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot work before a server starts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--uri", metavar="s3://...", help="where the table shall be; what is there is overwritten")
    parser.add_argument("--endpoint", metavar="URL", help="the store, if it is not AWS")
    parser.add_argument("--region", default="us-east-1")
    args = parser.parse_args(argv)
    if args.endpoint and not args.uri:
        parser.error("--endpoint: goes with --uri")
    if args.uri and not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(os.environ):
        parser.error("--uri: needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")
    return args


@contextmanager
def store(args: argparse.Namespace) -> Iterator[tuple[str, str | None, str, str]]:
    """Table, endpoint, key and secret: the caller's, or those of a server in this process."""
    if args.uri:
        yield args.uri, args.endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        return
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"aws_access_key_id": "example", "aws_secret_access_key": "example-secret"}
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name=args.region, **keys).create_bucket(
            Bucket="lance-ray-example"
        )
        yield "s3://lance-ray-example/cities", f"http://{host}:{port}", "example", "example-secret"
    finally:
        server.stop()


if __name__ == "__main__":
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says much about each dataset
    main()
