"""Plain-torch oracle of one or two linear maps per task: it defines the meaning of low_rank, lora and the maps of pal.

    z = middle(x first_t + first_bias_t)      z = x where there is no first map
    y = dropout(last(z second_t + second_bias_t))

x [N, d_in], first [T, d_in, r], first_bias [T, r], second [T, r, d_out], second_bias [T, d_out], for the rows of task
t. Any floating dtypes; float32 inside, float64 where x is float64; y has x's dtype. Dropout has a probability p_t for
each task, keeps what fastmtl_kernels.philox.keep_mask says of the row among all N, and multiplies that with
1 / (1 - p_t). Rows past the last token offset belong to no task: y and the gradients are zero there, whatever they
hold. Gradients by autograd.

Source: Stickland & Murray, BERT and PALs, 2019 (low-rank layers and projected attention); Hu et al., LoRA, 2021.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.philox import keep_mask

if TYPE_CHECKING:
    from fastmtl_kernels.task_maps.common import Maps


def maps(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    call: Maps,
) -> Tensor:
    """y [N, d_out]; the arguments are those of fastmtl_kernels.task_maps.common.maps."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for task, (start, stop) in enumerate(pairwise(call.tasks.host)):
        z = x[start:stop].to(dtype)
        if first is not None:
            z = activate(linear(z, first, first_bias, task), call.middle)
        y = activate(linear(z, second, second_bias, task), call.last)
        if seed is not None and call.rates[task] > 0:
            keep = keep_mask(seed, stop, y.shape[1], call.rates[task])[start:]
            y = (y * (1 / (1 - call.rates[task]))).masked_fill(~keep, 0.0)
        parts.append(y)
    # Filled rather than made anew, so that x has a gradient where there is no row with a task at all.
    tail = x[call.tasks.host[-1] :, :1].to(dtype).masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
    return torch.cat([*parts, tail.expand(-1, second.shape[2])]).to(x.dtype)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, task: int) -> Tensor:
    """rows [n, in] times weight[task] [in, out], in the dtype of the rows."""
    mapped = rows @ weight[task].to(rows.dtype)
    return mapped if bias is None else mapped + bias[task].to(rows.dtype)


def activate(rows: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(rows)
        case "relu":
            return F.relu(rows)
        case _:
            return rows
