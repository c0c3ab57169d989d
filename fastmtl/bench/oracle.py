"""No time without the right gradients: each variant is compared with the textbook loop on the same rows and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmtl.bench import textbook
from fastmtl.bench.variants import Skipped, Variant
from fastmtl.bench.workload import SEED, Workload, plain_name

# A tensor whose gradient is nothing but cancellation (the bias of keys) is measured against this share of the whole.
FLOOR = 1e-2
# PCGrad's gradient differs from the sum's by at least so many tolerances, or the check would not tell them apart.
APART = 10


class GradientMismatch(RuntimeError):
    """A variant's gradient is not the textbook's: its time would mean nothing."""


class Oracle:
    """The textbook loop's gradients of a workload, by parameter. Holds T gradients of the encoder.

    Task gradients are float32, made by the loop's own backwards. They are merged in float64, since torch's inner
    product of 10^8 float32 numbers may be off by a percent of the norms; and by T coordinates in place of P, since the
    loop never leaves the span of the T gradients and knows nothing of them but inner products.
    """

    def __init__(self, workload: Workload) -> None:
        model = workload.padded
        model.zero_grad()
        self._shapes = {name: p.shape for name, p in model.encoder.named_parameters(prefix="encoder")}
        rows = textbook.task_gradients(model, workload.padded_batches)
        self._rows = [row.split([shape.numel() for shape in self._shapes.values()]) for row in rows]
        heads = model.heads.named_parameters(prefix="heads")
        self._own = {name: p.grad.clone() for name, p in heads if p.grad is not None}
        self._norms = {name: gradient.norm().item() for name, gradient in self._own.items()}
        self._gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for name, piece in self._pieces():
            self._gram += piece @ piece.t()
            self._norms[name] = piece.norm(dim=1).sum().item()
        self._whole = math.hypot(*self._norms.values())
        self._summed = self._combined(torch.ones(len(rows), dtype=torch.float64))
        self._merged: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def expected(self, order: Tensor | None) -> dict[str, Tensor]:
        """Every parameter's gradient, float32: of the sum of the losses without an order, else PCGrad's."""
        if order is None:
            return {**self._summed, **self._own}
        key = tuple(order.flatten().tolist())
        if key not in self._merged:
            values, vectors = torch.linalg.eigh(self._gram)
            coordinates = vectors * values.clamp(min=0).sqrt()  # rows with the gradients' inner products
            merged = textbook.pcgrad(list(coordinates), order)
            self._merged[key] = self._combined(torch.linalg.pinv(coordinates.t()) @ merged)
        return {**self._merged[key], **self._own}

    def check(self, variant: Variant) -> float:
        """Runs the variant's first step and returns its largest error, relative to the task gradients' norms.

        Raises GradientMismatch naming variant and parameter, and Skipped for an optional variant that fails.
        """
        expected = self.expected(variant.order)
        apart = max(self._error(name, expected[name], summed) for name, summed in self._summed.items())
        if variant.order is not None and apart < APART * variant.tolerance:
            raise GradientMismatch(f"{variant.name}: the tasks do not conflict, the check would take a sum for PCGrad")
        torch.manual_seed(SEED)
        try:
            variant.step()
        except Exception as failure:
            if not variant.optional:
                raise
            raise Skipped(f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}") from failure
        found = {plain_name(name): parameter.grad for name, parameter in variant.model.named_parameters()}
        largest = 0.0
        for name, wanted in expected.items():
            gradient = found[name]
            error = math.inf if gradient is None else self._error(name, gradient, wanted)
            if not error <= variant.tolerance:
                raise GradientMismatch(
                    f"{variant.name}: the gradient of {name} is not the textbook loop's (relative error {error:.1e}, "
                    f"allowed {variant.tolerance:.1e}), so nothing is timed"
                )
            largest = max(largest, error)
        return largest

    def _error(self, name: str, found: Tensor, expected: Tensor) -> float:
        return (found - expected).norm().item() / (self._norms[name] + FLOOR * self._whole)

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """The columns of J that belong to a parameter, float64 [T, its size]."""
        for name, *rows in zip(self._shapes, *self._rows, strict=True):
            yield name, torch.stack(rows).double()

    def _combined(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: (weights @ piece).float().view(self._shapes[name]) for name, piece in self._pieces()}
