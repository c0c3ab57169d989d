"""The launches of the Triton kernels of one or two linear maps per task, forward and backward.

Backward launches the kernel of the rows (rows.py), then the two kernels of the weights' gradients
(weights.py). h, the input of `middle`, is kept for backward in the rows' dtype; the input of `last`
is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastmtl_kernels.task_maps.common import Maps, Wants
from fastmtl_kernels.task_maps.triton.common import constants, dense, dropout_pointers
from fastmtl_kernels.task_maps.triton.rows import maps_bwd_kernel, maps_fwd_kernel
from fastmtl_kernels.task_maps.triton.weights import weight_gradients


def forward(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    call: Maps,
) -> tuple[Tensor | None, ...]:
    """Return y [N, d_out] and h [N, r], the output of the first map before `middle`.

    h is None without a first map, and if no backward follows.
    """
    num_rows, num_tasks = x.shape[0], call.tasks.num_tasks
    rank, d_out = second.shape[1:]
    y = torch.empty(num_rows, d_out, dtype=x.dtype, device=x.device)
    store_h = first is not None and call.saves
    h = torch.empty(num_rows, rank, dtype=x.dtype, device=x.device) if store_h else None
    first, second = None if first is None else dense(first), dense(second)
    shape = _blocks(x, rank, call)
    if num_rows:
        with torch.cuda.device_of(x):
            maps_fwd_kernel[_grid(num_rows, num_tasks, shape["BLOCK_M"])](
                x_ptr=x.contiguous(),
                first_ptr=first,
                first_bias_ptr=None if first_bias is None else first_bias.contiguous(),
                second_ptr=second,
                second_bias_ptr=None if second_bias is None else second_bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                h_ptr=h,
                y_ptr=y,
                num_rows=num_rows,
                num_tasks=num_tasks,
                HAS_FIRST_BIAS=first_bias is not None,
                HAS_SECOND_BIAS=second_bias is not None,
                STORE_H=store_h,
                MIDDLE=call.middle,
                LAST=call.last,
                **dropout_pointers(seed, call, x.device),
                **constants(x, first, second, seed is not None),
                **shape,
            )
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    first: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    *,
    call: Maps,
    wants: Wants,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, first, first_bias, second and second_bias.

    A gradient that autograd does not need is None.
    """
    num_rows, num_tasks = x.shape[0], call.tasks.num_tasks
    x, dy = x.contiguous(), dy.contiguous()
    store_dx = wants.x or first is None
    dx = torch.empty_like(x) if store_dx else None
    dh = None if h is None else torch.empty_like(h)
    z = None if h is None or call.middle == "identity" else torch.empty_like(h)
    dlast = None if call.last == "identity" else torch.empty_like(dy)
    dense_first, dense_second = None if first is None else dense(first), dense(second)
    shape = _blocks(x, second.shape[1], call, derives_last=call.last != "identity")
    if num_rows:
        with torch.cuda.device_of(x):
            maps_bwd_kernel[_grid(num_rows, num_tasks, shape["BLOCK_M"])](
                dy_ptr=dy,
                h_ptr=x if h is None else h,
                first_ptr=dense_first,
                second_ptr=dense_second,
                second_bias_ptr=None if second_bias is None else second_bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                z_ptr=z,
                dlast_ptr=dlast,
                dh_ptr=dh,
                dx_ptr=dx,
                num_rows=num_rows,
                num_tasks=num_tasks,
                HAS_SECOND_BIAS=second_bias is not None,
                STORE_DX=store_dx,
                MIDDLE=call.middle,
                LAST=call.last,
                **dropout_pointers(seed, call, x.device),
                **constants(x, dense_first, dense_second, seed is not None),
                **shape,
            )
    if not any(wants[1:]):
        return dx, None, None, None, None
    if dlast is not None:  # maps_bwd_kernel has applied dropout to dlast
        dy, seed = dlast, None
    if z is None:
        z = x if h is None else h
    gradients = weight_gradients(x, dy, z, dh, dense_first, dense_second, seed, call, wants)
    return dx if wants.x else None, *gradients


def _blocks(x: Tensor, rank: int, call: Maps, derives_last: bool = False) -> dict[str, Any]:
    """Return block shapes with which the kernels fit in registers and shared memory.

    derives_last: whether backward has an activation `last`; it then needs registers for both z and
    dh.
    """
    shape: dict[str, Any] = {"num_warps": 4 if rank <= 64 else 8}
    if x.dtype == torch.float32:
        shape |= {"BLOCK_M": 32, "BLOCK_D": 32, "num_stages": 2}
    elif derives_last and rank > 128:
        shape |= {"BLOCK_M": 64, "BLOCK_D": 32, "num_stages": 3}
    else:
        shape |= {"BLOCK_M": 64, "BLOCK_D": 64, "num_stages": 3 if rank <= 128 else 2}
    return shape | {"BLOCK_T": triton.next_power_of_2(call.tasks.num_tasks + 1)}


def _grid(num_rows: int, num_tasks: int, block_m: int) -> tuple[int]:
    """Return the largest number of row blocks, for any distribution of the rows over the tasks.

    The tasks, and the rows of no task, each round up their number of blocks. The distribution is on
    the device, so the host does not know it.
    """
    return (num_rows // block_m + num_tasks + 1,)
