"""Weights of the tasks' losses that change during a run (`weighting.name`), a file each.

uncertainty and imtl_l are learned as parameters of the model. stch and famo depend on the losses of
the micro-batch. dwa, rlw and gradnorm are known before a step. excess_mtl depends on the tasks'
gradients in the step, and weighs these.
"""

from __future__ import annotations

from torch import nn

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.model.losses.weighting.batch_weights import BatchWeights
from fastmtl.model.losses.weighting.dwa import DynamicWeightAverage
from fastmtl.model.losses.weighting.excess_mtl import ExcessMTL
from fastmtl.model.losses.weighting.famo import Famo
from fastmtl.model.losses.weighting.gradnorm import GradNorm
from fastmtl.model.losses.weighting.imtl import ImpartialScale
from fastmtl.model.losses.weighting.rlw import RandomWeights
from fastmtl.model.losses.weighting.stch import SmoothTchebycheff
from fastmtl.model.losses.weighting.step_weights import StepWeights
from fastmtl.model.losses.weighting.uncertainty import Uncertainty
from fastmtl.surgery.balance import RiskWeights

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


def gradient_weights(recipe: Recipe) -> RiskWeights | None:
    """Return the weights that depend on the tasks' gradients of a step; None for others."""
    given = recipe.weighting
    if given.name != "excess_mtl":
        return None
    return ExcessMTL(len(recipe.tasks), given.step_size, given.warmup_steps)


def check_weighting(recipe: Recipe) -> None:
    """Raise UserError for weights that need task gradients which no step of the recipe has."""
    gradient, name = recipe.gradient, recipe.weighting.name
    if name not in ("gradnorm", "excess_mtl"):
        return
    what = "the norms of the tasks' gradients" if name == "gradnorm" else "the tasks' gradients"
    if gradient.method == "sum" or gradient.scope == "tensor" or not recipe.shares:
        raise UserError(
            f"weighting.name: {name} needs {what} of shared parameters: set gradient.method: equal (the sum, with "
            "norms) or a method of surgery, with gradient.scope: global"
        )
    if name == "excess_mtl" and (gradient.storage == "kept" or gradient.reduce != "exact"):
        raise UserError(
            "weighting.name: excess_mtl needs the tasks' gradients of all ranks: set gradient.reduce: exact, and "
            "gradient.storage: stacked or replay"
        )


__all__ = [
    "LEARNED",
    "BatchWeights",
    "DynamicWeightAverage",
    "ExcessMTL",
    "Famo",
    "GradNorm",
    "ImpartialScale",
    "RandomWeights",
    "SmoothTchebycheff",
    "StepWeights",
    "Uncertainty",
    "add_learned_weight",
    "batch_weights",
    "check_weighting",
    "gradient_weights",
    "step_weights",
]
