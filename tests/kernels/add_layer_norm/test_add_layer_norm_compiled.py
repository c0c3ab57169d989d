"""Triton kernels of add_layer_norm, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compiled import Vectors, check_vectors, meta


def launches() -> None:
    """Launch the largest kernels of BERT-base in bfloat16: dropout, an adapter, three tasks."""
    from fastmtl_kernels.add_layer_norm import triton as add_layer_norm_triton
    from fastmtl_kernels.layer_norm.common import RowNorm
    from fastmtl_kernels.task_sink import TaskRows

    rows, column, seed = meta(8192, 768), meta(768), meta(1, dtype=torch.int64)
    tasks = TaskRows(meta(4, dtype=torch.int32), 8192, None)
    call = RowNorm(add_layer_norm_triton, 0.1, 1e-12, tasks, None, True, torch.bfloat16)
    _, z, mean, rstd, _ = add_layer_norm_triton.forward(rows, rows, rows, column, column, seed, call)
    add_layer_norm_triton.backward(rows, z, mean, rstd, column, seed, call, dx_dtype=torch.bfloat16, want_sums=True)
    add_layer_norm_triton.recompute(z, mean, rstd, column, column, call)


EXPECTED = {
    "_add_layer_norm_fwd_kernel": Vectors(3, 2, 64, 16),
    # Two blocks of dy and z in flight, and the sums over the threads. Two blocks of rows of two
    # tensors are loaded before the loop, the next one in it.
    "_add_layer_norm_bwd_kernel": Vectors(2, 2, 128, 17, ahead=6),
    "_sum_slots_kernel": Vectors(1, 0, 64, 16),
    "_layer_norm_recompute_kernel": Vectors(2, 2, 64, 16),
}


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    check_vectors(compile_ahead(launches, 90), EXPECTED)
