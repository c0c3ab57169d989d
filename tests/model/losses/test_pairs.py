"""Losses of u and v, compared with their formulas in float64, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.losses.task_loss import build_loss


def make_task(**settings: Any) -> TaskConfig:
    return TaskConfig.model_validate(
        {"type": "binary", "pairs": "bi", "data": {}, "head": {"name": "cosine"}, **settings}
    )


def vectors(count: int) -> tuple[Tensor, Tensor]:
    u, v = torch.randn(2, count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return u.requires_grad_(), v.requires_grad_()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def assert_same_gradients(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def mnr_mean(u: Tensor, v: Tensor, similar: list[int], scale: float) -> Tensor:
    """Return - 1/K sum_i (S(u_i, v_i) - log sum_j exp S(u_i, v_j)), term by term."""
    total = u.new_zeros(())
    for i in similar:
        denominator = sum((scale * cosine(u[i], v[j])).exp() for j in similar)
        total = total - (scale * cosine(u[i], v[i]) - denominator.log())
    return total / len(similar)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("labels", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
def test_mnr_is_the_mean_over_similar_pairs(labels: list[int], scale: float) -> None:
    u, v = vectors(5)
    loss = build_loss(make_task(loss="mnr", mnr={"scale": scale}))
    losses = loss.of_pairs(u, v, torch.tensor(labels, dtype=torch.float32))
    assert not losses[torch.tensor(labels) == 0].any()
    similar = [row for row, label in enumerate(labels) if label]
    assert_same_gradients(losses.mean(), mnr_mean(u, v, similar, scale), (u, v))


def test_mnr_of_scores_takes_those_in_the_upper_range() -> None:
    u, v = vectors(5)
    task = make_task(type="regression", range=[0, 5], loss="mnr", mnr={"scale": 3.0})
    losses = build_loss(task).of_pairs(u, v, torch.tensor([3.9, 4.0, 5.0, 0.0, 4.4]))
    assert_same_gradients(losses.mean(), mnr_mean(u, v, [1, 2, 4], 3.0), (u, v))
    other = make_task(type="regression", range=[-1, 1], loss="mnr", mnr={"similar": 0.5, "scale": 1.0})
    losses = build_loss(other).of_pairs(u, v, torch.tensor([-1.0, 0.0, 0.5, -0.1, 1.0]))
    assert_same_gradients(losses.mean(), mnr_mean(u, v, [1, 2, 4], 1.0), (u, v))


@pytest.mark.parametrize("count", [0, 3])
def test_mnr_without_similar_pairs_is_zero(count: int) -> None:
    u, v = vectors(count)
    losses = build_loss(make_task(loss="mnr")).of_pairs(u, v, torch.zeros(count))
    assert losses.shape == (count,) and not losses.any()
    gradients = torch.autograd.grad(losses.sum(), (u, v))
    assert all(torch.isfinite(g).all() and not g.any() for g in gradients)


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_cosine_embedding(margin: float) -> None:
    u, v = vectors(6)
    with torch.no_grad():
        v[4], v[5] = u[4] + 0.1 * v[4], u[5] + 0.1 * v[5]
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    losses = build_loss(make_task(loss="cosine_embedding", margin=margin)).of_pairs(u, v, labels)
    rows = [cosine(u[i], v[i]) for i in range(6)]
    expected = [1 - c if label else torch.relu(c - margin) for c, label in zip(rows, labels.tolist(), strict=True)]
    assert_same_gradients(losses.sum(), torch.stack(expected).sum(), (u, v))
    theirs = torch.nn.functional.cosine_embedding_loss(u, v, 2 * labels - 1, margin=margin, reduction="none")
    torch.testing.assert_close(losses, theirs)


def test_sums_have_their_weights() -> None:
    u, v = vectors(4)
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0])
    logits = torch.randn(4, 1, dtype=torch.float64)
    loss = build_loss(make_task(loss={"bce": 0.5, "mnr": 2.0, "cosine_embedding": 3.0}))
    alone = {name: build_loss(make_task(loss=name)) for name in ("bce", "mnr", "cosine_embedding")}
    torch.testing.assert_close(loss(logits, labels), 0.5 * alone["bce"](logits, labels))
    expected = 2 * alone["mnr"].of_pairs(u, v, labels) + 3 * alone["cosine_embedding"].of_pairs(u, v, labels)
    torch.testing.assert_close(loss.of_pairs(u, v, labels), expected)
    both = build_loss(make_task(loss=["bce", "mnr"]))
    torch.testing.assert_close(both(logits, labels), alone["bce"](logits, labels))
    torch.testing.assert_close(both.of_pairs(u, v, labels), alone["mnr"].of_pairs(u, v, labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mnrl"}, "unknown loss 'mnrl'. Did you mean 'mnr'"),
        ({"loss": "mnr", "pairs": "cross"}, "mnr compares the vectors of two texts: it needs pairs: bi"),
        ({"type": "regression", "range": [0, 5], "loss": "cosine_embedding"}, "does not fit a regression task; use"),
        ({"mnr": {"scale": 1.0}}, "mnr: a setting of the loss mnr, which this task does not have; its loss is bce"),
        ({"margin": 0.5}, "margin: a setting of the loss cosine_embedding"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loss(make_task(**settings))
