"""AdamW's step on the weighted sum of task gradients, in one pass over memory.

    g = sum_t weights[t] J[t], then AdamW's step with the gradient g

The pass updates the model's weights, their moments and, if wanted, a 16-bit copy of the weights.
J [T, P] is read once, weights and moments are read and written once, and g is never stored. In
float32 the pass moves (4 T + 24) P bytes. `combine` followed by an optimizer moves (4 T + 32) P
bytes, and clipping between the two 12 P more. To clip the gradient, multiply `weights` by the
factor. Arithmetic in float32; J float32, bfloat16 or float16. Each element is computed by itself:
equal inputs give equal bits.

Source: see fastmtl_kernels.combined_adamw.reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastmtl_kernels.checks import describe
from fastmtl_kernels.combined_adamw import cpp, reference
from fastmtl_kernels.combined_adamw.reference import Update, Written
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.task_lists import Grads, task_lists

Tensors = Tensor | Sequence[Tensor]


@torch.no_grad()
def combined_adamw(
    grads: Grads,
    weights: Tensor,
    params: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    copies: Tensors | None = None,
    slots: Tensor | None = None,
    impl: RowImpl = "auto",
) -> None:
    """Take one step of AdamW with the gradient sum_t weights[t] J[t], in place.

    Args:
        grads: J as [T, P] or T lists of K tensors (see fastmtl_kernels.task_gradients.api);
            T >= 1, P and K may be 0. Tensors that are not contiguous are copied.
        weights: the tasks' weights, [T], floating point, on the gradients' device; converted to the
            dtype of `params`.
        params, exp_avgs, exp_avg_sqs: the model's weights and their first and second moments. Each
            is a tensor [P] if `grads` is a tensor, else K tensors of the gradients' shapes;
            contiguous, float32 (float64 too with impl "reference").
        step: number of this step, from 1.
        lr, betas, eps, weight_decay: the arguments of torch.optim.AdamW.
        copies: bfloat16 or float16 tensors of the shapes of `params`, which receive the rounded new
            values of `params`; None writes no copies.
        slots: only for one embedding table [V, d] whose gradients have few rows: int32 [V] on the
            gradients' device. `grads` is then T lists of one tensor [n, d], and row v of the table
            has the gradient grads[t][0][slots[v]] of task t, or zero if slots[v] < 0. Rows with a
            zero gradient are updated too. The values are checked on CPUs only, as reading them
            would wait for a GPU.
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    lists = task_lists(grads)
    flat = isinstance(grads, Tensor)
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    if not isinstance(weights, Tensor) or weights.shape != (len(lists),) or not weights.is_floating_point():
        raise ValueError(f"weights must be a floating point tensor of shape [{len(lists)}], got {describe(weights)}")
    if lists[0] and weights.device != device:
        raise ValueError(f"weights must be on {device} like grads, got {weights.device}")
    if not step >= 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and less than 1, got {betas}")
    if slots is not None:
        _check_slots(slots, lists, device)
    update = Update.at(step, lr, betas, eps, weight_decay)
    written = [
        _listed(name, value, lists[0], flat)
        for name, value in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs))
    ]
    copied = [None] * len(lists[0]) if copies is None else _listed("copies", copies, lists[0], flat)
    targets = [Written(*tensors) for tensors in zip(*written, copied, strict=True)]
    for k, target in enumerate(targets):
        _check(k, target, lists[0][k], slots)
    if slots is not None and device.type == "cpu" and len(slots) and int(slots.max()) >= len(lists[0][0]):
        raise ValueError(f"slots must be below the {len(lists[0][0])} rows of grads, got {int(slots.max())}")
    if targets:
        written_tensors = (tensor for target in targets for tensor in target)
        kernels = _kernels(select("combined_adamw", impl, *lists[0], *written_tensors))
        kernels.combined_adamw(lists, weights, targets, update, slots)


def _kernels(impl: str) -> ModuleType:
    match impl:
        case "cpp":
            return cpp
        case "triton":
            from fastmtl_kernels.combined_adamw import triton

            return triton
        case _:
            return reference


def _listed(name: str, value: Tensors, like: list[Tensor], flat: bool) -> list[Tensor]:
    if isinstance(value, Tensor) != flat:
        kind = "a tensor [P]" if flat else "a list of tensors"
        raise ValueError(f"{name} must be {kind} for these grads, got {type(value).__name__}")
    tensors = [value] if isinstance(value, Tensor) else list(value)
    if len(tensors) != len(like):
        raise ValueError(f"{name} must hold {len(like)} tensors, one for each tensor of a task, got {len(tensors)}")
    return tensors


def _check(k: int, target: Written, gradient: Tensor, slots: Tensor | None) -> None:
    shape = gradient.shape if slots is None else torch.Size((len(slots), gradient.shape[1]))
    for name, tensor in zip(("params", "exp_avgs", "exp_avg_sqs", "copies"), target, strict=True):
        if name == "copies" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != gradient.device:
            raise ValueError(
                f"{name}[{k}] must have the shape {list(shape)} on {gradient.device}, got {describe(tensor)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}[{k}] must be contiguous, as it is written in place")
        allowed = (torch.bfloat16, torch.float16) if name == "copies" else (torch.float32, torch.float64)
        if tensor.dtype not in allowed or (name.startswith("exp") and tensor.dtype != target.param.dtype):
            wanted = (
                " or ".join(map(str, allowed)) if not name.startswith("exp") else f"{target.param.dtype} like params"
            )
            raise ValueError(f"{name}[{k}] must be {wanted}, got {tensor.dtype}")


def _check_slots(slots: Tensor, lists: list[list[Tensor]], device: torch.device) -> None:
    if len(lists[0]) != 1 or lists[0][0].dim() != 2:
        raise ValueError("slots is for one embedding table: grads must be lists of one tensor [n, d]")
    if not isinstance(slots, Tensor) or slots.dim() != 1 or slots.dtype != torch.int32 or slots.device != device:
        raise ValueError(f"slots must be int32 [V] on {device}, got {describe(slots)}")
