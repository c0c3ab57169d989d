"""varlen_attention with a window, rotary positions and a bias, on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from position_cases import SEED, PositionCase, exact_results, position_cases, results
from torch import Tensor
from torch.nn import functional

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention.api import varlen_attention

REASON = unsupported_reason("varlen_attention", "cpp", torch.device("cpu"))
IMPLS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(bool(REASON), reason=REASON or "built"))]
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [1, 2, 8, 10, 16, 17, 34, 64, 128]


def assert_near(
    results: list[Tensor], exact: list[Tensor], qkv: Tensor, grad: Tensor, arguments: dict[str, Any]
) -> None:
    """Check the errors: roundings of 16-bit results, and of sums at their largest terms.

    A score s is rounded by about 2^-24 s (2^-53 s in float64), and so is the share of its key. dS
    is a difference of numbers as large as dP, which may cancel.
    """
    dtype = qkv.dtype
    step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    scale, bias = arguments["softmax_scale"], arguments.get("bias")
    scale = abs(qkv.shape[3] ** -0.5 if scale is None else scale)
    q, k, v = (
        norms.max() if norms.numel() else norms.sum() for norms in qkv.double().nan_to_num().norm(dim=-1).unbind(1)
    )
    dp = v * (grad.double().norm(dim=-1).max() if grad.numel() else 0.0) / (1 - arguments["dropout_p"])
    score = scale * q * k + (0.0 if bias is None else bias.double().abs().max())
    terms = [torch.zeros(()), scale * torch.maximum(q, k) * dp, dp]
    for (result, right), term in zip(zip(results, exact, strict=True), terms, strict=False):
        size = term + (right.abs().max() if right.numel() else 0.0)
        assert result.dtype == dtype and result.shape == right.shape
        error = (result.double() - right).abs()
        assert (error <= rounding * right.abs() + (4 + score) * step * size + step).all(), error.max() / size


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(case=position_cases(dtypes=DTYPES, head_dims=HEAD_DIMS))
def test_against_float64(impl: Any, case: PositionCase) -> None:
    qkv, grad, arguments = case.inputs()
    found = results(qkv, grad, arguments | {"impl": impl})
    assert_near(found, exact_results(qkv, grad, arguments), qkv, grad, arguments)
    if case.tail:
        assert not found[0][-case.tail :].any() and not found[1][-case.tail :].any()


@settings(max_examples=20, deadline=None)
@given(case=position_cases(dtypes=[torch.float64], head_dims=[1, 2, 6, 16], longest=30))
def test_the_reference_in_float64(case: PositionCase) -> None:
    qkv, grad, arguments = case.inputs()
    assert_near(results(qkv, grad, arguments), exact_results(qkv, grad, arguments), qkv, grad, arguments)


def test_gradients_of_the_reference_by_differences() -> None:
    case = PositionCase([3, 1, 4], 1, 2, 4, torch.float64, None, 0.3, 2, True, (1, 2), 1)
    qkv, _, arguments = case.inputs()
    bias = arguments.pop("bias").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: varlen_attention(x, bias=b, **arguments), (qkv.nan_to_num().requires_grad_(), bias)
    )


@needs_cpp
def test_equal_bits_for_any_number_of_threads_and_layout() -> None:
    """A table with strides, and a bias and a table of more places, change no bit either."""
    case = PositionCase([200, 3, 0, 77, 130, 1], 1, 3, 20, torch.float32, None, 0.1, 20, True, (2, 0, 4), 0)
    qkv, grad, arguments = case.inputs()
    further = {
        "rotary": functional.pad(arguments["rotary"], (0, 3, 0, 9))[:, :, :-3],
        "bias": functional.pad(arguments["bias"], (9, 9)).double().mT.contiguous().mT,
        "bias_offsets": arguments["bias_offsets"].repeat_interleave(2)[::2],
    }
    before = torch.get_num_threads()
    found = []
    try:
        for threads, changed in ((1, {}), (2, {}), (3, further)):
            torch.set_num_threads(threads)
            found.append(results(qkv, grad, arguments | changed | {"impl": "cpp"}))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    out, dqkv, dbias = found[2]
    assert torch.equal(out, found[0][0]) and torch.equal(dqkv, found[0][1])
    assert torch.equal(dbias[..., 9:-9].float(), found[0][2]) and not dbias[..., :9].any() and not dbias[..., -9:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_window_of_all_tokens_is_no_window(impl: Any) -> None:
    case = PositionCase([40, 7, 0, 100], 0, 2, 16, torch.float32, None, 0.1, None, True, (), 0)
    qkv, grad, arguments = case.inputs()
    plain, wide = (results(qkv, grad, arguments | {"impl": impl, "window": window}) for window in (None, 99))
    assert torch.equal(plain[0], wide[0]) and torch.equal(plain[1], wide[1])


@needs_cpp
def test_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    out, stats, numbers = QKV.new_empty(10, 2, 6), torch.empty(10, 2, 2), (keep_threshold(0.1), 1 / 0.9, 0.5)
    terms = (3, ROTARY, BIAS, BOUNDS)
    forward = (QKV, CU_SEQLENS, SEED, *numbers, out, stats, *terms)
    torch.library.opcheck(torch.ops.fastmtl.varlen_attention_out.default, forward, test_utils=checks)
    backward = (out, QKV, stats, CU_SEQLENS, SEED, *numbers, torch.empty_like(QKV), *terms, torch.empty_like(BIAS))
    torch.library.opcheck(torch.ops.fastmtl.varlen_attention_backward_out.default, backward, test_utils=checks)


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


@needs_cpp
@pytest.mark.parametrize(
    "wrong",
    [
        {"rotary": ROTARY[:, :5].contiguous()},
        {"rotary": ROTARY.double()},
        {"rotary": ROTARY[:, :, :2].contiguous()},
        {"rotary": ROTARY.mT.contiguous().mT},
        {"bias": BIAS[..., :9].contiguous()},
        {"bias": BIAS[:, :1].contiguous()},
        {"bias": BIAS.double()},
        {"bias_offsets": None},
        {"bias_offsets": BOUNDS.long()},
        {"bias_offsets": BOUNDS[:2]},
        {"bias_offsets": BOUNDS + 1},
        {"bias_offsets": BOUNDS[[1, 0, 2]]},
        {"dbias": BIAS[:1].contiguous()},
        {"bias": None, "bias_offsets": None},
    ],
    ids=str,
)
def test_the_operators_never_read_out_of_bounds(wrong: dict[str, Any]) -> None:
    out, stats = torch.zeros(10, 2, 6), torch.zeros(10, 2, 2)
    terms = {"rotary": ROTARY, "bias": BIAS, "bias_offsets": BOUNDS, "dbias": torch.zeros_like(BIAS)}
    call = (out, QKV, stats, CU_SEQLENS, None, 0, 1.0, 1.0, torch.empty_like(QKV))
    torch.ops.fastmtl.varlen_attention_backward_out(*call, **terms)
    with pytest.raises(RuntimeError, match="varlen_attention_backward_out: .*(rotary|bias)"):
        torch.ops.fastmtl.varlen_attention_backward_out(*call, **terms | wrong)
