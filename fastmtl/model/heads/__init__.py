"""Heads by name. A head maps the pooled sequences of a task to its outputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastmtl.config import HeadConfig, TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.heads.adjustment import Adjusted
from fastmtl.model.heads.cosine import CosineHead
from fastmtl.model.heads.embed import Projection, Recurrent
from fastmtl.model.heads.linear import LinearHead
from fastmtl.model.heads.linear_cosine import LinearCosineHead
from fastmtl.model.heads.mlp import MlpHead
from fastmtl.model.heads.outputs import kind, num_outputs
from fastmtl.model.heads.squash import Squashed

# A head is created with (task, size of u and v, standard deviation of its last weights). It maps u
# and v [E, d] (v is None for one sequence) to outputs [E, num_outputs], described in outputs.py.
HEADS: dict[str, Callable[[TaskConfig, int, float], nn.Module]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "cosine": CosineHead,
    "linear_cosine": LinearCosineHead,
    "rnn": MlpHead,
    "lstm": MlpHead,
}
RECURRENT = ("rnn", "lstm")


def build_head(task: TaskConfig, hidden_size: int, std: float) -> nn.Module:
    """Build the head of a task.

    Its submodule `embed` computes u and v from the pooled sequences [B, d], or, if it is
    `Recurrent`, from the tokens and lengths of the task's sequences.
    Raises UserError for an unknown name or a setting that does not fit.
    """
    config = task.head
    if config.name not in HEADS:
        raise unknown_name("head", config.name, HEADS)
    _check(task)
    embed, size = _embed(config, hidden_size)
    head = HEADS[config.name](task, size, std)
    if config.squash and config.name != "cosine":
        head = Squashed(head, config.squash)
    if config.adjustment:
        head = Adjusted(head, num_outputs(task))
    head.embed = embed
    return head


def _embed(config: HeadConfig, hidden_size: int) -> tuple[nn.Module, int]:
    """Return the submodule `embed` and the size of u and v."""
    if config.name in RECURRENT:
        return Recurrent(config, hidden_size), config.size + (hidden_size if config.cls else 0)
    if config.projection:
        return Projection(config, hidden_size), config.projection
    return nn.Identity(), hidden_size


def _check(task: TaskConfig) -> None:
    config = task.head
    if task.pairs == "bi" and (not config.features or len(set(config.features)) < len(config.features)):
        raise UserError(f"head.features: {config.features}: name at least one feature of the pair, and each once")
    if config.name in RECURRENT:
        if config.projection:
            raise UserError(
                f"head.projection: u and v are the states of the {config.name}: set their size by head.size"
            )
        if task.pooling != "cls":
            raise UserError(f"pooling: {task.pooling}: the {config.name} head reads the tokens itself; leave it at cls")
    else:
        for key in ("size", "cls"):
            if getattr(config, key) != HeadConfig.model_fields[key].default:
                raise UserError(f"head.{key} is for the heads rnn and lstm, this one is {config.name}")
    if config.squash and (task.type != "regression" or kind(task) != "score"):
        raise UserError("head.squash: it keeps a score within the label range: for regression tasks, not in bins")
    if config.adjustment and kind(task) != "classes":
        raise UserError("head.adjustment: it maps the probabilities of classes: for classification by cross_entropy")
