"""Comparisons of an exported graph with the model: on sample texts, and by scores of dev rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.rows import Rows
from fastmtl.data.stream import evaluation_batches
from fastmtl.inference.evaluation import score
from fastmtl.inference.exported.feeds import Run, feeds_of, head_outputs
from fastmtl.inference.exported.metadata import padding_id
from fastmtl.inference.predict import Predictor
from fastmtl.inference.selection import evaluate_scores
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.model.examples import Examples
from fastmtl.model.multitask import predictions_of

_TEXTS = ["The film was good.", "A dull and boring story, not good at all, she said to the man.", "He ran."]
_LONG = " ".join(_TEXTS)


@dataclass(frozen=True)
class OpenGraph:
    """A graph that can run. run: see `Run`. inputs: the names that it takes."""

    run: Run
    inputs: Sequence[str]


def largest_difference(predictor: Predictor, task: str, graph: OpenGraph) -> float:
    """Return the largest difference of a graph's outputs from the model's, on sample texts.

    The logits and, where the graph has them, the predictions are compared. A difference is divided
    by the largest value of the model if this is above 1.
    """
    config, index = predictor.task(task), predictor.recipe.task_names.index(task)
    rows = INFERENCE_TYPES[config.type].rows_of(config, _samples(config))
    found = 0.0
    for batch in evaluation_batches(predictor.tokenized(task, rows), index, len(predictor.recipe.tasks), 4096):
        outputs = graph.run(feeds_of(batch, index, graph.inputs, padding_id(predictor)))
        with torch.no_grad():
            examples = predictor.model.examples(batch)[index]
        pairs = [(head_outputs(batch, index, config, outputs[f"{task}.logits"]), examples.outputs)]
        if f"{task}.predictions" in outputs:
            pairs.append((outputs[f"{task}.predictions"], predictor.model.predict(batch)[task]))
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape, (task, ours.shape, theirs.shape)
            difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
            found = max(found, float(difference))
    return found


def dev_metrics(predictor: Predictor, graphs: Mapping[str, OpenGraph], rows: Mapping[str, Rows]) -> dict[str, float]:
    """Return {task: its own metric} of labelled rows, predicted by graphs.

    graphs: {task: graph}. rows: {task: rows}.
    """
    found = {}
    for name, of_task in rows.items():
        config, index = predictor.task(name), predictor.recipe.task_names.index(name)
        head = predictor.model.heads[index]

        def forward(batch: PackedBatch, name: str = name, index: int = index, head: Any = head) -> dict[str, Tensor]:
            graph, config = graphs[name], predictor.task(name)
            outputs = graph.run(feeds_of(batch, index, graph.inputs, padding_id(predictor)))
            logits = head_outputs(batch, index, config, outputs[f"{name}.logits"])
            return {name: predictions_of(config, Examples(logits, logits, None, batch.units_of(index)), head)}

        scores = score(forward, predictor.recipe, {name: predictor.tokenized(name, of_task)})[name]
        found[name] = evaluate_scores(config, scores)[config.metric_name]
    return found


def _samples(task: TaskConfig) -> list[Any]:
    """Return rows of a task's kind, as `Predictor.predict` takes them."""
    match task.type:
        case "span":
            return [("Who ran?", _LONG), ("What was good?", _TEXTS[0])]
        case "choice" | "ranking":
            return [(_TEXTS[0], _TEXTS[1:]), (_TEXTS[2], _TEXTS)]
    if task.pairs == "bi" or "text_pair" in task.data.columns:
        return [(_TEXTS[0], _TEXTS[1]), (_LONG, _TEXTS[2])]
    return [*_TEXTS, _LONG]
