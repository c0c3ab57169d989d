"""Base classes of adapters and tops: layers, dropout rates, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.encoder.context import ForwardContext


class Top(nn.Module):
    """Layers of each task on top of the encoder; a subclass defines `forward`.

    num_layers: layers whose dropout places it uses, after those of the encoder (see context.py).
    """

    num_layers: int

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map the encoder's hidden states [N, d_m] to [N, d_m]."""
        raise NotImplementedError


class Adapter(nn.Module):
    """TS_t(h) of Stickland & Murray (2019), added in a layer: LN(h' + FFN(h') + TS_t(h)).

    A subclass creates its parameters, stacked over the tasks [T, ...], calls `initialise` and
    defines `task_specific`. T tasks; d_m is the encoder's hidden size, d_s = config.size.
    Attribute top: layers after the encoder's last one, or None.
    """

    def __init__(self, config: AdapterConfig, bert: BertConfig, task_names: list[str]) -> None:
        super().__init__()
        self.top: Top | None = None
        self.layers = _layers(config, bert.num_hidden_layers)
        self.dropout = _dropout(config, task_names)

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Return TS(h) [N, d_m] of one layer for hidden [N, d_m], after dropout with `rates`."""
        raise NotImplementedError

    @property
    def rates(self) -> list[float]:
        """Dropout rate of TS(h) for each task, 0 outside training."""
        return self.dropout if self.training else [0.0] * len(self.dropout)

    def forward(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        """Return TS(h) [N, d_m] for the input `hidden` [N, d_m] of a layer.

        None for a layer without an adapter.
        """
        return self.task_specific(layer, hidden, context) if layer in self.layers else None

    def initialise(self, scheme: str, std: float, last: list[nn.Parameter]) -> None:
        """Initialise the weights [T, ..., out, in]; biases stay zero.

        default: normal with the encoder's standard deviation. xavier: uniform, by the sizes of each
        matrix. no_influence: as default, but `last` (the maps that return TS) is zero. TS is then
        exactly 0 at first, while the gradient of `last` is not.
        """
        with torch.no_grad():
            for parameter in self.parameters():
                for matrix in parameter.flatten(0, -3) if parameter.ndim > 2 else ():
                    fill(matrix, scheme, std)
            if scheme == "no_influence":
                for parameter in last:
                    parameter.zero_()


class NoAdapter(Adapter):
    """Adapter without layers, for a recipe that has a top only."""

    def __init__(self, config: AdapterConfig, bert: BertConfig, task_names: list[str]) -> None:
        super().__init__(config, bert, task_names)
        self.layers = []


def fill(matrix: Tensor, scheme: str, std: float) -> None:
    """Fill one weight [out, in] as `Adapter.initialise` describes."""
    if scheme == "xavier":
        nn.init.xavier_uniform_(matrix)
    else:
        nn.init.normal_(matrix, std=std)


def _layers(config: AdapterConfig, num_layers: int) -> list[int]:
    layers = list(range(num_layers)) if config.layers is None else sorted(config.layers)
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise UserError(f"adapter.layers: no layer {wrong[0]}: the encoder's layers are 0 to {num_layers - 1}")
    if not layers or len(set(layers)) < len(layers):
        raise UserError(f"adapter.layers: {config.layers}: name at least one layer, and each once")
    return layers


def _dropout(config: AdapterConfig, task_names: list[str]) -> list[float]:
    if isinstance(config.dropout, dict):
        for name in config.dropout:
            if name not in task_names:
                raise UserError(f"adapter.dropout: no task '{name}'; the tasks are {', '.join(task_names)}")
    given = config.dropout
    rates = [given.get(name, 0.0) if isinstance(given, dict) else given for name in task_names]
    for rate in rates:
        if not 0 <= rate < 1:
            raise UserError(f"adapter.dropout: {rate} is not a rate in [0, 1)")
    return rates
