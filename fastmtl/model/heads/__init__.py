"""What turns pooled sequences into a task's outputs, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.heads.cosine import CosineHead
from fastmtl.model.heads.linear import LinearHead
from fastmtl.model.heads.mlp import MlpHead

# A head is made from (task, hidden size, standard deviation of its last weights) and maps u, v [E, d] (v: None for
# one sequence) to outputs [E, num_outputs], whose meaning by task type stands in outputs.py.
HEADS: dict[str, Callable[[TaskConfig, int, float], nn.Module]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "cosine": CosineHead,
}


def build_head(task: TaskConfig, hidden_size: int, std: float) -> nn.Module:
    """The task's head. Raises UserError for an unknown name or a setting that does not fit."""
    if task.head.name not in HEADS:
        raise unknown_name("head", task.head.name, HEADS)
    features = task.head.features
    if task.pairs == "bi" and (not features or len(set(features)) < len(features)):
        raise UserError(f"head.features: {features}: name at least one feature of the pair, and each once")
    return HEADS[task.head.name](task, hidden_size, std)
