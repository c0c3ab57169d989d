"""Heads of pairs, compared with their formulas in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.heads import build_head
from fastmtl.model.heads.outputs import predictions

Formula = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def pair_task(**settings: Any) -> TaskConfig:
    kind = {"range": [0, 5]} if settings.get("type", "regression") == "regression" else {}
    return TaskConfig.model_validate({"type": "regression", "pairs": "bi", "data": {}, **kind, **settings})


def assert_follows(task: TaskConfig, formula: Formula, out: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Check out(outputs) against a formula of the pooled pair and the head's parameters."""
    head = build_head(task, 6, 0.3).eval().double()
    generator = torch.Generator().manual_seed(0)
    pooled = [torch.randn(5, 6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    upstream = torch.randn(5, dtype=torch.float64, generator=generator)
    leaves = [*pooled, *head.parameters()]
    found = out(head(*(head.embed(x) for x in pooled)))
    expected = formula(pooled[0], pooled[1], dict(head.named_parameters()))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    grads = zip(
        torch.autograd.grad(found @ upstream, leaves), torch.autograd.grad(expected @ upstream, leaves), strict=True
    )
    for ours, theirs in grads:
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


def cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(1) / (u.square().sum(1) * v.square().sum(1)).sqrt()


@pytest.mark.parametrize(
    ("squash", "function"),
    [(None, lambda x: x), ("relu", lambda x: x.clamp(min=0)), ("sigmoid", lambda x: 1 / (1 + (-x).exp()))],
)
def test_cosine_scaled_to_the_range(squash: str | None, function: Callable[[Tensor], Tensor]) -> None:
    task = pair_task(head={"name": "cosine", "squash": squash})
    assert_follows(task, lambda u, v, _: 5 * function(cosine(u, v)), lambda x: predictions(task, x))


def test_cosine_of_a_binary_task_is_the_logit() -> None:
    task = pair_task(type="binary", head={"name": "cosine"})
    assert_follows(task, lambda u, v, _: 1 / (1 + (-4 * (cosine(u, v) - 0.5)).exp()), lambda x: predictions(task, x))


def test_a_projection_comes_first() -> None:
    def formula(u: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
        u, v = (x @ p["embed.dense.weight"].T + p["embed.dense.bias"] for x in (u, v))
        return 5 * cosine(u, v)

    task = pair_task(head={"name": "cosine", "projection": 3})
    assert_follows(task, formula, lambda x: predictions(task, x))

    def concatenated(u: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
        u, v = (x @ p["embed.dense.weight"].T + p["embed.dense.bias"] for x in (u, v))
        return torch.cat([u, v], dim=1) @ p["dense.weight"][0] + p["dense.bias"]

    assert_follows(
        pair_task(type="binary", head={"projection": 3, "features": ["u", "v"]}), concatenated, lambda x: x[:, 0]
    )


def test_projection_dropout_is_of_what_the_projection_sees() -> None:
    head = build_head(pair_task(head={"projection": 4, "projection_dropout": 0.5, "dropout": 0.0}), 6, 0.02)
    pooled = torch.randn(9, 6)
    torch.manual_seed(0)
    found = head.embed(pooled)
    torch.manual_seed(0)
    torch.testing.assert_close(found, head.embed.dense(functional.dropout(pooled, 0.5)))
    assert torch.equal(head(found, found), head(found, found))
    torch.testing.assert_close(head.eval().embed(pooled), head.embed.dense(pooled))


@pytest.mark.parametrize("squash", ["relu", "sigmoid"])
def test_any_heads_score_can_be_squashed(squash: str) -> None:
    function = {"relu": lambda x: x.clamp(min=0), "sigmoid": lambda x: 1 / (1 + (-x).exp())}[squash]

    def formula(u: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
        x = torch.cat([u, v], dim=1) @ p["head.dense.weight"][0] + p["head.dense.bias"]
        return 2 + 8 * function(x)

    task = pair_task(range=[2, 10], head={"features": ["u", "v"], "squash": squash})
    assert_follows(task, formula, lambda x: predictions(task, x))


def test_linear_map_plus_cosine() -> None:
    def formula(u: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
        return torch.cat([u, v, u * v], dim=1) @ p["dense.weight"][0] + p["dense.bias"] + cosine(u, v)

    task = pair_task(type="binary", head={"name": "linear_cosine", "features": ["u", "v", "product"]})
    assert_follows(task, formula, lambda x: x[:, 0])


def test_learned_matrix_maps_the_probabilities() -> None:
    task = TaskConfig.model_validate(
        {"type": "classification", "num_labels": 5, "data": {}, "head": {"adjustment": True}}
    )
    head = build_head(task, 6, 1.0).eval().double()
    u = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    matrix = head.row_bias.exp() / head.row_bias.exp().sum(1, keepdim=True)
    torch.testing.assert_close(matrix.diagonal(), torch.full((5,), 0.95, dtype=torch.float64), rtol=1e-5, atol=0)
    logits = u @ head.head.dense.weight.T + head.head.dense.bias
    expected = (logits.exp() / logits.exp().sum(1, keepdim=True)) @ matrix
    found = predictions(task, head(u, None))
    torch.testing.assert_close(found, expected)
    upstream, leaves = torch.randn(4, 5, dtype=torch.float64), [u, *head.parameters()]
    grads = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)
