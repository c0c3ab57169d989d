"""Triton kernels of pal's map up, compiled ahead of time.

Those of its attention are in test_varlen_attention_compiled.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compile_table import SHARED

KERNELS = ["maps_fwd_kernel", "maps_bwd_kernel", "_weights_kernel", "_sum_slots_kernel"]


def launches() -> None:
    """Launch the map up of BERT-base with the paper's size for three tasks.

    Its parameter has the memory of torch's linear layers. The maps down and to the heads are those
    of test_low_rank_compiled.py.
    """
    from fastmtl_kernels.task_maps import common as low_rank_maps
    from fastmtl_kernels.task_maps.triton import launch as low_rank_triton
    from fastmtl_kernels.task_sink import TaskRows

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tasks = TaskRows(meta(4, dtype=torch.int32), 8192, None)
    z, dy, seed, up = meta(8192, 204), meta(8192, 768), meta(1, dtype=torch.int64), meta(3, 768, 204).mT
    call = low_rank_maps.Maps(low_rank_triton, tasks, "identity", "gelu", (0.1,) * 3, True)
    wants = low_rank_maps.Wants(True, False, False, True, False)
    low_rank_triton.forward(z, None, None, up, None, seed, call)
    low_rank_triton.backward(dy, z, None, up, None, seed, None, call=call, wants=wants)


def test_what_the_launchers_choose(compile_ahead: Callable[..., Any]) -> None:
    kernels = compile_ahead(launches, 90)
    assert [kernel.name for kernel in kernels] == KERNELS
    for kernel in kernels:
        assert kernel.spilled == 0 and kernel.shared <= SHARED[90], kernel
        if kernel.name == "_sum_slots_kernel":
            continue
        assert any(name.startswith("HGMMA") for name in kernel.instructions), kernel
        # Tensor cores compute every dot: the ordinary multipliers compute erf only, with few FFMA.
        assert sum(count for name, count in kernel.instructions.items() if name.startswith("FFMA")) < 400, kernel
