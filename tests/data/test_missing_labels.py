"""Rows without a label: bad rows, or left out; several tasks that read one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data.corpus import Corpus
from fastmtl.data.readers import read_file
from fastmtl.errors import UserError

SET = {"type": "multilabel", "label_names": ["red", "blue"]}
ANSWER = {"text": ["film"], "answer_start": [2]}
# The task with its columns, its label column, and three rows: the label of the second is missing.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[dict[str, Any]]]] = {
    "classification": (
        {"type": "classification", "num_labels": 2},
        {"text": "t", "label": "y"},
        "y",
        [{"t": "a", "y": 0}, {"t": "b", "y": None}, {"t": "c", "y": 1}],
    ),
    "binary, key missing": (
        {"type": "binary"},
        {"text": "t", "label": "y"},
        "y",
        [{"t": "a", "y": 0}, {"t": "b"}, {"t": "c", "y": 1}],
    ),
    "regression, NaN": (
        {"type": "regression", "range": [0, 5]},
        {"text": "t", "label": "y"},
        "y",
        [{"t": "a", "y": 0.5}, {"t": "b", "y": float("nan")}, {"t": "c", "y": 1}],
    ),
    "multilabel": (
        SET,
        {"text": "t", "label": "y"},
        "y",
        [{"t": "a", "y": ""}, {"t": "b", "y": None}, {"t": "c", "y": ["red"]}],
    ),
    "multilabel, indicators": (
        SET,
        {"text": "t", "label": ["r", "b"]},
        "r",
        [{"t": "a", "r": 0, "b": 1}, {"t": "b", "r": None, "b": ""}, {"t": "c", "r": 0, "b": 0}],
    ),
    "tokens": (
        {"type": "tokens", "label_names": ["O", "A"]},
        {"words": "w", "label": "y"},
        "y",
        [{"w": ["a"], "y": ["O"]}, {"w": ["b"], "y": None}, {"w": ["c"], "y": ["A"]}],
    ),
    "span": (
        {"type": "span"},
        {"text": "q", "text_pair": "t", "answers": "y"},
        "y",
        [{"q": q, "t": "a film", "y": y} for q, y in (("a", ANSWER), ("b", None), ("c", ANSWER))],
    ),
    "choice": (
        {"type": "choice"},
        {"text": "t", "choices": "c", "label": "y"},
        "y",
        [{"t": t, "c": ["x", "z"], "y": y} for t, y in (("a", 0), ("b", None), ("c", 1))],
    ),
    "ranking, lists": (
        {"type": "ranking"},
        {"text": "t", "choices": "c", "label": "y"},
        "y",
        [{"t": t, "c": ["x", "z"], "y": y} for t, y in (("a", [0, 1]), ("b", None), ("c", [1, 0]))],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_without_a_label(case: str, tmp_path: Path) -> None:
    kind, columns, column, rows = CASES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def task(**files: Any) -> TaskConfig:
        return TaskConfig.model_validate({**kind, "data": {"columns": columns, **files}})

    with pytest.raises(UserError, match=f"rows.jsonl, line 2, column {column}: .*missing_labels: leave_out"):
        read_file(path, task())
    assert len(read_file(path, task(), on_bad_row="skip").skipped) == 1
    found = read_file(path, task(missing_labels="leave_out"))
    assert list(found.texts) == ["a", "c"] and not found.skipped
    assert list(found.ids) == ["0", "2"]
    assert found.notes == ["rows.jsonl: 1 row has no label, left out (missing_labels: leave_out)"]
    assert found.answers is not None or found.labels is not None
    path.write_text(json.dumps({**rows[1], column: None}), encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl: no rows \(1 without a label were left out\)"):
        read_file(path, task(missing_labels="leave_out"))
    assert len(read_file(path, task(missing_labels="leave_out"), require_labels=False)) == 1


def test_a_candidate_without_a_grade(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("g,q,c,y\n1,a,x,1\n1,a,z,\n1,a,u,0\n2,b,x,1\n2,b,u,0\n", encoding="utf-8")
    columns = {"group": "g", "text": "q", "text_pair": "c", "label": "y"}
    files = {"columns": columns, "missing_labels": "leave_out"}
    found = read_file(path, TaskConfig.model_validate({"type": "ranking", "data": files}))
    assert found.items is not None and found.items.of(0) == ["x", "u"] and len(found) == 2


def test_another_mistake_is_an_error_even_without_a_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("t,y\na,1\n,\nb,0\n", encoding="utf-8")
    files = {"columns": {"text": "t", "label": "y"}, "missing_labels": "leave_out"}
    with pytest.raises(UserError, match="line 3, column t: expected a text, found none. Fix the row"):
        read_file(path, TaskConfig.model_validate({"type": "binary", "data": files}))


def test_tasks_that_read_one_file_share_its_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    from fastmtl.model.encoder.pretrained import load_tokenizer

    rows: list[dict[str, Any]] = [
        {"t": "the film was good", "kind": 2, "score": 1.5, "hues": ["red"], "good": True},
        {"t": "a dull story", "kind": 0, "score": None, "hues": None, "good": False},
        {"t": "he ran", "kind": None, "score": 3.0, "hues": [], "good": True},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def task(column: str, kind: dict[str, Any]) -> dict[str, Any]:
        files = {"train": "rows.jsonl", "columns": {"text": "t", "label": column}, "missing_labels": "leave_out"}
        return {**kind, "data": files}

    tasks = {
        "kind": task("kind", {"type": "classification", "num_labels": 3}),
        "score": task("score", {"type": "regression", "range": [0, 5]}),
        "hues": task("hues", SET),
        "good": task("good", {"type": "binary"}),
        "again": task("good", {"type": "classification", "num_labels": 2}),
    }
    recipe = Recipe.model_validate(
        {
            "encoder": {"path": str(tiny_bert)},
            "data": {"dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")},
            "tasks": tasks,
        }
    )
    train = Corpus.load(recipe, load_tokenizer(recipe.encoder), 64).train
    assert [list(data.ids) for data in train] == [["0", "1"], ["0", "2"], ["0", "2"], ["0", "1", "2"], ["0", "1", "2"]]
    assert [data.notes for data in train][-1] == []
    # One entry for rows 0 and 1, one for rows 0 and 2, and one for all three.
    entries = [entry for entry in (tmp_path / "cache").iterdir() if entry.name.startswith("tokens-")]
    assert len(entries) == 3
    first = train[0].tokens[: train[0].offsets[1]]
    for data in train[1:]:
        np.testing.assert_array_equal(data.tokens[: data.offsets[1]], first)
    assert train[2].labels is not None and train[2].labels.tolist() == [[1, 0], [0, 0]]
