"""Modules that compute u and v: a projection of the pooled sequences, recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastmtl.config import HeadConfig


class Projection(nn.Module):
    """W dropout(x) + b, from [B, d] to [B, head.projection]."""

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        assert config.projection is not None
        self.dropout = nn.Dropout(config.projection_dropout)
        self.dense = nn.Linear(hidden_size, config.projection)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.dense(self.dropout(pooled))


class Recurrent(nn.Module):
    """Last state of an RNN or LSTM over the hidden states of each sequence.

    With `cls` the network reads all tokens except the first one, [CLS], and [CLS]'s hidden state is
    appended to the last state. A sequence of one token is read unchanged.
    """

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        kind = {"rnn": _Rnn, "lstm": _Lstm}[config.name]
        self.cls = config.cls
        self.network = kind(hidden_size, config.size)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Map tokens [n, d] of B sequences to [B, size], or with `cls` to [B, size + d]."""
        # Without rows the network computes nothing of use, but under ZeRO 3 every rank has to run
        # its forward and backward.
        sequences = tokens.split(lengths) if lengths else [tokens.sum(0, keepdim=True)]
        read = [sequence[1:] if self.cls and len(sequence) > 1 else sequence for sequence in sequences]
        _, state = self.network(pack_sequence(read, enforce_sorted=False))
        last = (state[0] if isinstance(state, tuple) else state)[0]
        if self.cls:
            last = torch.cat([last, torch.stack([sequence[0] for sequence in sequences])], dim=1)
        return last[: len(lengths)]


class _Together(torch.autograd.Function):
    """Pass weights through unchanged, and all their gradients back in one call."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _InOrder(nn.RNNBase):
    """Recurrent network whose weights get their gradients in an order without regard to lengths.

    torch's loop over time steps gives no fixed order on CPUs, and ZeRO 2 sums over the ranks the
    gradients that arrive as the n-th.
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
