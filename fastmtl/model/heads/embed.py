"""What a task's u and v are: its pooled sequences, a projection of these, or the state of a recurrent network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastmtl.config import HeadConfig


class Projection(nn.Module):
    """W dropout(x) + b, [B, d] -> [B, head.projection]."""

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        assert config.projection is not None
        self.dropout = nn.Dropout(config.projection_dropout)
        self.dense = nn.Linear(hidden_size, config.projection)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.dense(self.dropout(pooled))


class Recurrent(nn.Module):
    """The last state of an RNN or LSTM over the hidden states of each sequence's tokens.

    With `cls` the network reads all but the first token, [CLS], whose hidden state is put beside the last state. A
    sequence of one token is read as it is.
    """

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        kind = {"rnn": _Rnn, "lstm": _Lstm}[config.name]
        self.cls = config.cls
        self.network = kind(hidden_size, config.size)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """tokens [n, d], lengths of the B sequences that they are of -> [B, size] or, with `cls`, [B, size + d]."""
        # A network has no meaning without rows, but under ZeRO 3 every rank has to run it, forward and backward.
        sequences = tokens.split(lengths) if lengths else [tokens.sum(0, keepdim=True)]
        read = [sequence[1:] if self.cls and len(sequence) > 1 else sequence for sequence in sequences]
        _, state = self.network(pack_sequence(read, enforce_sorted=False))
        last = (state[0] if isinstance(state, tuple) else state)[0]
        if self.cls:
            last = torch.cat([last, torch.stack([sequence[0] for sequence in sequences])], dim=1)
        return last[: len(lengths)]


class _Together(torch.autograd.Function):
    """Hands weights on as they are, and their gradients back all at once."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _InOrder(nn.RNNBase):
    """Gradients of the weights arrive in the same order whatever the lengths of the sequences.

    torch's loop over time steps gives no such order on CPUs, and ZeRO 2 adds up over ranks what arrived as the n-th.
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
