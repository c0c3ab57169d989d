"""Row-wise dropout by Triton. Other kernels with dropout call `keep_rows`.

    words = Philox4x32-10(key = seed, counter = (column // 4, row, 0, 1))
    keep[row, column] = int32(words[column % 4]) >= threshold

x, y [num_rows, D], float32, float16 or bfloat16. Source: see fastmtl_kernels.philox.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.row_blocks import block_shape

MAX_BLOCK_D = 1024


@triton.jit
def keep_rows(
    seed_ptr: tl.tensor, rows: tl.tensor, first_column: tl.tensor, threshold: tl.tensor, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Return the dropout mask, bool [rows, BLOCK_D], True for a kept element.

    The columns are first_column to first_column + BLOCK_D - 1; first_column is a multiple of 4.
    """
    groups = first_column // 4 + tl.arange(0, BLOCK_D // 4)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), groups[None, :], rows.to(tl.int32)[:, None], 0, 1)
    k0 = w0.to(tl.int32, bitcast=True) >= threshold
    k1 = w1.to(tl.int32, bitcast=True) >= threshold
    k2 = w2.to(tl.int32, bitcast=True) >= threshold
    k3 = w3.to(tl.int32, bitcast=True) >= threshold
    return tl.join(tl.join(k0, k2), tl.join(k1, k3)).reshape(rows.shape[0], BLOCK_D)


@triton.jit(do_not_specialize=["num_rows", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _dropout_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    num_rows: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_D
    offs_d = first_column + tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (offs_d < D)[None, :]
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(keep_rows(seed_ptr, rows, first_column, threshold, BLOCK_D), x * keep_scale, 0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Return y [N, d]. Backward is the same function, applied to dy."""
    num_rows, num_columns = x.shape
    y = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    shape = block_shape(min(num_columns, MAX_BLOCK_D))
    grid = triton.cdiv(num_rows, shape["BLOCK_M"]), triton.cdiv(num_columns, shape["BLOCK_D"])
    with torch.cuda.device_of(x):
        _dropout_kernel[grid](
            x_ptr=x.contiguous(),
            y_ptr=y,
            seed_ptr=seed,
            num_rows=num_rows,
            threshold=keep_threshold(dropout_p),
            keep_scale=1 / (1 - dropout_p),
            D=num_columns,
            **shape,
        )
    return y
