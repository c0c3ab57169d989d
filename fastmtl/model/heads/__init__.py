"""Heads by name. A head maps the pooled sequences of a task to logits or scores (outputs.py)."""

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
from fastmtl.model.types import UNIT_TYPES

# A head is created with (task, size d of u and v, standard deviation of its last layer's initial
# weights). For E examples it maps u and v, the vectors [E, d] of their first and second sequences,
# to outputs [E, num_outputs] (outputs.py). v is None if an example is a single sequence.
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

    The head's submodule `embed` computes the vectors u and v. Its input is the pooled sequences
    [B, hidden_size]; only a `Recurrent` reads the tokens and lengths of the task's sequences.
    std: standard deviation of the last layer's initial weights.
    Raises UserError, naming the key, for an unknown head or a setting that does not fit the task.
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
    if task.type in UNIT_TYPES:
        UNIT_TYPES[task.type].add_parts(task, head)
    return head


def _embed(config: HeadConfig, hidden_size: int) -> tuple[nn.Module, int]:
    """Return the submodule that computes u and v, and their size."""
    if config.name in RECURRENT:
        return Recurrent(config, hidden_size), config.size + (hidden_size if config.cls else 0)
    if config.projection:
        return Projection(config, hidden_size), config.projection
    return nn.Identity(), hidden_size


def _check(task: TaskConfig) -> None:
    config = task.head
    if task.scores == "tokens" and config.name in RECURRENT:
        raise UserError(f"head.name: {config.name} gives one state per text, and a {task.type} task scores tokens")
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
