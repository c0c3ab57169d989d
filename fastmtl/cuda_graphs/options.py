"""Checks for settings, devices and tasks that `engine.cuda_graphs` does not support."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.surgery.ranks.collectives import world_size
from fastmtl_kernels import dispatch

# Compute capabilities with a bf16 grouped_mm that does not copy the offsets to the host (torch 2.11
# and 2.13).
GROUPED_ON = (9, 10)


def check_cuda_graphs(recipe: Recipe) -> None:
    """Raise UserError if the recipe has `engine.cuda_graphs: true` and a setting that forbids it.

    The message names that setting. Reasons that depend on the machine are no errors: the run logs
    a warning (`unsupported_reason`).
    """
    if not recipe.engine.cuda_graphs:
        return
    surgery = recipe.gradient.method != "sum" and recipe.shares
    gradient, engine = recipe.gradient, recipe.engine
    others = {
        "smart": recipe.smart.used,
        f"encoder.recompute: {recipe.encoder.recompute}": recipe.encoder.recompute != "none",
        "encoder.layer_norm: apex": recipe.encoder.layer_norm == "apex",
        "engine.zero: 3": engine.zero == 3,
        "deepspeed.torch_autocast": recipe.deepspeed.get("torch_autocast", {}).get("enabled"),
        f"gradient.storage: {gradient.storage}": surgery and gradient.storage in ("kept", "replay"),
        "engine.offload, which makes gradient.storage replay": surgery and engine.offload,
        "gradient.scope: tensor": surgery and gradient.scope == "tensor",
    }
    for key, given in others.items():
        if given:
            raise UserError(f"engine.cuda_graphs: true does not work with {key}: change one of the two")
    if surgery and engine.precision != "bf16":
        raise UserError(
            f"engine.cuda_graphs: true with gradient.method: {gradient.method} needs engine.precision: bf16, not "
            f"{engine.precision}: torch's grouped matrix products run without the host in bf16 only"
        )


def unsupported_reason(hidden: Tensor, head_dim: int, *, grouped: bool) -> str:
    """Return why an encoder cannot be recorded on this device, "" if it can.

    hidden: any tensor of the encoder's device and dtype. head_dim: columns of an attention head.
    grouped: True if backward computes per-task gradients by grouped matrix products.
    """
    device, dtype = hidden.device, hidden.dtype
    if device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, the model is on {device.type}"
    without = dispatch.unsupported_reason("add_layer_norm", "triton", device, {dtype})
    if without:
        return without
    if head_dim > dispatch.MAX_HEAD_DIM[dtype]:
        return f"attention heads of {head_dim} columns in {dtype} have no kernel of their own"
    if grouped and dtype != torch.bfloat16:
        return f"per-task matrix products need bf16, the model is in {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if grouped and major not in GROUPED_ON:
        return f"per-task matrix products need a GPU of sm_90 or sm_100, this one is sm_{major}{minor}"
    return ""


def heads_unsupported_reason(recipe: Recipe) -> str:
    """Return why the heads and losses of the recipe's tasks cannot be recorded, "" if they can."""
    for name, task in recipe.tasks.items():
        if task.scores != "rows":
            return f"task '{name}' of type {task.type} has another number of units in every batch"
        if "mnr" in task.losses and task.mnr.cached:
            return f"the loss of task '{name}' spans a whole step (mnr.cached)"
        if "mnr" in task.losses and world_size() > 1:
            return f"the loss mnr of task '{name}' spans the pairs of all ranks"
    return ""
