"""The public operations on task gradients: they validate, pick an implementation and call it.

Task gradients J are a tensor [T, P], or T lists of K tensors, tensor k of the same shape, dtype and device in every
list; no flat copy is made of lists. float32, bfloat16 and float16, accumulated in float32 or better; float64 (for
tests) by the reference only. No operation is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels import _native, dispatch
from fastmtl_kernels.task_gradients import native as gradients
from fastmtl_kernels.task_gradients import reference
from fastmtl_kernels.task_maps import common as low_rank_maps

Impl = Literal["auto", "reference", "cpp", "cuda", "triton"]
Grads = Tensor | Sequence[Sequence[Tensor]]


# The implementations of gramian and combine, with what doctor says of them.
_FASTEST_FIRST = {
    "cpp": "C++, vectorised and threaded",
    "cuda": f"CUDA, tensor lists, up to {gradients.MAX_CUDA_TASKS} tasks",
    "triton": "Triton, one tensor for each task",
    "reference": "plain torch",
}
# The same of the operations on packed rows, and of combined_adamw.
_ROWS = {
    "cpp": "C++, vectorised and threaded",
    "triton": "Triton",
    "reference": "plain torch",
}
_ROW_OPERATIONS = ("varlen_attention", "add_layer_norm", "embed_layer_norm", "dropout", "pool")
# The same of the operations with parameters of each task.
_ADAPTERS = {
    "triton": f"Triton, ranks up to {low_rank_maps.MAX_RANK}",
    "torch": "matrix products by torch",
    "reference": "plain torch",
}
_ADAPTER_OPERATIONS = ("low_rank", "lora", "pal")


class Implementation(NamedTuple):
    """One way to compute an operation on one kind of device."""

    impl: str
    available: bool
    reason: str
    auto: bool


def implementations(device: str | torch.device = "cpu") -> dict[str, list[Implementation]]:
    """Every implementation of every operation for float32, bfloat16 and float16 inputs on `device`.

    Returns:
        For each operation its implementations, fastest first: the name for `impl=`, whether it can be used, the reason
        if not or what it is, and whether `impl="auto"` picks it.
    """
    on = torch.device(device)
    gradient_impls = _listed(_FASTEST_FIRST, lambda impl: _unsupported_reason(impl, on))
    row_impls = _listed(_ROWS, lambda impl: dispatch.unsupported_reason(impl, on))
    adapter_impls = _listed(_ADAPTERS, lambda impl: low_rank_maps.unsupported_reason(impl, on))
    on_device = [Implementation("reference", True, "plain torch, stays on the device", True)]
    return {
        "gramian": gradient_impls,
        "combine": gradient_impls,
        "combined_adamw": row_impls,
        "pcgrad_weights": on_device,
        "gradvac_weights": on_device,
        **{operation: row_impls for operation in _ROW_OPERATIONS},
        **{operation: adapter_impls for operation in _ADAPTER_OPERATIONS},
    }


def _listed(described: dict[str, str], unsupported_reason: Callable[[str], str]) -> list[Implementation]:
    """List implementations. described: a description of each, fastest first; unsupported_reason: why one is not."""
    reasons = {impl: unsupported_reason(impl) for impl in described}
    auto = next(impl for impl, reason in reasons.items() if not reason)
    return [
        Implementation(impl, not reason, reason or described[impl], impl == auto) for impl, reason in reasons.items()
    ]


@torch.no_grad()
def gramian(grads: Grads, impl: Impl = "auto") -> Tensor:
    """Inner products of all pairs of task gradients, G = J J^T.

    Args:
        grads: J as [T, P] or T lists of K tensors (see the module); T >= 1, P and K may be 0. Tensors that are not
            contiguous are copied.
        impl: "auto", "reference", "cpp" (C++, CPU tensors), "cuda" (CUDA tensors, T <= 64) or "triton" (CUDA tensors, a
            [T, P] tensor or lists of one tensor).

    Returns:
        G [T, T] float32 on the gradients' device (float64 for float64 gradients). Equal inputs give equal bits.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    lists = task_lists(grads)
    match _select(impl, lists):
        case "cpp" | "cuda":
            return gradients.gramian(lists)
        case "triton":
            from fastmtl_kernels.task_gradients import triton as gradients_triton

            return gradients_triton.gramian(lists)
        case _:
            return reference.gramian(lists)


@torch.no_grad()
def combine(
    grads: Grads, weights: Tensor, out: Tensor | Sequence[Tensor] | None = None, impl: Impl = "auto"
) -> Tensor | list[Tensor]:
    """The merged gradient, sum_t weights[t] J[t].

    Args:
        grads: J as [T, P] or T lists of K tensors (see the module).
        weights: [T], floating point, on the gradients' device; used in float32.
        out: where to write: [P] for a tensor, K tensors for lists; contiguous, of the gradients' shapes, float32 or of
            their dtype; must not overlap `grads`. None makes new tensors of the gradients' dtype.
        impl: "auto", "reference", "cpp" (C++, CPU tensors), "cuda" (CUDA tensors, T <= 64) or "triton" (CUDA tensors, a
            [T, P] tensor or lists of one tensor).

    Returns:
        `out`: [P] for a tensor, a list of K tensors for lists.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    lists = task_lists(grads)
    if not isinstance(weights, Tensor) or weights.shape != (len(lists),) or not weights.is_floating_point():
        raise ValueError(f"weights must be a floating point tensor of shape [{len(lists)}], got {_describe(weights)}")
    if lists[0] and weights.device != lists[0][0].device:
        raise ValueError(f"weights must be on {lists[0][0].device} like grads, got {weights.device}")
    targets = _targets(grads, lists[0], out)
    match _select(impl, lists):
        case "cpp" | "cuda":
            gradients.combine(lists, weights, targets)
        case "triton":
            from fastmtl_kernels.task_gradients import triton as gradients_triton

            gradients_triton.combine(lists, weights, targets)
        case _:
            reference.combine(lists, weights, targets)
    return targets[0] if isinstance(grads, Tensor) else targets


def task_lists(grads: Grads) -> list[list[Tensor]]:
    """J as T lists of K contiguous tensors. Raises ValueError naming what is wrong with `grads`."""
    if isinstance(grads, Tensor):
        if grads.dim() != 2 or grads.shape[0] == 0:
            raise ValueError(f"grads must have the shape [T, P] with T >= 1, got {list(grads.shape)}")
        lists = [[row] for row in grads.unbind(0)]
    else:
        lists = [list(task) for task in grads]
        if not lists:
            raise ValueError("grads must hold the gradients of at least one task, got an empty list")
    device = lists[0][0].device if lists[0] else None
    for t, task in enumerate(lists):
        if len(task) != len(lists[0]):
            raise ValueError(f"grads[{t}] must hold as many tensors as grads[0] ({len(lists[0])}), got {len(task)}")
        for k, (tensor, first) in enumerate(zip(task, lists[0], strict=True)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(f"grads[{t}][{k}] must be a floating point tensor, got {_describe(tensor)}")
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise ValueError(
                    f"grads[{t}][{k}] must be like grads[0][{k}] ({_describe(first)}), got {_describe(tensor)}"
                )
            if tensor.device != device:
                raise ValueError(f"grads[{t}][{k}] must be on {device} like grads[0][0], got {tensor.device}")
    return [[tensor.contiguous() for tensor in task] for task in lists]


def _targets(grads: Grads, like: list[Tensor], out: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Where combine writes: K tensors."""
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
                f"got {_describe(target)} on {target.device}{'' if target.is_contiguous() else ', not contiguous'}"
            )
        if target.dtype not in (tensor.dtype, torch.float32):
            raise ValueError(f"out[{k}] must be {tensor.dtype} like grads or torch.float32, got {target.dtype}")
    return targets


def _select(impl: str, lists: list[list[Tensor]]) -> str:
    """The implementation to use; an explicit one that cannot be used is an error."""
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    if impl == "auto":
        return next(name for name in _FASTEST_FIRST if not _unsupported_reason(name, device, lists))
    if impl not in _FASTEST_FIRST:
        raise ValueError(f"impl must be 'auto', {', '.join(map(repr, _FASTEST_FIRST))}, got {impl!r}")
    reason = _unsupported_reason(impl, device, lists)
    if reason:
        raise RuntimeError(f"impl={impl!r} cannot be used here: {reason}")
    return impl


def _unsupported_reason(impl: str, device: torch.device, lists: Sequence[Sequence[Tensor]] = ((),)) -> str:
    """The reason why an implementation cannot be used on a device, with these gradients if given; "" where it can."""
    if impl == "reference":
        return ""
    kernels = {"cpp": "the C++ kernels", "cuda": "the CUDA kernels", "triton": "the Triton kernels"}[impl]
    wanted = "cpu" if impl == "cpp" else "cuda"
    if device.type != wanted:
        return f"{kernels} take {wanted.upper()} tensors, not {device.type}"
    wrong = [tensor.dtype for tensor in lists[0] if tensor.dtype not in gradients.DTYPES]
    if wrong:
        return f"{kernels} take float32, bfloat16 and float16, not {wrong[0]}"
    if impl == "cpp":
        return _native.why_unavailable()
    if impl == "cuda":
        if len(lists) > gradients.MAX_CUDA_TASKS:
            return f"{kernels} take up to {gradients.MAX_CUDA_TASKS} tasks, not {len(lists)}"
        return _native.why_no_cuda(device)
    if len(lists[0]) > 1:
        return f"{kernels} take a [T, P] tensor or lists of one tensor, not lists of {len(lists[0])}"
    return dispatch.why_no_triton()


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
