"""Model -> DeepSpeed engine: optimiser, schedule, ZeRO; and gradient surgery on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmtl.config import Recipe
from fastmtl.cuda_graphs.install import install_cuda_graphs
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.cuda_graphs.options import check_cuda_graphs
from fastmtl.engine.deepspeed_section import check_section
from fastmtl.engine.fused_optimizers import build_adam
from fastmtl.engine.gradient_norm import leave_norm_to_surgery, max_norm, surgery_clips
from fastmtl.engine.settings import deepspeed_config, deepspeed_section, set_buckets
from fastmtl.errors import UserError, listed, quoted
from fastmtl.model.masked_lm import MaskedLanguageModel
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.checks import DTYPES, check_options
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.methods.order import draw_order
from fastmtl.surgery.methods.table import find_method
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl.surgery.targets.flat import FlatParameters

Model = MultiTaskModel | MaskedLanguageModel


def check_engine(recipe: Recipe, world: int) -> None:
    """Raise UserError for settings that `build_engine` or `build_surgery` would refuse.

    Imports DeepSpeed where the recipe has settings for it.
    """
    check_cuda_graphs(recipe)
    config = deepspeed_config(recipe, world, cpu=not torch.cuda.is_available())
    if recipe.deepspeed:
        check_section(config, deepspeed_section(recipe))
    gradient = recipe.gradient
    if recipe.encoder.freeze:  # there is nothing to merge, and no option matters
        return
    method = find_method(gradient.method, gradient.reduction, gradient.options)
    if method is not None:
        _check_method(method, recipe)
    check_options(
        recipe.engine.zero < 3 and not recipe.engine.offload,
        method,
        storage=gradient.storage,
        scope=gradient.scope,
        reduce=gradient.reduce,
        dtype=DTYPES[recipe.jacobian_dtype],
        sketch_size=gradient.sketch_size,
        world=world,
    )


def _check_method(method: Method, recipe: Recipe) -> None:
    """Solve for orthogonal gradients once: libraries look at some options only then."""
    name, options, count = recipe.gradient.method, recipe.gradient.options, len(recipe.tasks)
    advice = f"gradient.method: {name} with gradient.options {quoted(options)} cannot weigh {count} tasks"
    try:
        weights = method.weights(torch.eye(count), draw_order(count, 0, 0))
    except Exception as error:  # whatever TorchJD and its solvers raise
        raise UserError(f"{advice}: {error}") from error
    if weights.shape != (count,) or not bool(weights.isfinite().all()):
        raise UserError(f"{advice}: the weights of orthogonal gradients are {weights.tolist()}")


def build_engine(recipe: Recipe, model: Model, world: int, total_steps: int, *, universal: bool = False) -> Any:
    """Build the DeepSpeed engine of a model on the CPU; the engine moves, casts and partitions it.

    With `engine.cuda_graphs` the model records its training forward and backward.
    total_steps: optimiser steps of the whole run, for the schedule.
    universal: the engine will load a universal checkpoint.
    Raises UserError for settings that do not work together.
    """
    import deepspeed

    check_cuda_graphs(recipe)
    if recipe.engine.cuda_graphs:
        install_cuda_graphs(model)
    groups = model.parameter_groups(recipe.optimizer)
    module: nn.Module = model
    if recipe.engine.flat_parameters:
        module = flat = FlatParameters(model, groups, alone=model.sparse_parameters())
        groups = flat.groups
    optimizer = build_optimizer(recipe, groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe, total_steps))
    cpu = not torch.cuda.is_available()
    config = deepspeed_config(recipe, world, cpu=cpu)
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    if recipe.engine.zero:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        set_buckets(config["zero_optimization"], trainable, cpu=cpu)
    if surgery_clips(recipe, model, world):
        leave_norm_to_surgery(config)
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
    except Exception as error:
        if not recipe.deepspeed or isinstance(error, torch.OutOfMemoryError | OSError):
            raise
        raise UserError(
            f"DeepSpeed does not start with the recipe's section deepspeed ({listed(recipe.deepspeed)}): "
            f"{error or type(error).__name__}. Mend that setting, or leave it out"
        ) from error
    return engine


def build_surgery(recipe: Recipe, engine: Any, model: Model, tasks: list[str] | None = None) -> GradientSurgery:
    """Return the recipe's gradient method on the engine of this model.

    tasks: the tasks whose losses the forward returns; by default those of the recipe.
    """
    gradient = recipe.gradient
    return GradientSurgery(
        engine,
        gradient.method,
        tasks=tasks or recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=gradient.storage,
        scope=gradient.scope,
        reduce=gradient.reduce,
        dtype=DTYPES[recipe.jacobian_dtype],
        sketch_size=gradient.sketch_size,
        task_weights=model.task_weights,
        reduction=gradient.reduction,
        options=gradient.options,
        seed=recipe.seed,
        cuda_graphs=record_merging if recipe.engine.cuda_graphs else False,
        max_norm=max_norm(recipe, model, world_size()),
    )


def build_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build AdamW, Adam or SGD for a model's groups, each with a learning rate and weight decay."""
    config = recipe.optimizer
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return build_adam(recipe, groups)


def lr_factor(recipe: Recipe, total_steps: int) -> Callable[[int], float]:
    """Return the function from a step (from 0) to the factor of every group's learning rate.

    The factor rises linearly in the warm-up, then stays, or decays to 0 linearly or as a cosine.
    """
    warmup = math.ceil(recipe.schedule.warmup * total_steps)
    kind = recipe.schedule.name

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if kind == "constant":
            return 1.0
        return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
