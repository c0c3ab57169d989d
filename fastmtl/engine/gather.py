"""A complete state dict from an engine of any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gathered_state_dict(engine: Any) -> dict[str, Tensor] | None:
    """Return all parameters and persistent buffers of the module, float32 on the CPU.

    Every rank calls it; the result is on rank 0, None elsewhere.
    """
    import deepspeed

    result: dict[str, Tensor] = {}
    partitioned = engine.zero_optimization_stage() == 3
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        # One parameter at a time, so that at most one is whole besides the shards.
        with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
            if engine.global_rank == 0:
                whole = tensor.detach().to("cpu", copy=True)
                result[name] = whole.to(torch.float32) if whole.is_floating_point() else whole
    return result if engine.global_rank == 0 else None
