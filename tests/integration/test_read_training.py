"""Reading for training: consumers side by side see every row once, and a seed determines the order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data import DataIterator
from ray.data.expressions import col

import lance_ray
from tests.tables import numbers, read_here, rows, source_of, tasks_of, write, write_many_fragments

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 rows with vectors in six fragments, 300 of them deleted."""
    uri = tmp_path_factory.mktemp("table") / "t"
    vectors = pa.FixedSizeListArray.from_arrays(np.arange(12_000, dtype=np.float32), 4)
    write(uri, numbers(3000).append_column("vector", vectors), fragments=6).delete("id % 10 = 0")
    return uri


WANTED = [item for item in range(3000) if item % 10]


def ids_of(consumer: DataIterator) -> list[int]:
    return [item for batch in consumer.iter_batches(batch_size=64) for item in batch["id"].tolist()]


@pytest.mark.slow
def test_two_consumers_see_every_row_once_in_every_epoch(table: Path) -> None:
    consumers = lance_ray.read_lance(table, override_num_blocks=6).streaming_split(2)

    with ThreadPoolExecutor(2) as threads:
        epochs = [list(threads.map(ids_of, consumers)) for _ in range(2)]

    for shares in epochs:
        assert sorted(item for share in shares for item in share) == WANTED


@pytest.mark.slow
def test_consumers_of_a_shuffled_filtered_and_narrowed_read_see_its_rows_once(table: Path) -> None:
    dataset = lance_ray.read_lance(table, shuffle=3, filter="id >= 100", override_num_blocks=6)
    consumers = dataset.filter(expr=col("id") < 1500).select_columns(["id"]).streaming_split(2)

    with ThreadPoolExecutor(2) as threads:
        shares = list(threads.map(ids_of, consumers))

    assert sorted(item for share in shares for item in share) == [item for item in WANTED if 100 <= item < 1500]


def test_torch_batches_hold_every_row_once(table: Path) -> None:
    torch = pytest.importorskip("torch")
    batches = list(lance_ray.read_lance(table, columns=["id", "x"]).iter_torch_batches(batch_size=128))

    assert sorted(torch.cat([batch["id"] for batch in batches]).tolist()) == WANTED


def test_batches_hold_the_vectors_of_their_rows(table: Path) -> None:
    batches = list(lance_ray.read_lance(table, columns=["id", "vector"]).iter_batches(batch_size=500))

    assert sorted(item for batch in batches for item in batch["id"].tolist()) == WANTED
    assert all((np.stack(list(batch["vector"]))[:, 3] == batch["id"] * 4 + 3).all() for batch in batches)


@pytest.mark.parametrize(
    "options",
    [{}, {"filter": "id > 100"}, {"limit": 2000, "offset": 10}, {"columns": ["id"]}, {"fragment_group_size": 1}],
    ids=str,
)
def test_a_seed_permutes_the_rows_the_same_way_each_time(options: dict[str, Any], table: Path) -> None:
    options = {"override_num_blocks": 5, **options}
    in_order, first, again, other = (
        read_here(table, **options, shuffle=seed)["id"].to_pylist() for seed in (None, 11, 11, 12)
    )

    assert sorted(first) == sorted(other) == in_order
    assert first == again
    assert len({tuple(order) for order in (in_order, first, other)}) == 3


def test_without_a_seed_each_read_has_an_order_of_its_own_and_keeps_it(table: Path) -> None:
    dataset = lance_ray.read_lance(table, columns=["id"], shuffle=True, override_num_blocks=5)

    first, again = (rows(dataset)["id"].to_pylist() for _ in range(2))
    other = read_here(table, shuffle=True, override_num_blocks=5)["id"].to_pylist()

    assert sorted(first) == WANTED
    assert first == again
    assert first != other
    assert read_here(table, shuffle=False, override_num_blocks=5)["id"].to_pylist() == WANTED


def test_rows_that_an_index_found_are_shuffled_too(tmp_path: Path) -> None:
    write(tmp_path / "t", numbers(1000), fragments=2).create_scalar_index("id", "BTREE")

    orders = [
        read_here(tmp_path / "t", filter="id < 500", shuffle=seed, override_num_blocks=4)["id"].to_pylist()
        for seed in (None, 1, 1, 2)
    ]

    assert orders[0] == sorted(orders[1]) == sorted(orders[3]) == list(range(500))
    assert orders[1] == orders[2]
    assert orders[0] != orders[1] != orders[3]


@pytest.mark.slow
def test_what_is_shipped_stays_small_for_many_fragments(tmp_path: Path) -> None:
    write_many_fragments(tmp_path / "t", numbers(200), 20_000)
    source = source_of(tmp_path / "t")
    tasks = tasks_of(source)

    assert len(tasks) > 1
    assert len(cloudpickle.dumps(source)) < 20_000
    assert max(len(cloudpickle.dumps(task)) for task in tasks) < 20_000
    assert len(cloudpickle.dumps(lance_ray.read_lance(tmp_path / "t"))) < 40_000
