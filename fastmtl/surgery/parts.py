"""The target, the solver and the parameters of a step, and the gradients that belong to one task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmtl.surgery.ranks.collectives import sum_over_ranks
from fastmtl.surgery.solver import Solver
from fastmtl.surgery.targets.protocol import Target


@dataclass(frozen=True)
class Parts:
    """Fixed parts of every step.

    shared: the parameters whose task gradients are merged. own: the parameters of one task each, which get their own
    gradient. max_norm: of the whole gradient, None where the target clips.
    """

    target: Target
    solver: Solver
    tasks: list[str]
    shared: list[nn.Parameter]
    own: list[nn.Parameter]
    max_norm: float | None = None

    @contextmanager
    def own_watched(self) -> Iterator[Tensor]:
        """Yield a float64 [own]: above 0 for parameters whose gradient is not finite in a backward of the target inside
        the block. The gradient goes into the target as it comes; `check_own` raises afterwards.
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
        """Raise TrainingError before the update for a gradient that is not finite, unless fp16 backs off from it.
        Waits for the device.
        """
        for parameter, count in zip(self.own, sum_over_ranks(bad).tolist(), strict=True):
            if count and not self.target.backs_off():
                self.solver.stop_at("gradient", self.target.names[id(parameter)])
