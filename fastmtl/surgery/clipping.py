"""The norm of a step's whole gradient, and its clipping to a bound.

    factor = min(1, max_norm / (norm + 1e-6))
    norm^2 = c^T G c + |gradients of the tasks' own parameters|^2

The first term follows from the Gramian G and the task weights c, before the merged gradient is
formed. So clipping only multiplies c by the factor. Sources: torch.nn.utils.clip_grad_norm_, and
DeepSpeed's `gradient_clipping`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.norms import total_norm
from fastmtl.surgery.ranks.collectives import BUCKET, sum_over_ranks, world_size
from fastmtl.surgery.targets.protocol import Target

# Below this ratio of |sum_t c_t g_t| to sum_t |c_t| |g_t|, the terms nearly cancel. The rounding
# error of the float32 G, about 1e-7 of the squared terms, would then be visible in the norm.
_CANCELLED = 1e-2
_EPS = 1e-6


def check_max_norm(max_norm: float | None, target: Target, storage: str, reduce: str, *, joint: bool) -> None:
    """Raise UserError for a bound not above 0, and where surgery lacks the whole gradient."""
    if max_norm is None:
        return
    if not max_norm > 0:
        raise UserError(f"max_norm must be above 0, got {max_norm}; None leaves clipping to the target")
    advice = f"leave max_norm out and {target.clipping}"
    if target.merges:
        raise UserError("max_norm: SurgeryAdamW clips by its own max_norm: give it there")
    reduces = world_size() > 1 and not target.sums_ranks
    if joint and (reduces or target.loss_scale() != 1.0):
        reason = "in several processes the target reduces" if reduces else "under fp16 DeepSpeed scales"
        raise UserError(f"max_norm: for a sum and for features, {reason} the gradient: {advice}")
    if not joint and storage in ("replay", "none"):
        raise UserError(
            f"max_norm: storage='replay' and scope='tensor' merge inside the target's own backward: {advice}"
        )
    if joint and not target.stacks:
        raise UserError(f"max_norm: ZeRO 3, offload and fully_shard do not expose the whole gradient: {advice}")
    if not joint and reduce != "exact":
        raise UserError(f"max_norm: reduce='{reduce}' does not give the norm of the gradient of all ranks: {advice}")


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that clips a gradient of this norm, at most 1; NaN for a NaN norm."""
    return 1.0 if norm + _EPS <= max_norm else max_norm / (norm + _EPS)


def clip_factor_on_device(norm: Tensor, max_norm: float) -> Tensor:
    """Return `clip_factor` as a float32 scalar tensor, without a wait for the device."""
    return (max_norm / (norm + _EPS)).clamp(max=1.0).float()


def shared_norm(info: SurgeryInfo) -> float | None:
    """Return the norm of the merged shared gradient from G; None if rounding in G affects it."""
    if info.merged_norm is None or info.weights is None or info.task_norms is None:
        return None
    parts = float(info.weights.abs() @ info.task_norms)
    return info.merged_norm if info.merged_norm >= _CANCELLED * parts else None


def known_clip(info: SurgeryInfo, norm: float | None, max_norm: float | None) -> float | None:
    """Return the factor that clips a step's gradient, before merging.

    None if the norm must be measured after merging. norm: from `shared_norm`.
    """
    if max_norm is None or info.merged_norm is None:  # or an overflow, which the target must find
        return 1.0
    return None if norm is None else clip_factor(_total(info, norm), max_norm)


def clip_gradients(
    info: SurgeryInfo, norm: float | None, max_norm: float | None, merged: Merged, factor: float
) -> tuple[SurgeryInfo, float]:
    """Return the report with norms, and the factor that clips a step's gradient.

    If the norm was not known before merging, it is measured here, and `merged` is clipped in place.

    norm: from `shared_norm`; if it is known, `merged` is clipped already. merged: gradients of this
    rank by parameter id, times `factor`.
    """
    if max_norm is None or info.merged_norm is None:
        return info, 1.0
    shared = _measured_norm(list(merged.values())) / factor if norm is None else norm
    total = _total(info, shared)
    clip = clip_factor(total, max_norm)
    if norm is None and clip != 1.0:
        merged.multiply(clip)
    return dataclasses.replace(info, merged_norm=shared, total_norm=total), clip


def _total(info: SurgeryInfo, shared: float) -> float:
    return math.hypot(shared, info.own_norm or 0.0)


def _measured_norm(merged: Sequence[Tensor]) -> float:
    """Return the norm of a merged gradient, summed over ranks before.

    Sends the gradient once, and waits for the device.
    """
    if world_size() == 1:
        return float(total_norm(list(merged)))
    squares = 0.0
    for gradient in merged:
        for piece in gradient.flatten().split(BUCKET):
            squares += float(total_norm([sum_over_ranks(piece.to(torch.float32, copy=True))])) ** 2
    return math.sqrt(squares)


def over_ranks(own: list[Tensor]) -> list[Tensor]:
    """Return gradients of own parameters, summed over ranks by one collective.

    In a single process, they are returned unchanged.
    """
    if world_size() == 1 or not own:
        return own
    flat = sum_over_ranks(torch.cat([gradient.flatten().float() for gradient in own]))
    pieces = flat.split([gradient.numel() for gradient in own])
    return [piece.view(gradient.shape) for piece, gradient in zip(pieces, own, strict=True)]
