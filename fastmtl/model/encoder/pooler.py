"""The pooler of BERT: a linear layer and tanh on the hidden state of a text's first token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.context import SegmentContext
from fastmtl.model.encoder.layers import TaskLinear
from fastmtl.surgery.segments import Segments

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class Pooler(nn.Module):
    """tanh(W x + b) of each sequence's first hidden state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = TaskLinear(hidden_size, hidden_size)

    def forward(self, first: Tensor, batch: PackedBatch, task_grads: Sink | None) -> Tensor:
        """Map the first hidden state of each of the B sequences, [B, d], to [B, d].

        A row is a sequence, so task t has the rows seq_offsets[t]:seq_offsets[t + 1].
        """
        sequences = Segments(batch.seq_offsets, batch.host.seq_offsets)
        return self.dense(first, SegmentContext(sequences, task_grads)).tanh()


class UnusedPooler(nn.Module):
    """Pooler weights that no head uses, kept to be saved with the encoder.

    They are buffers and not parameters, so that the optimiser does not see them.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Module()
        self.dense.register_buffer("weight", torch.empty(hidden_size, hidden_size))
        self.dense.register_buffer("bias", torch.empty(hidden_size))
