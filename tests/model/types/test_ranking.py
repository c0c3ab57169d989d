"""Losses of rankings against their formulas group by group, in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranked_groups
import torch
from ranked_groups import COUNTS, GRADES, units_of
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.examples import Examples
from fastmtl.model.heads import build_head
from fastmtl.model.losses.smart import divergence
from fastmtl.model.losses.task_loss import build_loss

Formula = Callable[[Tensor, Tensor], Tensor]


def task_of(**settings: Any) -> TaskConfig:
    return TaskConfig.model_validate({"type": "ranking", "data": {}, **settings})


def listwise(scores: Tensor, grades: Tensor) -> Tensor:
    return functional.cross_entropy(scores, grades.softmax(0))


def pairs_of(scores: Tensor, grades: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    places = range(len(scores))
    terms = [function(scores[i] - scores[j]) for i in places for j in places if grades[i] > grades[j]]
    return torch.stack(terms).mean() if terms else 0 * scores.sum()


def pairwise(scores: Tensor, grades: Tensor) -> Tensor:
    return pairs_of(scores, grades, lambda x: -x.sigmoid().log())


def triplet(scores: Tensor, grades: Tensor) -> Tensor:
    return pairs_of(scores, grades, lambda x: torch.relu(0.7 - x))


@pytest.mark.parametrize(
    ("name", "formula", "settings", "scale"),
    [
        ("listwise", listwise, {}, 1.0),
        ("listwise", listwise, {"head": {"name": "cosine"}, "pairs": "bi"}, 20.0),
        ("pairwise", pairwise, {"ranking": {"scale": 3.0}}, 3.0),
        ("triplet", triplet, {"ranking": {"scale": 3.0, "margin": 0.7}}, 1.0),
    ],
)
def test_losses_of_scores(name: str, formula: Formula, settings: dict[str, Any], scale: float) -> None:
    scores = torch.randn(sum(COUNTS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    grades = torch.tensor([grade for own in GRADES for grade in own])
    found = Examples(scores, scores, None, units_of(COUNTS))
    loss = build_loss(task_of(loss={name: 2.0}, **settings)).of_units(found, grades, nn.Identity())
    pieces = zip((scale * scores.squeeze(1)).split(COUNTS), grades.double().split(COUNTS), strict=True)
    expected = 2.0 * torch.stack([formula(*piece) for piece in pieces]).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (loss, expected)))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_mnr_compares_with_the_candidates_of_all_groups(scale: float) -> None:
    task = ranked_groups.task(scale)
    queries, candidates = (x.requires_grad_() for x in ranked_groups.vectors())
    loss = ranked_groups.loss(task, queries, candidates, range(len(COUNTS)))
    expected = []
    rows = np.split(np.arange(sum(COUNTS)), np.cumsum(COUNTS)[:-1])
    for query, own, grades in zip(queries, rows, GRADES, strict=True):
        scores = scale * functional.cosine_similarity(query[None], candidates)
        relevant = [int(row) for row, grade in zip(own, grades, strict=True) if grade > 0]
        others = [row for row in range(len(scores)) if row not in relevant]
        terms = [-scores[[row, *others]].log_softmax(0)[0] for row in relevant]
        expected.append(torch.stack(terms).mean() if terms else 0 * scores.sum())
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    leaves = (queries, candidates)
    for pair in zip(*(torch.autograd.grad(x, leaves) for x in (loss, torch.stack(expected).sum())), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("name", ["listwise", "pairwise", "triplet", "mnr"])
@pytest.mark.parametrize("counts", [[], [1], [2]])
def test_groups_that_teach_nothing(name: str, counts: list[int]) -> None:
    """No group, one candidate, or candidates that are all good: finite gradients."""
    task = task_of(loss=name, pairs="bi", head={"name": "cosine"})
    u, v = (torch.randn(sum(counts), 4, requires_grad=True) for _ in range(2))
    head = build_head(task, 4, 0.02).eval()
    found = Examples(head(u, v), u, v, units_of(counts))
    loss = build_loss(task).of_units(found, torch.ones(sum(counts)), head)
    gradients = torch.autograd.grad(loss, (u, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if name != "listwise" or counts != [2]:
        assert not loss and not any(gradient.any() for gradient in gradients)


def test_divergence_is_that_of_the_scaled_softmax() -> None:
    p, q = torch.randn(2, sum(COUNTS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = divergence(task_of(ranking={"scale": 2.0}), p, q, units_of(COUNTS))
    expected = []
    for one, other in zip(*((2.0 * x.squeeze(1)).split(COUNTS) for x in (p, q)), strict=True):
        log_p, log_q = one.log_softmax(0), other.log_softmax(0)
        both = [functional.kl_div(a, b, log_target=True, reduction="sum") for a, b in ((log_p, log_q), (log_q, log_p))]
        expected.append(sum(both))
    torch.testing.assert_close(found, torch.stack(expected))  # type: ignore[arg-type]


def test_heads_and_losses_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="unknown loss of a ranking task 'liswise'. Did you mean 'listwise'"):
        build_loss(task_of(loss="liswise"))
    with pytest.raises(UserError, match="mnr: a setting of the loss mnr, which this task does not have"):
        build_loss(task_of(mnr={"scale": 2.0}))
    with pytest.raises(UserError, match="cosine compares two sequences"):
        build_head(task_of(head={"name": "cosine"}), 4, 0.02)
    assert not build_loss(task_of(loss="mnr", pairs="bi")).reads_outputs
    assert build_loss(task_of(loss=["mnr", "triplet"], pairs="bi")).reads_outputs


def test_the_score_of_the_cosine_head_is_the_cosine() -> None:
    u, v = torch.randn(2, 3, 4)
    head = build_head(task_of(pairs="bi", head={"name": "cosine", "dropout": 0.0}), 4, 0.02)
    torch.testing.assert_close(head(u, v)[:, 0], functional.cosine_similarity(u, v))
