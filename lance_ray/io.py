"""The functions of lance-ray's module of this name: code that imports them from there goes on working."""

from lance_ray.column_merge import add_columns_from, merge_columns_from, update_columns_from
from lance_ray.columns import add_columns, update_columns
from lance_ray.datasource import read_lance
from lance_ray.writing import write_lance

__all__ = [
    "add_columns",
    "add_columns_from",
    "merge_columns_from",
    "read_lance",
    "update_columns",
    "update_columns_from",
    "write_lance",
]
