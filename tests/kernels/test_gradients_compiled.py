"""The Triton kernels of gramian and combine, compiled ahead of time: no spills, loads and stores of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# Tasks, columns, dtypes of J and of the result: sizes of int64, rows of all alignments, the most registers, more rows
# than are loaded together.
CASES = [
    (1, 2**31 + 8, torch.bfloat16, torch.bfloat16),
    (3, 1 << 20, torch.float32, torch.float32),
    (3, 999_999, torch.float16, torch.float16),
    (3, 1 << 20, torch.bfloat16, torch.float32),
    (8, 1 << 20, torch.bfloat16, torch.bfloat16),
    (16, 1 << 20, torch.bfloat16, torch.bfloat16),
]


def launches() -> None:
    from fastmtl_kernels import gradients_triton

    for num_tasks, size, dtype, out_dtype in CASES:
        rows = [[row] for row in torch.empty(num_tasks, size, dtype=dtype, device="meta")]
        out = torch.empty(size, dtype=out_dtype, device="meta")
        gradients_triton.combine(rows, torch.empty(num_tasks, device="meta"), [out])
        if num_tasks <= gradients_triton.MAX_ROWS:
            gradients_triton.gramian(rows)


@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any], capability: int) -> None:
    kernels = compile_ahead(launches, capability)
    rows = {kernel: kernel.signature.get("row_ptrs", []) for kernel in kernels}
    assert [len(rows[kernel]) for kernel in kernels if kernel.name == "_combine_kernel"] == [1, 3, 3, 3, 8, 16]
    assert [len(rows[kernel]) for kernel in kernels if kernel.name == "_gramian_kernel"] == [1, 3, 3, 3, 8]
    assert [kernel.signature.get("num_columns") for kernel in kernels].count("i64") == 2
    for kernel in kernels:
        # At least three blocks of 128 threads on a multiprocessor, to hide the latency of the loads.
        assert kernel.spilled == 0 and kernel.registers <= 168 and kernel.shared <= 16 << 10, kernel
        loads, stores = (kernel.instructions.get(name, 0) for name in ("LDG.E.128", "STG.E.128"))
        assert loads >= sum(row.endswith(":16") for row in rows[kernel]), kernel
        assert stores or kernel.name != "_combine_kernel", kernel
