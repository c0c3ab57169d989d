"""Evaluation, predictions, prediction files and summaries of the types choice and ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scored import scored

from fastmtl.config import TaskConfig
from fastmtl.data.candidates import items_of
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import UnitTable
from fastmtl.errors import UserError
from fastmtl.inference.predict import Predictor
from fastmtl.inference.scores import Scores
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.inference.types.choice import ChoicePrediction
from fastmtl.inference.types.ranking import RankingPrediction

CHOICE = TaskConfig.model_validate({"type": "choice", "data": {}})
RANKING = TaskConfig.model_validate({"type": "ranking", "data": {}, "ranking": {"k": 2}})


def scores_of(task: TaskConfig, groups: list[list[float]], labels: list[Any] | None) -> Scores:
    """Return the scores of rows whose candidates are named a, b, ..."""
    texts = [[chr(ord("a") + number) for number in range(len(group))] for group in groups]
    items = items_of(texts, labelled=task.type == "ranking")
    found = scored(np.zeros(len(groups)), None if labels is None else np.array(labels))
    object.__setattr__(found.rows, "items", items)
    object.__setattr__(found.dataset, "units", UnitTable(items.offsets, None, labelled=items.labelled))
    return Scores(found.dataset, np.array([score for group in groups for score in group], dtype=np.float32))


def test_choice() -> None:
    kind = INFERENCE_TYPES["choice"]
    scores = scores_of(CHOICE, [[0.5, 0.5], [0.2, 0.1, 0.7], [0.1, 0.9], [0.6, 0.4]], [0, 0, 0, 1])
    assert kind.evaluate(CHOICE, scores) == {"accuracy": 0.25}
    first, second = kind.predictions(CHOICE, scores)[:2]
    assert first == ChoicePrediction(0, "a", (0.5, 0.5))
    assert (second.choice, second.text) == (2, "c") and second.probabilities == pytest.approx((0.2, 0.1, 0.7))
    header, lines = kind.table(CHOICE, scores)
    assert header == ["id", "choice", "text", "predicted", "probability"]
    assert list(lines)[1:4] == [
        ["0", "1", "b", "0", "0.500000"],
        ["1", "0", "a", "0", "0.200000"],
        ["1", "1", "b", "0", "0.100000"],
    ]
    summary = kind.summary(CHOICE, scores)
    assert summary.per_label is not None and summary.errors is not None
    assert summary.per_label.rows == [["2", "3", "0.3333"], ["3", "1", "0.0000"]]
    assert summary.errors.head == ["row", "text", "right", "predicted", "p of right", "p of predicted"]
    assert summary.errors.rows == [
        ["2", "text 2", "a", "b", "0.100", "0.900"],
        ["1", "text 1", "a", "c", "0.200", "0.700"],
        ["3", "text 3", "b", "a", "0.400", "0.600"],
    ]
    assert kind.statistics(CHOICE, scores.dataset) == {"2 choices": 3, "3 choices": 1}


def test_ranking() -> None:
    kind = INFERENCE_TYPES["ranking"]
    groups = [[0.1, 0.3, 0.2], [1.0, 2.0], [5.0], [0.0, -1.0]]
    scores = scores_of(RANKING, groups, [2, 0, 1, 0, 1, 3, 0, 0])
    dcg = (1 / np.log2(3)) / (2 + 1 / np.log2(3))  # of the first group at 2
    expected = {"ndcg": (dcg + 2) / 3, "mrr": 2.5 / 3, "recall": 2.5 / 3, "map": (7 / 12 + 2) / 3}
    assert kind.evaluate(RANKING, scores) == pytest.approx(expected)  # the last group has no good candidate
    first = kind.predictions(RANKING, scores)[0]
    assert first == RankingPrediction((1, 2, 0), first.scores) and first.scores == pytest.approx((0.1, 0.3, 0.2))
    header, lines = kind.table(RANKING, scores)
    assert header == ["id", "candidate", "text", "rank", "score"]
    assert list(lines)[:2] == [["0", "0", "a", "3", "0.100000"], ["0", "1", "b", "1", "0.300000"]]
    summary = kind.summary(RANKING, scores)
    assert summary.per_label is not None and summary.errors is not None
    assert [row[:2] for row in summary.per_label.rows] == [["1", "1"], ["2", "1"], ["3", "1"]]
    assert summary.errors.rows == [["0", "text 0", "a", "b", "2", "3", "0", f"{dcg:.3f}"]]
    assert kind.statistics(RANKING, scores.dataset) == {"grade 0": 4, "above 0": 4}
    with pytest.raises(UserError, match="no group has a candidate with a grade above 0"):
        kind.evaluate(RANKING, scores_of(RANKING, groups, [0] * 8))


@pytest.mark.parametrize("task", [CHOICE, RANKING], ids=lambda task: task.type)
def test_scores_that_cannot_be_evaluated(task: TaskConfig) -> None:
    kind = INFERENCE_TYPES[task.type]
    with pytest.raises(UserError, match="no labels to evaluate against"):
        kind.evaluate(task, scores_of(task, [[0.0, 1.0]], None))
    with pytest.raises(UserError, match="1 of 2 predictions are not finite"):
        kind.evaluate(task, scores_of(task, [[0.0, np.nan]], [0, 1]))


@pytest.mark.parametrize(
    ("task", "rows", "text"),
    [
        (CHOICE, "who", r"not one string: write \[\(text, \[candidates\]\)\]"),
        (
            CHOICE,
            [("who", ["a", "b"]), ["a", "b"]],
            r"texts\[1\] is not a pair \(text, \[candidates\]\) like the first",
        ),
        (CHOICE, [["a", "b"], ("who", ["a", "b"])], r"texts\[1\] is not a list of texts like the first"),
        (CHOICE, [["a"]], r"texts\[0\] has 1 candidates, and the least number is 2"),
        (CHOICE, [["a", "\ud800"]], r"texts\[0\], character 1: .* half of a surrogate pair"),
        (RANKING, [["a", "b"]], r"texts\[0\] is not a pair \(text, \[candidates\]\): \['a', 'b'\]"),
        (RANKING, [("a", [])], r"texts\[0\] has 0 candidates, and the least number is 1"),
    ],
)
def test_rows_from_python_that_do_not_fit(task: TaskConfig, rows: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        INFERENCE_TYPES[task.type].rows_of(task, rows)


def test_predict_from_python(tiny_bert: Path) -> None:
    """A candidate's score depends on its own texts only, wherever it stands in the batch."""
    from packed_batches import build_model
    from transformers import AutoTokenizer

    tasks = {
        "which": {"type": "choice", "data": {}},
        "cross": {"type": "ranking", "data": {}},
        "bi": {"type": "ranking", "pairs": "bi", "head": {"name": "cosine"}, "pooling": "mean", "data": {}},
    }
    model = build_model(tiny_bert, tasks=tasks).double()
    predictor = Predictor(model, model.recipe, AutoTokenizer.from_pretrained(tiny_bert), torch.device("cpu"))
    rows = [("a film", ["good", "a bad film", "so"]), ("it is", ["so", "a bad film"]), ("a film", ["so", "good"])]
    for name in ("cross", "bi"):
        first, _, last = predictor.predict(name, rows)
        assert last.scores == pytest.approx([first.scores[2], first.scores[0]], abs=1e-6)
        assert first.scores[0] != pytest.approx(first.scores[2], abs=1e-5)
        assert first.order == tuple(sorted(range(3), key=lambda number: -first.scores[number]))
    found = predictor.predict("which", rows)
    assert [len(one.probabilities) for one in found] == [3, 2, 2]
    assert all(sum(one.probabilities) == pytest.approx(1) for one in found)
    assert found[0].text == rows[0][1][found[0].choice]
    alone, _ = predictor.predict("which", [["good", "so"], ["so", "it"]])
    assert alone.probabilities != pytest.approx(found[0].probabilities[:2], abs=1e-6)
    rows_of_file = Rows(
        Path("f"), ["0"], ["a film"], None, np.zeros(1, np.int64), items=items_of([["so", "it"]], labelled=False)
    )
    assert predictor.evaluate("which", rows_of_file)["accuracy"] in (0.0, 1.0)
