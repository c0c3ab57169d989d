"""Check of each variant's gradients against the textbook loop, so that wrong ones are not timed."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.bench import textbook
from fastmtl.bench.sizes import SEED
from fastmtl.bench.textbook import TaskBatch, TaskModel
from fastmtl.bench.variants import Skipped, Variant
from fastmtl.bench.workload import plain_name

# A tensor's error is divided by its own norm plus this share of the whole gradient's norm. The
# share matters for gradients that are only rounding errors, such as that of the keys' bias.
FLOOR = 1e-2
# Least difference between PCGrad's gradient and the plain sum, as a multiple of the allowed error.
# With a smaller one, a plain sum would pass the check of PCGrad.
APART = 5


class Checkable(Protocol):
    """Workload of the textbook loop: one batch for each task, and a model in its precision."""

    dtype: torch.dtype

    @property
    def padded(self) -> TaskModel: ...

    @property
    def padded_batches(self) -> Sequence[TaskBatch]: ...


class GradientMismatch(RuntimeError):
    """Raised if a variant's gradient is not the textbook loop's. Its time would be meaningless."""


class TextbookGradients:
    """The textbook loop's gradient of each task, in the model's precision, and merged gradients.

    Gradients are merged in float64, because torch's inner product of 10^8 float32 numbers may be
    off by a percent of the norms. For merging, T coordinates stand for the P numbers of each
    gradient. They are enough, because the loop uses only inner products of the T gradients, and its
    results are sums of multiples of them. This object holds T gradients of the encoder.

    norms: for every parameter, the sum over tasks of the norm of its gradient.
    """

    def __init__(self, model: TaskModel, batches: Sequence[TaskBatch]) -> None:
        model.zero_grad()
        named = model.encoder.named_parameters(prefix="encoder")
        self._shapes = {name: p.shape for name, p in named if p.requires_grad}
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
        self._merged: dict[tuple[float, ...], dict[str, Tensor]] = {}

    def merged(self, order: Tensor | None, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Return the merged gradient of every parameter by name, float32.

        order: PCGrad's projection order, int64 [T, T]; None: the gradients are summed. gram: see
        Variant.
        """
        gram = self._gram if gram is None else gram
        key = () if order is None else (*order.flatten().tolist(), *gram.flatten().tolist())
        if key not in self._merged:
            weights = torch.ones(len(self._rows), dtype=torch.float64)
            if order is not None:
                values, vectors = torch.linalg.eigh(gram)
                coordinates = vectors * values.clamp(min=0).sqrt()  # rows with the same inner products as the gradients
                merged = textbook.pcgrad(list(coordinates), order)
                weights = torch.linalg.pinv(coordinates.t()) @ merged
            self._merged[key] = self._combined(weights)
        return {**self._merged[key], **self._own}

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its columns of J, float64 [T, size]."""
        for name, *rows in zip(self._shapes, *self._rows, strict=True):
            yield name, torch.stack(rows).double()

    def _combined(self, weights: Tensor) -> dict[str, Tensor]:
        return {
            name: (weights.to(piece.device) @ piece).float().view(self._shapes[name]) for name, piece in self._pieces()
        }


class Oracle:
    """The correct gradients of a workload, and the largest errors that a variant may have.

    The textbook loop in float32 gives the correct gradients. If the workload is float32, the
    allowed error is the variant's own tolerance. In a lower precision, a parameter's allowed error
    is the tolerance plus twice the textbook loop's own error in that precision. The median of this
    error over all parameters is the least value used, since a tensor of a few numbers may be exact
    by luck.
    """

    def __init__(self, workload: Checkable) -> None:
        model, batches = workload.padded, workload.padded_batches
        if workload.dtype == torch.float32:
            self._exact, self._rounded = TextbookGradients(model, batches), None
        else:
            self._exact = TextbookGradients(copy.deepcopy(model).float(), batches)
            self._rounded = TextbookGradients(model, batches)
        self._whole = math.hypot(*self._exact.norms.values())

    def expected(self, order: Tensor | None, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Return the correct gradient of every parameter by name, float32.

        order, gram: see TextbookGradients.merged.
        """
        return self._exact.merged(order, gram)

    def allowed(self, variant: Variant) -> dict[str, float]:
        """Return each parameter's largest allowed error, relative to its gradients' norms."""
        expected = self.expected(variant.order, variant.gram)
        if self._rounded is None:
            return dict.fromkeys(expected, variant.tolerance)
        rounded = self._rounded.merged(variant.order, variant.gram)
        errors = {name: self._error(name, rounded[name], wanted) for name, wanted in expected.items()}
        least = statistics.median(errors.values())
        return {name: variant.tolerance + 2 * max(error, least) for name, error in errors.items()}

    def check(self, variant: Variant) -> float:
        """Run the variant's first step; return the largest relative error of its gradients.

        Raises GradientMismatch, with the names of variant and parameter, if an error is too large
        or if PCGrad's gradient is too close to the sum. Raises Skipped if an optional variant
        fails.
        """
        expected, allowed = self.expected(variant.order, variant.gram), self.allowed(variant)
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
