"""GeGLU by Triton; fastmtl_kernels.geglu.api has the formulas.

x, dx [num_rows, 2 F], y, dy [num_rows, F] contiguous, each float32, float16 or bfloat16. Arithmetic
in float32. A program computes BLOCK_D columns of BLOCK_M rows of y.

Source: see fastmtl_kernels.geglu.api.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.row_blocks import block_shape, load_rows

MAX_BLOCK_D = 1024
# Backward holds five tensors of the size of a block.
PER_THREAD = 8
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# The tanh formula is a sigmoid(a (LINEAR + CUBIC a^2)).
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.07135481627159756)


@triton.jit
def _exponent(a: tl.tensor) -> tl.tensor:
    return a * (_CUBIC * a * a + _LINEAR)


@triton.jit
def _share(a: tl.tensor, TANH: tl.constexpr) -> tl.tensor:
    """Return gelu(a) / a, in [0, 1]."""
    if TANH:
        return tl.sigmoid(_exponent(a))
    return 0.5 * (1.0 + tl.erf(a * _ROOT_HALF))


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_fwd_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (offs_d < F)[None, :]
    offs = rows.to(tl.int64)[:, None] * (2 * F) + offs_d[None, :]
    a = load_rows(x_ptr, offs, mask)
    y = a * _share(a, TANH) * load_rows(x_ptr + F, offs, mask)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * F + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_bwd_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    num_rows: tl.tensor,
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (offs_d < F)[None, :]
    offs = rows.to(tl.int64)[:, None] * (2 * F) + offs_d[None, :]
    dy = load_rows(dy_ptr, rows.to(tl.int64)[:, None] * F + offs_d[None, :], mask)
    a = load_rows(x_ptr, offs, mask)
    b = load_rows(x_ptr + F, offs, mask)
    share = _share(a, TANH)
    if TANH:
        slope = share + a * share * tl.sigmoid(-_exponent(a)) * (3 * _CUBIC * a * a + _LINEAR)
    else:
        slope = share + a * _DENSITY * tl.exp(-0.5 * a * a)
    tl.store(dx_ptr + offs, (dy * b * slope).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + F + offs, (dy * a * share).to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, approximate: str) -> Tensor:
    """Return y [N, f] of x's dtype. x: [N, 2 f]; approximate: "none" or "tanh"."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    shape = block_shape(min(width, MAX_BLOCK_D), PER_THREAD)
    if num_rows:
        with torch.cuda.device_of(x):
            _geglu_fwd_kernel[_grid(num_rows, width, shape)](
                x_ptr=x.contiguous(), y_ptr=y, num_rows=num_rows, F=width, TANH=approximate == "tanh", **shape
            )
    return y


def backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """Return dx [N, 2 f] of x's dtype."""
    num_rows, width = dy.shape
    dx = torch.empty(num_rows, 2 * width, dtype=x.dtype, device=x.device)
    shape = block_shape(min(width, MAX_BLOCK_D), PER_THREAD)
    if num_rows:
        with torch.cuda.device_of(x):
            _geglu_bwd_kernel[_grid(num_rows, width, shape)](
                dy_ptr=dy.contiguous(),
                x_ptr=x.contiguous(),
                dx_ptr=dx,
                num_rows=num_rows,
                F=width,
                TANH=approximate == "tanh",
                **shape,
            )
    return dx


def _grid(num_rows: int, width: int, shape: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(num_rows, shape["BLOCK_M"]), triton.cdiv(width, shape["BLOCK_D"])
