"""Metrics of rankings and choices: scikit-learn, and means over all orders of equal scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from fastmtl.inference.ranks import Ranked

GROUP = st.lists(st.tuples(st.integers(-1, 2), st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=5)


def ranked(groups: list[list[tuple[int, float]]]) -> Ranked:
    scores, grades = np.array([pair for group in groups for pair in group], dtype=np.float32).T
    return Ranked(scores, grades, np.concatenate([[0], np.cumsum([len(group) for group in groups])]))


def over_orders(group: list[tuple[int, float]], value: Callable[[list[float]], float]) -> float:
    """Return the mean of value(grades by rank) over all orders of candidates with equal scores."""
    orders = [order for order in itertools.permutations(group) if list(order) == sorted(order, key=lambda c: -c[0])]
    return float(np.mean([value([grade for _, grade in order]) for order in orders]))


@given(st.lists(GROUP, min_size=1, max_size=4), st.integers(1, 4))
def test_metrics_over_the_orders_of_equal_scores(groups: list[list[tuple[int, float]]], k: int) -> None:
    found = ranked(groups)
    metrics = [
        found.ndcg(k, exponential=False),
        found.ndcg(k, exponential=True),
        found.recall(k),
        found.reciprocal_rank(),
        found.average_precision(),
    ]
    for row, group in enumerate(groups):
        relevant = sum(grade > 0 for _, grade in group)
        gains = [np.array([grade for _, grade in group]), np.exp2([grade for _, grade in group]) - 1]
        expected = [0.0, 0.0, 0.0, 0.0, 0.0]
        if relevant:
            if len(group) > 1:
                scores = [[score for score, _ in group]]
                expected[:2] = [ndcg_score([gain], scores, k=k) for gain in gains]
            else:
                expected[:2] = [1.0, 1.0]
            expected[2] = over_orders(group, lambda grades, n=relevant: sum(grade > 0 for grade in grades[:k]) / n)
            expected[3] = over_orders(
                group, lambda grades: 1 / next(r for r, grade in enumerate(grades, 1) if grade > 0)
            )
            pairs = np.array(group)
            expected[4] = average_precision_score(pairs[:, 1] > 0, pairs[:, 0])
        np.testing.assert_allclose([metric[row] for metric in metrics], expected, rtol=1e-9)


def test_ranks_keep_the_order_of_equal_scores() -> None:
    assert ranked([[(1, 0), (2, 0), (1, 0)], [(0, 0)]]).ranks().tolist() == [2, 1, 3, 1]


@pytest.mark.parametrize("size", [1, 1000])
def test_a_model_without_an_opinion_has_the_mean_of_all_ranks(size: int) -> None:
    """The good candidate stands first in the file; its rank is still unknown."""
    group = [(0, 1.0)] + [(0, 0.0)] * (size - 1)
    np.testing.assert_allclose(ranked([group]).reciprocal_rank(), np.mean(1 / np.arange(1, size + 1)))
