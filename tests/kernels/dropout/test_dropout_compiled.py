"""Triton kernels of dropout, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compiled import Vectors, check_vectors, meta


def launches() -> None:
    """Launch dropout of the rows of BERT-base in bfloat16."""
    from fastmtl_kernels.dropout import triton as dropout_triton

    dropout_triton.dropout(meta(8192, 768), 0.1, meta(1, dtype=torch.int64))


EXPECTED = {
    "_dropout_kernel": Vectors(1, 1, 64, 16),
}


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    check_vectors(compile_ahead(launches, 90), EXPECTED)
