"""Metrics, compared with their formulas, and the cases in which a formula is undefined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmtl.config import Recipe, TaskConfig
from fastmtl.errors import UserError
from fastmtl.inference.metrics import confusion, evaluate_predictions, label_statistics, predicted_labels
from fastmtl.inference.selection import check_metrics, mean_score, selected_score

CLASSES = TaskConfig.model_validate({"type": "classification", "num_labels": 3, "data": {}})
BINARY = TaskConfig.model_validate({"type": "binary", "data": {}})
REGRESSION = TaskConfig.model_validate({"type": "regression", "range": [0, 5], "data": {}})


def recipe(**changes: Any) -> Recipe:
    tasks = {
        "sst": {"type": "classification", "num_labels": 3, "data": {}},
        "sts": {"type": "regression", "range": [0, 5], "data": {}},
    }
    return Recipe.model_validate({"tasks": tasks, **changes})


def one_hot(labels: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[labels]


def test_classification_equals_the_formulas() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    scores = one_hot([0, 1, 1, 1, 0, 2], 3)
    result = evaluate_predictions(CLASSES, scores, labels)
    precision = [1 / 2, 2 / 3, 1 / 1]
    recall = [1 / 2, 2 / 2, 1 / 2]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["macro_precision"] == pytest.approx(np.mean(precision))
    assert result["macro_recall"] == pytest.approx(np.mean(recall))
    assert result["macro_f1"] == pytest.approx(np.mean(f1))
    assert confusion(CLASSES, scores, labels).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]


def test_a_class_that_is_never_predicted_has_precision_zero() -> None:
    result = evaluate_predictions(CLASSES, one_hot([0, 0, 0], 3), [0, 1, 2])
    assert result["macro_precision"] == pytest.approx((1 / 3) / 3)
    assert result["macro_f1"] == pytest.approx((2 * (1 / 3) / (4 / 3)) / 3)


def test_binary_threshold_and_float_labels() -> None:
    scores = np.array([0.2, 0.5, 0.9, 0.49])
    assert predicted_labels(BINARY, scores).tolist() == [0, 1, 1, 0]
    labels = np.array([0.0, 1.0, 0.0, 0.0], dtype=np.float32)
    assert evaluate_predictions(BINARY, scores, labels)["accuracy"] == pytest.approx(0.75)
    assert confusion(BINARY, scores, labels).tolist() == [[2, 1], [0, 1]]


def test_label_statistics() -> None:
    assert label_statistics(CLASSES, [0, 2, 2]) == {"0": 1, "1": 0, "2": 2}
    assert label_statistics(BINARY, np.array([0.0, 1.0, 1.0])) == {"0": 1, "1": 2}
    found = label_statistics(REGRESSION, [1.0, 2.0, 6.0])
    assert found == {"mean": 3.0, "deviation": 2.1602, "smallest": 1.0, "largest": 6.0}


def test_confusion_keeps_classes_that_do_not_occur() -> None:
    assert confusion(CLASSES, one_hot([0], 3), [0]).shape == (3, 3)


@given(
    hnp.arrays(np.float64, st.integers(3, 40), elements=st.floats(-5, 5, width=16)),
    st.floats(0.1, 10),
    st.floats(-3, 3),
)
def test_correlation_is_one_for_a_rising_line(labels: np.ndarray, slope: float, offset: float) -> None:
    result = evaluate_predictions(REGRESSION, slope * labels + offset, labels)
    if np.ptp(labels) < 1e-2:
        assert -1.0 <= result["pearson"] <= 1.0
    else:
        assert result["pearson"] == pytest.approx(1.0, abs=1e-6)


def test_regression_equals_the_formulas() -> None:
    scores, labels = np.array([1.0, 2.0, 2.5, 5.0]), np.array([0.0, 3.0, 2.0, 4.0])
    a, b = scores - scores.mean(), labels - labels.mean()
    result = evaluate_predictions(REGRESSION, scores, labels)
    assert result["pearson"] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    assert result["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))
    assert result["mse"] == pytest.approx((1 + 1 + 0.25 + 1) / 4)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]), ([1.0], [2.0])],
    ids=["constant predictions", "constant labels", "one row"],
)
def test_correlation_without_variance_is_zero(scores: list[float], labels: list[float]) -> None:
    result = evaluate_predictions(REGRESSION, np.array(scores), labels)
    assert result["pearson"] == 0.0
    assert result["spearman"] == 0.0


def test_predictions_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 3 predictions are not finite"):
        evaluate_predictions(REGRESSION, np.array([1.0, np.nan, 2.0]), [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="1 of 2 predictions"):
        evaluate_predictions(CLASSES, np.array([[1.0, 0, 0], [np.nan, np.nan, 0]]), [0, 1])


def test_no_rows_and_unequal_lengths() -> None:
    with pytest.raises(UserError, match="no rows"):
        evaluate_predictions(REGRESSION, np.zeros(0), [])
    with pytest.raises(ValueError, match="2 predictions for 3 labels"):
        evaluate_predictions(REGRESSION, np.zeros(2), [1.0, 2.0, 3.0])


def test_mean_takes_each_task_s_metric_and_leaves_out_tasks_without_dev_rows() -> None:
    metrics = {"sst": {"accuracy": 0.5, "macro_f1": 0.1}, "sts": {"pearson": 0.9, "mse": 2.0}}
    assert mean_score(metrics, recipe()) == pytest.approx(0.7)
    assert mean_score({"sts": metrics["sts"]}, recipe()) == pytest.approx(0.9)
    with pytest.raises(UserError, match="no task"):
        mean_score({}, recipe())


def test_selected_score_is_greater_for_the_better_value() -> None:
    chosen = recipe(early_stopping={"metric": "sts/mse"})
    assert selected_score({"sts": {"mse": 1.0}}, chosen) > selected_score({"sts": {"mse": 2.0}}, chosen)
    assert selected_score({"sst": {"accuracy": 0.5}, "sts": {"pearson": 0.7}}, recipe()) == pytest.approx(0.6)
    with pytest.raises(UserError, match="task sts has no dev file"):
        selected_score({"sst": {"accuracy": 0.5}}, chosen)


def test_metrics_of_a_recipe_are_checked_by_name() -> None:
    check_metrics(recipe(early_stopping={"metric": "sts/spearman"}))
    with pytest.raises(UserError, match="early_stopping.metric.*Did you mean 'sts/pearson'"):
        check_metrics(recipe(early_stopping={"metric": "sts/person"}))
    tasks = {"sts": {"type": "regression", "range": [0, 5], "metric": "accuracy", "data": {}}}
    with pytest.raises(UserError, match="tasks.sts.metric: unknown metric of a regression task 'accuracy'"):
        check_metrics(Recipe.model_validate({"tasks": tasks}))
