"""The Triton kernels of geglu on a GPU, against the oracle: outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from geglu_cases import Case, cases, check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl_kernels.dispatch import unsupported_reason

NO_GPU = unsupported_reason("geglu", "triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]


# Few widths: each is a compilation.
@settings(max_examples=40, deadline=None)
@given(case=cases(max_rows=700), width=st.sampled_from([1, 33, 1152, 2624]))
def test_any_case(case: Case, width: int) -> None:
    check(replace(case, width=width), "triton", "cuda")
