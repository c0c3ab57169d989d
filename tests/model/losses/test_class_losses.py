"""Losses with class weights, label smoothing, focus and order, compared with torch and formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from fastmtl.config import Recipe, TaskConfig
from fastmtl.config.class_weights import class_weights
from fastmtl.data.class_weights import balanced, with_class_weights
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.packed_batch import Units
from fastmtl.errors import UserError
from fastmtl.model.examples import Examples
from fastmtl.model.heads import build_head
from fastmtl.model.heads.outputs import num_outputs, predictions
from fastmtl.model.losses.smart import divergence
from fastmtl.model.losses.task_loss import build_loss
from fastmtl.model.types import UNIT_TYPES

WEIGHTS = [0.5, 2.0, 1.5, 3.0]


def task(kind: str = "classification", **values: Any) -> TaskConfig:
    types: dict[str, dict[str, Any]] = {
        "classification": {"num_labels": 4},
        "tokens": {"label_names": ["O", "A", "B", "C"]},
        "multilabel": {"label_names": ["red", "blue", "green", "pink"]},
        "regression": {"range": [0, 5]},
    }
    return TaskConfig.model_validate({"type": kind, "data": {}, **types.get(kind, {}), **values})


def drawn(kind: str) -> tuple[Tensor, Tensor]:
    """Draw outputs and targets of seven examples."""
    random = torch.Generator().manual_seed(1)
    columns = {"binary": 1, "ordinal": 3}.get(kind, 4)
    outputs = (3 * torch.randn(7, columns, dtype=torch.float64, generator=random)).requires_grad_()
    shape = (7, 4) if kind == "multilabel" else (7,)
    labels = torch.randint(0, 2 if kind in ("binary", "multilabel") else 4, shape, generator=random)
    return outputs, labels.float() if kind in ("binary", "multilabel") else labels


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_torchs(weights: list[float] | None, smoothing: float) -> None:
    given: dict[str, Any] = {"class_weights": weights, "label_smoothing": smoothing}
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    how: dict[str, Any] = {"weight": tensor, "label_smoothing": smoothing, "reduction": "none"}
    outputs, labels = drawn("classification")
    expected = functional.cross_entropy(outputs, labels, **how)
    torch.testing.assert_close(build_loss(task(**given))(outputs, labels), expected)
    labels[2] = -100
    units = Units(torch.arange(7), torch.arange(8), torch.arange(7), tuple(range(8)))
    found = Examples(outputs, outputs, None, units)
    of_words = UNIT_TYPES["tokens"].losses["cross_entropy"](task("tokens", **given))(found, labels, torch.nn.Identity())
    torch.testing.assert_close(of_words, functional.cross_entropy(outputs, labels, **how))
    # A binary task is one of two classes with the logits 0 and x; several labels are as many tasks.
    x, y = drawn("binary")
    two: dict[str, Any] = {"class_weights": weights and weights[:2], "label_smoothing": smoothing}
    how["weight"] = None if tensor is None else tensor[:2]
    expected = functional.cross_entropy(torch.cat([0 * x, x], dim=1), y.long(), **how)
    torch.testing.assert_close(build_loss(task("binary", **two))(x, y), expected)
    x, y = drawn("multilabel")
    smooth = y * (1 - smoothing) + smoothing / 2
    expected = functional.binary_cross_entropy_with_logits(x, smooth.double(), pos_weight=tensor, reduction="none")
    torch.testing.assert_close(build_loss(task("multilabel", **given))(x, y), expected.mean(1))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal(gamma: float, weights: list[float] | None) -> None:
    given: dict[str, Any] = {"loss": "focal", "focal_gamma": gamma, "class_weights": weights}
    w = torch.tensor(weights or [1.0] * 4, dtype=torch.float64)

    def formula(p: Tensor, weight: Tensor) -> Tensor:
        return -weight * (1 - p) ** gamma * p.log()

    outputs, labels = drawn("classification")
    p = outputs.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(build_loss(task(**given))(outputs, labels), formula(p, w[labels]))
    other = labels.clone()
    other[2] = -100
    units = Units(torch.arange(7), torch.arange(8), torch.arange(7), tuple(range(8)))
    of_words = UNIT_TYPES["tokens"].losses["focal"](task("tokens", **given))
    found = of_words(Examples(outputs, outputs, None, units), other, torch.nn.Identity())
    torch.testing.assert_close(found, formula(p, w[labels]).where(other >= 0, 0.0))
    x, y = drawn("binary")
    p, two = torch.where(y > 0, x[:, 0].sigmoid(), 1 - x[:, 0].sigmoid()), weights and weights[:2]
    torch.testing.assert_close(
        build_loss(task("binary", **{**given, "class_weights": two}))(x, y), formula(p, w[y.long()])
    )
    x, y = drawn("multilabel")
    p = torch.where(y > 0, x.sigmoid(), 1 - x.sigmoid())
    torch.testing.assert_close(
        build_loss(task("multilabel", **given))(x, y), formula(p, torch.where(y > 0, w, 1.0)).mean(1)
    )


@pytest.mark.parametrize(("kind", "loss"), [("classification", "focal"), ("classification", "ordinal")])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradients(kind: str, loss: str, weights: list[float] | None) -> None:
    outputs, labels = drawn("ordinal" if loss == "ordinal" else kind)
    function = build_loss(task(kind, loss=loss, class_weights=weights))
    assert torch.autograd.gradcheck(lambda x: function(x, labels), (outputs,))
    for other in ("binary", "multilabel") if loss == "focal" else ():
        x, y = drawn(other)
        function = build_loss(
            task(other, loss=loss, class_weights=weights and weights[: 2 if other == "binary" else 4])
        )
        assert torch.autograd.gradcheck(lambda x, y=y, function=function: function(x, y), (x,))


def test_certain_outputs_have_finite_gradients() -> None:
    for kind, columns in (("classification", 4), ("binary", 1), ("multilabel", 4)):
        for gamma in (0.0, 0.5, 2.0):
            x = torch.full((2, columns), -200.0, requires_grad=True)
            y = torch.tensor([0, 1]) if kind != "multilabel" else torch.eye(2, 4)
            with torch.no_grad():
                x[0, 0] = x[1, columns // 4] = 200.0
            build_loss(task(kind, loss="focal", focal_gamma=gamma))(x, y).sum().backward()
            assert x.grad is not None and x.grad.isfinite().all()


def corn_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the sum of CORN's losses, as in section 3.3 of the paper, and their number."""
    total, number = logits.new_zeros(()), 0
    for k in range(logits.shape[1]):
        subset = labels > k - 1
        above, f = (labels[subset] > k).double(), logits[subset, k].sigmoid()
        total = total - (above * f.log() + (1 - above) * (1 - f).log()).sum()
        number += int(subset.sum())
    return total, number


def test_ordinal() -> None:
    config = task(loss="ordinal")
    outputs, labels = drawn("ordinal")
    losses, p = build_loss(config)(outputs, labels), predictions(config, outputs)
    torch.testing.assert_close(losses.sum(), corn_loss(outputs, labels)[0])
    torch.testing.assert_close(losses, -p.gather(1, labels[:, None]).squeeze(1).log())
    torch.testing.assert_close(p.sum(1), torch.ones(7, dtype=torch.float64))
    above = outputs.sigmoid().cumprod(1)  # P(y > k)
    torch.testing.assert_close(p[:, 1:].flip(1).cumsum(1).flip(1), above)
    weighted = build_loss(task(loss="ordinal", class_weights=WEIGHTS))(outputs, labels)
    torch.testing.assert_close(weighted, losses * torch.tensor(WEIGHTS, dtype=torch.float64)[labels])
    other = outputs.detach().flip(0)
    q = predictions(config, other)
    torch.testing.assert_close(divergence(config, outputs, other), ((p - q) * (p / q).log()).sum(1))
    assert num_outputs(config) == 3 and build_head(config, 8, 0.02).dense.out_features == 3
    with pytest.raises(UserError, match="head.adjustment"):
        build_head(task(loss="ordinal", head={"adjustment": True}), 8, 0.02)
    both = task(loss=["focal", "cross_entropy"])
    x, y = drawn("classification")
    expected = sum(build_loss(task(loss=name))(x, y) for name in ("focal", "cross_entropy"))
    torch.testing.assert_close(build_loss(both)(x, y), expected)
    for losses_of in (["cross_entropy", "ordinal"], ["mse", "ordinal"], ["focal", "mse"]):
        with pytest.raises(UserError, match="reads the outputs as .* take one of the two"):
            build_loss(task(loss=losses_of))


def test_balanced_weights() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 3])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert balanced(task(), labels) == pytest.approx(expected.tolist())
    words = np.concatenate([labels, [-100, -100]])
    assert balanced(task("tokens"), words) == pytest.approx(expected.tolist())
    assert balanced(task("binary"), np.array([0.0, 1, 1, 1])) == pytest.approx([2.0, 2 / 3])
    sets = np.array([[1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
    assert balanced(task("multilabel"), sets) == [2.0, 2.0, 0.5, 2.0]
    with pytest.raises(UserError, match="no training row has the class 'pink'"):
        balanced(task("multilabel"), np.eye(4)[:3])
    with pytest.raises(UserError, match="every training row has the class 'red'"):
        balanced(task("multilabel"), np.array([[1, 0, 1, 1], [1, 1, 0, 0]], np.float32))


def test_balanced_weights_of_a_recipe(tmp_path: Any) -> None:
    (tmp_path / "t.csv").write_text("t,y\na,0\nb,1\nc,1\n")
    files = {"train": "t.csv", "columns": {"text": "t", "label": "y"}}
    one = {"type": "binary", "data": files, "class_weights": "balanced"}
    recipe = Recipe.model_validate(
        {"tasks": {"one": one, "two": {**one, "class_weights": None}}, "data": {"dir": str(tmp_path)}}
    )
    found = with_class_weights(recipe, CorpusRows.read(recipe))
    assert found.tasks["one"].class_weights == [1.5, 0.75] and found.tasks["two"] == recipe.tasks["two"]
    assert recipe.tasks["one"].class_weights == "balanced"
    assert Recipe.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(ValueError, match="call fastmtl.data.class_weights.with_class_weights"):
        build_loss(recipe.tasks["one"])
    three = {**one, "type": "classification", "num_labels": 3}
    more = Recipe.model_validate({"tasks": {"one": three}, "data": {"dir": str(tmp_path)}})
    with pytest.raises(UserError, match="tasks.one.class_weights: balanced: no training row has the class 2: give"):
        with_class_weights(more, CorpusRows.read(more))


def test_weights_by_name() -> None:
    assert class_weights(task("tokens", class_weights={"B": 3.0, "O": 0.1})) == [0.1, 1.0, 3.0, 1.0]
    assert class_weights(task("binary", class_weights={1: 4.0})) == [1.0, 4.0]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("regression", {"class_weights": "balanced"}, "class_weights: for tasks with classes .* of type regression"),
        ("choice", {"class_weights": [1.0, 2.0]}, "class_weights: for tasks with classes"),
        ("span", {"label_smoothing": 0.1}, "label_smoothing: for tasks with classes"),
        ("classification", {"loss": "mse", "label_smoothing": 0.1}, "label_smoothing: for the losses .* has mse"),
        ("classification", {"loss": "mse", "class_weights": "balanced"}, "class_weights: for the losses"),
        ("classification", {"loss": "ordinal", "label_smoothing": 0.1}, "label_smoothing: for the losses"),
        ("classification", {"focal_gamma": 1.0}, "focal_gamma: a setting of the loss focal"),
        ("classification", {"class_weights": [1.0]}, "class_weights has 1 numbers for 4 classes"),
        ("classification", {"class_weights": [1.0, 0.0, 1.0, 1.0]}, "greater than 0"),
        ("multilabel", {"class_weights": {"read": 2.0}}, "'read' is none of the classes red, blue"),
        ("binary", {"class_weights": "balanced", "data": {"augment": {}}}, "does not go with data.augment"),
        ("binary", {"label_smoothing": 1.0}, "less than 1"),
    ],
)
def test_settings_that_do_not_fit(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(kind, **settings)
