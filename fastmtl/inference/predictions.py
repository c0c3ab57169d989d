"""Files of predictions: a table with probabilities, and the hand-in format of CS224N."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.files.writing import replace_text
from fastmtl.inference.scores import Scores
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.inference.types.single import texts

# The columns' names in the project's own files, with its spelling.
CS224N_COLUMN = {
    "classification": "Predicted_Sentiment",
    "binary": "Predicted_Is_Paraphrase",
    "regression": "Predicted_Similiary",
}


def write_table(path: Path, task: TaskConfig, scores: Scores) -> None:
    """Write a CSV file with a header: the id of each row, the prediction and the probabilities.

    docs/tasks.md gives the columns of each task type. Raises UserError if the file cannot be
    written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header, lines = INFERENCE_TYPES[task.type].table(task, scores)
    writer.writerow(header)
    writer.writerows(lines)
    _write(path, text.getvalue())


def write_cs224n(path: Path, task: TaskConfig, scores: Scores) -> None:
    """Write a file in the hand-in format of CS224N's default project (minBERT).

    It has a header `id \\t Predicted_...` and lines `id , value`. Raises UserError if the file
    cannot be written, and for a task of another type.
    """
    if task.type not in CS224N_COLUMN:
        raise UserError(f"the format cs224n has no tasks of type {task.type}: use the format table")
    ids = scores.dataset.ids
    lines = [f"id \t {CS224N_COLUMN[task.type]} \n"]
    lines.extend(f"{row_id} , {value} \n" for row_id, value in zip(ids, texts(task, scores.scores), strict=True))
    _write(path, "".join(lines))


def write_squad(path: Path, task: TaskConfig, scores: Scores) -> None:
    """Write the JSON object {id: answer} that SQuAD's evaluation program reads; "" is no answer.

    Raises UserError if the file cannot be written, for a task of another type, and for an id of
    several questions.
    """
    if task.type != "span":
        raise UserError(f"the format squad has no tasks of type {task.type}: use the format table")
    answers = {row_id: answer for row_id, answer, *_ in INFERENCE_TYPES[task.type].table(task, scores)[1]}
    if len(answers) < len(scores.rows):
        raise UserError(f"{scores.rows.path}: several questions have the same id: use the format table")
    _write(path, json.dumps(answers, ensure_ascii=False, indent=0) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
