"""All-gather of rows over the ranks, with a backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.surgery.ranks.collectives import world_size


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all ranks, [sum of n, d], in the order of the ranks.

    x [n, d]: this rank's rows; n may differ between ranks. The gradient of x is that of the sum of
    all ranks' losses.
    Forward and backward are collective. Every rank has to call this function, if need be with no
    rows, and to compute a loss that depends on the result. Waits for the device.
    """
    if world_size() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.full((1,), len(x), device=x.device))  # filled on the device, not copied
    return _GatherRows.apply(x, torch.cat(sizes).tolist())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        start = sum(sizes[: dist.get_rank()])
        ctx.own = slice(start, start + len(x))
        padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own], None
