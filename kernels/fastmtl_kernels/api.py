"""The public operations on task gradients: they validate, pick an implementation and call it.

Task gradients J are a tensor [T, P], or T lists of K tensors, tensor k of the same shape, dtype and device in every
list; no flat copy is made of lists. float32, bfloat16 and float16, accumulated in float32 or better; float64 (for
tests) by the reference only. No operation is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels import gradients, reference

Impl = Literal["auto", "reference", "cpp"]
Grads = Tensor | Sequence[Sequence[Tensor]]


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
    cpp_reason = _why_not_cpp(torch.device(device), ())
    gradient_impls = [
        Implementation("cpp", not cpp_reason, cpp_reason or "C++, vectorised and threaded", not cpp_reason),
        Implementation("reference", True, "plain torch", bool(cpp_reason)),
    ]
    on_device = [Implementation("reference", True, "plain torch, stays on the device", True)]
    return {
        "gramian": gradient_impls,
        "combine": gradient_impls,
        "pcgrad_weights": on_device,
        "gradvac_weights": on_device,
    }


@torch.no_grad()
def gramian(grads: Grads, impl: Impl = "auto") -> Tensor:
    """Inner products of all pairs of task gradients, G = J J^T.

    Args:
        grads: J as [T, P] or T lists of K tensors (see the module); T >= 1, P and K may be 0. Tensors that are not
            contiguous are copied.
        impl: "auto", "reference" or "cpp" (C++, CPU tensors).

    Returns:
        G [T, T] float32 on the gradients' device (float64 for float64 gradients). Equal inputs give equal bits.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    lists = _task_lists(grads)
    match _select(impl, lists):
        case "cpp":
            return gradients.gramian(lists)
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
        impl: "auto", "reference" or "cpp" (C++, CPU tensors).

    Returns:
        `out`: [P] for a tensor, a list of K tensors for lists.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    lists = _task_lists(grads)
    if not isinstance(weights, Tensor) or weights.shape != (len(lists),) or not weights.is_floating_point():
        raise ValueError(f"weights must be a floating point tensor of shape [{len(lists)}], got {_describe(weights)}")
    if lists[0] and weights.device != lists[0][0].device:
        raise ValueError(f"weights must be on {lists[0][0].device} like grads, got {weights.device}")
    targets = _targets(grads, lists[0], out)
    match _select(impl, lists):
        case "cpp":
            gradients.combine(lists, weights, targets)
        case _:
            reference.combine(lists, weights, targets)
    return targets[0] if isinstance(grads, Tensor) else targets


def _task_lists(grads: Grads) -> list[list[Tensor]]:
    """J as T lists of K contiguous tensors."""
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
    tensors = lists[0]
    device = tensors[0].device if tensors else torch.device("cpu")
    match impl:
        case "reference":
            return impl
        case "auto":
            return "reference" if _why_not_cpp(device, tensors) else "cpp"
        case "cpp":
            reason = _why_not_cpp(device, tensors)
            if reason:
                raise RuntimeError(f"impl='cpp' cannot be used here: {reason}")
            return impl
        case _:
            raise ValueError(f"impl must be 'auto', 'reference' or 'cpp', got {impl!r}")


def _why_not_cpp(device: torch.device, tensors: Sequence[Tensor]) -> str:
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type}"
    wrong = [tensor.dtype for tensor in tensors if tensor.dtype not in gradients.DTYPES]
    if wrong:
        return f"the C++ kernels take float32, bfloat16 and float16, not {wrong[0]}"
    return gradients.why_unavailable()


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
