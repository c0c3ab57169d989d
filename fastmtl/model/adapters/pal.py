"""Projected attention layers (Stickland & Murray 2019): TS(h) = V_D MHA(V_E h).

Every task has its own weights. All layers of a task share V_E [d_s, d_m] and V_D [d_m, d_s]. Each
layer has its own matrices [d_s, d_s] for queries, keys and values. There is no output projection
and no bias. The setting `activation` is applied after V_D, as in the authors' code.

With the setting `projections` p > 1, V_E and V_D are products of p linear maps, as in
pals-and-mnrl, which does not give the inner sizes. Here these are d_s: V_E maps
d_m -> d_s -> ... -> d_s, and V_D maps back.
Parameters for T tasks and L layers: T (2 d_m d_s + 2 (p - 1) d_s^2 + L 3 d_s^2).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.adapters.adapter import Adapter
from fastmtl.model.adapters.per_task import PerLayer, PerTaskLinear
from fastmtl.model.encoder.context import ADAPTER, ForwardContext
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import Owner, within
from fastmtl_kernels import pal


class Pal(Adapter):
    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__(config, encoder, task_names)
        if config.size % config.heads:
            raise UserError(f"adapter.size: {config.size} is not a multiple of adapter.heads: {config.heads}")
        num_tasks, outer, size = len(task_names), encoder.hidden_size, config.size
        self.num_heads, self.activation = config.heads, config.activation
        self.attention_dropout = encoder.attention_probs_dropout_prob
        self.encode = PerTaskLinear(num_tasks, outer, size)
        self.encode_inner = PerLayer(range(config.projections - 1), num_tasks, size, size)
        self.attention = nn.ModuleDict({str(layer): PalAttention(num_tasks, size) for layer in self.layers})
        self.decode_inner = PerLayer(range(config.projections - 1), num_tasks, size, size)
        self.decode = PerTaskLinear(num_tasks, size, outer)
        self.initialise(config.init, encoder.initializer_range, last=[self.decode.weight])
        if config.init == "no_influence":  # at first V_D's input is an average of rows V_E h
            for module in (self.attention, self.encode_inner, self.decode_inner):
                for parameter in module.parameters():
                    parameter.data.copy_(torch.eye(size))

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        attention = cast(PalAttention, self.attention[str(layer)])

        def call(x: Tensor) -> Tensor:
            # No activation comes between the p maps, so they are multiplied to one map. This costs
            # about as much as mapping T d_m rows.
            down, up = self.encode.weight.mT, self.decode.weight.mT
            for inner in self.encode_inner.all():
                down = down @ inner.weight.mT
            for inner in reversed(self.decode_inner.all()):
                up = inner.weight.mT @ up
            return pal(
                x,
                down,
                attention.weight.flatten(1, 2).mT,
                up,
                context.cu_seqlens,
                context.segments,
                num_heads=self.num_heads,
                activation=self.activation,
                dropout_p=self.attention_dropout if self.training else 0.0,
                out_dropout_p=self.rates,
                seed=context.seed(ADAPTER),
                plan=context.plan,
            )

        owners = (self.encode, *self.encode_inner.all(), attention, *self.decode_inner.all(), self.decode)
        return within(owners, hidden, call)


class PalAttention(Owner):
    """Weights of the queries, keys and values of one layer, [T, 3, d_s, d_s]."""

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, 3, size, size))
