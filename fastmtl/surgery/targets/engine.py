"""A DeepSpeed engine as the target of surgery, through its public calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.advice import PER_TASK_PASSES
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl.surgery.targets.adamw import SurgeryAdamW
from fastmtl.surgery.targets.surrogate import Surrogate
from fastmtl.surgery.targets.trained import changed


class EngineTarget:
    """Target that passes a step's gradients to a DeepSpeed engine.

    A step's gradient is the sum of the ranks' gradients, but DeepSpeed averages over ranks. So each
    rank multiplies its gradients by the number of ranks.
    """

    merges = False
    sums_ranks = False
    sharded = False
    clipping = "set gradient_clipping in the engine's config"

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.device = torch.device(engine.device)
        self._named_parameters = list(engine.module.named_parameters())
        self.names = {id(p): name for name, p in self._named_parameters if p.requires_grad}
        self.parameters = [p for _, p in self._named_parameters if p.requires_grad]
        self.factor = float(world_size())
        if isinstance(getattr(engine, "basic_optimizer", None), SurgeryAdamW):
            raise UserError(
                "SurgeryAdamW is for a plain torch loop, under DeepSpeed the master weights are DeepSpeed's: give the "
                "engine torch.optim.AdamW or its own AdamW, and gradient_clipping in its config for max_norm"
            )
        stage = engine.zero_optimization_stage()
        if engine.fp16_enabled() and stage == 0:
            raise UserError(
                "fp16 with ZeRO 0: DeepSpeed does not scale that loss while its optimiser divides; use ZeRO 1"
            )
        if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
            raise UserError(
                "torch_autocast with float16: its gradient scaler is out of surgery's reach; use bfloat16, or fp16 "
                "with ZeRO 1"
            )
        self.stacks = stage < 3 and not engine.zero_use_cpu_optimizer()
        self.per_task = PER_TASK_PASSES if self.stacks else f"ZeRO 0 to 2 without offload, with {PER_TASK_PASSES}"
        self.one_backward = stage == 3
        self.can_discard = self.stacks and hasattr(getattr(engine, "optimizer", None), "check_grad_overflow")
        self._own_forward = False
        engine.register_forward_pre_hook(self._record_forward)

    def _record_forward(self, *_: Any) -> None:
        self._own_forward = torch.is_grad_enabled()

    def learn_names(self, model: nn.Module) -> None:
        """Keep the names of the engine's module."""

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return parameters

    def model(self, training_pass: bool) -> Any:
        # engine(...) prepares DeepSpeed for engine.backward, so it is only for forwards before one.
        return self.engine if training_pass else self.engine.module

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        """Return the autocast context of engine(...), which engine.module(...) lacks."""
        if training_pass or not self.engine.torch_autocast_enabled():
            return nullcontext()
        return torch.autocast(self.device.type, self.engine.torch_autocast_dtype())

    def backward(self, loss: Tensor, last: bool) -> None:
        self._own_forward = False
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.factor, scale_wrt_gas=False)

    def wants_float32(self) -> bool:
        """Return True if the surrogate's backward may multiply by a loss scale.

        The scale is that of fp16, or one that the user has set.
        """
        return self.engine.fp16_enabled() or bool(getattr(self.engine.optimizer, "custom_loss_scaler", False))

    def sum_over_ranks(self, gradients: Merged, reached: Collection[int]) -> Collection[int]:
        """Return `reached`: DeepSpeed reduces the gradients after `hand_over`."""
        return reached

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        """Hand over the gradients of all parameters, reached or not.

        DeepSpeed replaces missing gradients by zeros in every stage.
        """
        self._carry([gradients.pop(id(parameter)) for parameter in self.parameters], self.parameters)

    def check_trained(self) -> None:
        for name, parameter in self._named_parameters:
            if parameter.requires_grad != (id(parameter) in self.names):
                raise changed(name, parameter, "the engine (deepspeed.initialize) and GradientSurgery")

    def _carry(self, merged: list[Tensor], parameters: list[nn.Parameter], scaled_by: float = 1.0) -> None:
        """Make `merged` the gradients of `parameters` by engine.backward, and empty the list.

        scaled_by: the loss scale that the gradients already contain.
        """
        self.engine.set_gradient_accumulation_boundary(True)
        scale = scaled_by if self.wants_float32() else None
        self.engine.backward(Surrogate.apply(merged, scale, *parameters), scale_wrt_gas=False)

    def check_norm(self, parameters: Sequence[nn.Parameter], expected: float) -> None:
        pass

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        return None

    def begin(self) -> None:
        pass

    def check_forward(self) -> None:
        if self._own_forward:
            raise UserError(
                "the losses come from engine(...), which prepares DeepSpeed for a backward of its own: call "
                "engine.module(...) in their place"
            )

    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def backs_off(self) -> bool:
        """Return True if DeepSpeed reduces its loss scale and skips the step after an overflow.

        False also at the smallest loss scale, where an overflow is an error.
        """
        if not self.engine.fp16_enabled() or not self.engine.optimizer.dynamic_loss_scale:
            return False
        return self.loss_scale() > self.engine.optimizer.loss_scaler.min_scale

    def discard(self) -> None:
        """Drop the gradients and skip the update, by engine.step() with its overflow check on.

        The check finds that the gradients are not finite.
        """
        optimizer = self.engine.optimizer
        before, optimizer.check_grad_overflow = optimizer.check_grad_overflow, True
        try:
            self.engine.step()
        finally:
            optimizer.check_grad_overflow = before
