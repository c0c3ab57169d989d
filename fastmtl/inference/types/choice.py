"""Evaluation and predictions of choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.candidates import check_scores, counted, given_rows, table_of_sizes
from fastmtl.inference.types.spec import InferenceType, Summary, Table
from fastmtl.inference.types.texts import shown, text_cells, text_columns, worst


@dataclass(frozen=True)
class ChoicePrediction:
    """The prediction for one row.

    choice: number of the chosen text from 0; of equally probable texts the first. text: the chosen
    text. probabilities: those of all texts, in their order.
    """

    choice: int
    text: str
    probabilities: tuple[float, ...]


def metrics(task: TaskConfig) -> tuple[str, ...]:
    return ("accuracy",)


def chosen(scores: Scores) -> np.ndarray:
    """Return the number of each row's most probable text, int64 [n], the first of equal ones."""
    starts = scores.offsets[:-1]
    largest = np.maximum.reduceat(scores.scores, starts)
    found = np.flatnonzero(scores.scores == np.repeat(largest, np.diff(scores.offsets)))
    return found[np.searchsorted(found, starts)] - starts


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    labels = check_scores(scores)
    return {"accuracy": float((chosen(scores) == labels).mean())}


def predictions(task: TaskConfig, scores: Scores) -> list[ChoicePrediction]:
    items = scores.rows.items
    assert items is not None
    parts = np.split(scores.scores, scores.offsets[1:-1])
    return [
        ChoicePrediction(choice, items.of(row)[choice], tuple(map(float, part)))
        for row, (choice, part) in enumerate(zip(chosen(scores).tolist(), parts, strict=True))
    ]


def rows_of(task: TaskConfig, texts: Sequence[Any]) -> Rows:
    return given_rows(texts, least=2, alone=True)


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns and a line for each text of each row."""
    best = np.repeat(chosen(scores), np.diff(scores.offsets)).tolist()
    lines = (
        [row_id, str(number), text, str(int(number == choice)), f"{probability:.6f}"]
        for (row_id, number, text), choice, probability in zip(counted(scores), best, scores.scores, strict=True)
    )
    return ["id", "choice", "text", "predicted", "probability"], lines


def summary(task: TaskConfig, scores: Scores) -> Summary:
    """Return the accuracy by number of choices, and the rows whose right text lost by most."""
    labels, items = check_scores(scores), scores.rows.items
    assert items is not None
    best = chosen(scores)
    p_right = scores.scores[scores.offsets[:-1] + labels]
    p_best = scores.scores[scores.offsets[:-1] + best]
    lines = []
    for row in worst(p_best - p_right, best != labels):
        texts = items.of(row)
        lines.append(
            [
                *text_cells(scores, row),
                shown(texts[labels[row]]),
                shown(texts[best[row]]),
                f"{p_right[row]:.3f}",
                f"{p_best[row]:.3f}",
            ]
        )
    return Summary(
        per_label=table_of_sizes(
            "number of choices", np.diff(scores.offsets), {"accuracy": (best == labels).astype(float)}
        ),
        errors=Table([*text_columns(scores), "right", "predicted", "p of right", "p of predicted"], lines),
    )


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    """Return the number of rows by their number of choices."""
    assert dataset.units is not None
    sizes, counts = np.unique(np.diff(dataset.units.offsets), return_counts=True)
    return {f"{size} choices": int(count) for size, count in zip(sizes, counts, strict=True)}


CHOICE = InferenceType(metrics, evaluate, predictions, rows_of, table, summary, statistics)
