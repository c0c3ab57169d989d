"""The Triton kernels of low_rank, compiled ahead of time: spills, shared memory, tensor cores."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_table import SHARED

KERNELS = ["maps_fwd_kernel", "maps_bwd_kernel", "_weights_kernel", "_sum_slots_kernel"]
# Bytes per thread that Triton 3.6 spills, by kernel and capability.
# docs/compile-table-triton-3.6.md lists all.
OLDER_SPILLED = {("_weights_kernel", 80): 8}


def launch(columns: int, rank: int, dtype: torch.dtype, activation: str) -> None:
    """Launch forward and backward for three tasks of BERT-base.

    The parameters have the memory of torch's linear layers.
    """
    from fastmtl_kernels.task_maps import common as low_rank_maps
    from fastmtl_kernels.task_maps.triton import launch as low_rank_triton
    from fastmtl_kernels.task_sink import TaskRows

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tasks = TaskRows(meta(4, dtype=torch.int32), 8192, None)
    call = low_rank_maps.Maps(low_rank_triton, tasks, activation, "identity", (0.1, 0.1, 0.2), True)
    x, seed = meta(8192, columns), meta(1, dtype=torch.int64)
    down, up = meta(3, rank, columns).mT, meta(3, columns, rank).mT
    down_bias, up_bias = meta(3, rank), meta(3, columns)
    _, h = low_rank_triton.forward(x, down, down_bias, up, up_bias, seed, call)
    wants = low_rank_maps.Wants(True, True, True, True, True)
    low_rank_triton.backward(x, x, down, up, up_bias, seed, h, call=call, wants=wants)


def narrow() -> None:
    launch(768, 8, torch.bfloat16, "identity")


def wide() -> None:
    """Launch the kernels that take the most registers."""
    launch(768, 204, torch.bfloat16, "gelu")


@pytest.mark.parametrize(("function", "capability"), [(narrow, 80), (wide, 90)])
def test_what_the_launchers_choose(
    compile_ahead: Callable[..., Any], function: Callable[[], None], capability: int
) -> None:
    older = importlib.metadata.version("triton").startswith("3.6.")
    kernels = compile_ahead(function, capability)
    assert [kernel.name for kernel in kernels] == KERNELS
    tensor_core = "HGMMA" if capability == 90 else "HMMA"
    for kernel in kernels:
        assert kernel.spilled <= (OLDER_SPILLED.get((kernel.name, capability), 0) if older else 0), kernel
        assert kernel.shared <= SHARED[capability], kernel
        if kernel.name == "_sum_slots_kernel":
            continue
        assert any(name.startswith(tensor_core) for name in kernel.instructions), kernel
        # Tensor cores compute every dot: the ordinary multipliers compute erf only, with few FFMA.
        assert sum(count for name, count in kernel.instructions.items() if name.startswith("FFMA")) < 1000, kernel
        # Rows of x and y are accessed by 16 bytes, rows of the odd rank by 8.
        assert any(name.startswith("LDGSTS") and name.endswith("128") for name in kernel.instructions), kernel
        assert "STG.E.128" in kernel.instructions, kernel
