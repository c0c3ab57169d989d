"""Triton kernels of varlen_attention, compiled: spills, shared memory, tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_table import SHARED


def launch(dtype: torch.dtype, num_heads: int, head_dim: int) -> None:
    """Launch forward and backward of a batch with both kinds of sequences."""
    from fastmtl_kernels.varlen_attention.plan import AttentionPlan
    from fastmtl_kernels.varlen_attention.triton import launch as varlen_attention_triton

    plan = AttentionPlan.make([0, 20, 200], 208, "meta")
    qkv = torch.empty(208, 3, num_heads, head_dim, dtype=dtype, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    out, stats = varlen_attention_triton.forward(qkv, plan, 0.125, 0.1, seed)
    varlen_attention_triton.backward(qkv, out, stats, torch.empty_like(out), plan, 0.125, 0.1, seed)


def for_a100() -> None:
    launch(torch.bfloat16, 12, 64)


def for_h100() -> None:
    """BERT-base, and a projected attention layer, whose heads are not aligned to 16 bytes."""
    launch(torch.bfloat16, 12, 64)
    launch(torch.float16, 6, 34)


NAMES = ["tile_fwd_kernel", "long_fwd_kernel", "tile_bwd_kernel", "long_bwd_kernel"]


# On sm_80 long_bwd_kernel lacks four to twelve registers (twelve in Triton 3.7).
@pytest.mark.parametrize(("function", "capability", "spilled"), [(for_a100, 80, 48), (for_h100, 90, 0)])
def test_what_the_launchers_choose(
    compile_ahead: Callable[..., Any], function: Callable[[], None], capability: int, spilled: int
) -> None:
    kernels = compile_ahead(function, capability)
    assert [kernel.name for kernel in kernels] == NAMES * (2 if function is for_h100 else 1)
    tensor_core = "HGMMA" if capability == 90 else "HMMA"
    for kernel in kernels:
        assert kernel.spilled <= spilled, kernel
        assert kernel.shared <= SHARED[capability], kernel
        assert any(name.startswith(tensor_core) for name in kernel.instructions), kernel
        # Tensor cores compute every dot: the ordinary multipliers would need hundreds of FFMA.
        assert sum(count for name, count in kernel.instructions.items() if name.startswith("FFMA")) < 200, kernel
