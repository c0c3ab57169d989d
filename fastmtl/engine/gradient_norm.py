"""The choice of the part that computes the gradient's norm and clips: DeepSpeed or surgery.

Surgery is cheaper, since it computes most of the norm for the merging anyway.
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

# With several processes surgery also has to send the gradients of the tasks' own parameters. It
# clips only if these parameters are at most this share of all trained parameters.
_SMALL = 1 / 64


def surgery_clips(recipe: Recipe, model: MultiTaskModel | MaskedLanguageModel, world: int) -> bool:
    """Return True if surgery clips (`max_norm`) and checks for non-finite numbers, not DeepSpeed.

    world: the number of ranks. DeepSpeed is slower: it reads the norm of every parameter's gradient
    on the host, several times per step. It still has to clip in three cases:

    - Surgery does not have the whole gradient: replay, one tensor at a time, ZeRO 3 and offload,
      `sum` over ranks or micro-batches.
    - The dynamic loss scale has to see overflows: fp16.
    - The norm in surgery would cost more than it saves: large adapters over ranks, approximate or
      separate Gramians.
    """
    engine, gradient = recipe.engine, recipe.gradient
    of_stage = engine.zero in (1, 2) or (engine.zero == 0 and engine.precision == "fp32")
    if not of_stage or engine.offload or engine.precision == "fp16" or _forbids(recipe.deepspeed):
        return False
    shared = _trained(model.shared_parameters())
    if gradient.method == "sum" or not shared:
        # Otherwise all gradients would be in memory at once, which DeepSpeed avoids.
        return world == 1 and (engine.flat_parameters or (engine.accumulation == 1 and engine.zero < 2))
    if gradient.storage == "replay" or gradient.scope == "tensor" or gradient.reduce != "exact":
        return False
    every = _trained(list(model.parameters()))
    return world == 1 or every - shared <= _SMALL * every


def max_norm(recipe: Recipe, model: MultiTaskModel | MaskedLanguageModel, world: int) -> float | None:
    """Return the argument `max_norm` of GradientSurgery for an engine of this recipe.

    It is None if DeepSpeed clips, else `engine.clip`, or infinity without clipping.
    """
    return (recipe.engine.clip or math.inf) if surgery_clips(recipe, model, world) else None


def leave_norm_to_surgery(config: dict[str, Any]) -> None:
    """Change DeepSpeed's configuration, in place, so that it neither checks nor clips gradients.

    The recipe's own `compute_grad_norm` and `check_grad_overflow` stay.
    """
    config["gradient_clipping"] = 0.0
    if config["zero_optimization"]["stage"]:
        config["zero_optimization"].setdefault("compute_grad_norm", False)
    config["bf16"].setdefault("check_grad_overflow", False)


@contextmanager
def keeps_clipping(engine: Any) -> Iterator[None]:
    """Keep the engine's settings of clipping while the block loads a checkpoint.

    DeepSpeed replaces the engine's `gradient_clipping` by the checkpoint's, and rejects a
    checkpoint if the engine computes no norm. Both would be wrong after a change of the number of
    ranks: it may move the clipping from surgery to DeepSpeed, or the reverse.
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
    """Return whether the recipe's section `deepspeed` makes DeepSpeed compute a norm anyway."""
    return "data_types" in section or "zenflow" in section.get("zero_optimization", {})


def _trained(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
