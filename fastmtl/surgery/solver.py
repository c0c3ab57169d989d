"""Task weights from the Gramian of a step, and the decision to skip a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import TrainingError, UserError
from fastmtl.surgery.balance import Balance
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.step_losses import Step
from fastmtl.surgery.targets.protocol import Target

log = logging.getLogger(__name__)

MAX_SKIPPED = 5


class Solver:
    """State of surgery: the step's number, skipped steps, and the state of the method.

    name: the method's name. seed: fixes the projection order, together with the step's number.
    by_rank: True if each rank has its own Gramian (`reduce: local`). balance: weights of the task
    gradients before the method sees them; None for 1.
    """

    def __init__(
        self,
        method: Method | None,
        name: str,
        tasks: list[str],
        seed: int,
        *,
        by_rank: bool,
        balance: Balance | None = None,
    ) -> None:
        self.method, self.name, self.tasks, self.balance = method, name, tasks, balance
        self._seed, self._by_rank = seed, by_rank
        self._step = self._skipped = self._skipped_in_a_row = 0

    @property
    def step_seed(self) -> int:
        """Seed of this step's count-sketch, the same on every rank."""
        return (self._seed * 1_000_003 + self._step) % (1 << 31)

    @property
    def step(self) -> int:
        """Number of this step, from 1; it continues after `load_state_dict`."""
        return self._step

    def next_step(self) -> None:
        self._step += 1

    def order(self) -> Tensor:
        """Return the projection order of this step, int64 [T, T] on the host."""
        return draw_order(len(self.tasks), self._seed, self._step)

    def weights(self, gram: Tensor, index: int | None = None) -> Tensor:
        """Return weights [T] for G [T, T], on its device.

        index: the parameter tensor that G belongs to; None for the G of all parameters.
        """
        assert self.method is not None
        method = self.method if index is None else self.method.of_tensor(index)
        order = self.order()
        if gram.device.type == "cuda":
            order = order.pin_memory().to(gram.device, non_blocking=True)
        return method.weights(gram, order)

    def solve(
        self,
        gram: Tensor,
        step: Step,
        target: Target,
        own: Sequence[Tensor] = (),
        own_names: Sequence[str] = (),
        own_scale: float | None = None,
    ) -> tuple[SurgeryInfo, Tensor]:
        """Return the report of a step and its weights [T].

        All weights are NaN after an overflow that the target must find in the merged gradient, to
        reduce its loss scale. Arguments: see `report`.
        """
        if self.balance is None:
            weights = self.weights(gram)
        else:
            factors = self.balance.weights(gram)
            weights = factors * self.weights(gram * torch.outer(factors, factors))
        info, overflow = self.report(gram, weights, step, target, own, own_names, own_scale)
        if self.balance is not None:
            self.balance.finish(accepted=info.skipped is None and not overflow)
        return info, torch.full_like(weights, float("nan")) if overflow else weights

    def report(
        self,
        gram: Tensor,
        weights: Tensor,
        step: Step,
        target: Target,
        own: Sequence[Tensor] = (),
        own_names: Sequence[str] = (),
        own_scale: float | None = None,
    ) -> tuple[SurgeryInfo, bool]:
        """Check for non-finite gradients and build the SurgeryInfo.

        own: gradients of parameters that belong to one task; they are checked too. own_names: names
        of these parameters. own_scale: requests the norm of `own`, which must be sums over ranks;
        the loss scale that they contain. None: no norm.

        Returns the report, and True after an overflow that the target must find in the gradients,
        to reduce its loss scale. Costs one small reduction and one wait for the device.
        """
        num_tasks = len(self.tasks)
        norms = torch.stack(torch._foreach_norm(list(own))).double() if own else gram.new_zeros(0, dtype=torch.float64)
        extra = sum_over_ranks(torch.cat([step.sums, (~norms.isfinite()).double()]))
        reported = sum_over_ranks(gram.clone()) / world_size() if self._by_rank else gram
        host = torch.cat([reported.flatten().double(), weights.double(), extra, norms]).cpu().numpy()
        counts = [num_tasks**2, num_tasks, num_tasks + 1, len(own)]
        host_gram, host_weights, sums, flags, host_norms = np.split(host, np.cumsum(counts))
        host_gram = host_gram.reshape(num_tasks, num_tasks)
        losses, stop = step.summarize(sums.tolist())
        finite = np.isfinite(host_gram.diagonal()).tolist()
        bad = [name for name, good in zip(self.tasks, finite, strict=True) if not good]
        bad += [name for name, flag in zip(own_names, flags.tolist(), strict=True) if flag]
        if not bad:
            self.count_finite_step()
            merged = None if self._by_rank else float(host_weights @ host_gram @ host_weights)
            reported_weights = None if self._by_rank else host_weights.astype(np.float32)
            own_norm = None if own_scale is None else float(np.linalg.norm(host_norms)) / own_scale
            gram32 = host_gram.astype(np.float32)
            return SurgeryInfo.of_gramian(losses, gram32, reported_weights, merged, own_norm=own_norm, stop=stop), False
        if target.backs_off():  # DeepSpeed reduces its loss scale if it finds the overflow itself
            return SurgeryInfo(losses=losses, stop=stop), True
        self.skip(bad[0])
        return SurgeryInfo(losses=losses, skipped=bad[0], stop=stop), False

    def count_finite_step(self) -> None:
        """Count a step whose gradients are finite."""
        self._skipped_in_a_row = 0

    def skip(self, name: str) -> None:
        """Count a step that is skipped because the gradient of `name` is not finite.

        Raises TrainingError for the fifth one in a row.
        """
        self._skipped += 1
        self._skipped_in_a_row += 1
        log.warning("step %d skipped: the gradient of %s is not finite", self._step, name)
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(f"the gradient of {name} was not finite in {MAX_SKIPPED} steps in a row: {_ADVICE}")

    def fail(self, what: str, name: str) -> None:
        """Raise TrainingError for a step that cannot be skipped because the target already has the
        gradient.
        """
        raise TrainingError(f"the {what} of {name} is not finite at step {self._step}, before its update: {_ADVICE}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "step": self._step,
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "method": self.name,
            "method_state": {} if self.method is None else self.method.state_dict(),
            **({} if self.balance is None else {"balance": self.balance.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["method"] != self.name:
            raise UserError(
                f"the saved state is of gradient method {state['method']}, not {self.name}: keep the method, "
                "or start a new run from the saved model"
            )
        self._seed, self._step = state["seed"], state["step"]
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.method is not None:
            self.method.load_state_dict(dict(state["method_state"]))
        if self.balance is not None:
            if "balance" not in state:
                raise UserError(
                    "the saved state is of a run whose task weights did not follow excess risks: keep its weighting, "
                    "or start a new run from the saved model"
                )
            self.balance.load_state_dict(state["balance"])


_ADVICE = "lower optimizer.lr, lengthen schedule.warmup, or look for broken rows of that task"
