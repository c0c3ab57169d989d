"""A torch optimizer as a target, in a single process; group.py has the one for several."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl.surgery.targets.adamw import SurgeryAdamW
from fastmtl.surgery.targets.trained import changed
from fastmtl_kernels.cast import cast


class OptimizerTarget:
    """Target that adds a step's gradients to `.grad`, for a torch optimizer in a single process.

    SurgeryAdamW is an exception: it gets task gradients and merges them itself.
    """

    stacks = True
    factor = 1.0
    can_discard = False
    one_backward = False
    sums_ranks = False
    sharded = False
    clipping = "call torch.nn.utils.clip_grad_norm_ before optimizer.step()"
    per_task = PER_TASK_PASSES

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._world = world_size()
        self._merging = optimizer if isinstance(optimizer, SurgeryAdamW) else None
        self.merges = self._merging is not None
        self._groups = optimizer.param_groups
        every = {id(p): p for p in self._every()}  # torch allows a parameter twice in a group
        self.parameters = [p for p in every.values() if p.requires_grad]
        if not self.parameters:
            raise UserError("target: no parameter of the optimiser requires a gradient")
        self.names = {
            key: f"number {k} of the optimiser" for k, (key, p) in enumerate(every.items()) if p.requires_grad
        }
        self.device = self.parameters[0].device

    def learn_names(self, model: nn.Module) -> None:
        found = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names.update((key, name) for key, name in found.items() if key in self.names)

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return parameters

    def model(self, training_pass: bool) -> None:
        """Return None: the user's loss function has its own model."""

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def wants_float32(self) -> bool:
        return False

    def sum_over_ranks(self, gradients: Merged, reached: Collection[int]) -> Collection[int]:
        """Return `reached`: there is one process."""
        return reached

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        for parameter in self.parameters:
            gradient = cast(gradients.pop(id(parameter)), parameter.dtype)
            if id(parameter) in reached:  # else None, so neither weight decay nor momentum changes it
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def check_trained(self) -> None:
        for k, parameter in enumerate(self._every()):
            if parameter.requires_grad != (id(parameter) in self.names):
                raise changed(f"number {k} of the optimiser", parameter, "GradientSurgery")

    def _every(self) -> Iterator[nn.Parameter]:
        return (p for group in self._groups for p in group["params"])

    def check_norm(self, parameters: Sequence[nn.Parameter], expected: float) -> None:
        pass

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        if self._merging is None or (self._merging.max_norm is not None and norm is None):
            return None
        # As with every torch optimizer, a step's gradient is added to an existing `.grad`.
        return self._merging if all(parameter.grad is None for parameter in self.parameters) else None

    def begin(self) -> None:
        if world_size() != self._world:
            raise UserError(
                f"target: the process group has {world_size()} ranks, and had {self._world} when GradientSurgery was "
                "made: make GradientSurgery after torch.distributed.init_process_group"
            )
        if self._merging is not None:
            self._merging.check_taken()

    def check_forward(self) -> None:
        pass

    def loss_scale(self) -> float:
        return 1.0

    def backs_off(self) -> bool:
        return False

    def discard(self) -> None:
        raise NotImplementedError("gradients in `.grad` belong to the user")
