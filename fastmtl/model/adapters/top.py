"""Tops: a layer per task after the encoder (pals-and-mnrl; Stickland & Murray 2019, 3.3).

h is the output of the encoder's last layer. There are two tops:

layer: one BERT layer, LN_t(h' + FFN_t(h')) with h' = LN_t(h + MHA_t(h)), with the sizes and dropout
    of the encoder's layers. Weights: T (4 d_m^2 + 2 d_m d_ff), or T 12 d_m^2 if d_ff = 4 d_m.
pal: h + V_D MHA(V_E h), a projected attention layer (pal.py). Weights: T (2 d_m d_s + 3 d_s^2).

With `init: no_influence` the terms added to h and h' are exactly 0 at first. `pal` then returns h,
while `layer` still applies its two LayerNorms: LN(LN(h)).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.adapters.adapter import Top, fill
from fastmtl.model.adapters.pal import Pal
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.settings import EncoderSettings


class LayerOnTop(Top):
    """Top `layer`: a BERT layer for each task, in the module list `tasks`.

    Parameters have the names of transformers' BertLayer.
    """

    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__()
        self.num_layers, self.first = len(task_names), encoder.num_hidden_layers
        self.tasks = nn.ModuleList(Layer(encoder) for _ in task_names)
        for name, module in self.tasks.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if config.init == "no_influence" and name.endswith("output.dense"):  # of attention and feed-forward
                    nn.init.zeros_(module.weight)
                else:
                    fill(module.weight, config.init, encoder.initializer_range)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        offsets = context.segments.host
        rows = hidden.split([stop - start for start, stop in zip(offsets, offsets[1:], strict=False)])
        parts = [
            layer(part, None, context.of_task(task).at(self.first + task))
            for task, (layer, part) in enumerate(zip(self.tasks, rows, strict=True))
        ]
        return torch.cat(parts)


class PalOnTop(Top):
    """Top `pal`: a projected attention layer after the encoder's last layer."""

    num_layers = 1

    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__()
        size = config.top_size or config.size
        if size % config.heads:
            key = "size" if config.top_size is None else "top_size"
            raise UserError(f"adapter.{key}: {size} is not a multiple of adapter.heads: {config.heads}")
        self.layer = encoder.num_hidden_layers
        one_more = dataclasses.replace(encoder, num_hidden_layers=self.layer + 1)
        self.pal = Pal(config.model_copy(update={"size": size, "layers": [self.layer]}), one_more, task_names)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return hidden + self.pal.task_specific(self.layer, hidden, context.at(self.layer))


TOPS: dict[str, type[Top]] = {"layer": LayerOnTop, "pal": PalOnTop}
