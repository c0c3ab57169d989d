"""What every way of doing a step works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.differentiate import Term, differentiate
from fastmtl.surgery.ranks.reduce import sum_over_ranks
from fastmtl.surgery.sinks.task_gradients import TaskGradients
from fastmtl.surgery.solver import Solver
from fastmtl.surgery.targets.target import Target


@dataclass(frozen=True)
class Parts:
    """shared: the parameters that surgery is about. own: the tasks' own, which get their own gradient. max_norm: of the
    whole gradient, None where the target clips.
    """

    target: Target
    sink: TaskGradients
    solver: Solver
    tasks: list[str]
    shared: list[nn.Parameter]
    own: list[nn.Parameter]
    max_norm: float | None = None

    def one_pass(self, terms: Sequence[Term], own: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        """Differentiates a loss: all task gradients of the shared parameters go into the armed sink, those of `own` are
        returned.

        Raises UserError where a shared parameter's gradient goes past the sink.
        """
        # Shared parameters are asked for only to see that autograd has nothing for them: layers that write into the
        # sink give None, any other op's gradient would be lost.
        anchor, *rest = differentiate(terms, [self.sink.anchor, *own, *self.shared], self.target.names)
        if anchor is None:
            raise UserError(
                "loss_fn takes task_grads but the model does not use it: pass it to the layers, embedding included, or "
                "leave it out for one backward pass per task"
            )
        for parameter, gradient in zip(self.shared, rest[len(own) :], strict=True):
            if gradient is not None:
                raise UserError(
                    f"shared parameter {self.target.names[id(parameter)]} is used by an op that does not write into "
                    "task_grads: use the ops of fastmtl.surgery.functional for it, or leave it out of `shared`"
                )
        return rest[: len(own)]

    @contextmanager
    def own_watched(self) -> Iterator[Tensor]:
        """float64 [own]: above 0 for those whose gradient is not finite in a backward of the target inside the block.
        It goes into the target as it comes; `check_own` tells afterwards.
        """
        bad = torch.zeros(len(self.own), dtype=torch.float64, device=self.target.device)

        def note(k: int) -> Callable[[Tensor], None]:
            def add(gradient: Tensor) -> None:
                bad[k] += ~torch.isfinite(gradient.norm())

            return add

        handles = [parameter.register_hook(note(k)) for k, parameter in enumerate(self.own)]
        try:
            yield bad
        finally:
            for handle in handles:
                handle.remove()

    def check_own(self, bad: Tensor) -> None:
        """Stops the run before the update with what is not finite, unless fp16 backs off from it. Waits for the
        device.
        """
        for parameter, count in zip(self.own, sum_over_ranks(bad).tolist(), strict=True):
            if count and not self.target.backs_off():
                self.solver.stop_at("gradient", self.target.names[id(parameter)])
