"""Files of predictions: a table with probabilities, and the hand-in format of CS224N."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.files.writing import replacing
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
    header, lines = INFERENCE_TYPES[task.type].table(task, scores)
    with _writing(path) as file:  # line by line: the text of a large file does not fit into memory
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def write_cs224n(path: Path, task: TaskConfig, scores: Scores) -> None:
    """Write a file in the hand-in format of CS224N's default project (minBERT).

    It has a header `id \\t Predicted_...` and lines `id , value`. Raises UserError if the file
    cannot be written, and for a task of another type.
    """
    if task.type not in CS224N_COLUMN:
        raise UserError(f"the format cs224n has no tasks of type {task.type}: use the format table")
    ids = scores.dataset.ids
    lines = (f"{row_id} , {value} \n" for row_id, value in zip(ids, texts(task, scores.scores), strict=True))
    with _writing(path) as file:
        file.write(f"id \t {CS224N_COLUMN[task.type]} \n")
        file.writelines(lines)


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
    with _writing(path) as file:
        json.dump(answers, file, ensure_ascii=False, indent=0)
        file.write("\n")


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
