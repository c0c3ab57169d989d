"""Projected attention layers (Stickland & Murray 2019): TS(h) = V_D MHA(V_E h).

V_E [d_s, d_m] and V_D [d_m, d_s] are shared by all layers of a task; queries, keys and values [d_s, d_s] are each
layer's own; there is no output projection and no bias. Weights: T (2 d_m d_s + L 3 d_s^2). `activation` comes after
V_D, as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.adapters.adapter import ACTIVATIONS, Adapter
from fastmtl.model.adapters.per_task import PerTaskLinear, per_task_linear
from fastmtl.model.context import ADAPTER, ForwardContext, place


class Pal(Adapter):
    def __init__(self, config: AdapterConfig, bert: BertConfig, task_names: list[str]) -> None:
        super().__init__(config, bert, task_names)
        if config.size % config.heads:
            raise UserError(f"adapter.size: {config.size} is not a multiple of adapter.heads: {config.heads}")
        num_tasks, dropout = len(task_names), bert.attention_probs_dropout_prob
        self.encode = PerTaskLinear(num_tasks, bert.hidden_size, config.size)
        self.attention = nn.ModuleDict(
            {
                str(layer): PalAttention(num_tasks, config.size, config.heads, dropout, place(layer, ADAPTER))
                for layer in self.layers
            }
        )
        self.decode = PerTaskLinear(num_tasks, config.size, bert.hidden_size)
        self.activation = ACTIVATIONS[config.activation]()
        self.initialise(config.init, bert.initializer_range, last=[self.decode.weight])
        if config.init == "no_influence":  # V_D then begins with averages of V_E h
            identity = torch.eye(config.size).expand(num_tasks, 3, -1, -1)
            for parameter in self.attention.parameters():
                parameter.data.copy_(identity)

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        attended = self.attention[str(layer)](self.encode(hidden, context), context)
        return self.activation(self.decode(attended, context))


class PalAttention(nn.Module):
    """weight [T, 3, d_s, d_s]: queries, keys, values. Dropout on the probabilities as in the encoder."""

    def __init__(self, num_tasks: int, size: int, num_heads: int, dropout: float, at: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.at = at
        self.dropout = dropout
        self.weight = nn.Parameter(torch.zeros(num_tasks, 3, size, size))

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[N, d_s] -> [N, d_s]."""
        projected = per_task_linear(x, self.weight.flatten(1, 2), None, context.segments)
        dropout = self.dropout if self.training else 0.0
        return context.attend(projected.unflatten(1, (3, -1)), self.num_heads, dropout, self.at)
