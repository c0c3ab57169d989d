from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.heads.pooling import pooling

MakeBatch = Callable[..., PackedBatch]


@pytest.mark.parametrize("name", ["cls", "mean", "max"])
@pytest.mark.parametrize("lengths", [[[1, 9, 4], [], [17]], [[], []]])
def test_equals_the_loop_over_sequences(name: str, lengths: list[list[int]], make_batch: MakeBatch) -> None:
    batch = make_batch(lengths)
    hidden = torch.randn(batch.num_tokens, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    flat = [length for task in lengths for length in task]
    pooled = pooling(name)(hidden, batch)
    assert pooled.shape == (len(flat), 6)
    if not flat:
        return
    reference = hidden.detach().double().requires_grad_()
    row = {"cls": lambda part: part[0], "mean": lambda part: part.mean(0), "max": lambda part: part.amax(0)}[name]
    expected = torch.stack([row(part) for part in reference.split(flat)])
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(pooled.shape)
    pooled.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(hidden.grad.double(), reference.grad, rtol=1e-6, atol=1e-6)


def test_mean_of_bf16_is_summed_in_fp32(make_batch: MakeBatch) -> None:
    batch = make_batch([[512]])
    hidden = torch.full((512, 1), 1.0, dtype=torch.bfloat16)  # a sum of ones in bf16 stops at 256
    assert pooling("mean")(hidden, batch).item() == 1.0


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown pooling 'maen'. Did you mean 'mean'"):
        pooling("maen")
