"""The public operations on task gradients: they validate, select an implementation and call it.

    gramian  G[i, j] = sum_p J[i, p] J[j, p]
    combine  out[p]  = sum_t weights[t] J[t, p]

Task gradients J are a tensor [T, P], or T lists of K tensors; tensor k has the same shape, dtype
and device in every list. Lists are read in place, not copied to one flat tensor. float32, bfloat16
and float16, accumulated in float32 or better; float64 (for tests) by "reference" only. No operation
is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastmtl_kernels.checks import describe
from fastmtl_kernels.dispatch import select
from fastmtl_kernels.task_gradients import native, reference
from fastmtl_kernels.task_lists import Grads, task_lists

Impl = Literal["auto", "reference", "cpp", "cuda", "triton"]


@torch.no_grad()
def gramian(grads: Grads, impl: Impl = "auto") -> Tensor:
    """Return the inner products of all pairs of task gradients, G = J J^T.

    Args:
        grads: J as [T, P] or T lists of K tensors (see the module); T >= 1, P and K may be 0.
            Tensors that are not contiguous are copied.
        impl: "auto", "reference", "cpp" (C++, CPU tensors), "cuda" (CUDA tensors, T <= 64) or
            "triton" (CUDA tensors, a [T, P] tensor or lists of one tensor).

    Returns:
        G [T, T] float32 on the gradients' device (float64 for float64 gradients). Equal inputs give
        equal bits.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    lists = task_lists(grads)
    return _kernels("gramian", impl, lists).gramian(lists)


@torch.no_grad()
def combine(
    grads: Grads, weights: Tensor, out: Tensor | Sequence[Tensor] | None = None, impl: Impl = "auto"
) -> Tensor | list[Tensor]:
    """Return the weighted sum of the task gradients, sum_t weights[t] J[t].

    Args:
        grads: J as [T, P] or T lists of K tensors (see the module).
        weights: the tasks' weights, [T], floating point, on the gradients' device; converted to
            float32.
        out: the result is written here: a tensor [P] if `grads` is a tensor, else K tensors of the
            gradients' shapes; contiguous, float32 or of the gradients' dtype; must not overlap
            `grads`. None makes new tensors of the gradients' dtype.
        impl: as for `gramian`.

    Returns:
        `out` or the new tensors: [P] if `grads` is a tensor, else a list of K tensors.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    lists = task_lists(grads)
    if not isinstance(weights, Tensor) or weights.shape != (len(lists),) or not weights.is_floating_point():
        raise ValueError(f"weights must be a floating point tensor of shape [{len(lists)}], got {describe(weights)}")
    if lists[0] and weights.device != lists[0][0].device:
        raise ValueError(f"weights must be on {lists[0][0].device} like grads, got {weights.device}")
    targets = _targets(grads, lists[0], out)
    _kernels("combine", impl, lists).combine(lists, weights, targets)
    return targets[0] if isinstance(grads, Tensor) else targets


def _targets(grads: Grads, like: list[Tensor], out: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Return the K tensors that `combine` writes: those of `out`, checked, or new ones.

    like: the K gradients of one task.
    """
    if out is None:
        return [torch.empty_like(tensor) for tensor in like]
    if isinstance(out, Tensor) != isinstance(grads, Tensor):
        kind = "a tensor [P]" if isinstance(grads, Tensor) else "a list of tensors"
        raise ValueError(f"out must be {kind} for these grads, got {type(out).__name__}")
    targets = [out] if isinstance(out, Tensor) else list(out)
    if len(targets) != len(like):
        raise ValueError(f"out must hold {len(like)} tensors, one for each tensor of a task, got {len(targets)}")
    for k, (target, tensor) in enumerate(zip(targets, like, strict=True)):
        if target.shape != tensor.shape or target.device != tensor.device or not target.is_contiguous():
            raise ValueError(
                f"out[{k}] must be contiguous, of shape {list(tensor.shape)} and on {tensor.device}, "
                f"got {describe(target)} on {target.device}{'' if target.is_contiguous() else ', not contiguous'}"
            )
        if target.dtype not in (tensor.dtype, torch.float32):
            raise ValueError(f"out[{k}] must be {tensor.dtype} like grads or torch.float32, got {target.dtype}")
    return targets


def _kernels(operation: str, impl: Impl, lists: Sequence[Sequence[Tensor]]) -> ModuleType:
    """Return the module of the implementation for these gradients."""
    match select(operation, impl, *lists[0], tasks=len(lists), tensors=len(lists[0])):
        case "cpp" | "cuda":
            return native
        case "triton":
            from fastmtl_kernels.task_gradients import triton

            return triton
        case _:
            return reference
