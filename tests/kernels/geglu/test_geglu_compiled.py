"""Triton kernels of geglu, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled import Vectors, check_vectors, meta


def launches() -> None:
    """Launch GeGLU of the rows of ModernBERT-base in bfloat16."""
    from fastmtl_kernels.geglu import triton as geglu_triton

    x = meta(8192, 2304)
    geglu_triton.backward(geglu_triton.forward(x, "none"), x, "none")


EXPECTED = {
    "_geglu_fwd_kernel": Vectors(2, 1, 64, 16),
    "_geglu_bwd_kernel": Vectors(3, 2, 64, 16),
}


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    check_vectors(compile_ahead(launches, 90), EXPECTED)
