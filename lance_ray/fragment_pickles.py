"""Rows that tell of files by pickles alone, as lance-ray's writer makes them: read without running what they name.

A pickle is a program that calls whatever it names. The reader here knows the two classes of a fragment's metadata and
the constructors of Arrow schemas and types, which make values and do nothing else; any other name is refused before it
is looked up. So a forged row can say no more than one in JSON can.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from lance.blob import BlobType
from lance.fragment import FragmentMetadata

from lance_ray.errors import InvalidArgumentError
from lance_ray.write import WrittenFile

COLUMNS = ("fragment", "schema")

_CLASSES = ("FragmentMetadata", "DataFile")  # a new file has no deletions, and no row ids of its own
_CONSTRUCTORS = (
    *("schema", "field", "type_for_alias", "timestamp", "binary", "dictionary", "struct", "map_", "run_end_encoded"),
    *("list_", "large_list", "list_view", "large_list_view", "decimal32", "decimal64", "decimal128", "decimal256"),
    *("bool8", "uuid", "json_", "fixed_shape_tensor", "opaque"),
)
_ALLOWED = frozenset(
    {("lance.fragment", name) for name in _CLASSES}
    | {("pyarrow.lib", name) for name in _CONSTRUCTORS}
    | {("lance.blob", "BlobType")}
)
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    ImportError,
    *(AttributeError, IndexError, KeyError, TypeError, ValueError),
)
_WHY = "must be what lance-ray's LanceFragmentWriter returns: a pickled lance.FragmentMetadata and its pickled schema"


class _Reader(pickle.Unpickler):
    """Reads values of the allowed kinds."""

    def find_class(self, module: str, name: str) -> Any:
        """Runs for every name in the pickle."""
        if (module, name) == ("builtins", "getattr"):
            return _blob_type_of  # how a pickle names the method that makes the type of a blob column
        if (module, name) not in _ALLOWED:
            raise InvalidArgumentError("ds", f"{module}.{name}", f"is nothing that such a row may name; {_WHY}")
        return super().find_class(module, name)


def _blob_type_of(owner: Any, name: Any) -> Callable[..., Any]:
    if owner is not BlobType or name != "__arrow_ext_deserialize__":
        raise InvalidArgumentError("ds", f"{owner}.{name}", f"is nothing that such a row may name; {_WHY}")
    make: Callable[..., Any] = BlobType.__arrow_ext_deserialize__
    return make


def file_of_pickles(row: dict[str, Any]) -> WrittenFile:
    """The file that a row of :data:`COLUMNS` tells of.

    Raises:
        InvalidArgumentError: it is no such row, or names what it may not.
    """
    fragment, schema = _read(row["fragment"], FragmentMetadata), _read(row["schema"], pa.Schema)
    try:
        told = json.dumps(fragment.to_json())
        FragmentMetadata.from_json(told)
        size = sum(int(file.file_size_bytes or 0) for file in fragment.files)
        return WrittenFile(int(fragment.physical_rows), size, schema.serialize().to_pybytes(), told)
    except _MALFORMED as error:
        raise InvalidArgumentError("ds", "fragment", f"{_WHY} ({error})") from error


def _read(data: Any, kind: type) -> Any:
    try:
        found = _Reader(io.BytesIO(data)).load()
    except InvalidArgumentError:
        raise
    except _MALFORMED as error:
        raise InvalidArgumentError("ds", type(data).__name__, f"{_WHY} ({error})") from error
    if not isinstance(found, kind):
        raise InvalidArgumentError("ds", type(found).__name__, _WHY)
    return found
