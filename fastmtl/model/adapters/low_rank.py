"""Low-rank layers (Stickland & Murray 2019): TS(h) = V_D g(V_E h).

V_E [d_s, d_m] and V_D [d_m, d_s] are each layer's own; there is no bias. g is `activation`. Weights: T L 2 d_m d_s.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig

from fastmtl.config import AdapterConfig
from fastmtl.model.adapters.adapter import ACTIVATIONS, Adapter
from fastmtl.model.adapters.per_task import PerTaskLinear
from fastmtl.model.context import ForwardContext


class LowRank(Adapter):
    def __init__(self, config: AdapterConfig, bert: BertConfig, task_names: list[str]) -> None:
        super().__init__(config, bert, task_names)
        num_tasks, outer, inner = len(task_names), bert.hidden_size, config.size
        self.encode = nn.ModuleDict({str(layer): PerTaskLinear(num_tasks, outer, inner) for layer in self.layers})
        self.decode = nn.ModuleDict({str(layer): PerTaskLinear(num_tasks, inner, outer) for layer in self.layers})
        self.activation = ACTIVATIONS[config.activation]()
        self.initialise(config.init, bert.initializer_range, last=list(self.decode.parameters()))

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        encoded = self.activation(self.encode[str(layer)](hidden, context))
        return self.decode[str(layer)](encoded, context)
