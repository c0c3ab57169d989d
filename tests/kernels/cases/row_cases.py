"""Inputs, a sink and error budgets that the tests of row-wise operations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITE = float("inf")


@dataclass
class RecordingSink:
    """A sink that keeps the delivered gradients by id of the parameter."""

    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    expected: list[int] = field(default_factory=list)
    dense: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, list[tuple[Tensor, Tensor, tuple[int, ...]]]] = field(default_factory=dict)

    def expect(self, *parameters: Any) -> None:
        self.expected += [id(parameter) for parameter in parameters]

    def deliver(self, parameter: Any, gradients: Tensor) -> Tensor | None:
        assert gradients.dtype in (torch.float32, torch.float64) and gradients.shape[1:] == parameter.shape
        assert id(parameter) not in self.dense
        self.dense[id(parameter)] = gradients
        return None

    def deliver_rows(self, table: Any, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]) -> Tensor | None:
        assert len(ids) == len(rows) >= token_offsets[-1]
        self.rows.setdefault(id(table), []).append((ids, rows, token_offsets))
        return None

    def table(self, table: Tensor) -> Tensor:
        """Return the delivered rows as dense tables, float64 [T, V, d]."""
        ((ids, rows, offsets),) = self.rows[id(table)]
        dense = torch.zeros(len(offsets) - 1, *table.shape, dtype=torch.float64)
        for t, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
            dense[t].index_add_(0, ids[start:stop].cpu(), rows[start:stop].cpu().double())
        return dense


def strided(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values as every other column of a wider tensor, or transposed in memory."""
    match layout:
        case "columns":
            return torch.stack([tensor, torch.full_like(tensor, INFINITE)], -1)[..., 0]
        case "transposed":
            return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    return tensor


LAYOUTS = ["dense", "columns", "transposed"]


def nan_filled(run: Callable[[], Any]) -> Any:
    """Run with uninitialised memory full of NaN, which shows elements that are never written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(
    found: Tensor, exact: Tensor, oracle: Tensor, scale: Tensor | float, dtype: torch.dtype, on_average: bool = False
) -> None:
    """Check the error: at most twice the oracle's largest one, plus roundings to dtype at `scale`.

    on_average: also check root mean squares, against twice the oracle's error plus two roundings of
    the result. In well-conditioned cases roundings do not add up.
    """
    assert found.shape == exact.shape
    if exact.numel() == 0:
        return
    rounding = torch.finfo(dtype).eps * torch.as_tensor(scale).abs().max()
    budget = 2 * ((oracle.double() - exact).abs().max() + 4 * rounding)
    if on_average:
        error, allowed, size = (
            t.square().mean().sqrt() for t in (found.double() - exact, oracle.double() - exact, exact)
        )
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * size), f"{error:.3g} of {size:.3g} off on average"
    error = (found.double() - exact).abs().max()
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"


def split_points(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return offsets [T + 1] of tasks with these numbers of rows."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return tuple(offsets)
