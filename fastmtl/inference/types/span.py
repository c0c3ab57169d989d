"""Evaluation and predictions of type span: the part of a context that answers a question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError, quoted
from fastmtl.inference.scores import Scores
from fastmtl.inference.spans import Spans, best_spans
from fastmtl.inference.squad import compare
from fastmtl.inference.types.single import check_unicode
from fastmtl.inference.types.spec import InferenceType, Summary, Table
from fastmtl.inference.types.texts import shown, worst

METRICS = ("exact", "f1")
NOTHING = "(no answer)"
OF_ANSWERABLE = ("has_answer_exact", "has_answer_f1", "no_answer_exact")


@dataclass(frozen=True)
class SpanPrediction:
    """The prediction for one question.

    text: the answer, "" if there is none. start, end: its first character and its end in the
    context, None if there is no answer. probability: that of the answer, or of no answer if there
    is none, among all candidates. no_answer: the probability that there is no answer; 0 for a task
    without span.unanswerable.
    """

    text: str
    start: int | None
    end: int | None
    probability: float
    no_answer: float


def metrics(task: TaskConfig) -> tuple[str, ...]:
    return (*METRICS, *OF_ANSWERABLE) if task.span.unanswerable else METRICS


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    """Return the metrics of the questions that have windows; 0 for a metric of no question."""
    _, results, answerable = _results(task, scores)
    groups = {"": np.ones(len(results), bool), "has_answer_": answerable, "no_answer_": ~answerable}
    found = {
        f"{group}{name}": float(results[chosen, column].mean()) if chosen.any() else 0.0
        for group, chosen in groups.items()
        for column, name in enumerate(METRICS)
    }
    return {name: found[name] for name in metrics(task)}


def _results(task: TaskConfig, scores: Scores) -> tuple[dict[int, SpanPrediction], np.ndarray, np.ndarray]:
    """Return {row: prediction}, exact match and F1 float [R, 2], and which rows have an answer."""
    answers = scores.rows.answers
    if answers is None:
        raise UserError(f"{scores.dataset.path}: there are no answers to evaluate against")
    if not len(scores.dataset):
        raise UserError("there are no rows to evaluate")
    broken = len(np.unique(_row_of(scores)[~_finite_windows(scores)]))
    if broken:
        raise UserError(
            f"{broken} of {scores.dataset.num_rows} predictions are not finite: the training diverged; lower "
            "optimizer.lr, or raise schedule.warmup, or use engine.precision=bf16 instead of fp16"
        )
    predicted = _predicted(task, scores)
    results = [compare(found.text, [text for _, text in answers[row]]) for row, found in predicted.items()]
    return predicted, np.array(results), np.array([bool(answers[row]) for row in predicted])


def _finite_windows(scores: Scores) -> np.ndarray:
    return np.logical_and.reduceat(np.isfinite(scores.scores).all(axis=1), scores.offsets[:-1])


def _row_of(scores: Scores) -> np.ndarray:
    row_of = scores.dataset.row_of
    assert row_of is not None  # windows have it
    return row_of


def _best(task: TaskConfig, scores: Scores) -> tuple[Spans, np.ndarray, list[str]]:
    """Return the best answers of the rows that have windows, the scores of no answer, and texts.

    Scores are -inf for a task without span.unanswerable. The texts are the answers' characters.
    """
    table = scores.dataset.units
    assert table is not None
    assert table.spans is not None
    found = best_spans(scores.scores, table.offsets, table.spans, _row_of(scores), task.span.max_answer)
    contexts = scores.rows.pair_texts
    assert contexts is not None
    texts = [
        contexts[row][start:end] for row, (start, end) in zip(found.rows.tolist(), found.spans.tolist(), strict=True)
    ]
    return found, found.no_answer if task.span.unanswerable else np.full(len(texts), -np.inf), texts


def no_answer_threshold(task: TaskConfig, scores: Scores) -> float:
    """Return by how much the score of no answer exceeds the best answer's where it is predicted.

    `tuned` gives the number with the largest mean F1 on these rows, of equally good numbers the one
    nearest to 0. Raises UserError for `tuned` without right answers.
    """
    given, answers = task.span.no_answer_threshold, scores.rows.answers
    if given != "tuned":
        return given
    if answers is None:
        raise UserError(f"{scores.dataset.path}: there are no answers to evaluate against")
    found, nothing, texts = _best(task, scores)
    right = [[text for _, text in answers[row]] for row in found.rows.tolist()]
    gains = np.array([compare(text.strip(), r)[1] - compare("", r)[1] for text, r in zip(texts, right, strict=True)])
    return _tuned(nothing - found.score, gains)


def _tuned(excess: np.ndarray, gains: np.ndarray) -> float:
    """Return the threshold up to which answers have the largest sum of gains, nearest to 0.

    excess: float [n], by how much the score of no answer exceeds an answer's. gains: float [n], of
    answering instead of not. A threshold is 0, the middle between two neighbouring numbers, or 1
    beyond all numbers.
    """
    finite = np.isfinite(excess)
    order = np.argsort(excess[finite])
    sorted_excess, sums = excess[finite][order], np.cumsum(np.append(0.0, gains[finite][order]))
    if not len(order):
        return 0.0
    values = np.unique(sorted_excess)
    middle = (values[1:] + values[:-1]) / 2
    candidates = np.concatenate([[values[0] - 1, values[-1] + 1, 0.0], middle])
    total = sums[np.searchsorted(sorted_excess, candidates, side="right")]
    best = candidates[total >= total.max() - 1e-9]  # sums of equal gains differ by their rounding
    return float(best[np.abs(best).argmin()])


def _predicted(task: TaskConfig, scores: Scores) -> dict[int, SpanPrediction]:
    """Return the prediction for each row that has windows, by its position in the file."""
    found, nothing, texts = _best(task, scores)
    threshold = no_answer_threshold(task, scores)
    total, predicted = np.logaddexp(found.total, nothing), {}
    parts = (found.rows, found.spans[:, 0], found.score, nothing, total)
    for text, row, start, score, none, every in zip(texts, *(part.tolist() for part in parts), strict=True):
        p_none = float(np.exp(none - every)) if np.isfinite(none) else 0.0
        start += len(text) - len(text.lstrip())  # byte-level tokens begin with their space
        text = text.strip()
        if not text or none - score > threshold:
            predicted[row] = SpanPrediction("", None, None, p_none, p_none)
        else:
            predicted[row] = SpanPrediction(text, start, start + len(text), float(np.exp(score - every)), p_none)
    return predicted


def predictions(task: TaskConfig, scores: Scores) -> list[SpanPrediction]:
    return list(_predicted(task, scores).values())


def rows_of(task: TaskConfig, texts: Sequence[tuple[str, str]]) -> Rows:
    for position, pair in enumerate(texts):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise UserError(f"texts[{position}] is not a pair of strings (question, context): {quoted(pair)}")
        for part, name in zip(pair, ("question", "context"), strict=True):
            check_unicode(position, part)
            if not part.strip():
                raise UserError(f"texts[{position}]: the {name} is empty")
    return Rows(
        ids=[str(position) for position in range(len(texts))],
        texts=[" ".join(question.split()) for question, _ in texts],
        pair_texts=[context for _, context in texts],
        labels=None,
        path=Path("texts"),
    )


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns id, predicted, start, end, probability and p_no_answer, and their lines.

    predicted, start and end are empty if there is no answer.
    """
    lines = (
        [
            scores.rows.ids[row],
            found.text,
            *("" if place is None else str(place) for place in (found.start, found.end)),
            f"{found.probability:.6f}",
            f"{found.no_answer:.6f}",
        ]
        for row, found in _predicted(task, scores).items()
    )
    return ["id", "predicted", "start", "end", "probability", "p_no_answer"], lines


def summary(task: TaskConfig, scores: Scores) -> Summary:
    """Return exact match and F1 with and without an answer, and the surest wrong predictions."""
    predicted, results, answerable = _results(task, scores)
    groups = {"answerable": answerable, "unanswerable": ~answerable}
    lines = [
        [name, f"{chosen.sum():,}", *(f"{value:.4f}" for value in results[chosen].mean(axis=0))]
        for name, chosen in groups.items()
        if chosen.any()
    ]
    answers = scores.rows.answers
    assert answers is not None
    rows, found = list(predicted), list(predicted.values())
    badness = np.array([one.probability for one in found]) - results[:, 1]
    errors = [
        [
            shown(scores.rows.ids[rows[at]]),
            shown(scores.rows.texts[rows[at]]),
            shown(answers[rows[at]][0][1]) if answers[rows[at]] else NOTHING,
            shown(found[at].text) or NOTHING,
            f"{results[at, 1]:.2f}",
            f"{found[at].probability:.2f}",
        ]
        for at in worst(badness, results[:, 0] == 0)
    ]
    head = ["row", "question", "answer", "predicted", "F1", "probability"]
    return Summary(
        per_label=Table(["questions", "number", "exact", "F1"], lines), errors=Table(head, errors) if errors else None
    )


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    """Return the numbers of windows with and without the answer."""
    assert dataset.labels is not None
    found = int((dataset.labels > 0).any(axis=1).sum())
    return {"answer": found, "no answer": len(dataset) - found}


SPAN = InferenceType(metrics, evaluate, predictions, rows_of, table, summary, statistics)
