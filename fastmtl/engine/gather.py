"""A whole state dict from an engine, whatever ZeRO stage holds the pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gathered_state_dict(engine: Any) -> dict[str, Tensor] | None:
    """Every parameter and persistent buffer of the module, float32 on the CPU; on rank 0, None
    elsewhere. Every rank calls it.
    """
    import deepspeed

    result: dict[str, Tensor] = {}
    partitioned = engine.zero_optimization_stage() == 3
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        # One parameter at a time: never more than one whole beyond the shards.
        with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
            if engine.global_rank == 0:
                whole = tensor.detach().to("cpu", copy=True)
                result[name] = whole.to(torch.float32) if whole.is_floating_point() else whole
    return result if engine.global_rank == 0 else None
