"""PAL-LoRA: TS(h) = (h W_hr + b_1) W_rh + b_2, with rank r = `size`.

Every task has its own W_hr [d_m, r], W_rh [r, d_m], b_1 and b_2 in each layer. Parameters for T
tasks and L layers: T L 2 d_m r in weights, T L (r + d_m) in biases.
"""

from __future__ import annotations

from torch import Tensor

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.adapters.adapter import Adapter
from fastmtl.model.adapters.per_task import PerLayer
from fastmtl.model.encoder.context import ADAPTER, ForwardContext
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl_kernels import lora


class Lora(Adapter):
    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__(config, encoder, task_names)
        if config.activation != "identity":
            raise UserError(f"adapter.activation: {config.activation}: lora has no activation, low_rank has")
        num_tasks, outer, rank = len(task_names), encoder.hidden_size, config.size
        self.encode = PerLayer(self.layers, num_tasks, outer, rank, bias=True)
        self.decode = PerLayer(self.layers, num_tasks, rank, outer, bias=True)
        self.initialise(config.init, encoder.initializer_range, last=list(self.decode.parameters()))

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        encode, decode = self.encode.at(layer), self.decode.at(layer)

        def call(x: Tensor) -> Tensor:
            assert encode.bias is not None and decode.bias is not None
            return lora(
                x,
                encode.weight.mT,
                decode.weight.mT,
                context.segments,
                encode.bias,
                decode.bias,
                dropout_p=self.rates,
                seed=context.seed(ADAPTER),
            )

        return within((encode, decode), hidden, call)
