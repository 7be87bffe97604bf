"""Without a declared schema, later blocks may widen what earlier files were written with."""

from __future__ import annotations

from pathlib import Path

import lance
import pyarrow as pa
import pytest
import ray

from lance_ray import write_lance

pytestmark = pytest.mark.ray


def _data_files(uri: str) -> set[str]:
    return {path.name for path in Path(uri, "data").glob("*.lance")}


def test_files_of_narrower_types_are_written_again_and_the_old_ones_go(ray_session: object, tmp_path: Path) -> None:
    blocks = [
        pa.table({"id": [1, 2], "text": pa.array(["a", "b"]), "list": pa.array([[], []], pa.list_(pa.null()))}),
        pa.table({"id": [3], "text": pa.array(["c"], pa.large_string()), "list": pa.array([[7]])}),
        pa.table({"id": pa.nulls(2), "text": pa.nulls(2), "list": pa.nulls(2)}),
    ]
    uri = str(tmp_path / "table")

    report = write_lance(ray.data.from_arrow(blocks), uri, min_rows_per_file=1)

    table = lance.dataset(uri).to_table().sort_by([("id", "ascending")])
    assert table.schema.field("text").type == pa.large_string()
    assert table.to_pydict() == {
        "id": [1, 2, 3, None, None],
        "text": ["a", "b", "c", None, None],
        "list": [[], [], [7], None, None],
    }
    assert report.files == 3
    assert len(_data_files(uri)) == 3
    assert not Path(uri, "_lance_ray").exists()


def test_files_that_only_lack_a_column_are_not_written_again(ray_session: object, tmp_path: Path) -> None:
    blocks = [pa.table({"id": [1], "new": pa.nulls(1)}), pa.table({"new": ["x"], "id": [2]})]
    uri = str(tmp_path / "table")

    write_lance(ray.data.from_arrow(blocks), uri, min_rows_per_file=1)

    rows = sorted(lance.dataset(uri).to_table().to_pylist(), key=lambda row: row["id"])
    assert rows == [{"id": 1, "new": None}, {"id": 2, "new": "x"}]
    assert len(_data_files(uri)) == 2
