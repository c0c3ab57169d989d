"""varlen_attention on CPUs with scores up to 400,000: gradients as accurate as plain float32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from large_scores import LARGEST, check_large_scores
from torch import Tensor

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.varlen_attention.api import varlen_attention

REASON = unsupported_reason("varlen_attention", "cpp", torch.device("cpu"))


def by_cpp(qkv: Tensor, offsets: Sequence[int], scale: float, dropout_p: float, seed: Tensor) -> Tensor:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    return varlen_attention(qkv, cu_seqlens, softmax_scale=scale, dropout_p=dropout_p, seed=seed, impl="cpp")


@pytest.mark.skipif(bool(REASON), reason=REASON or "built")
@pytest.mark.parametrize(("scale", "dropout_p"), [(0.125, 0.0), (-0.125, 0.0), (0.125, 0.3)], ids=str)
@pytest.mark.parametrize("largest", LARGEST)
def test_gradients_are_as_accurate_as_plain_float32(largest: float, scale: float, dropout_p: float) -> None:
    check_large_scores(by_cpp, [5, 1, 63, 129], largest, scale, dropout_p)
