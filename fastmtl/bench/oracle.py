"""No time without the right gradients: every variant is compared with the textbook loop on the same rows and weights."""

from __future__ import annotations

import math

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

    Task gradients are float32, made by the loop's own backwards; they are merged in float64, since torch's inner
    product of 10^8 float32 numbers may be off by a percent of the norms.
    """

    def __init__(self, workload: Workload) -> None:
        model = workload.padded
        model.zero_grad()
        self._shapes = {name: p.shape for name, p in model.encoder.named_parameters(prefix="encoder")}
        self._rows = textbook.task_gradients(model, workload.padded_batches)
        heads = model.heads.named_parameters(prefix="heads")
        self._own = {name: p.grad.clone() for name, p in heads if p.grad is not None}
        self._norms = {name: gradient.norm().item() for name, gradient in self._own.items()}
        for row in self._rows:
            for name, piece in self._split(row).items():
                self._norms[name] = self._norms.get(name, 0.0) + piece.norm().item()
        self._whole = math.hypot(*self._norms.values())
        self._summed = self._split(torch.stack(self._rows).sum(0))
        self._merged: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def expected(self, order: Tensor | None) -> dict[str, Tensor]:
        """Every parameter's gradient, float32: of the sum of the losses without an order, else PCGrad's."""
        if order is None:
            return {**self._summed, **self._own}
        key = tuple(order.flatten().tolist())
        if key not in self._merged:
            merged = textbook.pcgrad([row.double() for row in self._rows], order)
            self._merged[key] = self._split(merged.float())
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
        except Exception as error:
            if not variant.optional:
                raise
            raise Skipped(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
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

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}
