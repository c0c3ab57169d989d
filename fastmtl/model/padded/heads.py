"""Poolings, vectors and outputs of heads on padded hidden states [B, L, d]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.encoder.pooler import Pooler
from fastmtl.model.heads.outputs import kind, predictions
from fastmtl.model.precision import precise


class PaddedHead(nn.Module):
    """A task's pooling and head.

    task, head: the task's settings and its module in the model. pooler: the encoder's, or None.
    """

    def __init__(self, task: TaskConfig, head: nn.Module, pooler: Pooler | None) -> None:
        super().__init__()
        self.task, self.head = task, head
        self.pooler = pooler if task.pooling == "pooler" else None

    def forward(self, hidden: Tensor, inside: Tensor, pairs: Tensor | None) -> dict[str, Tensor]:
        """Return the outputs by name: "logits", and "predictions" where a row has its own.

        hidden [B, L, d]; inside: bool [B, L], False for padding; pairs: int64 [P, 2], for a task
        with `pairs: bi` the texts that are compared, else not read.
        """
        vectors = self._vectors(hidden, inside)
        first, second = vectors, None
        if self.task.pairs == "bi":
            assert pairs is not None
            first, second = vectors[pairs[:, 0]], vectors[pairs[:, 1]]
        logits = precise(self.head(first, second))
        if kind(self.task) != "units":
            return {"logits": logits, "predictions": predictions(self.task, logits)}
        return {"logits": logits}

    def _vectors(self, hidden: Tensor, inside: Tensor) -> Tensor:
        embed = self.head.get_submodule("embed")
        if self.task.scores == "tokens":
            return embed(hidden)
        pooled = pool(self.task.pooling, hidden, inside)
        if self.pooler is not None:
            pooled = functional.linear(pooled, self.pooler.dense.weight, self.pooler.dense.bias).tanh()
        return embed(pooled)


def pool(name: str, hidden: Tensor, inside: Tensor) -> Tensor:
    """Return a vector per text, [B, d]. name: a pooling of fastmtl.model.heads.pooling."""
    match name:
        case "mean":
            weights = inside.unsqueeze(2).to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)
        case "max":
            return hidden.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(1)
        case "cls" | "pooler":
            return hidden[:, 0]
    raise NotImplementedError(f"there is no padded form of the pooling {name}")
