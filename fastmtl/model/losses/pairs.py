"""Losses of the vectors u and v of a pair's two sequences, for tasks with `pairs: bi`.

They do not read the outputs of the task's head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.heads.cosine import cosine_of
from fastmtl.model.losses.rank_rows import gather_rows
from fastmtl.model.precision import precise


class PairLoss(Protocol):
    """A loss of u and v. types: the task types that it supports, such as binary."""

    types: tuple[str, ...]

    def __init__(self, task: TaskConfig) -> None: ...

    def __call__(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """Return one loss per pair, [E], in float32 or wider.

        u, v: [E, d], the vectors of the pairs' sequences. labels: [E], as in PackedBatch.
        """
        ...


class CosineEmbedding(PairLoss):
    """1 - cos(u, v) for pairs of class 1, max(0, cos(u, v) - margin) for pairs of class 0."""

    types = ("binary",)

    def __init__(self, task: TaskConfig) -> None:
        self.margin = task.margin

    def __call__(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        cosine = cosine_of(u, v)
        return torch.where(labels > 0.5, 1 - cosine, (cosine - self.margin).clamp(min=0))


class MultipleNegatives(PairLoss):
    """Multiple negatives ranking: - S(u_i, v_i) + log sum_j exp S(u_i, v_j), with S = scale cos.

    Each similar pair i is compared with all similar pairs j. K of the E pairs in the batch of all
    ranks are similar: those of class 1, or in regression those with a label of at least
    low + mnr.similar (high - low). The formula's loss of a similar pair is multiplied by E / K; the
    loss of any other pair is 0. The mean over all E pairs is then the formula's mean over the K.
    Source: Henderson et al. 2017, equation 4.
    """

    types = ("binary", "regression")

    def __init__(self, task: TaskConfig) -> None:
        self.scale = task.mnr.scale
        low, high = task.range or (0.0, 1.0)
        self.least = low + task.mnr.similar * (high - low) if task.type == "regression" else 0.5

    def __call__(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        u, v = (functional.normalize(precise(x), dim=1) for x in (u, v))
        similar = labels >= self.least
        rows = gather_rows(torch.cat([v, similar[:, None].to(v.dtype)], dim=1))
        others, mask = rows[:, :-1], rows[:, -1] > 0.5
        # Masks exclude the pairs that are not similar; indexing would wait for the device.
        scores = (self.scale * u @ others.T).masked_fill(~mask, -torch.inf).where(similar[:, None], 0.0)
        factor = len(rows) / mask.sum().clamp(min=1)
        losses = scores.logsumexp(dim=1) - self.scale * (u * v).sum(1)
        return losses.where(similar, 0.0) * factor


PAIR_LOSSES: dict[str, type[PairLoss]] = {"cosine_embedding": CosineEmbedding, "mnr": MultipleNegatives}
