"""disentangled_attention on a GPU: padded texts against the oracle, without a wait for the GPU."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastmtl_kernels.disentangled_attention.api import disentangled_attention
from fastmtl_kernels.disentangled_attention.buckets import position_rows

NO_GPU = "" if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "found")]
LENGTHS = [70, 1, 0, 33, 9]


def results(device: str, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """Return the output and the gradients of qkv and both tables, of two groups, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    first, stop, rows = position_rows(max(LENGTHS), 16, 60)
    shapes = (sum(LENGTHS) + 2, 3, 2, 16), (2, stop - first, 2, 16), (2, stop - first, 2, 16)
    # Rounded to float16, so that all dtypes get the same numbers.
    values = [torch.randn(shape, generator=generator).half().to(device, dtype) for shape in shapes]
    qkv, key, query = (value.requires_grad_() for value in values)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    groups = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    rows, seed = rows.to(device), torch.tensor([2026], device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = disentangled_attention(
            qkv,
            bounds,
            rows,
            pos_key=key,
            pos_query=query,
            group_offsets=groups,
            dropout_p=0.1,
            seed=seed,
            impl=impl,  # type: ignore[arg-type]
        )
        found = [out, *torch.autograd.grad(out, [qkv, key, query], torch.ones_like(out))]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [one.detach().cpu() for one in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_padded_texts_are_the_oracle(dtype: torch.dtype) -> None:
    found, again = results("cuda", dtype, "auto"), results("cuda", dtype, "auto")
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 2e-2}[dtype]  # float32 may be TF32
    for ours, repeated, exact in zip(found, again, results("cpu", torch.float64, "reference"), strict=True):
        assert torch.equal(ours, repeated)
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
