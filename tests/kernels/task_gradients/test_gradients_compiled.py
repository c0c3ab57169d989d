"""Triton kernels of gramian and combine, compiled ahead of time: no spills, 16-byte accesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Tasks, columns, dtype of J: a size of int64, rows of all alignments, the most registers.
# docs/compile-table.md has more.
CASES = [
    (1, 2**31 + 8, torch.bfloat16),
    (3, 999_999, torch.float32),
    (8, 1 << 20, torch.bfloat16),
]


def launches() -> None:
    from fastmtl_kernels.task_gradients import triton as gradients_triton

    for num_tasks, size, dtype in CASES:
        rows = [[row] for row in torch.empty(num_tasks, size, dtype=dtype, device="meta")]
        out = torch.empty(size, dtype=dtype, device="meta")
        gradients_triton.combine(rows, torch.empty(num_tasks, device="meta"), [out])
        gradients_triton.gramian(rows)


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    kernels = compile_ahead(launches, 90)
    rows = {kernel: kernel.signature.get("row_ptrs", []) for kernel in kernels}
    assert [len(rows[kernel]) for kernel in kernels if kernel.name == "_combine_kernel"] == [1, 3, 8]
    assert [len(rows[kernel]) for kernel in kernels if kernel.name == "_gramian_kernel"] == [1, 3, 8]
    assert [kernel.signature.get("num_columns") for kernel in kernels].count("i64") == 2
    for kernel in kernels:
        # At least three blocks of 128 threads per multiprocessor hide the latency of the loads.
        assert kernel.spilled == 0 and kernel.registers <= 168 and kernel.shared <= 16 << 10, kernel
        loads, stores = (kernel.instructions.get(name, 0) for name in ("LDG.E.128", "STG.E.128"))
        assert loads >= sum(row.endswith(":16") for row in rows[kernel]), kernel
        assert stores or kernel.name != "_combine_kernel", kernel
