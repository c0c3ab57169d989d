"""The description of a task type for evaluation, predictions and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmtl.config import TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.inference.scores import Scores


@dataclass(frozen=True)
class Table:
    """A table of the report. rows: a text per column each."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Summary:
    """The part of the report about a task's dev rows.

    names, confusion: names of the classes, and the counts [C, C] of true (rows) and predicted
    (columns) classes. scatter: {"labels": [...], "scores": [...]} of at most a few hundred rows.
    per_label: metrics of each label, or by another value; the first column's head names it. errors:
    rows with the largest errors, the worst first.
    """

    names: list[str] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    scatter: dict[str, list[float]] | None = None
    per_label: Table | None = None
    errors: Table | None = None


@dataclass(frozen=True)
class InferenceType:
    """A task type.

    metrics: names of all metrics, in the order of a table's columns. evaluate: returns {metric:
    value}; it raises UserError without labels. predictions: what `Predictor.predict` returns, one
    per row. rows_of: the Rows of what users give to `Predictor.predict`; it raises UserError for
    anything else. table: header and lines of a prediction file. summary: for the report.
    statistics: numbers about the labels of a data set, by name.
    """

    metrics: Callable[[TaskConfig], tuple[str, ...]]
    evaluate: Callable[[TaskConfig, Scores], dict[str, float]]
    predictions: Callable[[TaskConfig, Scores], list[Any]]
    rows_of: Callable[[TaskConfig, Sequence[Any]], Rows]
    table: Callable[[TaskConfig, Scores], tuple[list[str], Iterable[list[str]]]]
    summary: Callable[[TaskConfig, Scores], Summary]
    statistics: Callable[[TaskConfig, TokenizedDataset], dict[str, float]]
