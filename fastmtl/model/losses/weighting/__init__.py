"""Weights of the tasks' losses that change during a run (`weighting.name`), a file each.

uncertainty and imtl_l are learned as parameters of the model. stch and famo depend on the losses of
the micro-batch. dwa, rlw and gradnorm are known before a step.
"""

from __future__ import annotations

from torch import nn

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.model.losses.weighting.batch_weights import BatchWeights
from fastmtl.model.losses.weighting.dwa import DynamicWeightAverage
from fastmtl.model.losses.weighting.famo import Famo
from fastmtl.model.losses.weighting.gradnorm import GradNorm
from fastmtl.model.losses.weighting.imtl import ImpartialScale
from fastmtl.model.losses.weighting.rlw import RandomWeights
from fastmtl.model.losses.weighting.stch import SmoothTchebycheff
from fastmtl.model.losses.weighting.step_weights import StepWeights
from fastmtl.model.losses.weighting.uncertainty import Uncertainty

# The name of a head's submodule that weights the task's loss, by weighting.name.
LEARNED = {"uncertainty": "uncertainty", "imtl_l": "loss_scale"}


def add_learned_weight(recipe: Recipe, head: nn.Module, *, squared_error: bool) -> None:
    """Add the learned weight of a task's loss to its head, if the recipe has one."""
    match recipe.weighting.name:
        case "uncertainty":
            head.uncertainty = Uncertainty(squared_error=squared_error)
        case "imtl_l":
            head.loss_scale = ImpartialScale()


def batch_weights(recipe: Recipe) -> BatchWeights | None:
    """Return the weights that depend on the micro-batch's losses; None for other weightings."""
    given = recipe.weighting
    match given.name:
        case "stch":
            return SmoothTchebycheff(given.mu)
        case "famo":
            return Famo(recipe.task_names, given.lr, given.weight_decay)
    return None


def step_weights(recipe: Recipe) -> StepWeights | None:
    """Return the weights that are known before a step; None for other weightings."""
    given, tasks = recipe.weighting, recipe.task_names
    match given.name:
        case "dwa":
            return DynamicWeightAverage(tasks, given.temperature)
        case "rlw":
            return RandomWeights(tasks, recipe.seed)
        case "gradnorm":
            return GradNorm(tasks, [task.weight for task in recipe.tasks.values()], given.alpha, given.lr)
    return None


def check_gradnorm(recipe: Recipe) -> None:
    """Raise UserError if weighting.name is gradnorm and no step knows the gradients' norms."""
    gradient = recipe.gradient
    if recipe.weighting.name != "gradnorm":
        return
    if gradient.method == "sum" or gradient.scope == "tensor" or not recipe.shares:
        raise UserError(
            "weighting.name: gradnorm needs the norms of the tasks' gradients of shared parameters: set "
            "gradient.method: equal (the sum, with norms) or a method of surgery, with gradient.scope: global"
        )


__all__ = [
    "LEARNED",
    "BatchWeights",
    "DynamicWeightAverage",
    "Famo",
    "GradNorm",
    "ImpartialScale",
    "RandomWeights",
    "SmoothTchebycheff",
    "StepWeights",
    "Uncertainty",
    "add_learned_weight",
    "batch_weights",
    "check_gradnorm",
    "step_weights",
]
