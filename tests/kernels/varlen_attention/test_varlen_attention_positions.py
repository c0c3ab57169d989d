"""varlen_attention with a window, rotary positions and a bias, on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from position_cases import PositionCase, exact_results, position_cases, results

from fastmtl_kernels.varlen_attention.api import varlen_attention

IMPLS = ["reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [1, 2, 8, 10, 16, 17, 34, 64, 128]


def assert_near(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, largest_score: float) -> None:
    """Check the error: roundings of a 16-bit result, and of sums at the largest entry.

    A score s is rounded by about 2^-24 s (2^-53 s in float64), and so is the share of its key.
    """
    step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    size = float(exact.abs().max()) if exact.numel() else 0.0
    assert result.dtype == dtype and result.shape == exact.shape
    error = (result.double() - exact).abs()
    assert (error <= rounding * exact.abs() + (4 + largest_score) * 2 * step * size + step).all(), error.max() / size


def largest_score(qkv: torch.Tensor, arguments: dict[str, Any]) -> float:
    scale, bias = arguments["softmax_scale"], arguments.get("bias")
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    q, k = qkv[:, :2].double().nan_to_num().permute(1, 0, 2, 3).norm(dim=-1)
    largest = float((q.max() * k.max()) if q.numel() else 0.0) * abs(scale)
    return largest + (0.0 if bias is None else float(bias.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(case=position_cases(dtypes=DTYPES, head_dims=HEAD_DIMS))
def test_against_float64(impl: Any, case: PositionCase) -> None:
    qkv, grad, arguments = case.inputs()
    found = results(qkv, grad, arguments | {"impl": impl})
    size = largest_score(qkv, arguments)
    for result, exact in zip(found, exact_results(qkv, grad, arguments), strict=True):
        assert_near(result, exact, case.dtype, size)
    if case.tail:
        assert not found[0][-case.tail :].any() and not found[1][-case.tail :].any()


@settings(max_examples=20, deadline=None)
@given(case=position_cases(dtypes=[torch.float64], head_dims=[1, 2, 6, 16], longest=30))
def test_the_reference_in_float64(case: PositionCase) -> None:
    qkv, grad, arguments = case.inputs()
    for result, exact in zip(results(qkv, grad, arguments), exact_results(qkv, grad, arguments), strict=True):
        assert_near(result, exact, torch.float64, largest_score(qkv, arguments))


def test_gradients_of_the_reference_by_differences() -> None:
    case = PositionCase([3, 1, 4], 1, 2, 4, torch.float64, None, 0.3, 2, True, (1, 2), 1)
    qkv, _, arguments = case.inputs()
    bias = arguments.pop("bias").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: varlen_attention(x, bias=b, **arguments), (qkv.nan_to_num().requires_grad_(), bias)
    )


QKV, CU_SEQLENS = torch.zeros(10, 3, 2, 6), torch.tensor([0, 4, 10], dtype=torch.int32)
ROTARY, BIAS, BOUNDS = torch.zeros(2, 6, 3), torch.zeros(2, 2, 11), torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": -1}, "window must be an integer >= 0, or None for no window, got -1"),
        ({"window": 2.0}, "window must be an integer >= 0"),
        ({"window": True}, "window must be an integer >= 0"),
        ({"rotary": ROTARY[0]}, r"rotary must have the shape \[2, P, head_dim // 2 = 3\], got torch.float32 \[6, 3\]"),
        ({"rotary": ROTARY[..., :2]}, "rotary must have the shape"),
        ({"rotary": 10000.0}, "rotary must have the shape .* got 10000.0"),
        ({"rotary": ROTARY, "qkv": QKV[..., :5]}, "rotary must be None where head_dim is odd, got it with head_dim 5"),
        ({"rotary": ROTARY.half()}, "rotary must be torch.float32 for qkv of torch.float32, got torch.float16"),
        ({"rotary": ROTARY, "qkv": QKV.double()}, "rotary must be torch.float64 for qkv of torch.float64"),
        ({"rotary": ROTARY.to("meta")}, "rotary must be on cpu like qkv, got meta"),
        ({"rotary": ROTARY.clone().requires_grad_()}, "rotary must not require a gradient"),
        ({"rotary": ROTARY[:, :5]}, "rotary must have a row for each of the 6 places .*, got 5 rows"),
        ({"bias": BIAS[0]}, r"bias must be floating point of shape \[G, heads, 2 R - 1\], got torch.float32 \[2, 11\]"),
        ({"bias": BIAS.int()}, "bias must be floating point"),
        ({"bias": BIAS[:, :1]}, r"bias must have the shape \[G, 2 heads, 2 R - 1\]"),
        ({"bias": BIAS[:0]}, "bias must have the shape .* with G >= 1"),
        ({"bias": BIAS[:1, :, :10]}, "bias must have the shape .* an odd number of columns"),
        ({"bias": BIAS[:1].to("meta")}, "bias must be on cpu like qkv, got meta"),
        ({"bias": BIAS[:1, :, :9]}, "bias must have at least 11 columns for the longest sequence of 6 tokens, got 9"),
        ({"bias": BIAS}, "bias_offsets must be given where bias has 2 groups, got None"),
        ({"bias_offsets": BOUNDS}, "bias_offsets must be None where bias is None"),
        ({"bias": BIAS, "bias_offsets": [0, 1, 2]}, r"bias_offsets must be int32 of shape \[3\], got \[0, 1, 2\]"),
        ({"bias": BIAS, "bias_offsets": BOUNDS[:2]}, r"bias_offsets must be int32 of shape \[3\]"),
        ({"bias": BIAS, "bias_offsets": BOUNDS.long()}, "bias_offsets must be int32 .* got torch.int64"),
        ({"bias": BIAS, "bias_offsets": BOUNDS.to("meta")}, "bias_offsets must be on cpu like qkv, got meta"),
        ({"bias": BIAS, "bias_offsets": BOUNDS + 1}, r"bias_offsets must ascend from 0 .*, 2, got \[1, 2, 3\]"),
        ({"bias": BIAS, "bias_offsets": BOUNDS // 2}, r"bias_offsets must ascend from 0 .*, 2, got \[0, 0, 1\]"),
        ({"bias": BIAS, "bias_offsets": BOUNDS[[0, 2, 1]]}, "bias_offsets must ascend"),
    ],
    ids=str,
)
def test_bad_position_terms_are_named(impl: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{"qkv": QKV, "cu_seqlens": CU_SEQLENS, "impl": impl} | wrong)
