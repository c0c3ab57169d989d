"""Small encoders with recorded layers, and one step of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BertConfig

from fastmtl.cuda_graphs.encoder import EncoderGraphs
from fastmtl.cuda_graphs.install import record_encoder
from fastmtl.cuda_graphs.recorder import Recorder
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.surgery.sinks.stack import StackSink

# Micro-batches, as tokens of each sequence of each task: absent tasks, one token, more than one
# bucket of rows.
MICRO_BATCHES = {
    1: [[[5, 1, 17]], [[30] * 9], [[2]]],
    2: [[[5, 1], [17, 9]], [[], [30] * 9], [[3], []]],
    3: [[[5, 1], [17], [9, 9]], [[], [30] * 3, [12]], [[7, 130], [], [8]], [[30] * 8, [1], [40]]],
    4: [[[5], [1], [17, 2], [9]], [[], [30], [], [12]], [[4] * 9, [3], [8], [150]]],
}


def make_encoder(
    recorder: Recorder | None = None, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32
) -> PackedBert:
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=160,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(3)
    encoder = PackedBert(config).to(dtype)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)  # type: ignore[misc]
    if recorder is not None:
        record_encoder(encoder, recorder)
    return encoder


def graphs_of(encoder: PackedBert) -> EncoderGraphs:
    assert isinstance(encoder.recorded, EncoderGraphs)
    return encoder.recorded


def make_sink(encoder: PackedBert, num_tasks: int, dtype: torch.dtype = torch.float32) -> StackSink:
    words = encoder.embeddings.word_embeddings.weight
    return StackSink(list(encoder.parameters()), num_tasks, sparse=[words], dtype=dtype)


def step(encoder: PackedBert, sink: StackSink, batches: Sequence[PackedBatch], seed: int) -> list[Tensor]:
    """Return the hidden states of each micro-batch, then J and the words' rows."""
    sink.clear()
    torch.manual_seed(seed)
    found = []
    for batch in batches:
        with sink.armed(encoder.embeddings.word_embeddings.weight.device):
            hidden = encoder(batch, task_grads=sink)
            dy = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(hidden)
            torch.autograd.grad(hidden, [sink.anchor], dy)
        found.append(hidden.detach())
    sink.gramian()
    return [*found, *(tensor.clone() for tensor in sink.tensors())]


def plain_step(encoder: PackedBert, batch: PackedBatch, seed: int, accumulate: int = 2) -> list[Tensor]:
    """Return the hidden states, then `.grad` of all parameters."""
    encoder.zero_grad()
    torch.manual_seed(seed)
    found = []
    for _ in range(accumulate):
        hidden = encoder(batch)
        hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(hidden))
        found.append(hidden.detach())
    return [*found, *(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare within the rounding of sums in another order, float32."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if one.numel():
            assert (one - other).abs().max() <= 2e-6 * max(1.0, float(other.abs().max()))
