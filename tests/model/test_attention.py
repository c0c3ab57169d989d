from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.model.attention import MAX_PADDING, AttentionPlan, packed_attention


def plan_of(lengths: list[int], dtype: torch.dtype = torch.float64) -> AttentionPlan:
    cu_seqlens = (0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())
    return AttentionPlan.build(cu_seqlens, torch.device("cpu"), dtype)


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], heads: int) -> Tensor:
    """Sequence by sequence, head by head."""
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        size = q.shape[1] // heads
        per_head = [
            torch.softmax(qh @ kh.T / math.sqrt(size), dim=1) @ vh
            for qh, kh, vh in zip(q.split(size, 1), k.split(size, 1), v.split(size, 1), strict=True)
        ]
        outputs.append(torch.cat(per_head, dim=1))
    return torch.cat(outputs)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), heads=st.sampled_from([1, 2, 3]))
def test_equals_attention_of_each_sequence_alone(lengths: list[int], heads: int) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    inputs = [torch.randn(sum(lengths), 5 * heads, dtype=torch.float64, generator=generator) for _ in range(3)]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    output = packed_attention(*ours, plan_of(lengths), heads)
    expected = naive(*theirs, lengths, heads)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    output.backward(upstream)
    expected.backward(upstream)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


def test_passes_gradcheck_on_strided_inputs() -> None:
    lengths = [3, 1, 4]
    joined = torch.randn(8, 3, 6, dtype=torch.float64, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x[:, 0], x[:, 1], x[:, 2], plan_of(lengths), 2)

    assert torch.autograd.gradcheck(attend, joined)


def test_dropout_keeps_the_mean_and_varies() -> None:
    torch.manual_seed(0)
    lengths = [7, 5, 7]
    query, key, value = (torch.randn(19, 8, dtype=torch.float64) for _ in range(3))
    plan = plan_of(lengths)
    exact = packed_attention(query, key, value, plan, 2)
    draws = torch.stack([packed_attention(query, key, value, plan, 2, 0.3) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()


def test_groups_hold_little_padding() -> None:
    lengths = torch.randint(4, 90, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = plan_of(lengths)
    assert sum(lengths) <= len(plan.source) <= (1 + 2 * MAX_PADDING) * sum(lengths)
    assert len(plan.blocks) < 25
    assert torch.equal(plan.source[plan.target], torch.arange(sum(lengths)))


@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0]])
def test_takes_empty_sequences(lengths: list[int]) -> None:
    query, key, value = (torch.randn(sum(lengths), 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    output = packed_attention(query, key, value, plan_of(lengths), 2)
    assert output.shape == (sum(lengths), 4)
    output.sum().backward()
    assert torch.isfinite(value.grad).all()
