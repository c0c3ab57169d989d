"""combined_adamw by the C++ kernels of csrc/combined_adamw_cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl_kernels.combined_adamw.reference import Update, Written


def combined_adamw(
    grads: Sequence[Sequence[Tensor]],
    weights: Tensor,
    targets: Sequence[Written],
    update: Update,
    slots: Tensor | None,
) -> None:
    tensors, weights = [tensor for task in grads for tensor in task], weights.float().contiguous()
    if slots is not None:
        torch.ops.fastmtl.combined_adamw_rows_(tensors, weights, slots.contiguous(), *targets[0], *update)
        return
    copies = [target.copy for target in targets if target.copy is not None]
    params, exp_avgs, exp_avg_sqs, _ = map(list, zip(*targets, strict=True))
    torch.ops.fastmtl.combined_adamw_(tensors, weights, params, exp_avgs, exp_avg_sqs, copies, *update)
