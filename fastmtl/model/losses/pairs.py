"""Losses of the vectors u and v of pairs, one value per example, for tasks with `pairs: bi`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.heads.cosine import cosine_of
from fastmtl.model.heads.features import precise
from fastmtl.model.losses.rank_rows import gather_rows


class PairLoss(Protocol):
    """A loss of u and v. types: the types of tasks that it supports."""

    types: tuple[str, ...]

    def __init__(self, task: TaskConfig) -> None: ...

    def __call__(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """Map u, v [E, d] and labels [E] to losses [E], float32 at least."""
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

    i and j run over the K similar pairs among the E pairs of the batch on all ranks. Similar are
    pairs of class 1, or with a label of at least low + similar (high - low). The loss of a similar
    pair is multiplied by E / K, that of another pair is 0. The mean over all rows is then the
    formula's mean over similar pairs.
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
        # Masks remove rows and columns of other pairs; indexing would wait for the device.
        scores = (self.scale * u @ others.T).masked_fill(~mask, -torch.inf).where(similar[:, None], 0.0)
        factor = len(rows) / mask.sum().clamp(min=1)
        losses = scores.logsumexp(dim=1) - self.scale * (u * v).sum(1)
        return losses.where(similar, 0.0) * factor


PAIR_LOSSES: dict[str, type[PairLoss]] = {"cosine_embedding": CosineEmbedding, "mnr": MultipleNegatives}
