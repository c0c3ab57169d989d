"""Model directories with random weights, the commands on them, and their predictions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl import cli
from fastmtl.config import Recipe
from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import save_model

SENTENCES = ["the film was good", "a dull and boring story , not good at all", "he ran", "she reads a lovely book"]
PAIRS = [("a dog ran", "the dog runs"), ("she eats soup", "a car drove to the city"), ("he sat", "he sat on the cat")]
SINGLE = {"id": "id", "text": "a", "label": "y"}
TASKS: dict[str, dict[str, Any]] = {
    "tone": {
        "type": "classification",
        "num_labels": 3,
        "pooling": "mean",
        "data": {"dev": "tone.csv", "columns": SINGLE},
    },
    "same": {
        "type": "binary",
        "head": {"name": "mlp", "hidden": [8]},
        "data": {"columns": {**SINGLE, "text_pair": "b"}},
    },
    "near": {"type": "regression", "range": [0, 5], "pairs": "bi", "data": {"columns": {**SINGLE, "text_pair": "b"}}},
}
# Tasks of the other types, and what `predict` takes for each.
MORE_TASKS: dict[str, dict[str, Any]] = {
    "words": {"type": "tokens", "label_names": ["O", "B-X", "I-X"], "tokens": {"scheme": "bio"}, "data": {}},
    "answer": {"type": "span", "span": {"stride": 2, "max_question": 8}, "data": {}},
    "topics": {"type": "multilabel", "label_names": ["a", "b"], "multilabel": {"thresholds": [0.1, 0.9]}, "data": {}},
    "which": {"type": "choice", "data": {}},
    "order": {"type": "ranking", "pairs": "bi", "data": {}},
}
MORE_ROWS: dict[str, list[Any]] = {
    "words": [sentence.split() for sentence in SENTENCES],
    "answer": [(one, " ".join(SENTENCES)) for one, _ in PAIRS],
    "topics": SENTENCES,
    "which": [(one, SENTENCES[: 2 + row]) for row, (one, _) in enumerate(PAIRS)],
    "order": [(one, SENTENCES[: 4 - row]) for row, (one, _) in enumerate(PAIRS)],
}


def save_random_model(
    directory: Path, bert: Path, tasks: list[str] | dict[str, dict], *, seed: int = 0, **sections: dict
) -> Path:
    """Save a model with random weights; return its directory.

    tasks: names of TASKS, or {name: task}. sections: other sections of its recipe.
    """
    values = {
        "tasks": tasks if isinstance(tasks, dict) else {task: TASKS[task] for task in tasks},
        "adapter": {"name": "low_rank", "size": 4},
        "data": {"dir": str(directory)},
        **sections,
        "encoder": {"path": str(bert), "freeze": True, **sections.get("encoder", {})},
    }
    recipe = Recipe.model_validate(values)
    torch.manual_seed(seed)
    model = MultiTaskModel(recipe, load_encoder(recipe.encoder))
    own = [p for part in model.task_parameters().values() for p in part]
    for parameter in [*own, *(() if model.lora is None else model.lora.parameters())]:
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(directory, model, recipe, load_tokenizer(recipe.encoder))
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastmtl", *map(str, arguments)])
    monkeypatch.setattr(cli, "_debug", False)
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def scores(directory: Path, task: str) -> np.ndarray:
    predictor = fastmtl.load(directory, device="cpu")
    answers = predictor.predict(task, PAIRS if "text_pair" in predictor.task(task).data.columns else SENTENCES)
    return np.array([a.label if a.probabilities is None else a.probabilities for a in answers])


def assert_same_predictions(joined: Path, source: Path, task: str, name: str | None = None) -> None:
    ours, theirs = scores(joined, name or task), scores(source, task)
    assert ours.tobytes() == theirs.tobytes()
    assert np.ptp(ours, axis=0).max() > 1e-5  # the vectors depend on the texts
