"""pal by the Triton kernels in Triton's interpreter, against the oracle: outputs and gradients.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from interpreter import few, interpreted
from pal_cases import Case, cases, check

pytestmark = interpreted


@few(6)
@given(case=cases(max_length=20, max_columns=70, max_head_dim=12))
def test_any_case(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_and_more_rows_than_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmtl_kernels.task_maps.triton import weights as low_rank_weights_triton

    # Hundreds of equal programs take most of the interpreter's time.
    monkeypatch.setattr(low_rank_weights_triton, "BLOCK_COLUMNS", 4096)
    case = Case(
        lengths=((3, 40, 22), (), (1,)), tail=2, columns=36, num_heads=2, head_dim=68, dtype=dtype,
        layout="dense", transposed=True, biases=False, activation="gelu", dropout_p=0.0, rate=0.1, seed=3,
    )  # fmt: skip
    check(case, "triton")
