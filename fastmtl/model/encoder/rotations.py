"""Tables of rotary positions, with the constants and the roundings of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotation_table(theta: float, head_dim: int, num_places: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cosines and sines, [2, num_places, head_dim // 2], for `varlen_attention`.

    They are computed in float32 and rounded to `dtype`, that of the hidden states. The result is
    float32, float64 for float64.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim))
    angles = torch.arange(num_places, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(dtype).to(torch.promote_types(dtype, torch.float32))


def rotate_rounded(qkv: Tensor, table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rotate queries and keys in float64 as transformers does, which rounds them to float32 first.

    qkv: [N, 3, heads, head_dim], float64. table: as `varlen_attention` takes it. The gradients are
    rounded at the same places. With narrower numbers nothing is rounded: the kernels rotate them.
    """
    rows = torch.arange(len(qkv), device=qkv.device)
    last = torch.searchsorted(cu_seqlens[1:-1].long(), rows, right=True)
    places = rows - cu_seqlens[last]
    cos, sin = (part.index_select(0, places).repeat(1, 2)[:, None, None] for part in table)
    both, values = qkv[:, :2], qkv[:, 2:]
    first, second = both.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([_Rounded.apply(both) * cos + _Rounded.apply(turned) * sin, values], 1)


class _Rounded(torch.autograd.Function):
    """Round to float32 in forward and backward, and return to float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.float().double()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.float().double()
