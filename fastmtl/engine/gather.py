"""The complete state dict of an engine's model, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def gathered_state_dict(engine: Any, instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
    """Return all parameters and persistent buffers of the engine's module by name, on the CPU.

    Floating-point tensors are float32. instead: tensors that replace those of the module, by name.
    Every rank calls this function; rank 0 gets the result, the
    others None.
    """
    import deepspeed

    result: dict[str, Tensor] = {}
    partitioned = engine.zero_optimization_stage() == 3
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        # Gathered one by one, so that memory holds only one complete parameter besides the shards.
        with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
            if engine.global_rank == 0:
                whole = (instead or {}).get(name, tensor).detach().to("cpu", copy=True)
                result[name] = whole.to(torch.float32) if whole.is_floating_point() else whole
    return result if engine.global_rank == 0 else None
