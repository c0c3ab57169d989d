"""Triton kernels of combined_adamw, compiled ahead of time: no spills, accesses of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Tasks, dtypes of J and of the copy.
CASES = [(9, torch.bfloat16, torch.bfloat16)]


def launches() -> None:
    from fastmtl_kernels.combined_adamw import reference
    from fastmtl_kernels.combined_adamw import triton as combined_adamw_triton

    update = reference.Update.at(1, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    for tasks, dtype, copy in CASES:
        for shape in ((1 << 20,), (1000, 384)):
            p, m, v = (torch.empty(shape, device="meta") for _ in range(3))
            copied = None if copy is None else torch.empty(shape, dtype=copy, device="meta")
            target = reference.Written(p, m, v, copied)
            slots = None if len(shape) == 1 else torch.empty(1000, dtype=torch.int32, device="meta")
            grads = [[torch.empty(shape, dtype=dtype, device="meta")] for _ in range(tasks)]
            combined_adamw_triton.combined_adamw(grads, torch.empty(tasks, device="meta"), [target], update, slots)


def test_no_spills_and_16_bytes_at_a_time(compile_ahead: Callable[..., Any]) -> None:
    kernels = compile_ahead(launches, 90)
    assert [kernel.name for kernel in kernels] == ["_combined_adamw_kernel", "_combined_adamw_rows_kernel"]
    for kernel, (tasks, _, copy) in zip(kernels, [case for case in CASES for _ in range(2)], strict=True):
        # At least three blocks of 128 threads per multiprocessor hide the latency of the loads.
        assert kernel.spilled == 0 and kernel.registers <= 168 and kernel.shared <= 4 << 10, kernel
        if kernel.name == "_combined_adamw_kernel":
            loads, stores = (kernel.instructions.get(name, 0) for name in ("LDG.E.128", "STG.E.128"))
            assert loads >= tasks + 3 and stores >= 3 + (copy is not None), kernel
