"""The function of lance-ray's module of this name: code that imports it from there goes on working."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lance_ray.arrow import align, to_arrow

__all__ = ["pd_to_arrow"]


def pd_to_arrow(df: Any, schema: pa.Schema | None) -> pa.Table:
    """A frame, dict of columns or Arrow table as an Arrow table, its columns matched to a schema by name.

    Args:
        df: the rows.
        schema: what they shall have; None keeps the types that they have.

    Raises:
        SchemaMismatchError: they do not fit; names the columns.
    """
    table = to_arrow(df)
    return table if schema is None else align(table, schema)
