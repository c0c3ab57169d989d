"""A product of bfloat16 tiles, to show the interpreter's result."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bfloat16_dot_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    count_ptr: tl.tensor,
    wide_ptr: tl.tensor,
    out_ptr: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Compute `*count_ptr` times A B [BLOCK, BLOCK], in float32 and rounded to bfloat16."""
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(tl.load(count_ptr)):
        total = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), total)
    tl.store(wide_ptr + offs, total)
    tl.store(out_ptr + offs, total.to(tl.bfloat16))
