"""Documents in two tables: the files as blobs, their paragraphs with embeddings; a question reads only what it needs.

python examples/documents.py                       # the Python files of the standard library
python examples/documents.py --input notes/ --question "how do I renew the lease"
python examples/documents.py --output ~/tables     # keep the tables
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

import lance_ray

DIMENSIONS = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Take files in, cut them into paragraphs, embed those, and answer one question."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="lance-ray-") as scratch:
        folder = Path(args.output or scratch).expanduser().resolve()
        files, paragraphs = str(folder / "files.lance"), str(folder / "paragraphs.lance")

        # The bytes of each file, fetched on the workers, as a blob column. Any fsspec URL would do.
        paths = sorted(path for path in args.input.rglob("*") if path.suffix in (".py", ".md", ".txt", ".rst"))
        urls = ray.data.from_items([{"path": str(path)} for path in paths[: args.limit]])
        report = lance_ray.write_lance(lance_ray.ingest_blobs(urls, "path", into="content"), files, mode="overwrite")
        print(f"files       {report.rows:>6,}")

        # Read as bytes again, some 32 MiB at a time, cut and embedded. The model is made once for each worker.
        cut = lance_ray.read_lance(files).flat_map(paragraphs_of)
        embedded = cut.map_batches(Embedder, fn_constructor_args=[DIMENSIONS], batch_format="pyarrow", concurrency=1)
        report = lance_ray.write_lance(embedded, paragraphs, mode="overwrite")
        print(f"paragraphs  {report.rows:>6,}")

        answer(args.question, files, paragraphs)


def answer(question: str, files: str, paragraphs: str) -> None:
    """The nearest paragraphs; of each file only those bytes are read, through a lazy handle."""
    nearest = {"column": "vector", "q": embed(question, DIMENSIONS), "k": 3, "metric": "cosine"}
    found = lance_ray.vector_search(paragraphs, nearest=nearest, columns=["path", "start", "length"]).to_pylist()
    rows = lance_ray.take(files, keys=[row["path"] for row in found], on="path", columns=["path", "_rowid"]).to_pylist()
    handles = lance_ray.open_blobs(files, "content", row_ids=[row["_rowid"] for row in rows])
    print(f"\n{question}")
    for row, handle in zip(found, handles, strict=True):
        assert handle is not None  # noqa: S101 - no file was null
        text = handle.read_range(row["start"], row["length"]).decode("utf-8", errors="replace")
        print(f"  {row['_distance']:.2f}  {Path(row['path']).name}: {' '.join(text.split())[:70]}")


def paragraphs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The paragraphs of a file: where each begins, in bytes, and its text."""
    content: bytes = row["content"]
    found = []
    start = 0
    for part in content.split(b"\n\n"):
        if part.strip():
            text = part.decode("utf-8", errors="replace")
            found.append({"path": row["path"], "start": start, "length": len(part), "text": text})
        start += len(part) + 2
    return found


class Embedder:
    """Stands for a model: hashes words into buckets. A real one would load its weights in ``__init__``."""

    def __init__(self, dimensions: int) -> None:
        """Load the model."""
        self.dimensions = dimensions

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with a ``vector`` for each text."""
        vectors = np.concatenate([embed(text, self.dimensions) for text in batch["text"].to_pylist()])
        return batch.append_column("vector", pa.FixedSizeListArray.from_arrays(vectors, self.dimensions))


def embed(text: str, dimensions: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Words counted in ``dimensions`` buckets, scaled to length one."""
    buckets = [zlib.crc32(word.encode()) % dimensions for word in text.lower().split()]
    counts = np.bincount(buckets, minlength=dimensions).astype(np.float32)
    return counts / np.float32(np.linalg.norm(counts) or 1.0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    stdlib = Path(sysconfig.get_path("stdlib")) / "json"
    parser.add_argument("--input", type=Path, default=stdlib, metavar="DIR", help="a folder of .py, .md, .txt, .rst")
    parser.add_argument("--output", metavar="DIR", help="keep the tables in this folder")
    parser.add_argument("--question", default="raise an error if the document is not valid JSON", metavar="TEXT")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="at most so many files")
    args = parser.parse_args(argv)
    if not args.input.is_dir():
        parser.error(f"--input {args.input}: no such folder")
    return args


if __name__ == "__main__":
    main()
