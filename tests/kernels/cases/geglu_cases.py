"""Cases of geglu and their check, for tests on CPUs, in the interpreter and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, assert_close, nan_filled, strided
from torch import Tensor

from fastmtl_kernels import geglu


@dataclass(frozen=True)
class Case:
    """scale: the standard deviation of x, since gelu is not linear."""

    rows: int
    width: int
    dtype: torch.dtype
    layout: str
    scale: float
    approximate: str
    seed: int

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """Return x [rows, 2 width] and the gradient of y."""
        generator = torch.Generator().manual_seed(self.seed)
        x = self.scale * torch.randn(self.rows, 2 * self.width, generator=generator)
        dy = torch.randn(self.rows, self.width, generator=generator)
        x, dy = (strided(tensor.to(device, self.dtype), self.layout) for tensor in (x, dy))
        return x, dy


def cases(max_rows: int = 40, max_width: int = 140) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        rows=st.sampled_from([0, 1, 2, 17, max_rows]),
        width=st.integers(1, max_width) | st.sampled_from([1, 7, 8, 9, 32, 33, max_width]),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from([0.01, 1.0, 30.0]),
        approximate=st.sampled_from(["none", "tanh"]),
        seed=st.integers(0, 2**31),
    )


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return y and the gradient of x."""
    x, dy = (tensor.to(wide or tensor.dtype) for tensor in case.tensors(device))
    x.requires_grad_()
    y = geglu(x, approximate=case.approximate, impl=impl)  # type: ignore[arg-type]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == x.dtype
    return y.detach(), dx


def check(case: Case, impl: Any, device: str = "cpu") -> None:
    """Check y and dx: error against float64, unwritten memory."""
    found = nan_filled(lambda: run(case, impl, device))
    exact, oracle = run(case, "reference", device, torch.float64), run(case, "reference", device)
    x, dy = (tensor.double() for tensor in case.tensors(device))
    a, b = x.abs().chunk(2, 1)
    if case.rows == 0:
        return
    # gelu(a) is at most |a|, and its slope at most 1.13.
    scales = (a * b).max(), (dy.abs() * torch.maximum(a, 1.13 * b)).max()
    for value, wanted, theirs, scale in zip(found, exact, oracle, scales, strict=True):
        assert_close(value, wanted, theirs, scale, case.dtype, on_average=case.width >= 32)
