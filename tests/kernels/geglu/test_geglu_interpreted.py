"""Triton kernels of geglu in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import interpreter
from geglu_cases import Case, cases, check
from hypothesis import given

pytestmark = interpreter.interpreted


@interpreter.few(10)
@given(case=cases(max_rows=30, max_width=70))
def test_any_case(case: Case) -> None:
    check(case, "triton")
