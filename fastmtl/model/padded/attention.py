"""Attention within padded texts, and a layer of BERT on them.

B texts, L tokens of the longest one. `inside` is bool [B, L], False for padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.model.encoder.bert_layer import Layer, Output, SelfAttention


def attend(qkv: Tensor, num_heads: int, inside: Tensor) -> Tensor:
    """Return multi-head attention within each text, [B, L, s]; no token attends to padding.

    qkv [B, L, 3 s]: queries, keys and values side by side.
    """
    query, key, value = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=inside[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


class PaddedLayer(nn.Module):
    """A layer of fastmtl on padded hidden states [B, L, d], with the weights of `layer`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, inside: Tensor) -> Tensor:
        own, intermediate = self.layer.attention.self, self.layer.intermediate
        assert isinstance(own, SelfAttention)
        parts = [functional.linear(hidden, part.weight, part.bias) for part in (own.query, own.key, own.value)]
        mixed = attend(torch.cat(parts, dim=2), own.num_heads, inside)
        attended = _output(self.layer.attention.output, mixed, hidden)
        before = functional.linear(attended, intermediate.dense.weight, intermediate.dense.bias)
        return _output(self.layer.output, intermediate.activation(before), attended)


def _output(output: Output, x: Tensor, residual: Tensor) -> Tensor:
    dense, norm = output.dense, output.LayerNorm
    summed = residual + functional.linear(x, dense.weight, dense.bias)
    return functional.layer_norm(summed, norm.weight.shape, norm.weight, norm.bias, norm.eps)
