"""Evaluation and predictions of rankings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError
from fastmtl.inference.ranks import Ranked
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.candidates import check_scores, counted, given_rows, table_of_sizes
from fastmtl.inference.types.spec import InferenceType, Summary, Table
from fastmtl.inference.types.texts import shown, text_cells, text_columns, worst


@dataclass(frozen=True)
class RankingPrediction:
    """The prediction for one query.

    order: numbers of the candidates from 0, the best one first; equal scores keep their order.
    scores: those of all candidates, in their own order; only differences within a query matter.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]


def metrics(task: TaskConfig) -> tuple[str, ...]:
    return ("ndcg", "mrr", "recall", "map")


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    """Return the means over the groups that have a candidate with a grade above 0."""
    values, relevant = _values(task, scores)
    if not relevant.any():
        raise UserError(f"{scores.dataset.path}: no group has a candidate with a grade above 0, so no rank is right")
    return {name: float(value[relevant].mean()) for name, value in values.items()}


def _values(task: TaskConfig, scores: Scores) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return {metric: values of the groups}, and whether a group has a grade above 0, bool [n]."""
    grades = check_scores(scores)
    ranked, config = Ranked(scores.scores, grades, scores.offsets), task.ranking
    values = {
        "ndcg": ranked.ndcg(config.k, exponential=config.gains == "exponential"),
        "mrr": ranked.reciprocal_rank(),
        "recall": ranked.recall(config.k),
        "map": ranked.average_precision(),
    }
    return values, np.maximum.reduceat(grades, scores.offsets[:-1]) > 0


def predictions(task: TaskConfig, scores: Scores) -> list[RankingPrediction]:
    parts = np.split(scores.scores, scores.offsets[1:-1])
    orders = [np.argsort(-part, kind="stable") for part in parts]
    return [
        RankingPrediction(tuple(order.tolist()), tuple(map(float, part)))
        for order, part in zip(orders, parts, strict=True)
    ]


def rows_of(task: TaskConfig, texts: Sequence[Any]) -> Rows:
    return given_rows(texts, least=1, alone=False)


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns and a line for each candidate of each query, in the order of the file."""
    ranks = Ranked(scores.scores, np.zeros(len(scores.scores)), scores.offsets).ranks().tolist()
    lines = (
        [row_id, str(number), text, str(rank), f"{score:.6f}"]
        for (row_id, number, text), rank, score in zip(counted(scores), ranks, scores.scores, strict=True)
    )
    return ["id", "candidate", "text", "rank", "score"], lines


def summary(task: TaskConfig, scores: Scores) -> Summary:
    """Return the metrics by size of the group, and the queries with the least nDCG."""
    values, relevant = _values(task, scores)
    items, grades = scores.rows.items, check_scores(scores)
    assert items is not None
    ranks = Ranked(scores.scores, grades, scores.offsets).ranks()
    lines = []
    for row in worst(-values["ndcg"], relevant & (values["ndcg"] < 1)):
        own = slice(scores.offsets[row], scores.offsets[row + 1])
        texts, best, top = items.of(row), int(grades[own].argmax()), int(ranks[own].argmin())
        lines.append(
            [
                *text_cells(scores, row),
                shown(texts[best]),
                shown(texts[top]),
                f"{grades[own][best]:g}",
                str(ranks[own][best]),
                f"{grades[own][top]:g}",
                f"{values['ndcg'][row]:.3f}",
            ]
        )
    columns = ["best by grade", "best by score", "best grade", "its rank", "grade of the top", "ndcg"]
    sizes = np.diff(scores.offsets)[relevant]
    by_size = {name: value[relevant] for name, value in values.items()}
    return Summary(
        per_label=table_of_sizes("number of candidates", sizes, by_size),
        errors=Table([*text_columns(scores), *columns], lines),
    )


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    """Return the number of candidates with the grade 0 and with a grade above 0."""
    assert dataset.labels is not None
    relevant = int((dataset.labels > 0).sum())
    return {"grade 0": len(dataset.labels) - relevant, "above 0": relevant}


RANKING = InferenceType(metrics, evaluate, predictions, rows_of, table, summary, statistics)
