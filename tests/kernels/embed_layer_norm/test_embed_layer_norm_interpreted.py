"""Triton kernels of embed_layer_norm in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import interpreter
from embed_layer_norm_cases import Case, cases, check
from hypothesis import given

pytestmark = interpreter.interpreted


@interpreter.few(15)
@given(case=cases(max_rows=30, max_columns=70))
def test_any_case(case: Case) -> None:
    check(case, "triton")
