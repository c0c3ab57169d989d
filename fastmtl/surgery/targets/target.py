"""What surgery needs of the thing that owns the parameters: a DeepSpeed engine, or a torch optimiser."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.reduce import world_size
from fastmtl.surgery.targets.adamw import SurgeryAdamW
from fastmtl.surgery.targets.flat import FlatParameters
from fastmtl.surgery.targets.surrogate import Surrogate
from fastmtl_kernels.cast import cast


class Target(Protocol):
    """Takes a step's gradients, from losses or merged already.

    names: of the trainable parameters by id, for messages. arranged: parameters in the order in which J is to have
    them. stacks: whether merged gradients can be handed over; otherwise replay. merges: whether there may be a
    `merging_optimizer`. factor: what merged gradients are to be multiplied by before they are. scales: whether the
    target multiplies them once more, so that they are to be float32 until then. hand_over: takes every
    gradient out of the mapping, for one that nobody else holds becomes `.grad` as it is, any other is copied; reached:
    ids of the parameters that a loss of the step has reached on this rank, other gradients are zeros.
    merging_optimizer: the one that is to be given task gradients in place of that, None where there is none; norm: of
    the merged gradient, None where it is not known. check_trained: raises UserError where other parameters are
    trainable than when the target was made. begin: raises UserError where a step's first gradient comes too early.
    takes_back: whether `take_back` can drop gradients that are not finite after they were handed over.
    check_forward: raises UserError where losses whose gradients will be handed over come from the target's own forward.
    """

    parameters: list[nn.Parameter]
    names: dict[int, str]
    device: torch.device
    stacks: bool
    merges: bool
    takes_back: bool
    factor: float

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]: ...
    def model(self, training_pass: bool) -> Any: ...
    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def scales(self) -> bool: ...
    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None: ...
    def check_trained(self) -> None: ...
    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None: ...
    def begin(self) -> None: ...
    def check_forward(self) -> None: ...
    def loss_scale(self) -> float: ...
    def backs_off(self) -> bool: ...
    def take_back(self) -> None: ...


class OptimizerTarget:
    """A torch optimiser in one process: merged gradients go into `.grad`, or SurgeryAdamW merges them itself."""

    stacks = True
    factor = 1.0
    takes_back = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if world_size() > 1:
            raise UserError(
                "target: with several processes use a DeepSpeed engine, a torch optimiser does not reduce gradients"
            )
        self._merging = optimizer if isinstance(optimizer, SurgeryAdamW) else None
        self.merges = self._merging is not None
        self._groups = optimizer.param_groups
        every = {id(p): p for p in self._every()}  # torch lets a parameter be in a group twice
        self.parameters = [p for p in every.values() if p.requires_grad]
        if not self.parameters:
            raise UserError("target: no parameter of the optimiser requires a gradient")
        self.names = {
            key: f"number {k} of the optimiser" for k, (key, p) in enumerate(every.items()) if p.requires_grad
        }
        self.device = self.parameters[0].device

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return parameters

    def model(self, training_pass: bool) -> None:
        """The user's loss function knows its model."""

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def scales(self) -> bool:
        return False

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        for parameter in self.parameters:
            gradient = cast(gradients.pop(id(parameter)), parameter.dtype)
            if id(parameter) in reached:  # else no gradient, so that no weight decay and no momentum move it either
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def check_trained(self) -> None:
        for k, parameter in enumerate(self._every()):
            if parameter.requires_grad != (id(parameter) in self.names):
                raise _changed(f"number {k} of the optimiser", parameter, "GradientSurgery")

    def _every(self) -> Iterator[nn.Parameter]:
        return (p for group in self._groups for p in group["params"])

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        if self._merging is None or (self._merging.max_norm is not None and norm is None):
            return None
        # What is in `.grad` already is to be added to, as every torch optimiser's user expects.
        return self._merging if all(parameter.grad is None for parameter in self.parameters) else None

    def begin(self) -> None:
        if self._merging is not None:
            self._merging.check_taken()

    def check_forward(self) -> None:
        pass

    def loss_scale(self) -> float:
        return 1.0

    def backs_off(self) -> bool:
        return False

    def take_back(self) -> None:
        raise NotImplementedError("gradients in `.grad` are the user's")


class EngineTarget:
    """A DeepSpeed engine, by its public calls. DeepSpeed averages over ranks, so gradients are handed over times their
    number.
    """

    merges = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.device = torch.device(engine.device)
        self._every = list(engine.module.named_parameters())
        self.names = {id(p): name for name, p in self._every if p.requires_grad}
        self.parameters = [p for _, p in self._every if p.requires_grad]
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
        self.takes_back = self.stacks and hasattr(getattr(engine, "optimizer", None), "check_grad_overflow")
        self._own_forward = False
        engine.register_forward_pre_hook(self._saw_forward)

    def _saw_forward(self, *_: Any) -> None:
        self._own_forward = torch.is_grad_enabled()

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return parameters

    def model(self, training_pass: bool) -> Any:
        # engine(...) prepares DeepSpeed for a backward of its own: only for a forward that engine.backward follows.
        return self.engine if training_pass else self.engine.module

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        """What engine(...) runs its forward in, and engine.module(...) does not."""
        if training_pass or not self.engine.torch_autocast_enabled():
            return nullcontext()
        return torch.autocast(self.device.type, self.engine.torch_autocast_dtype())

    def backward(self, loss: Tensor, last: bool) -> None:
        self._own_forward = False
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.factor, scale_wrt_gas=False)

    def scales(self) -> bool:
        """Whether a loss scale may come with the surrogate's backward: that of fp16, or one of the user's own."""
        return self.engine.fp16_enabled() or bool(getattr(self.engine.optimizer, "custom_loss_scaler", False))

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        """Hand over all of them: DeepSpeed puts zeros in place of a gradient that is missing, in every stage."""
        self._carry([gradients.pop(id(parameter)) for parameter in self.parameters], self.parameters)

    def check_trained(self) -> None:
        for name, parameter in self._every:
            if parameter.requires_grad != (id(parameter) in self.names):
                raise _changed(name, parameter, "the engine (deepspeed.initialize) and GradientSurgery")

    def _carry(self, merged: list[Tensor], parameters: list[nn.Parameter], scaled_by: float = 1.0) -> None:
        """Takes gradients of DeepSpeed's parameters through its backward. Takes them out of the list."""
        self.engine.set_gradient_accumulation_boundary(True)
        scale = scaled_by if self.scales() else None
        self.engine.backward(Surrogate.apply(merged, scale, *parameters), scale_wrt_gas=False)

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
        """Whether DeepSpeed answers an overflow with a smaller loss scale, so that it is no failure of the step."""
        if not self.engine.fp16_enabled() or not self.engine.optimizer.dynamic_loss_scale:
            return False
        return self.loss_scale() > self.engine.optimizer.loss_scaler.min_scale

    def take_back(self) -> None:
        """By DeepSpeed's own check for overflows: what it holds of the step is gone, and nothing is updated."""
        optimizer = self.engine.optimizer
        before, optimizer.check_grad_overflow = optimizer.check_grad_overflow, True
        try:
            self.engine.step()
        finally:
            optimizer.check_grad_overflow = before


class FlatTarget(EngineTarget):
    """An engine that has FlatParameters: autograd's gradients are of the model's own, DeepSpeed's of the flat ones."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._flat: FlatParameters = engine.module
        self._every = list(self._flat.model.named_parameters())
        self.names = {id(p): name for name, p in self._every if p.requires_grad}
        self.parameters = self._flat.leaves()
        if not self.stacks:
            raise UserError("FlatParameters: ZeRO 3 and offload take the model as it is; use ZeRO 0, 1 or 2 without")
        self._held: list[Tensor] = []

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of a flat parameter side by side, so that the merged gradient is one already."""
        wanted = {id(parameter) for parameter in parameters}
        return [parameter for parameter in self.parameters if id(parameter) in wanted]

    def model(self, training_pass: bool) -> Any:
        """Never the engine: no backward of its own follows."""
        return super().model(training_pass=False)

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        return super().autocast(training_pass=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Autograd's gradients of the model's parameters, added up here and handed over with the last ones."""
        self._own_forward = False
        self.check_trained()
        scale = self.loss_scale()
        found = differentiate([(loss, self.factor * scale)], self.parameters, self.names)
        gradients = Merged()
        for parameter, gradient in zip(self.parameters, found, strict=True):
            gradients[id(parameter)] = torch.zeros_like(parameter) if gradient is None else gradient
        del found, gradient
        gathered = unshared(self._flat.gather(gradients))
        if self._held or not last:  # in float32, for 16 bits would round every sum
            gathered = [cast(gradient, torch.float32) for gradient in gathered]
        if self._held:
            torch._foreach_add_(gathered, self._held)
        self._held = [] if last else gathered
        if last:
            self._carry(gathered, self._flat.trained(), scale)

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        self._carry(self._flat.gather(gradients), self._flat.trained())


def unshared(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients that can be changed in place: autograd gives one tensor for two parameters, or one number for all of a
    tensor's.
    """
    found, places = [], set()
    for gradient in gradients:
        alone = gradient.data_ptr() not in places and gradient.is_contiguous()
        places.add(gradient.data_ptr())
        found.append(gradient if alone else gradient.clone(memory_format=torch.contiguous_format))
    return found


def _changed(name: str, parameter: nn.Parameter, what: str) -> UserError:
    now, then = "frozen", "was trained"
    if parameter.requires_grad:
        now, then = "trained", "was frozen, or in no group of the optimiser,"
    return UserError(
        f"parameter {name} of shape {tuple(parameter.shape)} is {now}, but {then} when GradientSurgery was made: make "
        f"{what} anew after a change, and load_state_dict(surgery.state_dict()) into it to go on"
    )


def find_target(target: Any) -> Target:
    if isinstance(target, torch.optim.Optimizer):
        return OptimizerTarget(target)
    if hasattr(target, "zero_optimization_stage") and hasattr(target, "module"):
        return FlatTarget(target) if isinstance(target.module, FlatParameters) else EngineTarget(target)
    raise UserError(f"target: expected a DeepSpeed engine or a torch optimiser, got {type(target).__name__}")
