"""Triton kernels of pool in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import interpreter
import torch
from hypothesis import given
from pool_cases import Case, cases, check

from fastmtl_kernels import pool

pytestmark = interpreter.interpreted


@interpreter.few(15)
@given(case=cases(max_length=40, max_columns=70))
def test_any_case(case: Case) -> None:
    check(case, "triton")


def test_nan_is_the_maximum() -> None:
    x = torch.randn(42, 20, generator=torch.Generator().manual_seed(0))
    x[3, 4] = x[5, 4] = x[25, 4] = float("nan")
    x.requires_grad_()
    out = pool(x, torch.tensor([0, 30, 42], dtype=torch.int32), mode="max", impl="triton")
    assert out.isnan().nonzero().tolist() == [[0, 4]]
    (dx,) = torch.autograd.grad(out, x, torch.ones(2, 20))
    assert dx[3, 4] == 1 and dx.sum() == 40
