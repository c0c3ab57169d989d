"""Triton kernels of low_rank in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from interpreter import few, interpreted
from low_rank_cases import Case, cases, check

pytestmark = interpreted


@few(10)
@given(case=cases(max_rows=30, max_columns=70, max_rank=40))
def test_any_case(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize(("rank", "dtype"), [(204, torch.float16), (204, torch.bfloat16), (64, torch.float32)])
def test_the_widest_ranks_over_several_chunks_of_rows(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmtl_kernels.task_maps.triton import weights as low_rank_weights_triton

    monkeypatch.setattr(low_rank_weights_triton, "MIN_CHUNK", 50)
    # Hundreds of equal programs take most of the interpreter's time.
    monkeypatch.setattr(low_rank_weights_triton, "BLOCK_COLUMNS", 4096)
    case = Case(
        sizes=(70, 0, 1), tail=3, columns=36, rank=rank, dtype=dtype, layout="dense", transposed=True,
        down_bias=True, up_bias=True, activation="gelu", rates=(0.1, 0.0, 0.3), seed=3,
    )  # fmt: skip
    check(case, "triton")


def test_the_repaired_interpreter_multiplies_and_rounds_bfloat16_as_gpus_do() -> None:
    from bfloat16_dot import bfloat16_dot_kernel

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    wide, out = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    # A count in an array of one element: Triton 3.6 fails at a loop over it with numpy >= 2.4.
    bfloat16_dot_kernel[(1,)](a, b, torch.tensor([3]), wide, out, BLOCK=16)
    exact = 3 * a.double() @ b.double()
    # 3 x 16 sums in float32 of products that are exact in float32.
    assert ((wide - exact).abs() <= 48 * torch.finfo(torch.float32).eps * 3 * a.double().abs() @ b.double().abs()).all()
    assert torch.equal(out, wide.bfloat16())
