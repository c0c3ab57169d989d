"""pal by the Triton kernels in Triton's interpreter, against the oracle: outputs and gradients.

TRITON_INTERPRET is read when triton is imported, so the tests run in a process of their own: pytest on this file again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings

sys.path.insert(0, str(Path(__file__).parent))

from pal_cases import Case, cases, check  # noqa: E402

from fastmtl_kernels import dispatch  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_a_process_of_its_own")
# No shrinking: it would take minutes in the interpreter.
few = settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


@pytest.fixture(autouse=True, scope="module")
def on_cpu_tensors() -> Iterator[None]:
    """The interpreter takes what the operation would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "unsupported_reason", lambda *_: "")
        yield


@interpreted
@few
@given(case=cases(max_length=20, max_columns=70, max_head_dim=12))
def test_any_case(case: Case) -> None:
    check(case, "triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_and_more_rows_than_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmtl_kernels.task_maps.triton import weights as low_rank_weights_triton

    # Hundreds of programs that do the same take most of the interpreter's time.
    monkeypatch.setattr(low_rank_weights_triton, "BLOCK_COLUMNS", 4096)
    case = Case(
        lengths=((3, 40, 22), (), (1,)), tail=2, columns=36, num_heads=2, head_dim=68, dtype=dtype,
        layout="dense", transposed=True, biases=False, activation="gelu", dropout_p=0.0, rate=0.1, seed=3,
    )  # fmt: skip
    check(case, "triton")
