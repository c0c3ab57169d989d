"""Triton kernels of varlen_attention with a window, rotary positions and a bias, interpreted.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from interpreter import few, interpreted
from position_cases import PositionCase, assert_near_oracle, exact_results, position_cases, results
from torch import Tensor

pytestmark = interpreted
EMPTY = torch.empty


def filled_with_nan(*args: object, **kwargs: Any) -> Tensor:
    return EMPTY(*args, **kwargs).fill_(math.nan)  # type: ignore[call-overload]


def check(case: PositionCase) -> None:
    """Check results against the oracle; unwritten elements are NaN."""
    qkv, grad, arguments = case.inputs()
    with mock.patch.object(torch, "empty", filled_with_nan):
        found = results(qkv, grad, arguments | {"impl": "triton"})
    rounded = results(qkv, grad, arguments | {"impl": "reference"})
    for result, oracle, exact in zip(found, rounded, exact_results(qkv, grad, arguments), strict=True):
        assert_near_oracle(result, oracle, exact, case.dtype)
    if case.tail:
        assert not found[0][-case.tail :].any() and not found[1][-case.tail :].any()


@few(3)
@given(case=position_cases(dtypes=[torch.float32, torch.bfloat16], head_dims=[2, 16, 34], longest=90))
def test_against_the_reference(case: PositionCase) -> None:
    check(case)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 3), (torch.bfloat16, 64)], ids=str)
def test_all_together(dtype: torch.dtype, window: int) -> None:
    """Blocks of keys outside the window are skipped, and a tile has sequences of two groups."""
    check(PositionCase([200, 3, 0, 30], 3, 2, 16, dtype, None, 0.1, window, True, (0, 2, 1, 0, 1), 20))
