"""Triton kernels of dropout in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import interpreter
import torch
from hypothesis import given
from hypothesis import strategies as st
from row_cases import nan_filled

from fastmtl_kernels import dropout
from fastmtl_kernels.philox import keep_mask

pytestmark = interpreter.interpreted


@interpreter.few(15)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70) | st.just(1100),
    dropout_p=st.sampled_from([0.1, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_case(rows: int, columns: int, dropout_p: float, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    key = torch.tensor([seed])
    y = nan_filled(lambda: dropout(x, dropout_p, key, impl="triton"))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep, scale = keep_mask(key, rows, columns, dropout_p), torch.tensor(1 / (1 - dropout_p), dtype=torch.float32)
    assert torch.equal(y, torch.where(keep, x.float() * scale, 0.0).to(dtype))
    assert torch.equal(dx, torch.where(keep, scale, 0.0).to(dtype))
