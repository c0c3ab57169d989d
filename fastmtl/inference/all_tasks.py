"""Scores of the same rows for several tasks: rows that are encoded alike run together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data.packing import pack_tasks
from fastmtl.data.rows import Rows
from fastmtl.data.stream import evaluation_batches
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.data.types import encoding_key
from fastmtl.inference.evaluation import in_order
from fastmtl.inference.scores import Scores


class Loaded(Protocol):
    """The parts of a Predictor that this module uses."""

    model: Any
    recipe: Recipe
    device: torch.device

    def task(self, name: str) -> TaskConfig: ...

    def tokenized(self, task: str, rows: Rows) -> TokenizedDataset: ...


def score_together(predictor: Loaded, rows: Mapping[str, Rows]) -> dict[str, Scores]:
    """Return {task: scores of its rows}.

    Tasks whose rows have the same texts, encoded alike, share their batches. Without adapters
    inside of the layers the encoder then runs once for all of them; with adapters the rows are in
    a batch once per task.
    """
    groups: list[tuple[list[str], TokenizedDataset]] = []
    for name, of_task in rows.items():
        config = predictor.task(name)
        for names, _ in groups:
            if encoding_key(predictor.task(names[0])) == encoding_key(config) and _same(rows[names[0]], of_task):
                names.append(name)
                break
        else:
            groups.append(([name], predictor.tokenized(name, of_task)))
    result: dict[str, Scores] = {}
    for names, dataset in groups:
        for name, outputs in outputs_together(predictor, names, dataset, predictor.recipe.train.eval_tokens).items():
            result[name] = Scores(dataset, outputs)
    return {name: result[name] for name in rows}


def outputs_together(
    predictor: Loaded, names: Sequence[str], dataset: TokenizedDataset, tokens: int
) -> dict[str, np.ndarray]:
    """Return {task: the model's outputs for a data set, in its order, float32}.

    names: tasks that encode the data set alike. tokens: the most tokens of a batch, which a longer
    example may exceed.
    """
    numbers: list[np.ndarray] = []
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for chosen, found in _batches(predictor, names, dataset, tokens):
        numbers.append(chosen)
        for name in names:
            outputs[name].append(found[name].float().cpu().numpy())
    return {name: in_order(dataset, numbers, outputs[name]) for name in names}


def _batches(
    predictor: Loaded, names: Sequence[str], dataset: TokenizedDataset, tokens: int
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield the numbers of the rows of each batch, and {task: the model's output for them}."""
    recipe, model = predictor.recipe, predictor.model
    index, tasks = recipe.task_names.index(names[0]), len(recipe.tasks)
    copies = 1 if model.runs_encoder_once else len(names)
    for batch in evaluation_batches(dataset, index, tasks, max(1, tokens // copies)):
        chosen = batch.example_ids[index].numpy()
        if model.runs_encoder_once:
            yield chosen, model.predict_for_tasks(batch.to(predictor.device), names)
            continue
        copied = pack_tasks(recipe.task_names, {name: (dataset, chosen) for name in names})
        yield chosen, model.predict(copied.to(predictor.device))


def _same(one: Rows, other: Rows) -> bool:
    """Return whether two tasks have read the same texts."""
    if len(one) != len(other) or (one.pair_texts is None) != (other.pair_texts is None):
        return False
    pairs = one.pair_texts is None or other.pair_texts is None or list(one.pair_texts) == list(other.pair_texts)
    items = [
        None if rows.items is None else (list(rows.items.texts), rows.items.offsets.tolist()) for rows in (one, other)
    ]
    return pairs and list(one.texts) == list(other.texts) and items[0] == items[1]
