"""Captured layers on a GPU against the same layers run eagerly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recorded_encoders import MICRO_BATCHES, assert_equal, graphs_of, make_encoder, make_sink, plain_step, step
from torch import Tensor

from fastmtl.cuda_graphs.install import record_encoder
from fastmtl.cuda_graphs.options import unsupported_reason
from fastmtl.cuda_graphs.recorder import CudaRecorder, Unrecorded
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.bert import PackedBert

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MakeBatch = Callable[..., PackedBatch]


def encoders() -> list[PackedBert]:
    """Return a captured encoder and an eager one."""
    found = [make_encoder(dtype=torch.bfloat16).to("cuda") for _ in range(2)]
    for encoder, recorder in zip(found, (None, Unrecorded()), strict=True):
        record_encoder(encoder, recorder)
    return found


def check_captured(encoder: PackedBert) -> None:
    assert graphs_of(encoder).recordings.warned == []
    assert isinstance(graphs_of(encoder).recordings.recorder, CudaRecorder)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_graphs_equal_the_eager_layers_bit_for_bit(kept: torch.dtype, make_batch: MakeBatch) -> None:
    """Compare J, the words' rows and hidden states, on batches of several buckets."""
    both = encoders()
    reason = unsupported_reason(torch.empty(0, dtype=torch.bfloat16, device="cuda"), 16, grouped=True)
    if reason:
        pytest.skip(reason)
    sinks = [make_sink(encoder, 3, kept) for encoder in both]
    batches = [make_batch(lengths, seed=k).to("cuda") for k, lengths in enumerate(MICRO_BATCHES[3])]
    for seed in range(6):
        found: list[list[Tensor]] = []
        for encoder, sink in zip(both, sinks, strict=True):
            found.append(step(encoder, sink, [batches[seed % 4], batches[(seed + 1) % 4]][: 1 + seed % 2], seed))
        assert_equal(*found)
        assert all(bool(tensor.isfinite().all()) for tensor in found[0])
    check_captured(both[0])


def test_a_sum_of_gradients_too(make_batch: MakeBatch) -> None:
    both = encoders()
    for seed, lengths in enumerate([*MICRO_BATCHES[3], MICRO_BATCHES[3][0]]):
        batch = make_batch(lengths, seed=seed).to("cuda")
        found = []
        for encoder in both:
            hidden, *_ = plain_step(encoder, batch, seed, accumulate=1)
            found.append([hidden, *(p.grad.clone() for p in encoder.encoder.parameters() if p.grad is not None)])
        assert_equal(*found)
        assert len(found[0]) == 1 + len(list(both[0].encoder.parameters()))
    check_captured(both[0])
