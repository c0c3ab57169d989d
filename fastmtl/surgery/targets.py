"""What surgery needs of the thing that owns the parameters: a DeepSpeed engine, or a torch optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.surgery.reduce import world_size


class Target(Protocol):
    """Takes a step's gradients, from losses or merged already."""

    parameters: list[nn.Parameter]
    device: torch.device
    stacks: bool  # whether merged gradients can be handed over; otherwise replay

    def model(self, training_pass: bool) -> Any: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def hand_over(self, gradients: Mapping[int, Tensor]) -> None: ...
    def loss_scale(self) -> float: ...


class OptimizerTarget:
    """A torch optimiser in one process: merged gradients go into `.grad`."""

    stacks = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if world_size() > 1:
            raise ValueError(
                "target: with several processes use a DeepSpeed engine, a torch optimiser does not reduce gradients"
            )
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.device = self.parameters[0].device
        self._optimizer = optimizer

    def model(self, training_pass: bool) -> None:
        """The user's loss function knows its model."""

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def hand_over(self, gradients: Mapping[int, Tensor]) -> None:
        for parameter in self.parameters:
            gradient = gradients[id(parameter)].to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def loss_scale(self) -> float:
        return 1.0


class EngineTarget:
    """A DeepSpeed engine, by its public calls. DeepSpeed averages over ranks, so gradients are handed over times their
    number.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.device = torch.device(engine.device)
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad]
        stage = engine.zero_optimization_stage()
        if engine.fp16_enabled() and stage == 0:
            raise ValueError(
                "fp16 with ZeRO 0: DeepSpeed does not scale that loss while its optimiser divides; use ZeRO 1"
            )
        self.stacks = stage < 3 and not engine.zero_use_cpu_optimizer()

    def model(self, training_pass: bool) -> Any:
        # engine(...) prepares DeepSpeed for a backward of its own: only for a forward that engine.backward follows.
        return self.engine if training_pass else self.engine.module

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world_size(), scale_wrt_gas=False)

    def hand_over(self, gradients: Mapping[int, Tensor]) -> None:
        merged = [gradients[id(parameter)] * world_size() for parameter in self.parameters]
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(_Surrogate.apply(merged, *self.parameters), scale_wrt_gas=False)

    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0


class _Surrogate(torch.autograd.Function):
    """A scalar whose gradient for parameter k is `merged[k]`: it carries gradients made elsewhere through every hook of
    DeepSpeed.
    """

    @staticmethod
    def forward(ctx: Any, merged: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.merged = merged
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return merged[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        merged, ctx.merged = ctx.merged, None
        return None, *((g * scale).to(dtype) for g, dtype in zip(merged, ctx.dtypes, strict=True))


def find_target(target: Any) -> Target:
    if isinstance(target, torch.optim.Optimizer):
        return OptimizerTarget(target)
    if hasattr(target, "zero_optimization_stage") and hasattr(target, "module"):
        return EngineTarget(target)
    raise ValueError(f"target: expected a DeepSpeed engine or a torch optimiser, got {type(target).__name__}")
