"""Low-rank layers (Stickland & Murray 2019): TS(h) = V_D g(V_E h).

Every task has its own V_E [d_s, d_m] and V_D [d_m, d_s] in each layer; there is no bias. g is the
setting `activation`. Parameters for T tasks and L layers: T L 2 d_m d_s.
"""

from __future__ import annotations

from torch import Tensor

from fastmtl.config import AdapterConfig
from fastmtl.model.adapters.adapter import Adapter
from fastmtl.model.adapters.per_task import PerLayer
from fastmtl.model.encoder.context import ADAPTER, ForwardContext
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl_kernels import low_rank


class LowRank(Adapter):
    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__(config, encoder, task_names)
        num_tasks, outer, inner = len(task_names), encoder.hidden_size, config.size
        self.encode = PerLayer(self.layers, num_tasks, outer, inner)
        self.decode = PerLayer(self.layers, num_tasks, inner, outer)
        self.activation = config.activation
        self.initialise(config.init, encoder.initializer_range, last=list(self.decode.parameters()))

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        encode, decode = self.encode.at(layer), self.decode.at(layer)

        def call(x: Tensor) -> Tensor:
            return low_rank(
                x,
                encode.weight.mT,
                decode.weight.mT,
                context.segments,
                activation=self.activation,
                dropout_p=self.rates,
                seed=context.seed(ADAPTER),
            )

        return within((encode, decode), hidden, call)
