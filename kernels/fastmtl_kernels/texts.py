"""Rows of packed texts as padded texts, and back.

Shapes: N rows, B texts, L the length of a padded text; bounds int64 [B + 1], text b is rows
bounds[b]:bounds[b + 1]. Each function is the backward of the other. Both copy rows and never sum,
so that equal inputs give equal bits on a GPU, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_texts(rows: Tensor, bounds: Tensor, length: int) -> Tensor:
    """Return rows [N, ...] as texts [B, L, ...], zeros in the padding. No text is longer than L."""
    texts: Tensor = _ToTexts.apply(rows, bounds, length)
    return texts


def to_rows(texts: Tensor, bounds: Tensor, num_rows: int) -> Tensor:
    """Return texts [B, L, ...] as rows [N, ...], zeros in the rows of no text; N = num_rows."""
    rows: Tensor = _ToRows.apply(texts, bounds, num_rows)
    return rows


class _ToTexts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(bounds)
        ctx.num_rows = len(x)
        rows = bounds[:-1, None] + torch.arange(length, device=x.device)
        padding = rows >= bounds[1:, None]
        if len(x) == 0:
            return x.new_zeros(*rows.shape, *x.shape[1:])
        texts = x.index_select(0, rows.clamp(max=len(x) - 1).flatten()).unflatten(0, rows.shape)
        return texts.masked_fill(padding.view(*padding.shape, *(1,) * (x.dim() - 1)), 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (bounds,) = ctx.saved_tensors
        return _ToRows.apply(dy, bounds, ctx.num_rows), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(bounds)
        ctx.length = x.shape[1]
        if x.shape[0] * x.shape[1] == 0:
            return x.new_zeros(num_rows, *x.shape[2:])
        row = torch.arange(num_rows, device=x.device)
        text = torch.searchsorted(bounds[1:].contiguous(), row, right=True).clamp(max=len(x) - 1)
        place = (row - bounds[text]).clamp(max=x.shape[1] - 1)
        outside = (row >= bounds[-1]).view(-1, *(1,) * (x.dim() - 2))
        return x.flatten(0, 1).index_select(0, text * x.shape[1] + place).masked_fill(outside, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (bounds,) = ctx.saved_tensors
        return _ToTexts.apply(dy, bounds, ctx.length), None, None
