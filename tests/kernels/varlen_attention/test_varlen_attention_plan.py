"""The plan of varlen_attention: the rows that each program of the Triton kernels processes."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), max_size=30), tail=st.integers(0, 150))
def test_a_plan_has_every_row_once(lengths: list[int], tail: int) -> None:
    offsets = [0, *accumulate(lengths)]
    num_rows = offsets[-1] + tail
    plan = AttentionPlan.make(offsets, num_rows)
    start_of = {row: start for start, stop in pairwise(offsets) for row in range(start, stop)}
    seen = []
    for rows, starts in zip(plan.tile_rows.tolist(), plan.tile_starts.tolist(), strict=True):
        for slot, (row, start) in enumerate(zip(rows, starts, strict=True)):
            assert start == start_of.get(row, -1)
            # A sequence is contiguous; its groups of four keys begin at a multiple of four slots.
            assert start < 0 or rows[slot - (row - start)] == start and (slot - (row - start)) % 4 == 0
        seen += [row for row in rows if row >= 0]
    for start, stop, first in plan.blocks.tolist():
        assert start_of[first] == start and stop - start > TILE and (first - start) % TILE == 0
        assert start == offsets[offsets.index(start) + offsets.count(start) - 1]
        seen += range(first, min(first + TILE, stop))
    assert sorted(seen) == list(range(num_rows))
    wider = AttentionPlan.make(offsets, num_rows + 100)
    grown = plan.with_rows(num_rows + 100)
    assert torch.equal(grown.numbers, wider.numbers)
    assert (grown.num_tiles, grown.num_rows) == (wider.num_tiles, wider.num_rows)


def test_a_plan_wastes_little() -> None:
    """A batch of real sentences leaves at most an eighth of the slots empty, most by rounding."""
    lengths = torch.randint(5, 50, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = AttentionPlan.make([0, *accumulate(lengths)], sum(lengths))
    assert plan.tile_rows.numel() * 7 / 8 <= sum(lengths)
