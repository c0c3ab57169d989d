"""Metrics, thresholds and predictions of type multilabel."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scored import scored
from sklearn import metrics as sk

from fastmtl.config import Recipe, TaskConfig
from fastmtl.errors import UserError
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import check_metrics, evaluate_scores, with_thresholds
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.inference.types.multilabel import LabelsPrediction, thresholds, tuned_thresholds

NAMES = ["red", "blue", "green", "none", "all"]
KIND = INFERENCE_TYPES["multilabel"]


def task(**section: Any) -> TaskConfig:
    return TaskConfig.model_validate(
        {"type": "multilabel", "label_names": NAMES, "data": {"dev": "d.csv"}, "multilabel": section}
    )


def drawn(n: int = 60, seed: int = 0) -> Scores:
    """Draw scores, some of them equal, and labels; no row has `none`, every row has `all`."""
    random = np.random.default_rng(seed)
    labels = (random.random((n, 5)) < [0.3, 0.5, 0.1, -1, 2]).astype(np.float32)
    scores = np.clip(0.5 * random.random((n, 5)) + 0.3 * labels, 0, 1).round(2).astype(np.float32)
    return scored(scores, labels)


def test_metrics_are_those_of_scikit_learn() -> None:
    found = drawn()
    y, p = found.labels, found.scores
    assert y is not None
    predicted = p >= 0.5
    values = evaluate_scores(task(), found)
    assert tuple(values) == KIND.metrics(task())
    assert values["micro_f1"] == sk.f1_score(y, predicted, average="micro")
    assert values["macro_f1"] == sk.f1_score(y, predicted, average="macro", zero_division=0)
    assert values["accuracy"] == sk.accuracy_score(y, predicted)
    ranked = [0, 1, 2, 4]  # no row has label 3
    assert values["map"] == pytest.approx(sk.average_precision_score(y[:, ranked], p[:, ranked], average="macro"))
    assert values["roc_auc"] == pytest.approx(sk.roc_auc_score(y[:, :3], p[:, :3], average="macro"))
    none = scored(p[:, 3:], y[:, 3:])
    pair = task().model_copy(update={"label_names": NAMES[3:]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate_scores(pair, none)["roc_auc"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_tuned_thresholds_have_the_largest_f1(seed: int) -> None:
    found = drawn(12, seed)
    assert found.labels is not None
    least = tuned_thresholds(found.scores, found.labels)
    assert least[3] == 0.5 and ((least > 0) & (least < 1)).all()
    for label, value in enumerate(least):
        y, p = found.labels[:, label], found.scores[:, label].astype(np.float64)
        every = [sk.f1_score(y, p >= other, zero_division=0) for other in np.unique([*p, value])]
        assert sk.f1_score(y, p >= value, zero_division=0) == max(every)
        assert value not in p or label == 3


def test_tuned_thresholds_of_equal_scores_and_ties() -> None:
    assert tuned_thresholds(np.full((4, 1), 0.25, np.float32), np.array([[1.0], [0], [0], [1]])) == [0.125]
    scores = np.array([[0.9], [0.8], [0.4], [0.2]], np.float32)
    np.testing.assert_allclose(tuned_thresholds(scores, np.array([[1.0], [0], [1], [0]])), [0.3])
    # The F1 of the first row alone and that of all rows are 2/3; 0.85 is nearer to 0.5 than 0.1.
    np.testing.assert_allclose(tuned_thresholds(scores, np.array([[1.0], [0], [0], [1]])), [0.85])


def test_a_saved_model_has_the_numbers() -> None:
    found = drawn()
    recipe = Recipe(tasks={"sets": task(thresholds="tuned"), "other": task(thresholds=0.25)})
    saved = with_thresholds(recipe, {"sets": found}).tasks
    numbers = saved["sets"].multilabel.thresholds
    assert found.labels is not None
    assert numbers == tuned_thresholds(found.scores, found.labels).tolist()
    assert evaluate_scores(saved["sets"], found) == evaluate_scores(recipe.tasks["sets"], found)
    assert saved["other"] == recipe.tasks["other"]
    assert thresholds(saved["sets"], scored(found.scores)).tolist() == numbers
    check_metrics(recipe)
    without = recipe.model_copy(deep=True)
    without.tasks["sets"].data.dev = None
    with pytest.raises(UserError, match="tasks.sets.multilabel.thresholds: tuned needs dev rows"):
        check_metrics(without)
    with pytest.raises(UserError, match="there are no labels to evaluate against"):
        thresholds(recipe.tasks["sets"], scored(found.scores))


def test_predictions_table_and_summary() -> None:
    scores = np.array([[0.5, 0.25, 0.75, 0.1, 0.9], [0.1] * 5, [0.9, 0.9, 0.1, 0.1, 0.1]], np.float32)
    labels = np.array([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]], np.float32)
    found, config = scored(scores, labels, ["x", "y", "z"]), task(separator=";", thresholds=[0.4, 0.3, 0.5, 0.5, 0.5])
    first, second, _ = KIND.predictions(config, found)
    assert isinstance(first, LabelsPrediction)
    assert first.labels == ["red", "green", "all"] and second.labels == []
    assert first.probabilities == dict(zip(NAMES, map(float, scores[0]), strict=True))
    header, lines = KIND.table(config, found)
    assert header == ["id", "predicted", *(f"p_{name}" for name in NAMES)]
    assert [line[:3] for line in lines] == [
        ["x", "red;green;all", "0.500000"],
        ["y", "", "0.100000"],
        ["z", "red;blue", "0.900000"],
    ]
    summary = KIND.summary(config, found)
    assert summary.names == NAMES and summary.per_label is not None and summary.errors is not None
    rows = {row[0]: row[1:] for row in summary.per_label.rows}
    assert rows["red"] == ["1.000", "1.000", "1.000", "1.000", "2", "0.400"]
    assert rows["blue"][:3] == ["0.000"] * 3 and rows["none"] == ["0.000"] * 3 + ["–", "0", "0.500"]
    assert [row[0] for row in summary.errors.rows] == ["y", "z"]  # 0.1 * 0.9^4 and 0.9^4 * 0.1
    assert summary.errors.rows[0][2:4] == ["blue", "–"]
    assert KIND.statistics(config, found.dataset) == dict(
        zip(NAMES, [0.6667, 0.3333, 0.3333, 0.0, 0.3333], strict=True)
    )


def test_scores_that_are_not_finite() -> None:
    found = drawn()
    found.scores[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 60 predictions are not finite"):
        evaluate_scores(task(), found)
