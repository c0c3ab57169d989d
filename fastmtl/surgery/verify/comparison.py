"""Distance between the task gradients of one pass and those of a backward pass per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, is_first

# Rounding errors of a small gradient may stem from larger numbers. So a difference is measured
# against at least this part of the norm of the task's whole gradient.
_FLOOR = 0.01

# Three norms, scalars: of the difference of two gradients, and of both.
Norms = tuple[Tensor, Tensor, Tensor]


@dataclass
class Comparison:
    """Norms of the task gradients of n shared parameters, found by one pass and by T passes.

    differences, one_pass, per_task: [n, T], norms of the difference and of both gradients.
    narrow: True if an operation has computed in 16 bits. other_cause: of differences, besides rows
    that mix.
    """

    differences: Tensor
    one_pass: Tensor
    per_task: Tensor
    narrow: bool
    other_cause: str

    @classmethod
    def of_norms(cls, tasks: Sequence[Sequence[Norms]], narrow: bool, other_cause: str) -> Comparison:
        """Return the comparison of T lists, each with the norms of n parameters."""
        differences, one_pass, per_task = torch.stack(
            [torch.stack([torch.stack(norms) for norms in task]) for task in tasks], dim=1
        ).unbind(-1)
        return cls(differences, one_pass, per_task, narrow, other_cause)

    def relative(self) -> Tensor:
        """Return the differences relative to the norms, float64 [n, T]; NaN where not finite."""
        differences, norms = self.differences.double(), torch.maximum(self.one_pass, self.per_task).double()
        scale = torch.maximum(norms, _FLOOR * norms.norm(dim=0))
        finite = torch.isfinite(differences) & torch.isfinite(scale)
        return torch.where(finite, differences / scale.clamp(min=torch.finfo(torch.float64).tiny), torch.nan)


def compare_dense(one_pass: Tensor | None, per_task: Tensor | None, zero: Tensor) -> Norms:
    """Return the norms of a task's gradients of one parameter; None is a gradient of zeros.

    zero: a scalar 0 on their device.
    """
    norms = [zero if gradient is None else _norm(gradient) for gradient in (one_pass, per_task)]
    if one_pass is None or per_task is None:
        return norms[0] + norms[1], norms[0], norms[1]
    return _norm(per_task - one_pass), norms[0], norms[1]


def compare_table(one_pass: Sequence[Rows], per_task: Tensor | None, zero: Tensor) -> Norms:
    """Return the norms of a task's gradients of a table [V, d], without a second dense table.

    one_pass: pairs (ids, rows) that add up.
    """
    width = one_pass[0][1].shape[1] if one_pass else 0
    if per_task is None:
        ((_, sums),) = coalesce([one_pass], torch.Size((2**31, width)), zero)
        return _norm(sums), _norm(sums), zero
    ((ids, sums),) = coalesce([one_pass], per_task.shape, per_task)
    at_rows = (per_task.index_select(0, ids) - sums)[is_first(ids)] if len(ids) else sums
    elsewhere = _norm(per_task, dim=1).index_fill(0, ids, 0)
    return torch.hypot(_norm(at_rows), _norm(elsewhere)), _norm(sums), _norm(per_task)


def _norm(gradient: Tensor, dim: int | None = None) -> Tensor:
    """Return the norm of a gradient, in float32; over all dimensions if `dim` is None."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dim=dim, dtype=wide).float()
