"""The choice of who finds the norm of a step's gradient: DeepSpeed, or surgery, which knows most of
it already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastmtl.config import Recipe
from fastmtl.model.masked_lm import MaskedLanguageModel
from fastmtl.model.multitask import MultiTaskModel

# What surgery sends besides, in several processes: the gradients of the tasks' own parameters, at
# most this part of all that is trained.
_SMALL = 1 / 64


def surgery_clips(recipe: Recipe, model: MultiTaskModel | MaskedLanguageModel, world: int) -> bool:
    """Return whether surgery clips (`max_norm`) and looks for numbers that are not finite in place
    of DeepSpeed.

    DeepSpeed reads the norm of every parameter's gradient on the host, several times in a step. It
    keeps to that where surgery does not have the whole gradient: replay, one tensor at a time, ZeRO
    3 and offload, `sum` over ranks or micro-batches; where its dynamic loss scale needs to see an
    overflow (fp16); and where the norm would cost more than it saves (large adapters over ranks,
    approximate or separate Gramians).
    """
    engine, gradient = recipe.engine, recipe.gradient
    of_stage = engine.zero in (1, 2) or (engine.zero == 0 and engine.precision == "fp32")
    if not of_stage or engine.offload or engine.precision == "fp16" or _forbids(recipe.deepspeed):
        return False
    shared = _trained(model.shared_parameters())
    if gradient.method == "sum" or not shared:
        # Otherwise all gradients would be held at once where DeepSpeed does not.
        return world == 1 and (engine.flat_parameters or (engine.accumulation == 1 and engine.zero < 2))
    if gradient.storage == "replay" or gradient.scope == "tensor" or gradient.reduce != "exact":
        return False
    every = _trained(list(model.parameters()))
    return world == 1 or every - shared <= _SMALL * every


def max_norm(recipe: Recipe, model: MultiTaskModel | MaskedLanguageModel, world: int) -> float | None:
    """Return GradientSurgery's `max_norm` for an engine of this recipe: infinite where nothing is
    clipped.
    """
    return (recipe.engine.clip or math.inf) if surgery_clips(recipe, model, world) else None


def leave_norm_to_surgery(config: dict[str, Any]) -> None:
    """Change DeepSpeed's configuration so that it neither reads nor clips gradients, unless the
    recipe says so.
    """
    config["gradient_clipping"] = 0.0
    if config["zero_optimization"]["stage"]:
        config["zero_optimization"].setdefault("compute_grad_norm", False)
    config["bf16"].setdefault("check_grad_overflow", False)


@contextmanager
def keeps_clipping(engine: Any) -> Iterator[None]:
    """Keep who clips, and at what norm, while a checkpoint is loaded.

    DeepSpeed puts the checkpoint's `gradient_clipping` in place of the engine's, and refuses one
    where the engine finds no norm. Another number of ranks may have another owner of clipping.
    """
    optimizer = engine.optimizer
    own = {name: getattr(optimizer, name) for name in ("clip_grad", "compute_grad_norm") if hasattr(optimizer, name)}
    if "compute_grad_norm" in own:
        optimizer.compute_grad_norm = True
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(optimizer, name, value)


def _forbids(section: dict[str, Any]) -> bool:
    """Return whether the recipe's section `deepspeed` has what DeepSpeed finds a norm for in any
    case.
    """
    return "data_types" in section or "zenflow" in section.get("zero_optimization", {})


def _trained(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
