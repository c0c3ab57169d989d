"""No time without the right gradients: each variant is compared with the textbook loop on the same rows and weights."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.bench import textbook
from fastmtl.bench.sizes import SEED
from fastmtl.bench.textbook import PaddedBatch, PaddedModel
from fastmtl.bench.variants import Skipped, Variant
from fastmtl.bench.workload import Workload, plain_name

# A tensor whose gradient is nothing but cancellation (the bias of keys) is measured against this share of the whole.
FLOOR = 1e-2
# PCGrad's gradient differs from the sum's by at least so many tolerances, or the check would not tell them apart.
APART = 5


class GradientMismatch(RuntimeError):
    """A variant's gradient is not the textbook's: its time would mean nothing."""


class TextbookGradients:
    """Each task's gradient by the textbook loop, in the model's precision, and what merging makes of them.

    They are merged in float64, since torch's inner product of 10^8 float32 numbers may be off by a percent of the
    norms; and by T coordinates in place of P, since the loop never leaves the span of the T gradients and knows nothing
    of them but inner products. Holds T gradients of the encoder.

    norms: of every parameter, the sum over tasks of its gradient's norm.
    """

    def __init__(self, model: PaddedModel, batches: Sequence[PaddedBatch]) -> None:
        model.zero_grad()
        self._shapes = {name: p.shape for name, p in model.encoder.named_parameters(prefix="encoder")}
        rows = textbook.task_gradients(model, batches)
        self._rows = [row.split([shape.numel() for shape in self._shapes.values()]) for row in rows]
        heads = model.heads.named_parameters(prefix="heads")
        self._own = {name: p.grad.float() for name, p in heads if p.grad is not None}
        model.zero_grad()
        self.norms = {name: gradient.norm().item() for name, gradient in self._own.items()}
        gram = rows[0].new_zeros(len(rows), len(rows), dtype=torch.float64)
        for name, piece in self._pieces():
            gram += piece @ piece.t()
            self.norms[name] = piece.norm(dim=1).sum().item()
        self._gram = gram.cpu()
        self._merged: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def merged(self, order: Tensor | None) -> dict[str, Tensor]:
        """Every parameter's gradient, float32: of the sum of the losses without an order, else PCGrad's."""
        key = () if order is None else tuple(order.flatten().tolist())
        if key not in self._merged:
            weights = torch.ones(len(self._rows), dtype=torch.float64)
            if order is not None:
                values, vectors = torch.linalg.eigh(self._gram)
                coordinates = vectors * values.clamp(min=0).sqrt()  # rows with the gradients' inner products
                merged = textbook.pcgrad(list(coordinates), order)
                weights = torch.linalg.pinv(coordinates.t()) @ merged
            self._merged[key] = self._combined(weights)
        return {**self._merged[key], **self._own}

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """The columns of J that belong to a parameter, float64 [T, its size]."""
        for name, *rows in zip(self._shapes, *self._rows, strict=True):
            yield name, torch.stack(rows).double()

    def _combined(self, weights: Tensor) -> dict[str, Tensor]:
        return {
            name: (weights.to(piece.device) @ piece).float().view(self._shapes[name]) for name, piece in self._pieces()
        }


class Oracle:
    """The textbook loop's gradients of a workload in float32, and how far off a variant's may be.

    In float32 that is the variant's own tolerance. In a lower precision it is, for every parameter, that and twice the
    error that the textbook loop has itself when torch runs it in this precision; the median of that over all
    parameters where it is less, since a tensor of a few numbers may come out right by luck.
    """

    def __init__(self, workload: Workload) -> None:
        model, batches = workload.padded, workload.padded_batches
        if workload.dtype == torch.float32:
            self._exact, self._rounded = TextbookGradients(model, batches), None
        else:
            self._exact = TextbookGradients(copy.deepcopy(model).float(), batches)
            self._rounded = TextbookGradients(model, batches)
        self._whole = math.hypot(*self._exact.norms.values())

    def expected(self, order: Tensor | None) -> dict[str, Tensor]:
        """Every parameter's gradient, float32: of the sum of the losses without an order, else PCGrad's."""
        return self._exact.merged(order)

    def allowed(self, variant: Variant) -> dict[str, float]:
        """The largest error of every parameter, relative to the task gradients' norms."""
        expected = self.expected(variant.order)
        if self._rounded is None:
            return dict.fromkeys(expected, variant.tolerance)
        rounded = self._rounded.merged(variant.order)
        errors = {name: self._error(name, rounded[name], wanted) for name, wanted in expected.items()}
        least = statistics.median(errors.values())
        return {name: variant.tolerance + 2 * max(error, least) for name, error in errors.items()}

    def check(self, variant: Variant) -> float:
        """Runs the variant's first step and returns its largest error, relative to the task gradients' norms.

        Raises GradientMismatch naming variant and parameter, and Skipped for an optional variant that fails.
        """
        expected, allowed = self.expected(variant.order), self.allowed(variant)
        summed = self.expected(None)
        apart = max(self._error(name, wanted, summed[name]) / allowed[name] for name, wanted in expected.items())
        if variant.order is not None and apart < APART:
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
            if not error <= allowed[name]:
                raise GradientMismatch(
                    f"{variant.name}: the gradient of {name} is not the textbook loop's (relative error {error:.1e}, "
                    f"allowed {allowed[name]:.1e}), so nothing is timed"
                )
            largest = max(largest, error)
        return largest

    def _error(self, name: str, found: Tensor, expected: Tensor) -> float:
        return (found - expected).norm().item() / (self._exact.norms[name] + FLOOR * self._whole)
