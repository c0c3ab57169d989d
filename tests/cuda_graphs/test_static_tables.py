"""Rows of an embedding table in buffers of fixed sizes, compared with dense sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl.cuda_graphs.buffers.tables import STEP, StaticRows, capacity_of, spread, sums_by_id

V, D = 7, 3


def test_capacities_grow_by_steps() -> None:
    found = [capacity_of(number) for number in range(1, 20 * STEP)]
    assert found == sorted(found) and capacity_of(0) == STEP
    for number, capacity in enumerate(found, start=1):
        assert number <= capacity < 1.25 * number + STEP
    assert len(set(found)) <= 16


def _lists(sizes: list[list[int]], seed: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Make pieces of the given numbers of rows for each task."""
    random = torch.Generator().manual_seed(seed)
    return [
        [(torch.randint(V, (n,), generator=random), torch.randn(n, D, generator=random)) for n in pieces]
        for pieces in sizes
    ]


@pytest.mark.parametrize("capacity", [12, 16])
@pytest.mark.parametrize("sizes", [[[5]], [[4, 3], [], [5]], [[1], [2, 0, 6], [3]], [[], []], [[0], [1]]])
def test_sums_are_those_over_equal_ids(sizes: list[list[int]], capacity: int) -> None:
    static = StaticRows(capacity + 4, D, torch.device("cpu"))
    static.ids.fill_(3)
    static.rows.fill_(float("nan"))  # of an earlier step
    for seed in range(3):
        lists = _lists(sizes, seed)
        bounds = torch.tensor(static.fill(lists, capacity))
        sums, unique = sums_by_id(static.ids[:capacity], static.rows[:capacity], bounds, V)
        assert sums.shape == (len(sizes), capacity, D) and sums.dtype == torch.float32
        occurring = sorted({int(i) for task in lists for ids, _ in task for i in ids})
        assert unique.tolist() == occurring + [V] * (capacity - len(occurring))
        for task, found in zip(lists, sums, strict=True):
            expected = torch.zeros(V, D, dtype=torch.float64)
            for ids, rows in task:
                expected.index_add_(0, ids, rows.double())
            table = torch.full((V + 1, D), float("nan"))
            spread(found, unique, table)
            assert (table[:V] - expected).abs().max() <= 1e-6


def test_rows_of_16_bits_are_added_up_in_float32() -> None:
    static = StaticRows(1024, 1, torch.device("cpu"))
    rows = torch.ones(1000, 1, dtype=torch.bfloat16)  # a sum of 257 of them is 256 in bfloat16
    bounds = static.fill([[(torch.zeros(1000, dtype=torch.int64), rows)]], 1024)
    sums, _ = sums_by_id(static.ids, static.rows, torch.tensor(bounds), V)
    assert sums[0, 0].item() == 1000
