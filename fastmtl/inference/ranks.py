"""Metrics of rankings: nDCG@k, the reciprocal rank, recall@k and the average precision.

Candidates with equal scores have no order: each metric is its mean over all orders of theirs, as
in sklearn.metrics.ndcg_score. Only the average precision counts them as one rank, the last of
theirs, as sklearn.metrics.average_precision_score does.
"""

from __future__ import annotations

import numpy as np


class Ranked:
    """The candidates of n groups, each group from the largest score to the smallest.

    scores: float [U]. grades: float [U], at least 0. offsets: int64 [n + 1]; group i has the
    candidates offsets[i] to offsets[i + 1] - 1, at least one.
    """

    def __init__(self, scores: np.ndarray, grades: np.ndarray, offsets: np.ndarray) -> None:
        grades = grades.astype(np.float64)
        self._starts, counts = offsets[:-1], np.diff(offsets)
        self._group = np.repeat(np.arange(len(counts)), counts)
        self._place = np.arange(len(scores)) - np.repeat(self._starts, counts)  # from 0
        self.order = np.lexsort((-scores, self._group))  # stable: equal scores keep the order of the file
        self._grades, self._ideal = grades[self.order], grades[np.lexsort((-grades, self._group))]
        sorted_scores = scores[self.order]
        begins = np.ones(len(scores), dtype=bool)
        begins[1:] = (sorted_scores[1:] != sorted_scores[:-1]) | (self._place[1:] == 0)
        self._tie = np.cumsum(begins) - 1  # number of the run of equal scores of each candidate
        self._tie_starts = np.flatnonzero(begins)

    def ndcg(self, k: int, *, exponential: bool) -> np.ndarray:
        """Return nDCG@k of each group, float64 [n]; 0 for a group whose grades are all 0.

        exponential: True for the gain 2^grade - 1, else the grade. Jarvelin & Kekalainen 2002.
        """
        discounts = np.where(self._place < k, 1 / np.log2(self._place + 2.0), 0.0)
        found, ideal = (np.exp2(grades) - 1 if exponential else grades for grades in (self._grades, self._ideal))
        return _ratio(self._sum(self._shared(found) * discounts), self._sum(ideal * discounts))

    def recall(self, k: int) -> np.ndarray:
        """Return the share of relevant candidates, those with a grade above 0, in the first k."""
        relevant = (self._grades > 0).astype(np.float64)
        return _ratio(self._sum(self._shared(relevant) * (self._place < k)), self._sum(relevant))

    def average_precision(self) -> np.ndarray:
        """Return the mean of the precision at each relevant candidate of a group, float64 [n].

        A relevant candidate has a grade above 0; the result is 0 for a group without one.
        """
        relevant = (self._grades > 0).astype(np.float64)
        found = np.cumsum(relevant)
        found -= np.repeat(found[self._starts] - relevant[self._starts], np.bincount(self._group))
        last = np.append(self._tie_starts[1:], len(relevant)) - 1  # of each run of equal scores
        precision = (found[last] / (self._place[last] + 1.0))[self._tie]
        return _ratio(self._sum(relevant * precision), self._sum(relevant))

    def reciprocal_rank(self) -> np.ndarray:
        """Return 1 / (rank of the first relevant candidate) of each group, float64 [n], or 0."""
        relevant = self._grades > 0
        result = np.zeros(len(self._starts))
        runs = np.add.reduceat(relevant, self._tie_starts, dtype=np.int64) if len(relevant) else np.zeros(0, np.int64)
        sizes = np.diff(np.append(self._tie_starts, len(relevant)))
        group = self._group[self._tie_starts]
        first = np.flatnonzero(runs > 0)
        _, chosen = np.unique(group[first], return_index=True)
        for run in first[chosen].tolist():
            rank = int(self._place[self._tie_starts[run]]) + 1
            result[group[run]] = mean_reciprocal(rank, int(sizes[run]), int(runs[run]))
        return result

    def ranks(self) -> np.ndarray:
        """Return the rank from 1 of each candidate, int64 [U]; equal scores keep their order."""
        ranks = np.empty(len(self.order), dtype=np.int64)
        ranks[self.order] = self._place + 1
        return ranks

    def _shared(self, x: np.ndarray) -> np.ndarray:
        """Return the mean over candidates with equal scores, float64 [U]."""
        sizes = np.bincount(self._tie)
        return (np.bincount(self._tie, weights=x) / sizes)[self._tie]

    def _sum(self, x: np.ndarray) -> np.ndarray:
        return np.bincount(self._group, weights=x, minlength=len(self._starts))


def mean_reciprocal(rank: int, size: int, relevant: int) -> float:
    """Return the mean of 1 / (rank of the first relevant candidate) over all orders of a run.

    The run has `size` candidates, of which `relevant` are relevant; its first place is `rank`.
    """
    total, others_first = 0.0, 1.0  # probability that the places before hold no relevant candidate
    for place in range(size - relevant + 1):
        total += others_first * relevant / (size - place) / (rank + place)
        others_first *= (size - relevant - place) / (size - place)
    return total


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.divide(x, y, out=np.zeros(len(x)), where=y > 0)
