"""Modules that compute the vectors u and v, inputs of a head: a projection and an RNN or LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastmtl.config import HeadConfig


class Projection(nn.Module):
    """Linear map of pooled sequences x [B, d] to [B, head.projection]: W dropout(x) + b."""

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        assert config.projection is not None
        self.dropout = nn.Dropout(config.projection_dropout)
        self.dense = nn.Linear(hidden_size, config.projection)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.dense(self.dropout(pooled))


class Recurrent(nn.Module):
    """RNN or LSTM over the hidden states of each sequence; the result is its last state.

    With `head.cls` the network skips the first token, [CLS], whose hidden state is instead appended
    to the last state. In a sequence of one token the network reads that token.
    """

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        kind = {"rnn": _Rnn, "lstm": _Lstm}[config.name]
        self.cls = config.cls
        self.network = kind(hidden_size, config.size)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Return one vector per sequence: [B, size], or [B, size + d] with `head.cls`.

        tokens [n, d]: hidden states of the B sequences, one after another. lengths: B token counts.
        """
        # Without sequences the network still runs, on one row of zeros whose result is dropped:
        # under ZeRO 3 every rank has to run its forward and backward.
        sequences = tokens.split(lengths) if lengths else [tokens.sum(0, keepdim=True)]
        read = [sequence[1:] if self.cls and len(sequence) > 1 else sequence for sequence in sequences]
        _, state = self.network(pack_sequence(read, enforce_sorted=False))
        last = (state[0] if isinstance(state, tuple) else state)[0]
        if self.cls:
            last = torch.cat([last, torch.stack([sequence[0] for sequence in sequences])], dim=1)
        return last[: len(lengths)]


class _Together(torch.autograd.Function):
    """Identity of all weights in one operation, so that their gradients arrive together."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _InOrder(nn.RNNBase):
    """Recurrent network whose weights get their gradients in the same order for every batch.

    ZeRO 2 sums the gradients that arrive as the n-th on each rank, so all ranks need one order. In
    torch's loop over time steps on CPUs the order depends on the lengths of the sequences.
    """

    def forward(self, *inputs: Any) -> Any:
        weights = self._flat_weights
        self._flat_weights = list(_Together.apply(*weights))
        try:
            return super().forward(*inputs)
        finally:
            self._flat_weights = weights


class _Rnn(_InOrder, nn.RNN):
    pass


class _Lstm(_InOrder, nn.LSTM):
    pass
