"""Triton kernels of add_layer_norm in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import interpreter
import torch
from add_layer_norm_cases import Case, cases, check
from hypothesis import given
from row_cases import nan_filled

from fastmtl_kernels import add_layer_norm

pytestmark = interpreter.interpreted


@interpreter.few(15)
@given(case=cases(max_rows=30, max_columns=70))
def test_any_case(case: Case) -> None:
    check(case, "triton")


def test_a_float32_parameter_beside_a_bfloat16_one_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, dy = torch.randn(40, 24, generator=generator), torch.randn(40, 24, generator=generator)
    weight, bias = torch.ones(24, dtype=torch.bfloat16).requires_grad_(), torch.zeros(24).requires_grad_()
    y = nan_filled(lambda: add_layer_norm(rows, rows, weight, bias, impl="triton"))
    dweight, dbias = torch.autograd.grad(y, [weight, bias], dy)
    assert dweight.dtype == torch.bfloat16
    torch.testing.assert_close(dbias, dy.sum(0), rtol=1e-5, atol=1e-5)
