"""Fused Adam and AdamW (one pass over weights and moments) of torch, DeepSpeed or NVIDIA Apex."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.system import nvidia_apex

_KEY = "engine.fused_optimizer"


def check_fused_optimizer(recipe: Recipe) -> None:
    """Raise UserError if `engine.fused_optimizer` does not fit the recipe or this machine.

    No data files are read.
    """
    choice = recipe.engine.fused_optimizer
    if choice != "torch" and recipe.optimizer.name == "sgd":
        raise UserError(f"{_KEY}: {choice} is Adam; optimizer.name: sgd needs {_KEY}: torch")
    if choice == "deepspeed":
        reason = deepspeed_unsupported_reason()
        if reason:
            raise UserError(f"{_KEY}: deepspeed cannot be used here: {reason}; or use {_KEY}: torch")
    if choice == "apex":
        if recipe.engine.offload:
            raise UserError(
                f"{_KEY}: apex updates on the GPU, engine.offload on the host: use {_KEY}: deepspeed or torch"
            )
        reason = nvidia_apex.fused_adam_unsupported_reason()
        if not reason and not torch.cuda.is_available():
            reason = "it needs an NVIDIA GPU"
        if reason:
            raise UserError(f"{_KEY}: apex cannot be used here: {reason}; or use {_KEY}: torch")


def deepspeed_unsupported_reason() -> str:
    """Return why DeepSpeed cannot build its Adam here, "" if all build tools are installed."""
    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

    if not is_ninja_available():
        return "it builds its Adam with ninja, which is not on PATH (pip installs it beside DeepSpeed)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"it builds its Adam with a C++ compiler, and {compiler} is not on PATH"
    if torch.cuda.is_available() and CUDA_HOME is None:
        return "it builds its Adam with CUDA's nvcc, which is neither on PATH nor under CUDA_HOME"
    return ""


def build_adam(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW or Adam in the implementation that `engine.fused_optimizer` names.

    groups: torch's parameter groups. Raises UserError with the reason if DeepSpeed cannot build its
    extension.
    """
    config, choice = recipe.optimizer, recipe.engine.fused_optimizer
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    decoupled = config.name == "adamw"
    match choice:
        case "apex":
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, adam_w_mode=decoupled, **settings)
        case "deepspeed":
            from deepspeed.ops import adam

            on_host = recipe.engine.offload or not torch.cuda.is_available()
            try:
                if on_host:
                    return adam.DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **settings)
                return adam.FusedAdam(groups, adam_w_mode=decoupled, **settings)
            except Exception as error:  # the type depends on torch, ninja and the compiler
                name = "cpu_adam" if on_host else "fused_adam"
                raise UserError(
                    f"{_KEY}: deepspeed cannot build its extension {name}: {_reason(error)}; fix that, or use "
                    f"{_KEY}: torch"
                ) from error
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    # With offload DeepSpeed moves the moments between devices, which torch's fused step does not
    # support.
    return kind(groups, fused=not recipe.engine.offload, **settings)


def _reason(error: BaseException | None) -> str:
    """Return the cause of a failed build as one line.

    It is the compiler's message if there is one. Otherwise it is the last line of the original
    error, which DeepSpeed and torch wrap in others.
    """
    lines: list[str] = []
    while error is not None:
        lines += str(error).strip().splitlines() or [type(error).__name__]
        error = error.__cause__ or error.__context__
    said = [line for line in lines if "error:" in line or "not found" in line]
    return (said or lines[-1:])[0].strip().rstrip(".")
