"""The choice of the target class for a DeepSpeed engine or a torch optimizer."""

from __future__ import annotations

from typing import Any

import torch

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl.surgery.targets.engine import EngineTarget
from fastmtl.surgery.targets.flat import FlatParameters
from fastmtl.surgery.targets.flat_engine import FlatTarget
from fastmtl.surgery.targets.group import GroupTarget
from fastmtl.surgery.targets.optimizer import OptimizerTarget
from fastmtl.surgery.targets.protocol import Target
from fastmtl.surgery.targets.sharded import ShardedTarget


def find_target(target: Any) -> Target:
    """Return the target of a DeepSpeed engine or a torch optimizer.

    Raises UserError for any other object.
    """
    if isinstance(target, torch.optim.Optimizer):
        if any(is_sharded(parameter) for group in target.param_groups for parameter in group["params"]):
            return ShardedTarget(target)
        return GroupTarget(target) if world_size() > 1 else OptimizerTarget(target)
    if hasattr(target, "zero_optimization_stage") and hasattr(target, "module"):
        return FlatTarget(target) if isinstance(target.module, FlatParameters) else EngineTarget(target)
    raise UserError(f"target: expected a DeepSpeed engine or a torch optimiser, got {type(target).__name__}")
