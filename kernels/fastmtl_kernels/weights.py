"""Task weights from a Gramian: PCGrad and GradVac in coefficient form.

Row i of C [T, T] starts as e_i and stands for the modified gradient g_i' = sum_k C[i, k] g_k, with

    g_i' . g_j = (C G)[i, j]        |g_i'|^2 = (C G C^T)[i, i]

Each row visits the tasks j != i in a random order. With phi = cos(g_i', g_j):

    PCGrad   where g_i' . g_j < 0:      C[i, j] -= (g_i' . g_j) / |g_j|^2
    GradVac  where phi < phi_T[i, j]:   C[i, j] += |g_i'| / (|g_j| sqrt(1 - phi_T^2))
                                                   (phi_T sqrt(1 - phi^2) - phi sqrt(1 - phi_T^2))

weights = sum_i C[i], so that sum_t weights[t] g_t is the sum of the modified gradients.

gram (G) [T, T] symmetric, float32 or float64; arithmetic in float64; weights [T] in gram's dtype,
on its device. All rows of C are updated in parallel, in T steps of a few small operations. The host
does not wait for the device.

Sources: Yu et al., Gradient Surgery for Multi-Task Learning, 2020, algorithm 1 (every projection is
on the original g_j); Wang et al., Gradient Vaccine, 2021, equation 2 and algorithm 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from fastmtl_kernels.upload import upload

Reduction = Literal["sum", "mean"]

# Adding a finite multiple of g_j cannot give g_i' a cosine of 1 with g_j.
_LARGEST_TARGET = 1.0 - 1e-6


def pcgrad_weights(
    gram: Tensor,
    order: Tensor | None = None,
    generator: Generator | None = None,
    reduction: Reduction = "sum",
    *,
    check_order: bool = True,
) -> Tensor:
    """Return PCGrad's weight of each task gradient, from the Gramian of the task gradients.

    Args:
        gram: [T, T] float32 or float64, symmetric. No gradient is projected on a zero gradient
            (gram[j, j] == 0).
        order: the order in which row i visits the tasks, skipping its own index: an integer
            permutation [T] used for every row, or [T, T], one per row. None draws one per row, on
            the host.
        generator: the CPU generator that draws the order, the global one by default.
        reduction: "sum" of the projected gradients, as in the paper, or their "mean".
        check_order: whether to check that `order` has permutations. Values on a GPU are never
            checked.

    Returns:
        weights [T], of gram's dtype and on its device.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
    """
    _check(gram, reduction)
    order = _order(gram, order, generator, check_order)
    gram64, coefficients, rows = _start(gram)
    for step in order.unbind(1):
        facing = gram64[step]
        dots = (coefficients * facing).sum(1)
        square = facing.gather(1, step[:, None]).squeeze(1)
        conflict = (dots < 0) & (step != rows) & (square > 0)
        change = torch.where(conflict, -dots / square, 0.0)
        coefficients.scatter_add_(1, step[:, None], change[:, None])
    return _reduce(coefficients, reduction).to(gram.dtype)


def gradvac_weights(
    gram: Tensor,
    target: Tensor,
    order: Tensor | None = None,
    generator: Generator | None = None,
    reduction: Reduction = "sum",
    *,
    check_order: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return GradVac's weight of each task gradient, and the cosines that update the targets.

    The targets' moving average is the caller's state: `target.lerp_(cosines, beta)` after each
    call. The paper's beta is 0.01, and its targets start at 0.

    Args:
        gram: [T, T] float32 or float64, symmetric.
        target: [T, T] cosines phi_T, on gram's device; target[i, j] is the goal of g_i with g_j.
            Values are clamped to +-(1 - 1e-6); the diagonal is not used.
        order, generator, reduction, check_order: as for `pcgrad_weights`.

    Returns:
        weights [T] and cosines [T, T], of gram's dtype and on its device. cosines[i, j] is phi when
        row i visits task j, before the correction. It is target[i, j] where g_i or g_j is zero, so
        that a task absent from the batch keeps its averages, and 1 on the diagonal.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
    """
    _check(gram, reduction)
    if target.shape != gram.shape or not target.is_floating_point() or target.device != gram.device:
        raise ValueError(
            f"target must be a floating point tensor of shape {list(gram.shape)} on {gram.device} like gram, "
            f"got {target.dtype} {list(target.shape)} on {target.device}"
        )
    order = _order(gram, order, generator, check_order)
    gram64, coefficients, rows = _start(gram)
    cosines = torch.ones_like(gram64)
    for step in order.unbind(1):
        facing = gram64[step]
        dots = (coefficients * facing).sum(1)
        norm_i = (coefficients @ gram64 * coefficients).sum(1).clamp(min=0).sqrt()
        norm_j = facing.gather(1, step[:, None]).squeeze(1).clamp(min=0).sqrt()
        wanted = target[rows, step].double()
        other = step != rows
        defined = (norm_i > 0) & (norm_j > 0)
        phi = torch.where(defined, (dots / (norm_i * norm_j)).clamp(-1, 1), wanted)
        phi_T = wanted.clamp(-_LARGEST_TARGET, _LARGEST_TARGET)
        sine, sine_T = (1 - phi.square()).sqrt(), (1 - phi_T.square()).sqrt()
        change = norm_i * (phi_T * sine - phi * sine_T) / (norm_j * sine_T)
        change = torch.where(other & defined & (phi < phi_T), change, 0.0)
        coefficients.scatter_add_(1, step[:, None], change[:, None])
        cosines.scatter_(1, step[:, None], torch.where(other, phi, 1.0)[:, None])
    return _reduce(coefficients, reduction).to(gram.dtype), cosines.to(gram.dtype)


def _start(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gram64 = gram.detach().double()
    num_tasks = gram.shape[0]
    identity = torch.eye(num_tasks, dtype=torch.float64, device=gram.device)
    return gram64, identity, torch.arange(num_tasks, device=gram.device)


def _reduce(coefficients: Tensor, reduction: Reduction) -> Tensor:
    return coefficients.mean(0) if reduction == "mean" else coefficients.sum(0)


def _check(gram: Tensor, reduction: str) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must have the shape [T, T] with T >= 1, got {list(gram.shape)}")
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram must be float32 or float64, got {gram.dtype}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def _order(gram: Tensor, order: Tensor | None, generator: Generator | None, check: bool) -> Tensor:
    """Return the order of every row, checked, or a random one: int64 [T, T] on gram's device."""
    num_tasks = gram.shape[0]
    if order is None:
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be a CPU generator, got one on {generator.device}")
        order = torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
    elif order.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"order must be int64 or int32, got {order.dtype}")
    elif order.shape not in ((num_tasks,), (num_tasks, num_tasks)):
        raise ValueError(
            f"order must have the shape [{num_tasks}] or [{num_tasks}, {num_tasks}], got {list(order.shape)}"
        )
    # On another device the values are not checked: reading them would wait for it.
    elif check and order.device.type == "cpu" and not (order.sort(-1).values == torch.arange(num_tasks)).all():
        raise ValueError(f"order must hold permutations of 0..{num_tasks - 1}, got {order.tolist()}")
    return upload(order.to(torch.int64), gram.device).expand(num_tasks, num_tasks)
