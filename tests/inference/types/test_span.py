"""The best answers against a search over all spans, SQuAD's rules, and what users get."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.errors import UserError
from fastmtl.inference.predictions import write_squad
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import check_metrics, with_thresholds
from fastmtl.inference.spans import best_spans
from fastmtl.inference.squad import compare
from fastmtl.inference.types.span import SPAN, SpanPrediction, no_answer_threshold

# (tokens of question and special tokens before, tokens of the context, special tokens after)
SIZES = st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(0, 2))


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_a_search_over_all(sizes: list[tuple[int, int, int]], longest: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = [sum(size) for size in sizes]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    row_of = random.integers(0, 3, len(sizes))
    logits = (random.normal(size=(offsets[-1], 2)) * random.choice([1, 500])).astype(np.float32)
    spans = np.full((offsets[-1], 2), -1, np.int32)
    for begin, (before, context, _) in zip(offsets, sizes, strict=False):
        starts = 10 * random.integers(0, 100) + 3 * np.arange(context)
        spans[begin + before : begin + before + context] = np.stack([starts, starts + 2], axis=1)
    found = best_spans(logits, offsets, spans, row_of, longest)
    assert found.rows.tolist() == sorted(set(row_of.tolist()))
    wide = logits.astype(np.float64)
    for at, row in enumerate(found.rows):
        windows = np.flatnonzero(row_of == row)
        candidates = [
            (wide[start, 0] + wide[end, 1], spans[start, 0], spans[end, 1])
            for window in windows
            for start, end in product(range(*offsets[window : window + 2]), repeat=2)
            if start <= end < start + longest and spans[start, 0] >= 0 and spans[end, 0] >= 0
        ]
        assert found.no_answer[at] == min(wide[offsets[window]].sum() for window in windows)
        if candidates:
            score, *span = max(candidates, key=lambda candidate: candidate[0])
            assert found.score[at] == score and found.spans[at].tolist() == span
            assert found.total[at] == pytest.approx(np.logaddexp.reduce([score for score, *_ in candidates]))
        else:
            assert found.score[at] == found.total[at] == -np.inf and found.spans[at].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("the Denver Broncos.", ["Denver  Broncos"], 1, 1),  # articles, punctuation, case, spaces
        ("an apple", ["a Apple!", "pear"], 1, 1),
        ("half-time", ["half time"], 0, 0),  # punctuation is left out, not replaced by a space
        ("theatre", ["atre"], 0, 0),  # an article is a word
        ("red red car", ["red car"], 0, 0.8),  # words count as often as they occur: 2 of 3, 2 of 2
        ("red car", ["blue car", "the red old car"], 0, 0.8),  # the best of the right answers
        ("", [], 1, 1),
        ("car", [], 0, 0),
        ("", ["car"], 0, 0),
        ("the", ["The"], 1, 1),  # nothing is left of both
        ("car", ["the", "car"], 1, 1),
        ("", ["the", "car"], 0, 0),  # a right answer of which nothing is left does not count beside another
        ("$5.50 — ok", ["550 — OK"], 1, 1),  # only ASCII punctuation
    ],
)
def test_the_rules_of_squad(answer: str, right: list[str], exact: float, f1: float) -> None:
    assert compare(answer, right) == pytest.approx((exact, f1))


def task(*, unanswerable: bool, **more: Any) -> TaskConfig:
    span = {"unanswerable": unanswerable, "max_answer": 2, **more}
    return TaskConfig.model_validate({"type": "span", "span": span, "data": {"train": "t.json", "dev": "d.json"}})


CONTEXT = "Ann met  Bob"
SPANS = [(-1, -1), (0, 3), (3, 7), (7, 12)]  # tokens of bytes begin with their space


def scores_of(best: list[list[tuple[int, int] | None]]) -> Scores:
    """Return the scores of four questions of two windows each; best: first and last token."""
    answers = [[(0, "Ann")], [(9, "Bob"), (4, "met  Bob")], [], []]
    rows = Rows(Path("made"), list("abcd"), ["who"] * 4, [CONTEXT] * 4, None, answers=answers)
    windows = [window for row in best for window in row]
    n = len(windows)
    logits = np.zeros((n, 4, 2), np.float32)
    for number, window in enumerate(windows):
        start, end = window or (0, 0)
        logits[number, start, 0] = logits[number, end, 1] = 20 + number % 2
    units = UnitTable(4 * np.arange(n + 1), np.tile(np.arange(4, dtype=np.int32), n), spans=np.tile(SPANS, (n, 1)))
    dataset = TokenizedDataset(
        tokens=np.zeros(4 * n, np.int32),
        offsets=units.offsets,
        second_text=np.full(n, 1, np.int32),
        sequences_per_example=1,
        labels=np.tile([[1, 1], [3, 3], [0, 0], [0, 0]], 2).reshape(n, 2),
        ids=[row for row in "abcd" for _ in best[0]],
        truncated=0,
        skipped=[],
        path=rows.path,
        units=units,
        rows=rows,
        row_of=np.repeat(np.arange(4), len(best[0])),
    )
    return Scores(dataset, logits.reshape(-1, 2))


BEST: list[list[tuple[int, int] | None]] = [[(1, 1), None], [(2, 3), (3, 3)], [None, None], [(1, 2), None]]


def test_predictions_and_metrics_of_questions_with_several_windows() -> None:
    scores, config = scores_of(BEST), task(unanswerable=True)
    found = SPAN.predictions(config, scores)
    assert [(one.text, one.start, one.end) for one in found] == [
        ("Ann", 0, 3),
        ("Bob", 9, 12),
        ("", None, None),
        ("Ann met", 0, 7),
    ]
    assert all(0.99 < one.probability <= 1 for one in (found[0], found[2])) and found[2].no_answer > 0.99
    assert found[1].probability == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)  # the other window's answer is next
    values = SPAN.evaluate(config, scores)
    assert tuple(values) == SPAN.metrics(config)
    expected = {"exact": 0.75, "f1": 0.75, "has_answer_exact": 1, "has_answer_f1": 1, "no_answer_exact": 0.5}
    assert values == pytest.approx(expected)
    always = SPAN.predictions(task(unanswerable=False), scores)
    assert always[2].text and [one.no_answer for one in always] == [0] * 4
    assert SPAN.metrics(task(unanswerable=False)) == ("exact", "f1")


def test_a_part_of_the_windows_gives_the_questions_that_are_there() -> None:
    scores = scores_of(BEST)
    chosen = np.array([6, 1, 2])  # in any order
    units = scores.dataset.units
    assert units is not None
    part = Scores(scores.dataset.take(chosen), scores.scores[units.positions(chosen)])
    found = SPAN.predictions(task(unanswerable=True), part)
    assert [one.text for one in found] == ["", "met  Bob", "Ann met"]
    values = SPAN.evaluate(task(unanswerable=True), part)
    assert (values["exact"], values["has_answer_exact"], values["no_answer_exact"]) == pytest.approx((1 / 3, 0.5, 0))


@pytest.mark.parametrize("seed", range(4))
def test_a_tuned_threshold_has_the_best_f1_and_is_saved(seed: int) -> None:
    scores, config = scores_of(BEST), task(unanswerable=True, no_answer_threshold="tuned")
    noise = 8 * np.random.default_rng(seed).normal(size=scores.scores.shape)
    scores = Scores(scores.dataset, (scores.scores + noise).astype(np.float32))

    def f1(threshold: float) -> float:
        return SPAN.evaluate(task(unanswerable=True, no_answer_threshold=threshold), scores)["f1"]

    grid = [f1(threshold) for threshold in np.linspace(-80, 80, 81)]
    found = no_answer_threshold(config, scores)
    assert SPAN.evaluate(config, scores)["f1"] == pytest.approx(max(grid)) == pytest.approx(f1(found))
    assert f1(0) < max(grid) or found == 0  # of equally good numbers, that nearest to 0
    saved = with_thresholds(Recipe(tasks={"where": config}), {"where": scores}).tasks["where"]
    assert saved.span.no_answer_threshold == found
    assert SPAN.predictions(saved, scores) == SPAN.predictions(config, scores)


def test_larger_thresholds_answer_more() -> None:
    texts = [
        [one.text for one in SPAN.predictions(task(unanswerable=True, no_answer_threshold=value), scores_of(BEST))]
        for value in (-100, 0, 100)
    ]
    assert texts[0] == [""] * 4 and texts[1].count("") == 1 and "" not in texts[2]


def test_wrong_thresholds_name_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="no_answer_threshold: tuned is for span.unanswerable: true"):
        task(unanswerable=False, no_answer_threshold="tuned")
    recipe = Recipe(tasks={"where": task(unanswerable=True, no_answer_threshold="tuned")})
    check_metrics(recipe)
    recipe.tasks["where"].data.dev = None
    with pytest.raises(UserError, match="tasks.where.span.no_answer_threshold: tuned needs dev rows"):
        check_metrics(recipe)
    scores = scores_of(BEST)
    without = dataclasses.replace(scores.dataset, rows=dataclasses.replace(scores.rows, answers=None))
    with pytest.raises(UserError, match="there are no answers to evaluate against"):
        no_answer_threshold(recipe.tasks["where"], Scores(without, scores.scores))


def test_files_and_reports(tmp_path: Path) -> None:
    scores, config = scores_of(BEST), task(unanswerable=True)
    head, lines = SPAN.table(config, scores)
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [cell["predicted"] for cell in cells] == ["Ann", "Bob", "", "Ann met"]
    assert [cell["id"] for cell in cells] == list("abcd") and (cells[2]["start"], cells[1]["start"]) == ("", "9")
    write_squad(tmp_path / "answers.json", config, scores)
    assert json.loads((tmp_path / "answers.json").read_text()) == {"a": "Ann", "b": "Bob", "c": "", "d": "Ann met"}
    with pytest.raises(UserError, match="format squad has no tasks of type binary"):
        write_squad(tmp_path / "none", TaskConfig.model_validate({"type": "binary", "data": {}}), scores)
    summary = SPAN.summary(config, scores)
    assert summary.per_label is not None and summary.errors is not None
    assert summary.per_label.rows == [
        ["answerable", "2", "1.0000", "1.0000"],
        ["unanswerable", "2", "0.5000", "0.5000"],
    ]
    assert [row[:4] for row in summary.errors.rows] == [["d", "who", "(no answer)", "Ann met"]]
    assert SPAN.statistics(config, scores.dataset) == {"answer": 4, "no answer": 4}


def test_errors_name_what_is_wrong() -> None:
    scores, config = scores_of(BEST), task(unanswerable=True)
    broken = scores.scores.copy()
    broken[5] = np.nan
    with pytest.raises(UserError, match="1 of 4 predictions are not finite"):
        SPAN.evaluate(config, Scores(scores.dataset, broken))
    without = dataclasses.replace(scores.dataset, rows=dataclasses.replace(scores.rows, answers=None))
    with pytest.raises(UserError, match="made: there are no answers to evaluate against"):
        SPAN.evaluate(config, Scores(without, scores.scores))
    for wrong, message in (
        ("text", r"texts\[0\] is not a pair"),
        (("a", " "), r"texts\[0\]: the context is empty"),
        (("\ud800", "b"), r"texts\[0\], character 1"),
    ):
        with pytest.raises(UserError, match=message):
            SPAN.rows_of(config, [wrong])
    assert SPAN.rows_of(config, [("who  is", " a  b")]).pair_texts == [" a  b"]
    assert SpanPrediction("", None, None, 1.0, 1.0).text == ""
