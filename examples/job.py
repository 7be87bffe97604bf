r"""A job for a cluster: submitted with ``ray job submit``, repeatable, with a result that other programs can read.

    ray job submit --address http://head:8265 --working-dir . -- \
        python examples/job.py --table s3://bucket/numbers --rows 1000000 --job-id 2026-11-25

Ray runs the command on the cluster; submitting it again with the same ``--job-id`` writes nothing. Exit codes are those
of Python: a failed job is a FAILED job for Ray.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

import ray

import lance_ray


def main(argv: Sequence[str] | None = None) -> None:
    """Write a table once, and print the report as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", required=True, metavar="URI", help="where to write")
    parser.add_argument("--rows", type=int, default=1000, metavar="N", help="rows to write")
    parser.add_argument("--job-id", required=True, metavar="ID", help="what makes the job repeatable")
    args = parser.parse_args(argv)
    numbers = ray.data.range(args.rows).map_batches(lambda batch: {"id": batch["id"], "square": batch["id"] ** 2})
    report = lance_ray.write_lance(
        numbers,
        args.table,
        mode="overwrite",
        job_id=args.job_id,
        commit_message=f"job {args.job_id}",
    )
    print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
