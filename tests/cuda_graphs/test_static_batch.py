from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmtl.cuda_graphs.buffers.batch import ROWS, Bucket, StaticBatch, rows_of
from fastmtl.data.packed_batch import HostOffsets
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

TASKS = 3
batches = st.lists(st.lists(st.integers(1, 300), max_size=12), min_size=TASKS, max_size=TASKS).filter(any)


def described(lengths: list[list[int]]) -> HostOffsets:
    ends = [list(accumulate(task)) for task in lengths]
    tokens = (0, *accumulate(task[-1] if task else 0 for task in ends))
    cu_seqlens = (0, *accumulate(length for task in lengths for length in task))
    return HostOffsets(cu_seqlens, (0, *accumulate(map(len, lengths))), tokens)


@given(first=batches, second=batches)
def test_a_batch_fits_its_bucket_and_leaves_nothing_behind(first: list[list[int]], second: list[list[int]]) -> None:
    """Each row is in one slot or one block, whatever the buffers contained before."""
    hosts = [described(lengths) for lengths in (first, second)]
    buckets = []
    for host in hosts:
        plan = AttentionPlan.make(host.cu_seqlens, rows_of(host.token_offsets[-1]))
        buckets.append(Bucket.of(host.token_offsets[-1], plan))
    largest = Bucket(*[max(getattr(b, size) for b in buckets) for size in ("rows", "tiles", "blocks")])
    largest = Bucket(largest.rows, largest.tiles + largest.rows // 64, largest.blocks)  # with room for the last of both
    assert all(largest.holds(bucket) for bucket in buckets)
    static = StaticBatch(largest, TASKS, torch.device("cpu"))
    addresses = static.segments.offsets.data_ptr(), static.cu_seqlens.data_ptr(), static.plan.blocks.data_ptr()
    for host, own in zip(hosts, buckets, strict=True):
        num_rows = host.token_offsets[-1]
        assert own.rows % ROWS == 0 and num_rows < own.rows <= num_rows + ROWS
        static.fill(host, AttentionPlan.make(host.cu_seqlens, largest.rows))
        assert tuple(static.segments.offsets.tolist()) == host.token_offsets
        assert static.cu_seqlens[: len(host.cu_seqlens)].tolist() == list(host.cu_seqlens)
        assert (static.cu_seqlens[len(host.cu_seqlens) :] == num_rows).all()
        covered = static.plan.tile_rows[static.plan.tile_rows >= 0].tolist()
        for _, stop, row in static.plan.blocks.tolist():
            covered += range(row, min(row + 64, stop))
        assert sorted(covered) == list(range(largest.rows))
    assert all(address % 16 == 0 for address in addresses)
    assert static.segments.host == (0,) * TASKS + (largest.rows,)
