"""Base classes of adapters and tops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.settings import EncoderSettings


class Top(nn.Module):
    """Task-specific layers after the encoder's last one; a subclass defines `forward`.

    num_layers: number of layers for which it uses dropout seeds (see context.py). Their numbers
    follow those of the encoder's layers.
    """

    num_layers: int

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map the hidden states [N, d_m] of the encoder's last layer to [N, d_m]."""
        raise NotImplementedError


class Adapter(nn.Module):
    """Task-specific function TS_t of Stickland & Murray (2019), which is added in the layers.

    The output of a layer with input h becomes LN(h' + FFN(h') + TS_t(h)), where h' is the result of
    its attention part. There are T tasks; d_m is the encoder's hidden size, d_s = config.size.
    A subclass creates its parameters, stacked over the tasks, [T, ...], calls `initialise` and
    defines `task_specific`.
    Attributes top: task-specific layers after the encoder's last one, or None.
    layers: numbers of the layers that have the adapter. dropout: rates of TS, one per task.
    """

    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__()
        self.top: Top | None = None
        self.layers = _layers(config, encoder.num_hidden_layers)
        self.dropout = _dropout(config, task_names)

    def task_specific(self, layer: int, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Return TS(h) [N, d_m] of a layer with the adapter, after dropout with `rates`."""
        raise NotImplementedError

    @property
    def rates(self) -> list[float]:
        """Dropout rates of TS(h), one per task; 0 outside training."""
        return self.dropout if self.training else [0.0] * len(self.dropout)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        """Return TS(h) [N, d_m] of the layer `context.layer`, or None if it has no adapter.

        hidden: the layer's input h [N, d_m].
        """
        layer = context.layer
        return self.task_specific(layer, hidden, context) if layer in self.layers else None

    def initialise(self, scheme: str, std: float, last: list[nn.Parameter]) -> None:
        """Initialise the weights [T, ..., out, in]; biases stay zero.

        scheme "default": normal with standard deviation `std`. "xavier": Xavier uniform.
        "no_influence": as default, but `last`, the parameters of the last linear map of TS, are
        zero. TS is then exactly 0 at first, while the gradient of `last` is not.
        """
        with torch.no_grad():
            for parameter in self.parameters():
                for matrix in parameter.flatten(0, -3) if parameter.ndim > 2 else ():
                    fill(matrix, scheme, std)
            if scheme == "no_influence":
                for parameter in last:
                    parameter.zero_()


class NoAdapter(Adapter):
    """Adapter that changes no layer of the encoder, for a recipe that has only a top."""

    def __init__(self, config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> None:
        super().__init__(config, encoder, task_names)
        self.layers = []


def fill(matrix: Tensor, scheme: str, std: float) -> None:
    """Fill one weight matrix [out, in] by a scheme that `Adapter.initialise` describes."""
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
