"""A new feature for every row of a table: a model on the workers, a run that breaks, and one that goes on from there.

python examples/backfill.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.compute as pc
import ray

import lance_ray


def main(argv: Sequence[str] | None = None) -> None:
    """Backfill a column twice: the first run fails half-way, the second does the rest. Then only what is new."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8_000, metavar="N", help="rows of the table")
    rows = parser.parse_args(argv).rows
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as folder:
        uri, flag = str(Path(folder) / "features.lance"), Path(folder) / "the model works"
        prices = ray.data.range(rows).map_batches(lambda batch: {"id": batch["id"], "price": batch["id"] % 100})
        prices.write_lance(uri, min_rows_per_file=rows // 8, max_rows_per_file=rows // 8)

        try:
            backfill(uri, flag)
        except lance_ray.LanceRayError as error:
            print(f"first run    {type(error).__name__}; the table is as it was: {lance.dataset(uri).schema.names}")

        flag.touch()
        report = backfill(uri, flag)
        print(f"second run   {report.fragments} fragments, of which {report.resumed} were finished before")

        # Rows that came later have no value yet; only those are computed.
        more = ray.data.range(100).map_batches(lambda batch: {"id": batch["id"] + rows, "price": batch["id"]})
        lance_ray.write_lance(more, uri, mode="append")
        report = lance_ray.update_columns(
            uri, columns=["score"], transform=Model, fn_constructor_args=[str(flag)], where_null=True, progress=False
        )
        print(f"what is new  {report.rows} rows")


def backfill(uri: str, flag: Path) -> lance_ray.ColumnsReport:
    """The job. With its id, what is finished stays when it fails."""
    return lance_ray.add_columns(
        uri,
        transform=Model,
        fn_constructor_args=[str(flag)],
        read_columns=["id", "price"],
        output_schema=pa.schema([("score", pa.float64())]),
        job_id="score-v1",
        concurrency=1,
        progress=False,
    )


class Model:
    """Made once for each worker, so that what it loads is loaded once. This one breaks while its flag is absent."""

    def __init__(self, flag: str) -> None:
        """Load the weights."""
        self.works = Path(flag).exists()

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Scores of a batch."""
        if not self.works and pc.max(batch["id"]).as_py() > 5_000:
            raise ValueError("the model does not know such ids yet")
        return pa.record_batch({"score": pc.divide(pc.cast(batch["price"], pa.float64()), 7.0)})


if __name__ == "__main__":
    main()
