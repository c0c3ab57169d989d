"""The report about one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.surgery.stopwatch import Stopwatch


@dataclass(frozen=True)
class SurgeryInfo:
    """Report of a step, over all ranks.

    losses: mean loss of each task that had rows.
    cosines: [T, T], between task gradients; NaN for an absent task.
    conflict_rate: share of the task pairs with a negative cosine.
    task_norms: [T], norms of the task gradients.
    weights: [T], weights of the task gradients in the merged gradient.
    merged_norm: norm of the merged gradient of the shared parameters, before clipping.
    own_norm: norm of the gradients of parameters that belong to one task, before clipping.
    total_norm: norm of the gradient of all trained parameters, before clipping.
    skipped: name of the task, or of the parameter of a single task, whose gradient is not finite:
    do not call step() then. None for a valid step.
    stop: True if any rank requests the end of training after this step.
    nbytes: size of J on this rank, or of the buffers that replace it.
    stopwatch: measures the time that surgery added to the step; see `seconds`.

    cosines, conflict_rate, task_norms, weights and merged_norm are None for `sum`, and where an
    fp16 overflow makes DeepSpeed reduce its loss scale. own_norm and total_norm are None without
    `max_norm`. With `scope="tensor"` weights is None, since each tensor has its own weights. With
    `reduce="local"` each rank has its own weights, so weights and merged_norm are None, and the
    other fields describe the mean of the ranks' Gramians.
    """

    losses: dict[str, float]
    cosines: Tensor | None = None
    conflict_rate: float | None = None
    task_norms: Tensor | None = None
    weights: Tensor | None = None
    merged_norm: float | None = None
    own_norm: float | None = None
    total_norm: float | None = None
    skipped: str | None = None
    stop: bool = False
    nbytes: int = 0
    stopwatch: Stopwatch | None = None

    @property
    def seconds(self) -> float:
        """Seconds that surgery added on this rank: Gramian, reductions, weights and merging.

        With `replay`, the first pass counts too. 0 with `scope="tensor"`, where surgery runs inside
        backward. Waits for the device.
        """
        return 0.0 if self.stopwatch is None else self.stopwatch.seconds()

    @classmethod
    def of_gramian(
        cls,
        losses: dict[str, float],
        gram: np.ndarray,
        weights: np.ndarray | None,
        merged_square: float | None,
        **more: Any,
    ) -> SurgeryInfo:
        """Return the report for G [T, T] and the weights [T], both float32.

        merged_square: squared norm of the merged gradient. more: the other fields. The computation
        is in numpy: torch would call a hundred operators for a few numbers.
        """
        norms = np.sqrt(gram.diagonal().clip(min=0))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            cosines = gram / np.outer(norms, norms)
        cosines[norms == 0, :] = cosines[:, norms == 0] = np.nan
        upper = cosines[np.triu_indices_from(cosines, k=1)]
        upper = upper[~np.isnan(upper)]
        return cls(
            losses=losses,
            cosines=torch.from_numpy(cosines),
            conflict_rate=float((upper < 0).astype(np.float32).mean()) if len(upper) else 0.0,
            task_norms=torch.from_numpy(norms),
            weights=None if weights is None else torch.from_numpy(weights),
            merged_norm=None if merged_square is None else max(merged_square, 0.0) ** 0.5,
            **more,
        )
