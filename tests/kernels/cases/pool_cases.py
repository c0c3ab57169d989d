"""Cases of pool and their check, for its tests on CPUs, in the interpreter and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, assert_close, nan_filled, split_points, strided
from torch import Tensor

from fastmtl_kernels.pool.api import pool

MODES = ["cls", "mean", "max"]


@dataclass(frozen=True)
class Case:
    """lengths: of the sequences. tail: rows of no sequence, NaN in them.

    levels: the number of different values in x, for ties; 0 for any.
    """

    lengths: tuple[int, ...]
    tail: int
    columns: int
    dtype: torch.dtype
    layout: str
    mode: Any
    levels: int
    seed: int

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, cu_seqlens and the gradient of the result."""
        generator = torch.Generator().manual_seed(self.seed)
        offsets = split_points(self.lengths)
        x = torch.randn(offsets[-1] + self.tail, self.columns, generator=generator)
        if self.levels:
            x = torch.randint(self.levels, x.shape, generator=generator).float()
        x[offsets[-1] :] = float("nan")
        dout = torch.randn(len(self.lengths), self.columns, generator=generator)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        made = (strided(tensor.to(device, self.dtype), self.layout) for tensor in (x, dout))
        return next(made), cu_seqlens, next(made)


def cases(max_length: int = 60, max_columns: int = 100) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, max_length]), max_size=6).map(tuple),
        tail=st.sampled_from([0, 1, 4]),
        columns=st.integers(1, max_columns) | st.sampled_from([8, 31, 33, max_columns]),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        mode=st.sampled_from(MODES),
        levels=st.sampled_from([0, 3]),
        seed=st.integers(0, 2**31),
    )


def run(case: Case, impl: Any, device: str, wide: torch.dtype | None = None) -> list[Tensor]:
    """Return the result and dx."""
    x, cu_seqlens, dout = case.tensors(device)
    if wide is not None:
        x, dout = x.to(wide), dout.to(wide)
    x.requires_grad_()
    out = pool(x, cu_seqlens, mode=case.mode, impl=impl)
    out.backward(dout)
    assert out.dtype == x.dtype and x.grad is not None
    return [out.detach(), x.grad]


def check(case: Case, impl: Any, device: str = "cpu") -> None:
    """Check result and dx against the oracle in float64, bits of two runs, unwritten memory."""
    found, again = nan_filled(lambda: run(case, impl, device)), run(case, impl, device)
    exact, oracle = run(case, "reference", device, torch.float64), run(case, "reference", device)
    x, cu_seqlens, dout = case.tensors(device)
    stop = int(cu_seqlens[-1])
    assert not found[1][stop:].any()
    scales = (x[:stop].double().abs().max() if stop else 0.0, dout.double().abs().max() if dout.numel() else 0.0)
    for value, twin, truth, rounded, scale in zip(found, again, exact, oracle, scales, strict=True):
        assert torch.equal(value, twin)
        if case.mode == "mean":
            assert_close(value, truth, rounded, scale, case.dtype)
        else:  # a choice among numbers: no rounding
            assert torch.equal(value.double(), truth)
