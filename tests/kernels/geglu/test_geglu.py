"""geglu on CPUs: the oracle against torch's gelu, the C++ kernels against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from geglu_cases import Case, cases, check, run
from hypothesis import given, settings

from fastmtl_kernels import geglu
from fastmtl_kernels.dispatch import unsupported_reason

REASON = unsupported_reason("geglu", "cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_oracle_is_torch(approximate: Any) -> None:
    x = torch.randn(2, 5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = geglu(x, approximate=approximate)
    expected = F.gelu(x[..., :7], approximate=approximate) * x[..., 7:]
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("impl", IMPLS[1:])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_case(impl: Any, case: Case) -> None:
    check(case, impl)


@needs_cpp
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_float(approximate: Any) -> None:
    """gelu and its slope agree with float64 for small and large numbers, and pass NaN."""
    a = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-38, 1e-20, 1e4, 1e18, -1e-38, -1e4, -1e18])])
    x = torch.stack([a, torch.ones_like(a)], 1).requires_grad_()
    y = geglu(x, approximate=approximate, impl="cpp")
    wide = a.double().requires_grad_()
    exact = F.gelu(wide, approximate=approximate)
    torch.testing.assert_close(y[:, 0].double(), exact, rtol=4e-7, atol=1e-6)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    dx = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(dx[:, 0].double(), slope, rtol=4e-7, atol=1.5e-6)
    assert geglu(torch.tensor([[float("nan"), 1.0]]), approximate=approximate, impl="cpp").isnan().all()


@needs_cpp
def test_bits_do_not_depend_on_threads() -> None:
    case = Case(301, 37, torch.float32, "dense", 1.0, "none", 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, "cpp", "cpu")
        torch.set_num_threads(5)
        assert all(map(torch.equal, one, run(case, "cpp", "cpu")))
    finally:
        torch.set_num_threads(threads)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=torch.zeros(3, 5))),
    ("x", dict(x=torch.zeros(3, 0))),
    ("x", dict(x=torch.zeros(3, 4, dtype=torch.int64))),
    ("x", dict(x=None)),
    ("approximate", dict(approximate="erf")),
    ("impl", dict(impl="cuda")),
]


@pytest.mark.parametrize("name, wrong", WRONG, ids=[f"{name}-{k}" for k, (name, _) in enumerate(WRONG)])
def test_errors_name_the_argument(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        geglu(**{"x": torch.zeros(3, 4), **wrong})
