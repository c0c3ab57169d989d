"""The file export.json, from which a program runs a graph without fastmtl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmtl.config import TaskConfig
from fastmtl.inference.exported.program import PAIRS, TEXTS, TOKENS
from fastmtl.inference.predict import Predictor
from fastmtl.model.heads.outputs import kind, num_outputs
from fastmtl.version import __version__

FORMAT = 1
FILE = "export.json"


@dataclass(frozen=True)
class Graph:
    """A graph in a file. tasks, inputs: names. int8: the file of its int8 version, or None."""

    tasks: Sequence[str]
    inputs: Sequence[str]
    int8: str | None = None


def metadata(predictor: Predictor, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """Return the contents of export.json. graphs: {file: its graph}."""
    encoder, recipe = predictor.model.encoder, predictor.recipe
    files = {task: file for file, graph in graphs.items() for task in graph.tasks}
    return {
        "format": FORMAT,
        "fastmtl": __version__,
        "encoder": encoder.config.model_type,
        "max_length": encoder.max_length,
        "padding": {"side": "right", "token_id": padding_id(predictor)},
        "graphs": {
            file: {
                **({} if graph.int8 is None else {"int8": graph.int8}),
                "inputs": {name: _input(name) for name in graph.inputs},
                "outputs": {
                    f"{task}.{output}": values
                    for task in graph.tasks
                    for output, values in outputs_of(recipe.tasks[task]).items()
                },
            }
            for file, graph in graphs.items()
        },
        "tasks": {name: _task(predictor, name, files[name]) for name in recipe.task_names},
    }


def padding_id(predictor: Predictor) -> int:
    """Return the id of the encoder's token for padding; 0 if it has none."""
    return getattr(predictor.model.encoder.config, "pad_token_id", None) or 0


def outputs_of(task: TaskConfig) -> dict[str, dict[str, Any]]:
    """Return {output: its shape and meaning} of a task."""
    number, rows = num_outputs(task), PAIRS if task.pairs == "bi" else TEXTS
    if task.scores == "tokens":
        return {"logits": _float([TEXTS, TOKENS, number], _OF_TOKENS[task.type])}
    if kind(task) == "units":
        return {"logits": _float([rows, number], _OF_SEQUENCES[task.type])}
    logits, predictions, columns = _OF_ROWS[kind(task)]
    if task.type == "regression":
        predictions, columns = "score in label units", False
    shape = [rows, task.num_labels] if columns else [rows]
    return {"logits": _float([rows, number], logits), "predictions": _float(shape, predictions)}


# kind of outputs: (the logits, the predictions, True if these have a column per label).
_OF_ROWS: dict[str, tuple[str, str, bool]] = {
    "classes": ("logits of the classes", "probabilities of the classes", True),
    "ordinal": ("logits of the steps between ordered classes", "probabilities of the classes", True),
    "binary": ("logit of class 1", "probability of class 1", False),
    "score": ("score in quarters of the label range, 0 in its middle", "shares of the two nearest classes", True),
    "bins": ("logits of scores that are evenly spread over the range", "score in label units", False),
    "labels": ("logit of each label", "probability of each label", True),
}
_OF_TOKENS = {
    "tokens": "logits of the tags of each token; read those of a word's chosen pieces",
    "span": "logits of each token to be the first and the last one of the answer",
}
_OF_SEQUENCES = {
    "choice": "score of a text; the softmax over the texts of a row gives their probabilities",
    "ranking": "score of a candidate; higher is better",
}


def _float(shape: Sequence[Any], meaning: str) -> dict[str, Any]:
    return {"dtype": "float32", "shape": list(shape), "meaning": meaning}


def _input(name: str) -> dict[str, Any]:
    meanings = {
        "input_ids": "tokens",
        "attention_mask": "1 for a token, 0 for padding",
        "token_type_ids": "0 for the first text of a pair in one sequence, 1 for the second",
        "pairs": "the two texts of each pair, by their rows in input_ids; 0 pairs are allowed",
    }
    return {"dtype": "int64", "shape": [PAIRS, 2] if name == "pairs" else [TEXTS, TOKENS], "meaning": meanings[name]}


def _task(predictor: Predictor, name: str, file: str) -> dict[str, Any]:
    task = predictor.recipe.tasks[name]
    found: dict[str, Any] = {"graph": file, "type": task.type, "head": task.head.name}
    if task.scores != "tokens":
        found |= {"pairs": task.pairs, "pooling": task.pooling}
    if task.num_labels is not None:
        found["labels"] = task.label_names or [str(label) for label in range(task.num_labels)]
    elif task.type == "binary":
        found["labels"] = task.label_names or ["0", "1"]
    if task.range is not None:
        found["range"] = list(task.range)
    if task.type == "multilabel":
        found["thresholds"] = task.multilabel.thresholds
    if task.type == "span":
        found["unanswerable"], found["no_answer_threshold"] = task.span.unanswerable, task.span.no_answer_threshold
    if task.type == "tokens":
        found["subwords"], found["scheme"] = task.tokens.subwords, task.tokens.scheme
    if "crf" in task.losses:
        found["crf"] = _crf(predictor, name)
    return found


def _crf(predictor: Predictor, name: str) -> dict[str, Any]:
    """Return the scores of a CRF, which the graph does not have: it gives the scores of tags."""
    crf = predictor.model.heads[predictor.recipe.task_names.index(name)].crf
    parameters = {"transitions": crf.transitions_bias, "start": crf.start_bias, "end": crf.end_bias}
    buffers = {"follows": crf.follows, "first": crf.first, "last": crf.last}
    return {key: tensor.tolist() for key, tensor in (parameters | buffers).items()}
