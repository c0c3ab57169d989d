"""A trained model, for Python users and for the commands `evaluate` and `predict`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastmtl.config import FROM_PYTHON, DataConfig, Recipe, TaskConfig
from fastmtl.data.corpus import demo_directory
from fastmtl.data.find_places import find_places, missing
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.readers import read_places, read_rows
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset, check_token_types, tokenize
from fastmtl.errors import UserError, unknown_name
from fastmtl.files.user_path import user_path
from fastmtl.inference.all_tasks import score_together
from fastmtl.inference.evaluation import score
from fastmtl.inference.predictions import write_cs224n, write_squad, write_table
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import evaluate_scores, mean_score, tuned_setting
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.inference.types.multilabel import LabelsPrediction
from fastmtl.inference.types.single import Prediction
from fastmtl.model.saved_model import load_model, model_directory

__all__ = [
    "Evaluation",
    "LabelsPrediction",
    "Prediction",
    "Predictor",
    "evaluate_file",
    "evaluate_split",
    "load",
    "predict_all_tasks",
    "predict_file",
]


Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    metrics: {task: {metric: value}}. mean: the mean of the tasks' own metrics. rows: {task: number
    of rows}. notes: lines for the user.
    """

    metrics: dict[str, dict[str, float]]
    mean: float
    rows: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"tasks": self.metrics, "mean": self.mean, "rows": self.rows, "notes": self.notes}


class Predictor:
    """A model with its recipe and tokenizer, on one device, in evaluation mode."""

    def __init__(self, model: Any, recipe: Recipe, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.recipe = recipe
        self.device = device
        self.tokenizer = tokenizer

    def predict(self, task: str, texts: Sequence[Any]) -> list[Any]:
        """Return a prediction per text, in order.

        texts: strings, or pairs (text, other text) for tasks of two sentences; docs/tasks.md gives
        those of the other task types, and the classes of the predictions. Raises UserError for an
        unknown task, and for texts of another type.
        """
        config = self.task(task)
        kind = INFERENCE_TYPES[config.type]
        if not texts:
            return []
        return kind.predictions(config, self.scores(task, kind.rows_of(config, texts)))

    def evaluate(self, task: str, rows: Rows) -> dict[str, float]:
        """Return the task's metrics on labelled rows (from `fastmtl.data.readers.read_file`).

        Raises UserError for an unknown task and for rows without labels.
        """
        return evaluate_scores(self.task(task), self.scores(task, rows))

    def scores(self, task: str, rows: Rows) -> Scores:
        """Return the model's scores for the rows."""
        return score(self._forward, self.recipe, {task: self.tokenized(task, rows)})[task]

    def tokenized(self, task: str, rows: Rows) -> TokenizedDataset:
        """Return the tokens of the rows, encoded for the task."""
        config = self.task(task)
        with tempfile.TemporaryDirectory(prefix="fastmtl-") as cache:  # removed while the arrays are still mapped
            dataset = tokenize(rows, self.tokenizer, config, self.model.encoder.max_length, cache, keep_rows=True)
        check_token_types([dataset], self.model.encoder.settings.type_vocab_size)
        return dataset

    def task(self, name: str) -> TaskConfig:
        if name not in self.recipe.tasks:
            raise unknown_name("task", name, self.recipe.task_names)
        config = self.recipe.tasks[name]
        tuned = tuned_setting(config)
        if tuned is not None:
            raise UserError(f"task {name} has no {tuned} yet: it is chosen when its training is evaluated")
        return config

    def _forward(self, batch: PackedBatch) -> dict[str, Tensor]:
        return self.model.predict(batch.to(self.device))


def load(model_dir: str | Path, device: str | None = None) -> Predictor:
    """Load a trained model.

    model_dir: a `model/` directory, or the run's directory around it. device: a torch device;
    default: the first GPU if there is one, else the CPU. Raises UserError for a directory without a
    model, and for a device that torch does not find.
    """
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, recipe, tokenizer = load_model(model_directory(model_dir))
    return Predictor(model, recipe, tokenizer, chosen)


def _device(name: str) -> torch.device:
    """Return a device that has taken a tensor."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each case
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"device {name}: not usable here, choose {' or '.join(found)} ({reason})") from None
    return device


def evaluate_file(predictor: Predictor, task: str, file: Path) -> Evaluation:
    """Return the metrics of one task on the labelled rows of one file.

    The file has the format of the task's training files.
    """
    rows = _read(predictor, predictor.task(task), file, require_labels=True)
    return _evaluate(predictor, {task: rows}, [])


def evaluate_split(predictor: Predictor, split: Split, data_dir: Path | None, tasks: list[str] | None) -> Evaluation:
    """Return the metrics of several tasks on the files that the recipe names for a split.

    The arguments and errors are those of `split_rows`. A task without a file for this split is
    named in `notes` of the result.
    """
    return _evaluate(predictor, *split_rows(predictor, split, data_dir, tasks))


def split_rows(
    predictor: Predictor, split: Split, data_dir: Path | None, tasks: list[str] | None
) -> tuple[dict[str, Rows], list[str]]:
    """Return {task: labelled rows} of the files that the recipe names for a split, and notes.

    data_dir: the folder of the files; default: the recipe's. tasks: names of tasks; default: all. A
    task without a file for this split is named in the notes. Raises UserError if no task has one.
    """
    recipe = predictor.recipe
    data = recipe.data.model_copy(update={"dir": str(data_dir or recipe.data.dir or demo_directory())})
    rows, notes = {}, []
    for name in tasks or recipe.task_names:
        config = predictor.task(name)
        files = config.data.names("train" if split == "dev" and data.dev_share(config.data) else split)
        if files == [FROM_PYTHON]:
            notes.append(f"{name}: its {split} rows were objects of a Python program; name a file with --file")
        elif not files:
            notes.append(f"{name}: the recipe names no {split} file")
        else:
            for file in files:
                _check_there(data, file, given=data_dir is not None)
            rows[name] = read_rows(config, data, split)
    if not rows:
        raise UserError(f"the recipe names no {split} file for {', '.join(tasks or recipe.task_names)}")
    return rows, notes


def _check_there(data: DataConfig, file: str, *, given: bool) -> None:
    """Raise UserError with advice if a file of the recipe is missing.

    given: the user has given the folder, so the advice does not explain the recipe's.
    """
    folder = user_path(data.dir or ".")
    if not missing(file, folder):
        return
    path = folder / file
    why = "" if given or path.is_absolute() else f" below {Path.cwd()}; the recipe's data.dir counts from there"
    raise UserError(f"{path}: no such file{why}. Say where the recipe's files are with --data DIR.")


def predict_file(
    predictor: Predictor, task: str, source: Path, target: Path, layout: Literal["table", "cs224n", "squad"]
) -> tuple[int, list[str]]:
    """Predict the rows of a file, with or without labels, and write the predictions to `target`.

    layout: that of `write_table`, `write_cs224n` or `write_squad`. Returns the number of rows, and
    lines for the user about skipped rows.
    """
    config = predictor.task(task)
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no directory {target.parent}")
    rows = _read(predictor, config, source, require_labels=False)
    scores = predictor.scores(task, rows)
    {"table": write_table, "cs224n": write_cs224n, "squad": write_squad}[layout](target, config, scores)
    return len(rows), _skipped(task, rows)


def predict_all_tasks(predictor: Predictor, source: Path, target: Path) -> tuple[int, list[str]]:
    """Predict the rows of a file for all tasks; write TASK.csv for each to the folder `target`.

    Every task reads the file by its own columns, without labels. Tasks that read the same texts
    share their batches (`score_together`). Returns the number of rows of the first task, and lines
    for the user.
    """
    recipe, rows = predictor.recipe, {}
    for name in recipe.task_names:
        try:
            rows[name] = _read(predictor, predictor.task(name), source, require_labels=False)
        except UserError as error:
            raise UserError(f"task {name} cannot read it: {error}") from None
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}") from None
    for name, scores in score_together(predictor, rows).items():
        write_table(target / f"{name}.csv", recipe.tasks[name], scores)
    return len(rows[recipe.task_names[0]]), [note for name, found in rows.items() for note in _skipped(name, found)]


def _read(predictor: Predictor, task: TaskConfig, source: Path, *, require_labels: bool) -> Rows:
    """Return the rows of a file, of the files of a pattern, or of a folder of Hugging Face's."""
    places = find_places([str(source)], ".")
    return read_places(places, task, on_bad_row=predictor.recipe.data.on_bad_row, require_labels=require_labels)


def _evaluate(predictor: Predictor, rows: dict[str, Rows], notes: list[str]) -> Evaluation:
    metrics = {name: predictor.evaluate(name, task_rows) for name, task_rows in rows.items()}
    for name, task_rows in rows.items():
        notes = [*notes, *(f"{name}: {note}" for note in task_rows.notes), *_skipped(name, task_rows)]
    counts = {name: len(task_rows) for name, task_rows in rows.items()}
    return Evaluation(metrics, mean_score(metrics, predictor.recipe), counts, notes)


def _skipped(task: str, rows: Rows) -> list[str]:
    return [f"{task}: {len(rows.skipped)} bad rows were skipped, the first: {rows.skipped[0]}"] if rows.skipped else []
