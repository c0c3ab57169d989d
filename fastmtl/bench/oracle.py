"""A check of each variant's gradients against the textbook loop. Wrong gradients are not timed."""

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

# Least scale of a tensor's error, relative to the whole gradient's norm. It matters for gradients
# that are pure cancellation, such as the bias of keys.
FLOOR = 1e-2
# Least distance of PCGrad's gradient from the sum's, in tolerances. A closer pair would make the
# check meaningless.
APART = 5


class GradientMismatch(RuntimeError):
    """Raised for a variant whose gradient is not the textbook's. Its time would be meaningless."""


class TextbookGradients:
    """Each task's gradient by the textbook loop in the model's precision, and merges of them.

    Merges are computed in float64, because torch's inner product of 10^8 float32 numbers may be off
    by a percent of the norms. T coordinates replace P, because the loop never leaves the span of
    the T gradients and uses only their inner products. This object holds T gradients of the
    encoder.

    norms: for every parameter, the sum over tasks of the norm of its gradient.
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
        """Return every parameter's gradient, float32: PCGrad's, or the sum's if order is None."""
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
        """Yield the columns of J of each parameter, float64 [T, size]."""
        for name, *rows in zip(self._shapes, *self._rows, strict=True):
            yield name, torch.stack(rows).double()

    def _combined(self, weights: Tensor) -> dict[str, Tensor]:
        return {
            name: (weights.to(piece.device) @ piece).float().view(self._shapes[name]) for name, piece in self._pieces()
        }


class Oracle:
    """The textbook loop's gradients of a workload in float32, and the allowed errors of a variant.

    In float32 the allowed error is the variant's own tolerance. In a lower precision it is, for
    every parameter, the tolerance plus twice the textbook loop's own error in that precision. The
    median of this error over all parameters is the least value used, since a tensor of a few
    numbers may be exact by luck.
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
        """Return every parameter's gradient, float32: PCGrad's, or the sum's if order is None."""
        return self._exact.merged(order)

    def allowed(self, variant: Variant) -> dict[str, float]:
        """Return every parameter's largest allowed error, relative to the task gradients' norms."""
        expected = self.expected(variant.order)
        if self._rounded is None:
            return dict.fromkeys(expected, variant.tolerance)
        rounded = self._rounded.merged(variant.order)
        errors = {name: self._error(name, rounded[name], wanted) for name, wanted in expected.items()}
        least = statistics.median(errors.values())
        return {name: variant.tolerance + 2 * max(error, least) for name, error in errors.items()}

    def check(self, variant: Variant) -> float:
        """Run the variant's first step; return its largest error, relative to the gradients' norms.

        Raises GradientMismatch with the variant and parameter, and Skipped for an optional variant
        that fails.
        """
        expected, allowed = self.expected(variant.order), self.allowed(variant)
        summed = self.expected(None)
        apart = max(self._error(name, wanted, summed[name]) / allowed[name] for name, wanted in expected.items())
        if variant.order is not None and apart < APART:
            raise GradientMismatch(f"{variant.name}: the tasks do not conflict, so a sum would pass for PCGrad")
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
