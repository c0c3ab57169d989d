"""The objects that every step uses, and a check of the gradients of parameters of one task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.surgery.attach.attachment import Attachment
from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.ranks.collectives import sum_over_ranks
from fastmtl.surgery.solver import Solver
from fastmtl.surgery.targets.protocol import Target
from fastmtl.surgery.verify.verifier import Verifier


@dataclass(frozen=True)
class Parts:
    """Objects that GradientSurgery creates once and that every step uses.

    shared: parameters whose task gradients are merged. own: parameters that belong to one task and
    get their own gradient. max_norm: bound of the whole gradient's norm; None where the target
    clips. attached: surgery inside the user's model, if there is one. verifier: compares steps with
    a pass per task, None if none does.
    """

    target: Target
    solver: Solver
    tasks: list[str]
    shared: list[nn.Parameter]
    own: list[nn.Parameter]
    max_norm: float | None = None
    attached: Attachment | None = None
    verifier: Verifier | None = None

    @contextmanager
    def flag_nonfinite_own(self) -> Iterator[Tensor]:
        """Yield float64 [len(own)], how often each own parameter got a gradient that is not finite.

        Backward passes inside the block are counted. The gradients reach the target unchanged; pass
        the counts to `check_own` afterwards.
        """
        bad = torch.zeros(len(self.own), dtype=torch.float64, device=self.target.device)

        def flag(k: int, parameter: Any) -> Any:
            def add(gradient: Tensor) -> None:
                bad[k] += ~torch.isfinite(gradient.norm())

            if is_sharded(parameter):  # FSDP calls no hook of the gradient itself
                return parameter.register_post_accumulate_grad_hook(lambda p: add(p.grad.to_local()))
            return parameter.register_hook(add)

        handles = [flag(k, parameter) for k, parameter in enumerate(self.own)]
        try:
            yield bad
        finally:
            for handle in handles:
                handle.remove()

    def check_own(self, bad: Tensor) -> None:
        """Raise TrainingError if an own gradient was not finite on some rank, before the update.

        bad: from `flag_nonfinite_own`. With a dynamic fp16 loss scale there is no error, since
        DeepSpeed skips the step. Waits for the device.
        """
        for parameter, count in zip(self.own, sum_over_ranks(bad).tolist(), strict=True):
            if count and not self.target.backs_off():
                self.solver.fail("gradient", self.target.names[id(parameter)])
