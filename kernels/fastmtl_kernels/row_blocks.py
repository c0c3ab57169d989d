"""Shapes and loads of blocks of whole rows, for the row-wise Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# Elements per thread: two 16-byte vectors of the half types.
PER_THREAD = 16


@triton.jit
def load_rows(ptr: tl.tensor, offs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return the elements at ptr + offs in float32, zero where the mask is false."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


def block_shape(num_columns: int, per_thread: int = PER_THREAD) -> dict[str, int]:
    """Return BLOCK_M, BLOCK_D and launch options of a kernel whose programs process whole rows.

    num_columns: the length of a row. per_thread: elements of a block per thread.
    """
    block_d = max(16, triton.next_power_of_2(num_columns))
    num_warps = min(max(block_d // 128, 1), 16)
    block_m = max(per_thread * 32 * num_warps // block_d, 1)
    return {"BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": num_warps, "enable_fp_fusion": True}
