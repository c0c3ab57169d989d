"""The weights of a step from its Gramian, and the decision to skip a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import TrainingError, UserError
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.step import Step, SurgeryInfo
from fastmtl.surgery.targets.protocol import Target

log = logging.getLogger(__name__)

MAX_SKIPPED = 5


class Solver:
    """The state of surgery: the step's number (with `seed` it fixes the order), skipped steps, the method's state.

    name: of the method. by_rank: each rank has a Gramian of its own (`reduce: local`).
    """

    def __init__(self, method: Method | None, name: str, tasks: list[str], seed: int, *, by_rank: bool) -> None:
        self.method, self.name, self.tasks = method, name, tasks
        self._seed, self._by_rank = seed, by_rank
        self._step = self._skipped = self._skipped_in_a_row = 0

    @property
    def step_seed(self) -> int:
        """The seed of this step, the same on every rank."""
        return (self._seed * 1_000_003 + self._step) % (1 << 31)

    def next_step(self) -> None:
        self._step += 1

    def order(self) -> Tensor:
        """Return the projection order of this step, int64 [T, T] on the host."""
        return draw_order(len(self.tasks), self._seed, self._step)

    def weights(self, gram: Tensor, index: int | None = None) -> Tensor:
        """Return weights [T] for G [T, T], on its device. index: of the parameter tensor that G is of, None for all."""
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
        """Return the report of a step and its weights, NaN where the target has to see an overflow (see `judge`)."""
        weights = self.weights(gram)
        info, spoilt = self.judge(gram, weights, step, target, own, own_names, own_scale)
        return info, torch.full_like(weights, float("nan")) if spoilt else weights

    def judge(
        self,
        gram: Tensor,
        weights: Tensor,
        step: Step,
        target: Target,
        own: Sequence[Tensor] = (),
        own_names: Sequence[str] = (),
        own_scale: float | None = None,
    ) -> tuple[SurgeryInfo, bool]:
        """Check for gradients that are not finite and build the SurgeryInfo: one small reduction and one wait for the
        device. Returns the report, and whether the target has to see an overflow in the gradients.

        own: gradients of the tasks' own parameters, which are checked too. own_scale: the factor in them, where they
        are sums over ranks and their norm is asked for.
        """
        num_tasks = len(self.tasks)
        norms = torch.stack(torch._foreach_norm(list(own))).double() if own else gram.new_zeros(0, dtype=torch.float64)
        extra = sum_over_ranks(torch.cat([step.sums, (~norms.isfinite()).double()]))
        shown = sum_over_ranks(gram.clone()) / world_size() if self._by_rank else gram
        host = torch.cat([shown.flatten().double(), weights.double(), extra, norms]).cpu().numpy()
        counts = [num_tasks**2, num_tasks, num_tasks + 1, len(own)]
        host_gram, host_weights, sums, flags, host_norms = np.split(host, np.cumsum(counts))
        host_gram = host_gram.reshape(num_tasks, num_tasks)
        losses, stop = step.summarize(sums.tolist())
        finite = np.isfinite(host_gram.diagonal()).tolist()
        bad = [name for name, good in zip(self.tasks, finite, strict=True) if not good]
        bad += [name for name, flag in zip(own_names, flags.tolist(), strict=True) if flag]
        if not bad:
            self.good_step()
            merged = None if self._by_rank else float(host_weights @ host_gram @ host_weights)
            shown_weights = None if self._by_rank else host_weights.astype(np.float32)
            of_own = None if own_scale is None else float(np.linalg.norm(host_norms)) / own_scale
            narrow = host_gram.astype(np.float32)
            return SurgeryInfo.of_gramian(losses, narrow, shown_weights, merged, own_norm=of_own, stop=stop), False
        if target.backs_off():  # it has to see the overflow in the gradients
            return SurgeryInfo(losses=losses, stop=stop), True
        self.skip(bad[0])
        return SurgeryInfo(losses=losses, skipped=bad[0], stop=stop), False

    def good_step(self) -> None:
        """Count a step whose gradients are finite."""
        self._skipped_in_a_row = 0

    def skip(self, name: str) -> None:
        """Count a step that is skipped for the gradient of `name`. Raises TrainingError for the fifth in a row."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        log.warning("step %d skipped: the gradient of %s is not finite", self._step, name)
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(f"the gradient of {name} was not finite in {MAX_SKIPPED} steps in a row: {_ADVICE}")

    def stop_at(self, what: str, name: str) -> None:
        """Raise TrainingError for a step that cannot be skipped: the target has the gradient already."""
        raise TrainingError(f"the {what} of {name} is not finite at step {self._step}, before its update: {_ADVICE}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "step": self._step,
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "method": self.name,
            "method_state": {} if self.method is None else self.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["method"] != self.name:
            raise UserError(
                f"the state to go on from is of gradient method {state['method']}, not {self.name}: keep the method, "
                "or begin a new run from the saved model"
            )
        self._seed, self._step = state["seed"], state["step"]
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.method is not None:
            self.method.load_state_dict(dict(state["method_state"]))


_ADVICE = "lower optimizer.lr, lengthen schedule.warmup, or look for broken rows of that task"
