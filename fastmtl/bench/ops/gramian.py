"""gramian: inner products of an encoder's task gradients, compared with one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import Case, Run, Tensors, Way, Work, ours, plain
from fastmtl.bench.sizes import PRECISIONS, SEED, Size
from fastmtl_kernels import gramian


def cases(size: Size) -> list[Case]:
    grads = task_gradients(size)
    tasks, columns = grads.shape

    def fastmtl(impl: str) -> Run:
        return lambda t, _: gramian(t["grads"], impl)  # type: ignore[arg-type]

    return [
        Case(
            "gramian",
            f"{tasks} tasks x {columns:,} numbers",
            {"grads": grads},
            fastmtl("reference"),
            [*ours(grads.device, "gramian", fastmtl), *plain(_eager), Way("eager in float64", lambda: _wide)],
            {"forward": Work(grads.nbytes, tasks * (tasks + 1) * columns)},
            exact=True,
        )
    ]


def task_gradients(size: Size) -> Tensor:
    """Return random task gradients J [T, P], P the number of the encoder's parameters."""
    device = torch.device(size.device)
    generator = torch.Generator(device).manual_seed(SEED)
    grads = torch.randn(size.tasks, size.shape.parameters, generator=generator, device=device)
    return grads.to(PRECISIONS[size.precision])


def _eager(t: Tensors, _: float) -> Tensor:
    """Return the Gramian as one matrix product of torch.

    A BLAS that adds float32 numbers one by one is too inaccurate to pass the check.
    """
    return t["grads"] @ t["grads"].T


def _wide(t: Tensors, _: float) -> Tensor:
    wide = t["grads"].double()
    return wide @ wide.T
