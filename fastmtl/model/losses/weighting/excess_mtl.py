"""Task weights `excess_mtl`: a task far above its smallest possible loss gets more weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.surgery.balance import EPSILON, RiskWeights
from fastmtl_kernels.upload import upload


class _State(NamedTuple):
    """Numbers [T], float64. steps: with a gradient of the task. risks: summed for the baseline."""

    logits: Tensor
    steps: Tensor
    risks: Tensor


class ExcessMTL(RiskWeights):
    """w = T softmax(x), where each step adds `step_size` E_t / B_t to x_t.

    E_t is the task's excess risk, which fastmtl.surgery.balance computes. B_t is its mean over the
    task's first `warmup_steps` steps, in which w_t keeps its value. Without a warm-up, B_t is E_t
    of the first step, and this step adds `step_size` E_t itself, which grows with the number of
    parameters. Tasks without a gradient in a step keep their weights.
    Source: He et al. 2024, "Robust Multi-Task Learning with Excess Risks", equation 9, with weights
    that add up to T, as those of `fixed`, not to 1.
    """

    def __init__(self, num_tasks: int, step_size: float = 0.01, warmup_steps: int = 10) -> None:
        self._step_size, self._warmup = step_size, warmup_steps
        zeros = torch.zeros(num_tasks, dtype=torch.float64)
        self._now = self._next = _State(zeros, zeros, zeros)

    def weights(self, risks: Tensor, present: Tensor) -> Tensor:
        now = _State(*(upload(value, risks.device) for value in self._now))
        total = now.risks + risks.where(present & (now.steps < max(self._warmup, 1)), 0.0)
        relative = risks / (total / max(self._warmup, 1) + EPSILON)
        if self._warmup == 0:
            relative = risks.where(now.steps == 0, relative)
        moves = present & (now.steps >= self._warmup)
        raised = now.logits + (self._step_size * relative).where(moves, 0.0)
        # The tasks that move share the weight that they had together.
        still = torch.full_like(raised, -torch.inf)
        shift = now.logits.where(moves, still).logsumexp(0) - raised.where(moves, still).logsumexp(0)
        logits = (raised + shift).where(moves, now.logits).log_softmax(0)
        self._now, self._next = now, _State(logits, now.steps + present, total)
        return len(logits) * logits.exp()

    def accept(self) -> None:
        self._now = self._next

    def state_dict(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in self._now._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._now = _State(**{name: torch.tensor(values, dtype=torch.float64) for name, values in state.items()})
