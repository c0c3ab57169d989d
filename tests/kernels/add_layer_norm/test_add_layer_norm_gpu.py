"""The Triton kernels of add_layer_norm on a GPU, against the oracle: outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from add_layer_norm_cases import Case, cases, check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl_kernels.dispatch import unsupported_reason

NO_GPU = unsupported_reason("add_layer_norm", "triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]
# Few widths: each is a compilation.
WIDTHS = [1, 33, 384, 768]


@settings(max_examples=60, deadline=None)
@given(case=cases(max_rows=700), columns=st.sampled_from(WIDTHS))
def test_any_case(case: Case, columns: int) -> None:
    check(replace(case, columns=columns), "triton", "cuda")
