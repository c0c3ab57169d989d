"""Steps of AdamW from task gradients and their error budget, for the tests of combined_adamw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
UNIT = 2.0**-23


@dataclass
class Written:
    """params, exp_avgs, exp_avg_sqs, copies: K tensors each; copies may be None."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor] | None

    @classmethod
    def random(cls, shapes: list[tuple[int, ...]], generator: torch.Generator, copy: torch.dtype | None) -> Written:
        def some(scale: float) -> list[Tensor]:
            return [scale * torch.randn(shape, generator=generator) for shape in shapes]

        copies = None if copy is None else [torch.full(shape, math.nan, dtype=copy) for shape in shapes]
        return cls(some(1.0), some(0.1), [tensor.square() for tensor in some(0.3)], copies)

    def on(self, device: str) -> Written:
        """A copy of its own."""

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.clone().to(device) for tensor in tensors]

        copies = None if self.copies is None else moved(self.copies)
        return Written(moved(self.params), moved(self.exp_avgs), moved(self.exp_avg_sqs), copies)

    def arguments(self) -> dict[str, Any]:
        return vars(self)


def check(
    found: Written, before: Written, merged: list[Tensor], magnitudes: list[Tensor], tasks: int, step: int
) -> None:
    """Check a step against AdamW in float64.

    merged: sum_t weights[t] J[t]. magnitudes: the sum of the absolute terms. Both float64.
    """
    beta1, beta2 = OPTIONS["betas"]
    step_size, root = OPTIONS["lr"] / (1 - beta1**step), (1 - beta2**step) ** -0.5
    for k, gradient in enumerate(merged):
        p, m, v = (tensor.double() for tensor in (before.params[k], before.exp_avgs[k], before.exp_avg_sqs[k]))
        exact_m, exact_v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient.square()
        size = exact_v.sqrt() * root + OPTIONS["eps"]
        exact_p = (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) * p - step_size * exact_m / size
        off = (tasks + 1) * UNIT * magnitudes[k]
        off_m = (1 - beta1) * off + 4 * UNIT * (m.abs() + gradient.abs())
        off_v = 2 * (1 - beta2) * (gradient.abs() + off) * off + 4 * UNIT * exact_v
        off_size = (1 - beta2) ** 0.5 * off * root + 4 * UNIT * size
        off_p = step_size * (off_m + exact_m.abs() * off_size / size) / size + 4 * UNIT * (p.abs() + exact_p.abs())
        for name, exact, allowed in (
            ("exp_avgs", exact_m, off_m),
            ("exp_avg_sqs", exact_v, off_v),
            ("params", exact_p, off_p),
        ):
            value = getattr(found, name)[k]
            assert value.dtype == torch.float32
            error = (value.double().cpu() - exact).abs()
            assert (error <= allowed + 1e-40).all(), (name, k, (error / allowed).max())
        if found.copies is not None:
            assert torch.equal(found.copies[k], found.params[k].to(found.copies[k].dtype))


def lists_of(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], tasks: int, generator: torch.Generator
) -> tuple[list[list[Tensor]], Tensor]:
    """Return T lists of gradients, and the tasks' weights."""
    grads = [
        [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for _ in range(tasks)
    ]
    return grads, torch.randn(tasks, generator=generator)


def exact_sums(grads: list[list[Tensor]], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return every tensor's weighted sum and sum of absolute terms, float64 on the CPU."""
    factors = weights.double().cpu()
    columns = [torch.stack([gradient.double().cpu() for gradient in same], -1) for same in zip(*grads, strict=True)]
    return [parts @ factors for parts in columns], [parts.abs() @ factors.abs() for parts in columns]


def spread(values: list[Tensor], slots: Tensor) -> list[Tensor]:
    """Return one compact tensor [n, d] as the table [V, d] that it stands for."""
    (rows,) = values
    present = (slots >= 0)[:, None]
    return [torch.where(present, rows[slots.clamp(min=0).long()] if len(rows) else 0.0, 0.0).expand(len(slots), -1)]
