"""A torch optimizer as a target, whose parameters are sharded by fully_shard (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.targets.adamw import SurgeryAdamW
from fastmtl.surgery.targets.optimizer import OptimizerTarget

_DIFFERS = 0.1  # of the norm; rounding to 16 bits changes it by less, a wrong factor by half or more


class ShardedTarget(OptimizerTarget):
    """Target for parameters that are DTensors, one shard on each rank.

    fully_shard gathers whole parameters for a module's forward and backward, and averages their
    gradients over the ranks. A step's gradient is the sum over the ranks, so each rank multiplies
    its gradients by the number of ranks. Only FSDP's own backward gives `.grad` its value.

    Raises UserError for a mix of sharded and other parameters, for a mesh that does not have every
    process once, for tensor parallelism, and for SurgeryAdamW.
    """

    stacks = False
    one_backward = True
    sharded = True
    per_task = f"DistributedDataParallel in place of fully_shard, with {PER_TASK_PASSES}"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, SurgeryAdamW):
            raise UserError("SurgeryAdamW does not update shards of fully_shard: use torch.optim.AdamW")
        super().__init__(optimizer)
        for parameter in self._every():
            _check(parameter)
        self.factor = float(world_size())
        first: Any = self.parameters[0]
        mesh = first.device_mesh
        if mesh.device_type != self.device.type:  # shards that are offloaded to the CPU
            self.device = torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.factor).backward()

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        raise NotImplementedError("fully_shard computes `.grad` in its own backward")

    def check_norm(self, parameters: Sequence[nn.Parameter], expected: float) -> None:
        """Raise UserError on every rank if the norm of `.grad` over all ranks is not `expected`."""
        shards: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for shard in shards:  # each number of HSDP is on several ranks
            copies = world_size() / shard.device_mesh.size(-1)
            squares += shard.to_local().double().square().sum().to(self.device) / copies
        found = math.sqrt(sum_over_ranks(squares).item())
        if math.isfinite(found) and abs(found - expected) > _DIFFERS * max(found, expected):
            raise UserError(
                f"target: fully_shard gave the shared parameters a gradient of norm {found:.3g}, and the merged one "
                f"has {expected:.3g}: leave set_gradient_divide_factor at its default, which is the average over all "
                "processes, and set_requires_gradient_sync at True"
            )


def _check(parameter: Any) -> None:
    shape = tuple(parameter.shape)
    if not is_sharded(parameter):
        raise UserError(
            f"target: a parameter of shape {shape} is not sharded, and others of the optimiser are, so their gradients "
            "would not be summed over the processes: call fully_shard on the whole model, without ignored_params"
        )
    mesh, (*outer, inner) = parameter.device_mesh, parameter.placements
    if len(outer) > 1 or not inner.is_shard() or not all(placement.is_replicate() for placement in outer):
        raise UserError(
            f"target: a parameter of shape {shape} has the placements {tuple(parameter.placements)}: surgery supports "
            "fully_shard on a mesh of one dimension, or of two (HSDP), without tensor parallelism"
        )
    if mesh.size() != world_size():
        raise UserError(
            f"target: a parameter of shape {shape} is sharded over a mesh of {mesh.size()} of {world_size()} "
            "processes, and surgery sums over all: call fully_shard with a mesh of all processes"
        )
