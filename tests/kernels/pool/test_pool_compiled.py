"""Triton kernels of pool, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compiled import Vectors, check_vectors, meta


def launches() -> None:
    """Launch the maximum over 96 sequences of BERT-base in bfloat16."""
    from fastmtl_kernels.pool import triton as pool_triton

    cu_seqlens = meta(97, dtype=torch.int32)
    out, winners = pool_triton.forward(meta(8192, 768), cu_seqlens, "max")
    pool_triton.backward(out, cu_seqlens, winners, "max", 8192)


EXPECTED = {
    "_pool_fwd_kernel": Vectors(1, 0, 85, 16),
    "_pool_bwd_kernel": Vectors(0, 1, 64, 16),
}


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    check_vectors(compile_ahead(launches, 90), EXPECTED)
