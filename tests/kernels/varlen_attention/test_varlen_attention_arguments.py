"""varlen_attention names its wrong arguments, and its operators refuse unreadable tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention.api import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

REASON = unsupported_reason("varlen_attention", "cpp", torch.device("cpu"))
IMPLS = ["auto", "reference", pytest.param("cpp", marks=pytest.mark.skipif(bool(REASON), reason=REASON or "built"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([2026])
QKV = torch.zeros(10, 3, 2, 16)
CU_SEQLENS = torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv": torch.zeros(10, 3, 32)}, r"qkv must be .* \[N, 3, heads, head_dim\], got torch.float32 \[10, 3, 32\]"),
        ({"qkv": torch.zeros(10, 2, 2, 16)}, "qkv must be"),
        ({"qkv": torch.zeros(10, 3, 0, 16)}, "qkv must have at least one head"),
        ({"qkv": torch.zeros(10, 3, 2, 0)}, "qkv must have"),
        ({"qkv": QKV.int()}, "qkv must be floating point"),
        ({"qkv": None}, "qkv must be .* got None"),
        ({"cu_seqlens": CU_SEQLENS.long()}, r"cu_seqlens must be int32, got torch.int64; convert it with .int\(\)"),
        ({"cu_seqlens": [0, 10]}, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": CU_SEQLENS[:0]}, "cu_seqlens must be"),
        ({"cu_seqlens": CU_SEQLENS[None]}, "cu_seqlens must be"),
        ({"cu_seqlens": CU_SEQLENS.to("meta")}, "cu_seqlens must be on cpu like qkv, got meta"),
        ({"cu_seqlens": CU_SEQLENS + 1}, "cu_seqlens must begin with 0, got"),
        ({"cu_seqlens": torch.tensor([0, 6, 4], dtype=torch.int32)}, "cu_seqlens must not descend, got 6 then 4"),
        ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, "cu_seqlens must end within the 10 rows of qkv"),
        ({"softmax_scale": math.nan}, "softmax_scale must be finite"),
        ({"softmax_scale": math.inf}, "softmax_scale must be finite"),
        ({"dropout_p": 1.0, "seed": SEED}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1, "seed": SEED}, "dropout_p must be in"),
        ({"dropout_p": math.nan, "seed": SEED}, "dropout_p must be in"),
        ({"dropout_p": 0.1}, "seed must be an int64 tensor of one element where dropout_p > 0, got None"),
        ({"dropout_p": 0.1, "seed": 3}, "seed must be an int64 tensor"),
        ({"dropout_p": 0.1, "seed": SEED.int()}, "seed must be an int64 tensor"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must be an int64 tensor of one element"),
        ({"dropout_p": 0.1, "seed": SEED.to("meta")}, "seed must be on cpu like .*, got meta"),
        ({"plan": [0, 4, 10]}, "plan must be an AttentionPlan"),
        ({"plan": AttentionPlan.make([0, 9], 9)}, "plan must be for the 10 rows of qkv on cpu, got one for 9 rows"),
        ({"plan": AttentionPlan.make([0, 9], 10, "meta")}, "plan must be for .* on cpu, got one .* on meta"),
    ],
    ids=str,
)
def test_bad_input_is_named(impl: Any, wrong: dict[str, Any], message: str) -> None:
    arguments = {"qkv": QKV, "cu_seqlens": CU_SEQLENS, "impl": impl} | wrong
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)


def test_an_unknown_implementation_is_an_error() -> None:
    with pytest.raises(ValueError, match="impl must be .* got 'fast'"):
        varlen_attention(QKV, CU_SEQLENS, impl="fast")  # type: ignore[arg-type]


def test_triton_takes_no_cpu_tensors() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' cannot be used here: the Triton kernels take CUDA tensors"):
        varlen_attention(QKV, CU_SEQLENS, impl="triton")


needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")


@needs_cpp
def test_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for dtype in DTYPES:
        qkv = torch.randn(10, 3, 2, 16).to(dtype)
        out, stats = qkv.new_empty(10, 2, 16), torch.empty(10, 2, 2)
        numbers = (keep_threshold(0.1), 1 / 0.9, 0.5)
        forward = (qkv, CU_SEQLENS, SEED, *numbers, out, stats)
        torch.library.opcheck(torch.ops.fastmtl.varlen_attention_out.default, forward, test_utils=checks)
        backward = (out, qkv, stats, CU_SEQLENS, SEED, *numbers, torch.empty_like(qkv))
        torch.library.opcheck(torch.ops.fastmtl.varlen_attention_backward_out.default, backward, test_utils=checks)


@needs_cpp
@pytest.mark.parametrize(
    ("position", "wrong"),
    [
        (0, QKV.transpose(-1, -2).contiguous().transpose(-1, -2)),
        (0, QKV.double()),
        (0, QKV[:8]),
        (1, CU_SEQLENS.long()),
        (1, torch.tensor([0, 11], dtype=torch.int32)),
        (1, torch.tensor([0, 6, 4], dtype=torch.int32)),
        (1, torch.tensor([1, 4], dtype=torch.int32)),
        (2, torch.zeros(2, dtype=torch.int64)),
        (6, torch.zeros(10, 2, 15)),
        (6, torch.zeros(10, 2, 16).half()),
        (7, torch.zeros(10, 2)),
    ],
    ids=str,
)
def test_the_operator_itself_never_reads_out_of_bounds(position: int, wrong: Tensor) -> None:
    arguments = [QKV, CU_SEQLENS, SEED, keep_threshold(0.5), 2.0, 1.0, torch.zeros(10, 2, 16), torch.zeros(10, 2, 2)]
    torch.ops.fastmtl.varlen_attention_out(*arguments)
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match="varlen_attention_out"):
        torch.ops.fastmtl.varlen_attention_out(*arguments)
