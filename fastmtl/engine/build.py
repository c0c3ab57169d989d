"""Building of the DeepSpeed engine (optimiser, schedule, ZeRO), and of gradient surgery on it."""

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
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.losses.weighting import gradient_weights
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
    """Raise UserError for settings that `build_engine` or `build_surgery` would reject.

    world: the number of ranks. DeepSpeed is imported only if the recipe has a section `deepspeed`.
    """
    check_cuda_graphs(recipe)
    config = deepspeed_config(recipe, world, cpu=not torch.cuda.is_available())
    if recipe.deepspeed:
        check_section(config, deepspeed_section(recipe))
    gradient = recipe.gradient
    if not recipe.shares:  # no gradient is merged, so the options of merging have no effect
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
    """Raise UserError if the method rejects its options or the number of tasks.

    The method computes the weights of orthogonal gradients once, because the libraries check some
    options only when they compute weights.
    """
    name, options, count = recipe.gradient.method, recipe.gradient.options, len(recipe.tasks)
    advice = f"gradient.method: {name} with gradient.options {quoted(options)} cannot weigh {count} tasks"
    try:
        weights = method.weights(torch.eye(count), draw_order(count, 0, 0))
    except Exception as error:  # whatever TorchJD and its solvers raise
        raise UserError(f"{advice}: {error}") from error
    if weights.shape != (count,) or not bool(weights.isfinite().all()):
        raise UserError(f"{advice}: the weights of orthogonal gradients are {weights.tolist()}")


def build_engine(recipe: Recipe, model: Model, world: int, total_steps: int, *, universal: bool = False) -> Any:
    """Return a DeepSpeed engine for a model that is on the CPU.

    The engine moves the model to the device, casts it and partitions it. With `engine.cuda_graphs`
    the forward and backward of training run as CUDA graphs.
    total_steps: optimiser steps of the whole phase, for the schedule.
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
    """Return the object that merges the tasks' gradients as the recipe's section `gradient` says.

    engine: the result of `build_engine` for this model. tasks: names of the losses that the model's
    forward returns; default: the recipe's tasks.
    """
    gradient = recipe.gradient
    trunk = None if recipe.encoder.freeze or gradient.method == "sum" else model.encoder.trunk
    surgery = GradientSurgery(
        engine,
        gradient.method,
        tasks=tasks or recipe.task_names,
        model=trunk,
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
        balance=gradient_weights(recipe) if isinstance(model, MultiTaskModel) else None,
    )
    if isinstance(model.encoder, TransformersEncoder):
        model.encoder.rows = None if trunk is None else surgery.rows
    return surgery


def build_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the recipe's optimiser: AdamW, Adam or SGD.

    groups: torch's parameter groups, each with its own learning rate and weight decay.
    """
    config = recipe.optimizer
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return build_adam(recipe, groups)


def lr_factor(recipe: Recipe, total_steps: int) -> Callable[[int], float]:
    """Return a function of the step (from 0) by whose value every learning rate is multiplied.

    The value rises linearly to 1 in the warm-up. Then it stays 1, or falls linearly or as a cosine
    to 0 at total_steps.
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
