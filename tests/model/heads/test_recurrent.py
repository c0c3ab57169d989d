"""RNN and LSTM heads against a loop over tokens in float64, also without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.model.heads import build_head


def make_task(name: str, *, cls: bool, **settings: Any) -> TaskConfig:
    head = {"name": name, "size": 3, "cls": cls, "hidden": [4]}
    return TaskConfig.model_validate({"type": "binary", "data": {}, "head": head, **settings})


def last_state(name: str, tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Run one sequence [n, d] token by token."""
    state = cell = tokens.new_zeros(3)
    for x in tokens:
        z = p["weight_ih_l0"] @ x + p["bias_ih_l0"] + p["weight_hh_l0"] @ state + p["bias_hh_l0"]
        if name == "rnn":
            state = z.tanh()
        else:
            i, f, g, o = z.split(3)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
    return state


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_equals_the_loop_over_tokens(name: str, cls: bool) -> None:
    head = build_head(make_task(name, cls=cls), 6, 0.3).eval().double()
    lengths = [4, 1, 7, 2]
    tokens = torch.randn(14, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(head.embed.network.named_parameters())
    rows = []
    for sequence in tokens.split(lengths):
        read = sequence[1:] if cls and len(sequence) > 1 else sequence
        state = last_state(name, read, parameters)
        rows.append(torch.cat([state, sequence[0]]) if cls else state)
    expected = torch.stack(rows)
    found = head.embed(tokens, lengths)
    torch.testing.assert_close(found, expected)
    upstream, leaves = torch.randn_like(expected), [tokens, *parameters.values()]
    grads = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)
    x = (expected @ head.hidden[0].weight.T + head.hidden[0].bias).clamp(min=0)
    torch.testing.assert_close(head(found, None), x @ head.dense.weight.T + head.dense.bias)


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_no_rows_give_no_vectors_and_zero_gradients(name: str) -> None:
    head = build_head(make_task(name, cls=True), 6, 0.3)
    vectors = head.embed(torch.zeros(0, 6), [])
    assert vectors.shape == (0, 9)
    head(vectors, None).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_gradients_arrive_in_one_order_whatever_the_lengths(name: str) -> None:
    """ZeRO 2 sums over the ranks the gradients that arrive as the n-th."""
    orders = []
    for lengths in ([1], [4, 1, 7], [2, 2], []):
        head = build_head(make_task(name, cls=False), 6, 0.3)
        order: list[str] = []
        for key, parameter in head.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, key=key, order=order: order.append(key))
        tokens = torch.randn(sum(lengths), 6, requires_grad=True)
        head(head.embed(tokens, lengths), None).sum().backward()
        orders.append(order)
    assert len(orders[0]) == 8 and orders == [orders[0]] * 4
