"""Outputs for losses of another task type: classes as a score, scores as classes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.heads.outputs import num_outputs, predictions, targets
from fastmtl.model.losses.task_loss import build_loss


def make_task(**settings: Any) -> TaskConfig:
    return TaskConfig.model_validate({"data": {}, **settings})


def test_classes_as_a_score() -> None:
    task = make_task(type="classification", num_labels=5, loss="mse")
    assert num_outputs(task) == 1
    classes = torch.arange(5)
    torch.testing.assert_close(targets(task, classes), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
    score = torch.tensor([0.0, 0.4, 1.75, 3.5, 4.6, -1.0])
    shares = predictions(task, score[:, None] - 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    torch.testing.assert_close(shares @ torch.arange(5.0), score.clamp(0, 4))
    assert shares.argmax(1).tolist() == [0, 0, 2, 3, 4, 0]
    torch.testing.assert_close(
        build_loss(task)(score[:5, None] - 2, targets(task, classes)), (score[:5] - classes) ** 2
    )


def test_scores_in_bins() -> None:
    task = make_task(type="regression", range=[0, 5], loss="cross_entropy")
    assert num_outputs(task) == 6
    labels = torch.tensor([0.0, 0.4, 2.6, 4.8, 5.0])
    assert targets(task, labels).tolist() == [0, 0, 3, 5, 5]
    logits = torch.randn(5, 6, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = sum(k * p[:, k] for k in range(6))
    torch.testing.assert_close(predictions(task, logits), expected)
    loss = build_loss(task)(logits, targets(task, labels))
    torch.testing.assert_close(loss, -p[torch.arange(5), targets(task, labels)].log())
    coarse = make_task(type="regression", range=[-1, 1], loss="cross_entropy", bins=3)
    assert targets(coarse, torch.tensor([-1.0, -0.4, 0.7])).tolist() == [0, 1, 2]
    torch.testing.assert_close(predictions(coarse, torch.tensor([[0.0, 0.0, 100.0]])), torch.tensor([1.0]))


def test_losses_are_added_with_their_weights() -> None:
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    task = make_task(type="classification", num_labels=3, loss={"cross_entropy": 0.5})
    torch.testing.assert_close(
        build_loss(task)(logits, classes), 0.5 * functional.cross_entropy(logits, classes, reduction="none")
    )
