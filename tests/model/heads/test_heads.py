from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.heads import build_head
from fastmtl.model.heads.outputs import predictions, targets
from fastmtl.model.losses.task_loss import build_loss


def task(**settings: Any) -> TaskConfig:
    settings = {"type": "classification", "data": {}, **settings}
    if settings["type"] == "classification":
        settings.setdefault("num_labels", 3)
    if settings["type"] == "regression":
        settings.setdefault("range", [0, 5])
    return TaskConfig.model_validate(settings)


U, V = torch.randn(4, 6), torch.randn(4, 6)


def test_linear_sees_the_chosen_features_in_their_order() -> None:
    config = task(pairs="bi", head={"features": ["product", "v", "abs_diff"]})
    head: Any = build_head(config, 6, 0.02).eval()
    x = torch.cat([U * V, V, (U - V).abs()], dim=1)
    torch.testing.assert_close(head(U, V), functional.linear(x, head.dense.weight, head.dense.bias))
    single: Any = build_head(task(type="binary"), 6, 0.02).eval()
    torch.testing.assert_close(single(U, None), functional.linear(U, single.dense.weight, single.dense.bias))


def test_mlp_has_the_declared_hidden_layers() -> None:
    head: Any = build_head(task(head={"name": "mlp", "hidden": [5, 7]}), 6, 0.02).eval()
    x = U
    for linear in head.hidden:
        x = functional.linear(x, linear.weight, linear.bias).clamp(min=0)
    torch.testing.assert_close(head(U, None), functional.linear(x, head.dense.weight, head.dense.bias))
    assert [linear.out_features for linear in head.hidden] == [5, 7]
    assert [linear.out_features for linear in build_head(task(head={"name": "mlp"}), 6, 0.02).hidden] == [6]


def test_cosine_spans_the_range_from_orthogonal_to_equal() -> None:
    config = task(type="regression", range=[1, 9], pairs="bi", head={"name": "cosine"})
    head = build_head(config, 2, 0.02).eval()
    u = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    v = torch.tensor([[5.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    expected = torch.tensor([9.0, 1 + 8 / 2**0.5, 1.0])
    torch.testing.assert_close(predictions(config, head(u, v)), expected)
    assert not list(head.parameters())


@pytest.mark.parametrize("name", ["linear", "mlp", "cosine"])
def test_dropout_is_for_training_only(name: str) -> None:
    head = build_head(task(type="regression", pairs="bi", head={"name": name, "dropout": 0.5}), 6, 0.02)
    assert not torch.equal(head(U, V), head(U, V))
    head.eval()
    assert torch.equal(head(U, V), head(U, V))


def test_losses_follow_their_formulas() -> None:
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    config = task()
    expected = -logits.log_softmax(1)[torch.arange(4), classes]
    torch.testing.assert_close(build_loss(config)(logits, targets(config, classes)), expected)
    torch.testing.assert_close(predictions(config, logits), logits.exp() / logits.exp().sum(1, keepdim=True))

    logit, binary = torch.randn(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0])
    config = task(type="binary")
    probability = predictions(config, logit)
    torch.testing.assert_close(probability, 1 / (1 + (-logit[:, 0]).exp()))
    expected = -(binary * probability.log() + (1 - binary) * (1 - probability).log())
    torch.testing.assert_close(build_loss(config)(logit, targets(config, binary)), expected)

    config = task(type="regression", range=[10, 50])
    output, labels = torch.randn(4, 1), torch.tensor([10.0, 30.0, 44.0, 50.0])
    score = predictions(config, output)
    torch.testing.assert_close(score, 30 + 10 * output[:, 0])
    torch.testing.assert_close(build_loss(config)(output, targets(config, labels)), ((score - labels) / 10) ** 2)


@pytest.mark.parametrize("limits", [(0, 1), (0, 5), (-3, 400)])
def test_regression_losses_do_not_depend_on_the_unit_of_the_labels(limits: tuple[float, float]) -> None:
    low, high = limits
    config = task(type="regression", range=limits)
    labels = low + (high - low) * torch.linspace(0, 1, 9)
    loss = build_loss(config)(torch.zeros(9, 1), targets(config, labels)).mean()
    torch.testing.assert_close(loss, torch.linspace(-2, 2, 9).square().mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": {"name": "liner"}}, "unknown head 'liner'. Did you mean 'linear'"),
        ({"type": "regression", "head": {"name": "cosine"}}, "needs pairs: bi"),
        ({"pairs": "bi", "head": {"name": "cosine"}}, "does not fit a classification task"),
        (
            {"type": "regression", "loss": "cross_entropy", "pairs": "bi", "head": {"name": "cosine"}},
            "by cross_entropy",
        ),
        ({"type": "binary", "head": {"name": "linear_cosine"}}, "needs pairs: bi"),
        ({"pairs": "bi", "head": {"name": "linear_cosine"}}, "fits binary tasks"),
        ({"head": {"name": "lstm", "projection": 4}}, "head.projection: u and v are the states of the lstm"),
        ({"head": {"name": "rnn"}, "pooling": "mean"}, "pooling: mean: the rnn head reads the tokens itself"),
        ({"head": {"size": 64}}, "head.size is for the heads rnn and lstm, this one is linear"),
        ({"head": {"cls": True}}, "head.cls is for the heads rnn and lstm"),
        ({"head": {"squash": "relu"}}, "head.squash"),
        ({"type": "regression", "loss": "cross_entropy", "head": {"squash": "sigmoid"}}, "not in bins"),
        ({"type": "binary", "head": {"adjustment": True}}, "head.adjustment"),
        ({"loss": "mse", "head": {"adjustment": True}}, "head.adjustment"),
        ({"head": {"name": "mlp", "hidden": [0]}}, "head.hidden"),
        ({"pairs": "bi", "head": {"features": []}}, "head.features"),
        ({"pairs": "bi", "head": {"features": ["u", "u"]}}, "head.features"),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(task(**settings), 6, 0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "crossentropy"}, "unknown loss 'crossentropy'. Did you mean 'cross_entropy'"),
        ({"loss": "bce"}, "bce does not fit a classification task; use cross_entropy or mse"),
        ({"type": "binary", "loss": "mse"}, "mse does not fit a binary task; use bce"),
        ({"loss": ["mse", "cross_entropy"]}, "take one of the two"),
    ],
)
def test_losses_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loss(task(**settings))
