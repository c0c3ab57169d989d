"""One task's adapter, top and LoRA on padded hidden states [B, L, d].

The formulas are those of fastmtl_kernels.task_maps.reference; the weights are copies of the task's
part of the stacked ones. `inside` is bool [B, L], False for padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.model.adapters.adapter import Adapter, Top
from fastmtl.model.adapters.lora import Lora as ParallelLora
from fastmtl.model.adapters.low_rank import LowRank
from fastmtl.model.adapters.pal import Pal, PalAttention
from fastmtl.model.adapters.per_task import PerTaskLinear
from fastmtl.model.adapters.top import LayerOnTop, PalOnTop
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.lora.lora import Lora
from fastmtl.model.padded.attention import PaddedLayer, attend
from fastmtl_kernels.task_maps.reference import activate


def task_term(adapter: Adapter, layer: int, task: int) -> nn.Module:
    """Return the module TS of a layer with the adapter: (h [B, L, d], inside) -> [B, L, d].

    task: number of the task. h: the layer's input.
    """
    match adapter:
        case Pal():
            return _Pal(adapter, layer, task)
        case LowRank():
            return _TwoMaps(adapter.encode.at(layer), adapter.decode.at(layer), task, adapter.activation)
        case ParallelLora():
            return _TwoMaps(adapter.encode.at(layer), adapter.decode.at(layer), task, "identity")
    raise NotImplementedError(f"there is no padded form of {type(adapter).__name__}")


def task_top(top: Top, task: int) -> nn.Module:
    """Return a task's top: (hidden [B, L, d], inside) -> [B, L, d]. task: number of the task."""
    match top:
        case LayerOnTop():
            return PaddedLayer(cast(Layer, top.tasks[task]))
        case PalOnTop():
            return _Added(task_term(top.pal, top.layer, task))
    raise NotImplementedError(f"there is no padded form of {type(top).__name__}")


class LoraTerm(nn.Module):
    """The term scale B A x of a linear layer.

    lora, name: the model's LoRA, and the layer's name in its `pairs`. task: the number of the task
    if each has its own LoRA, else None.
    """

    def __init__(self, lora: Lora, name: str, task: int | None) -> None:
        super().__init__()
        a, b = lora.matrices(name, task)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b * lora.config.scale)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.a), self.b)


class _Pal(nn.Module):
    def __init__(self, pal: Pal, layer: int, task: int) -> None:
        super().__init__()
        attention = cast(PalAttention, pal.attention[str(layer)])
        self.num_heads, self.activation = pal.num_heads, pal.activation
        self.encode = _maps([pal.encode, *pal.encode_inner.all()], task)
        self.qkv = _Map(attention.weight[task].flatten(0, 1), None)
        self.decode = _maps([*pal.decode_inner.all(), pal.decode], task)

    def forward(self, hidden: Tensor, inside: Tensor) -> Tensor:
        mixed = attend(self.qkv(self.encode(hidden)), self.num_heads, inside)
        return activate(self.decode(mixed), self.activation)


class _TwoMaps(nn.Module):
    def __init__(self, encode: PerTaskLinear, decode: PerTaskLinear, task: int, activation: str) -> None:
        super().__init__()
        self.encode, self.decode = _maps([encode], task), _maps([decode], task)
        self.activation = activation

    def forward(self, hidden: Tensor, inside: Tensor) -> Tensor:
        return self.decode(activate(self.encode(hidden), self.activation))


class _Added(nn.Module):
    def __init__(self, term: nn.Module) -> None:
        super().__init__()
        self.term = term

    def forward(self, hidden: Tensor, inside: Tensor) -> Tensor:
        return hidden + self.term(hidden, inside)


class _Map(nn.Module):
    """W x + b with copies of W [out, in] and b [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def _maps(linears: Iterable[PerTaskLinear], task: int) -> nn.Sequential:
    return nn.Sequential(*(_Map(one.weight[task], None if one.bias is None else one.bias[task]) for one in linears))
