"""varlen_attention on a GPU; the tests of the interpreter and the oracle cover more cases."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from position_cases import assert_near_oracle, exact_results, position_cases, results
from torch import Tensor

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.varlen_attention.api import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

REASON = unsupported_reason("varlen_attention", "triton", torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "usable")]
CASES = [
    (dtype, head_dim)
    for dtype, widest in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 128))
    for head_dim in (11, 16, 17, 32, 34, 64, 128)
    if head_dim <= widest
]


def run(
    qkv: Tensor, grad: Tensor, cu_seqlens: Tensor, dropout_p: float, impl: Any, plan: AttentionPlan | None = None
) -> list[Tensor]:
    """Return O and dqkv."""
    qkv = qkv.detach().requires_grad_()
    seed = torch.tensor([5], device=qkv.device)
    out = varlen_attention(qkv, cu_seqlens, dropout_p=dropout_p, seed=seed, impl=impl, plan=plan)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad.to(out.dtype))]


def random_batch(lengths: list[int], tail: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return qkv, a gradient of the output and cu_seqlens; rows past the last sequence are NaN."""
    generator = torch.Generator("cuda").manual_seed(len(lengths))
    num_rows = sum(lengths) + tail
    qkv = torch.randn(num_rows, 3, num_heads, head_dim, device="cuda", generator=generator).to(dtype)
    qkv[sum(lengths) :] = float("nan")
    grad = torch.randn(num_rows, num_heads, head_dim, device="cuda", generator=generator).to(dtype)
    return [qkv, grad, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")]


@pytest.mark.parametrize(("dtype", "head_dim"), CASES, ids=str)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 64), st.integers(65, 512)), max_size=40),
    tail=st.integers(0, 100),
    num_heads=st.sampled_from([1, 3, 12]),
    dropout_p=st.sampled_from([0.0, 0.1]),
)
def test_against_the_oracle(
    dtype: torch.dtype, head_dim: int, lengths: list[int], tail: int, num_heads: int, dropout_p: float
) -> None:
    """The error is at most twice the oracle's plus rounding; repeated runs give equal bits."""
    qkv, grad, cu_seqlens = random_batch(lengths, tail, num_heads, head_dim, dtype)
    results = run(qkv, grad, cu_seqlens, dropout_p, "triton")
    rounded = run(qkv, grad, cu_seqlens, dropout_p, "reference")
    exact = run(qkv.double(), grad.double(), cu_seqlens, dropout_p, "reference")
    again = run(qkv, grad, cu_seqlens, dropout_p, "triton")
    for result, oracle, truth, twin in zip(results, rounded, exact, again, strict=True):
        assert result.dtype == dtype and torch.equal(result, twin)
        if result.numel():
            off = (oracle.double() - truth).abs().max()
            size = truth.abs().max()
            assert (result.double() - truth).abs().max() <= 2 * off + 4 * torch.finfo(dtype).eps * size + 1e-7
        assert not result[sum(lengths) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_positions_against_the_oracle(dtype: torch.dtype, data: st.DataObject) -> None:
    """A window, rotary positions and a bias: the error, and equal bits of repeated runs."""
    case = data.draw(position_cases(dtypes=[dtype], head_dims=[2, 16, 34, 64], longest=400))
    qkv, grad, arguments = case.inputs("cuda")
    found, again = (results(qkv, grad, arguments | {"impl": "triton"}) for _ in range(2))
    rounded = results(qkv, grad, arguments | {"impl": "reference"})
    qkv, grad, arguments = case.inputs()
    for result, twin, oracle, exact in zip(found, again, rounded, exact_results(qkv, grad, arguments), strict=True):
        assert torch.equal(result, twin)
        assert_near_oracle(result.cpu(), oracle.cpu(), exact, dtype)


def test_a_cpu_drops_the_same_entries() -> None:
    qkv, grad, cu_seqlens = random_batch([30, 300, 1, 64], 5, 12, 64, torch.float32)
    for mine, theirs in zip(
        run(qkv, grad, cu_seqlens, 0.3, "triton"),
        run(qkv.cpu(), grad.cpu(), cu_seqlens.cpu(), 0.3, "auto"),
        strict=True,
    ):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4)


def test_a_graph_draws_fresh_masks() -> None:
    """A plan spares the host every wait for the GPU, and each replay of a graph reads the seed."""
    qkv, grad, cu_seqlens = random_batch([30, 200, 7], 0, 12, 64, torch.bfloat16)
    plan = AttentionPlan.make(cu_seqlens.tolist(), len(qkv), "cuda")
    seed = torch.tensor([1], device="cuda")

    def step() -> Tensor:
        return varlen_attention(qkv, cu_seqlens, dropout_p=0.1, seed=seed, impl="triton", plan=plan)

    expected = []
    for value in (1, 2):
        seed.fill_(value)
        expected.append(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for value, eager in zip((1, 2), expected, strict=True):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_is_too_wide(dtype: torch.dtype) -> None:
    qkv, grad, cu_seqlens = random_batch([9, 70], 0, 2, 129, dtype)
    with pytest.raises(ValueError, match="qkv must have head_dim <= .* got 129"):
        run(qkv, grad, cu_seqlens, 0.0, "triton")
    results, expected = (run(qkv, grad, cu_seqlens, 0.0, impl) for impl in ("auto", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
