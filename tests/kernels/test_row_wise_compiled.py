"""The Triton kernels of the row-wise operations, compiled ahead of time: no spills, loads and stores of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches() -> None:
    """The largest kernels of a step of BERT-base in bfloat16, with dropout, an adapter and three tasks."""
    from fastmtl_kernels.add_layer_norm import triton as add_layer_norm_triton
    from fastmtl_kernels.add_layer_norm.api import RowNorm
    from fastmtl_kernels.dropout import triton as dropout_triton
    from fastmtl_kernels.embed_layer_norm import triton as embed_layer_norm_triton
    from fastmtl_kernels.pool import triton as pool_triton
    from fastmtl_kernels.task_sink import TaskRows

    rows, column, seed = meta(8192, 768), meta(768), meta(1, dtype=torch.int64)
    tasks = TaskRows(meta(4, dtype=torch.int32), 8192, None)
    call = RowNorm(add_layer_norm_triton, 0.1, 1e-12, tasks, None, True, torch.bfloat16)
    _, z, mean, rstd, _ = add_layer_norm_triton.forward(rows, rows, rows, column, column, column, seed, call)
    add_layer_norm_triton.backward(rows, z, mean, rstd, column, seed, call, dx_dtype=torch.bfloat16, num_sums=3)
    add_layer_norm_triton.recompute(z, mean, rstd, column, column, call)
    ids, tables = meta(8192, dtype=torch.int64), (meta(30522, 768), meta(512, 768), meta(2, 768))
    embed_layer_norm_triton.forward((ids, ids, ids), tables, column, column, seed, call)
    dropout_triton.dropout(rows, 0.1, seed)
    cu_seqlens = meta(97, dtype=torch.int32)
    out, winners = pool_triton.forward(rows, cu_seqlens, "max")
    pool_triton.backward(out, cu_seqlens, winners, "max", 8192)


# Kernel: tensors that are read and written by vectors; registers and KiB of shared memory that leave room for the
# blocks its launcher expects.
EXPECTED = {
    "_add_layer_norm_fwd_kernel": (3, 2, 64, 16),
    # dy and z of two blocks of rows on their way, and what is summed over the threads.
    "_add_layer_norm_bwd_kernel": (2, 2, 128, 17),
    "_sum_slots_kernel": (1, 0, 64, 16),
    "_layer_norm_again_kernel": (2, 2, 64, 16),
    "_embed_layer_norm_fwd_kernel": (3, 2, 64, 16),
    "_dropout_kernel": (1, 1, 64, 16),
    "_pool_fwd_kernel": (1, 0, 85, 16),
    "_pool_bwd_kernel": (0, 1, 64, 16),
}
# Loads to registers, and those that a loop has under way to shared memory: cp.async.
LOADS, AHEAD = "LDG.E.128", "LDGSTS.E.BYPASS.128"


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    kernels = compile_ahead(launches, 90)
    assert [kernel.name for kernel in kernels] == list(EXPECTED)
    for kernel in kernels:
        loads, stores, registers, shared = EXPECTED[kernel.name]
        assert kernel.spilled == 0 and kernel.registers <= registers and kernel.shared <= shared << 10, kernel
        ahead = kernel.instructions.get(AHEAD, 0)
        assert kernel.instructions.get(LOADS, 0) + ahead >= loads, kernel
        # Before the loop two blocks of rows, in it the next, of two tensors each.
        assert ahead == (6 if kernel.name == "_add_layer_norm_bwd_kernel" else 0), kernel
        assert kernel.instructions.get("STG.E.128", 0) >= stores, kernel
