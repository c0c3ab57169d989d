"""Conversion of task gradients J to lists of tensors, for the operations that read J."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl_kernels.checks import describe

# Task gradients J: a tensor [T, P], or T lists of K tensors.
Grads = Tensor | Sequence[Sequence[Tensor]]


def task_lists(grads: Grads) -> list[list[Tensor]]:
    """Return J as T lists of K contiguous tensors.

    Raises:
        ValueError: `grads` is empty or has the wrong shape, or a tensor is not floating point, is
            on another device or differs from tensor k of the first list in shape or dtype.
    """
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
                raise ValueError(f"grads[{t}][{k}] must be a floating point tensor, got {describe(tensor)}")
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise ValueError(
                    f"grads[{t}][{k}] must be like grads[0][{k}] ({describe(first)}), got {describe(tensor)}"
                )
            if tensor.device != device:
                raise ValueError(f"grads[{t}][{k}] must be on {device} like grads[0][0], got {tensor.device}")
    return [[tensor.contiguous() for tensor in task] for task in lists]
