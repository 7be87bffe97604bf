"""Rows that keep coming: small appends, each exactly once, and a table that stays quick to read.

python examples/ingest.py
python examples/ingest.py --batches 100 --every 10
"""

from __future__ import annotations

import argparse
import datetime as dt
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lance
import ray

import lance_ray


def main(argv: Sequence[str] | None = None) -> None:
    """Append batches; every few of them compact, publish a version under a tag, and clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, default=12, metavar="N", help="batches to append")
    parser.add_argument("--every", type=int, default=4, metavar="N", help="care for the table after so many")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
        uri = str(Path(folder) / "events.lance")
        for number in range(args.batches):
            append(uri, number)
            append(uri, number)  # a scheduler that runs a job twice does no harm
            if (number + 1) % args.every == 0:
                care(uri)
        table = lance_ray.table_health(uri)
        print(f"\n{table}")
        published = ray.data.read_lance(uri, version="published").count()
        print(f"published: {published} rows; appended: {args.batches * 100}")


def append(uri: str, number: int) -> None:
    """One batch under an id of its own: run again, it writes nothing."""
    batch = ray.data.range(100).map_batches(lambda rows: {"id": rows["id"] + number * 100})
    mode = "append" if Path(uri).exists() else "create"
    report = lance_ray.write_lance(batch, uri, mode=mode, job_id=f"batch-{number:05}")
    if not report.skipped:
        print(f"batch {number:>3}: version {report.version}, {report.small_files} small file(s)")


def care(uri: str) -> None:
    """Merge small files, let readers see the result, and remove versions that nobody needs."""
    report = lance_ray.compact_files(uri, progress=False)
    dataset = lance.dataset(uri)
    if "published" in dataset.tags.list():
        dataset.tags.update("published", dataset.version)
    else:
        dataset.tags.create("published", dataset.version)
    # Readers on a tag, and jobs that still run, keep what they need; in production leave them days, not no time.
    removed = lance_ray.cleanup_old_versions(uri, older_than=dt.timedelta(0), error_if_tagged_old_versions=False)
    lance_ray.cleanup_orphans(uri)
    print(f"care:      {report or 'nothing to compact'}; {removed.old_versions} version(s) removed")


if __name__ == "__main__":
    main()
