"""The Triton kernels of the row-wise operations in Triton's interpreter, against the oracles: outputs and gradients.

TRITON_INTERPRET is read when triton is imported, so the tests run in a process of their own: pytest on this file again.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import add_layer_norm_cases as add_layer_norm  # noqa: E402
import embed_layer_norm_cases as embed_layer_norm  # noqa: E402
import pool_cases as pool  # noqa: E402
import row_cases  # noqa: E402

from fastmtl_kernels import dispatch  # noqa: E402
from fastmtl_kernels.dropout.api import dropout  # noqa: E402
from fastmtl_kernels.philox import keep_mask  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_a_process_of_its_own")
# No shrinking: it would take minutes in the interpreter.
few = settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_a_process_of_its_own() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.fixture(autouse=True, scope="module")
def on_cpu_tensors() -> Iterator[None]:
    """The interpreter takes what the operations would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "unsupported_reason", lambda *_: "")
        yield


@interpreted
@few
@given(case=add_layer_norm.cases(max_rows=30, max_columns=70))
def test_add_layer_norm(case: add_layer_norm.Case) -> None:
    add_layer_norm.check(case, "triton")


@interpreted
def test_a_float32_parameter_beside_a_bfloat16_one_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, dy = torch.randn(40, 24, generator=generator), torch.randn(40, 24, generator=generator)
    weight, bias = torch.ones(24, dtype=torch.bfloat16).requires_grad_(), torch.zeros(24).requires_grad_()
    y = row_cases.nan_filled(lambda: add_layer_norm.add_layer_norm(rows, rows, weight, bias, impl="triton"))
    dweight, dbias = torch.autograd.grad(y, [weight, bias], dy)
    assert dweight.dtype == torch.bfloat16
    torch.testing.assert_close(dbias, dy.sum(0), rtol=1e-5, atol=1e-5)


@interpreted
@few
@given(case=embed_layer_norm.cases(max_rows=30, max_columns=70))
def test_embed_layer_norm(case: embed_layer_norm.Case) -> None:
    embed_layer_norm.check(case, "triton")


@interpreted
@few
@given(case=pool.cases(max_length=40, max_columns=70))
def test_pool(case: pool.Case) -> None:
    pool.check(case, "triton")


@interpreted
def test_pool_shows_nan() -> None:
    x = torch.randn(42, 20, generator=torch.Generator().manual_seed(0))
    x[3, 4] = x[5, 4] = x[25, 4] = float("nan")
    x.requires_grad_()
    out = pool.pool(x, torch.tensor([0, 30, 42], dtype=torch.int32), mode="max", impl="triton")
    assert out.isnan().nonzero().tolist() == [[0, 4]]
    (dx,) = torch.autograd.grad(out, x, torch.ones(2, 20))
    assert dx[3, 4] == 1 and dx.sum() == 40


@interpreted
@few
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70) | st.just(1100),
    dropout_p=st.sampled_from([0.1, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_dropout(rows: int, columns: int, dropout_p: float, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    key = torch.tensor([seed])
    y = row_cases.nan_filled(lambda: dropout(x, dropout_p, key, impl="triton"))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep, scale = keep_mask(key, rows, columns, dropout_p), torch.tensor(1 / (1 - dropout_p), dtype=torch.float32)
    assert torch.equal(y, torch.where(keep, x.float() * scale, 0.0).to(dtype))
    assert torch.equal(dx, torch.where(keep, scale, 0.0).to(dtype))
