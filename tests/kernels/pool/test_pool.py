"""pool on CPUs: the oracle against results by hand, the kernels against the oracle in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from pool_cases import MODES, Case, cases, check

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.pool.api import pool

REASON = unsupported_reason("pool", "cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
X = torch.tensor([[1.0, -4.0], [3.0, -2.0], [3.0, -2.0], [9.0, 9.0], [0.5, 0.25]])
CU_SEQLENS = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
EXPECTED = {
    "cls": ([[1, -4], [0, 0], [9, 9]], [[1, 2], [0, 0], [0, 0], [5, 6], [0, 0]]),
    "mean": ([[7 / 3, -8 / 3], [0, 0], [9, 9]], [[1 / 3, 2 / 3]] * 3 + [[5, 6], [0, 0]]),
    "max": ([[3, -2], [0, 0], [9, 9]], [[0, 0], [1, 2], [0, 0], [5, 6], [0, 0]]),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_by_hand(impl: Any, mode: Any) -> None:
    """A tie, an empty sequence and a row of no sequence."""
    x = X.clone().requires_grad_()
    out = pool(x, CU_SEQLENS, mode=mode, impl=impl)
    (dx,) = torch.autograd.grad(out, x, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    torch.testing.assert_close(out, torch.tensor(EXPECTED[mode][0], dtype=torch.float32))
    torch.testing.assert_close(dx, torch.tensor(EXPECTED[mode][1], dtype=torch.float32))


@pytest.mark.parametrize("impl", IMPLS[1:])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(impl: Any, case: Case) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("mode", MODES)
def test_width_of_an_encoder(impl: Any, mode: Any) -> None:
    check(Case((512, 1, 25, 0, 130), 7, 768, torch.bfloat16, "dense", mode, 0, 3), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_maximum_shows_nan(impl: Any) -> None:
    x = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    x[3, 4] = x[5, 4] = math.nan
    x.requires_grad_()
    out = pool(x, torch.tensor([0, 7, 12], dtype=torch.int32), mode="max", impl=impl)
    assert out.isnan().nonzero().tolist() == [[0, 4]]
    (dx,) = torch.autograd.grad(out, x, torch.ones(2, 9))
    assert dx[3, 4] == 1 and dx.sum() == 18


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=torch.zeros(5))),
    ("x", dict(x=torch.zeros(5, 0))),
    ("x", dict(x=torch.zeros(5, 2, dtype=torch.int64))),
    ("cu_seqlens", dict(cu_seqlens=[0, 5])),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS.long())),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS[None])),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS[:0])),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS.to("meta"))),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS + 1)),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS.flip(0))),
    ("cu_seqlens", dict(cu_seqlens=CU_SEQLENS * 2)),
    ("mode", dict(mode="sum")),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        pool(**{**dict(x=X, cu_seqlens=CU_SEQLENS), **wrong})
