"""Predictions for many requests at once: the rows of all requests and tasks in one packed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.data.joining import joined
from fastmtl.data.packing import pack_tasks
from fastmtl.data.tokenized import TokenizedDataset, check_token_types, tokenize_in_memory
from fastmtl.data.types import encoding_key
from fastmtl.errors import UserError
from fastmtl.inference.all_tasks import outputs_together
from fastmtl.inference.predict import Predictor
from fastmtl.inference.scores import Scores
from fastmtl.inference.types import INFERENCE_TYPES


@dataclass(frozen=True)
class Request:
    """The texts of a request, tokenised for each task that it asks for.

    Tasks that encode texts alike have the same object. tokens: those that the request costs.
    """

    datasets: Mapping[str, TokenizedDataset]
    tokens: int


class PackedPredictor:
    """A model that answers several requests, each for several tasks, by one packed batch.

    Without adapters inside of the layers the encoder runs once for all tasks of a text. With
    adapters, or a LoRA of each task, a text is in the batch once per task. Not thread-safe:
    `encode` and `predict` may each be called by one thread at a time.
    tokens: the most tokens of a batch, which one text may exceed.
    """

    def __init__(self, predictor: Predictor, tokens: int = 8192) -> None:
        self._predictor, self._model, self._tokens = predictor, predictor.model, tokens
        self.recipe = predictor.recipe

    def encode(self, texts: Sequence[Any], tasks: Sequence[str]) -> Request:
        """Tokenise the texts of a request. texts: as for `Predictor.predict`, for each of `tasks`.

        Raises UserError for an unknown task and for texts of another kind.
        """
        found: dict[str, TokenizedDataset] = {}
        alike: dict[Any, TokenizedDataset] = {}
        for name in dict.fromkeys(tasks):
            config = self._predictor.task(name)
            key = self._key(name)
            if key not in alike:
                try:
                    rows = INFERENCE_TYPES[config.type].rows_of(config, texts)
                except UserError as error:
                    raise UserError(f"{error} (task {name})") from None
                encoder = self._model.encoder
                alike[key] = tokenize_in_memory(rows, self._predictor.tokenizer, config, encoder.max_length)
                check_token_types([alike[key]], encoder.settings.type_vocab_size)
            found[name] = alike[key]
        runs = alike.values() if self._model.runs_encoder_once else found.values()
        return Request(found, sum(len(dataset.tokens) for dataset in runs))

    def predict(self, requests: Sequence[Request]) -> list[dict[str, list[Any]]]:
        """Return {task: predictions of its texts} for each request, as `Predictor.predict` does."""
        if sum(request.tokens for request in requests) > self._tokens:
            outputs = [self._divided(request) for request in requests]
        else:
            together = self._alike if self._model.runs_encoder_once else self._apart
            outputs = [
                {name: output.float().cpu().numpy() for name, output in found.items()} for found in together(requests)
            ]
        result = []
        for request, of_request in zip(requests, outputs, strict=True):
            answers = {}
            for name, dataset in request.datasets.items():
                config, scores = self.recipe.tasks[name], Scores(dataset, of_request[name])
                answers[name] = INFERENCE_TYPES[config.type].predictions(config, scores)
            result.append(answers)
        return result

    def _divided(self, request: Request) -> dict[str, np.ndarray]:
        """Return {task: outputs} of a request with more tokens than a batch may have."""
        alike: dict[int, list[str]] = {}
        for name, dataset in request.datasets.items():
            alike.setdefault(id(dataset), []).append(name)
        result: dict[str, np.ndarray] = {}
        for names in alike.values():
            result |= outputs_together(self._predictor, names, request.datasets[names[0]], self._tokens)
        return result

    def _alike(self, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
        """Run the encoder once for the texts of all requests that are encoded alike."""
        outputs: list[dict[str, Tensor]] = [{} for _ in requests]
        groups: dict[Any, list[tuple[int, TokenizedDataset, list[str]]]] = {}
        for number, request in enumerate(requests):
            of_request: dict[Any, list[str]] = {}
            for name in request.datasets:
                of_request.setdefault(self._key(name), []).append(name)
            for key, names in of_request.items():
                groups.setdefault(key, []).append((number, request.datasets[names[0]], names))
        for parts in groups.values():
            datasets = [dataset for _, dataset, _ in parts]
            wanted = list(dict.fromkeys(name for _, _, names in parts for name in names))
            batch = self._packed({wanted[0]: joined(datasets)})
            found = self._model.predict_for_tasks(batch, wanted)
            for name, output in found.items():
                pieces = output.split([_outputs(dataset) for dataset in datasets])
                for (number, _, names), piece in zip(parts, pieces, strict=True):
                    if name in names:
                        outputs[number][name] = piece
        return outputs

    def _apart(self, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
        """Run one batch with the texts of all requests for all tasks."""
        outputs: list[dict[str, Tensor]] = [{} for _ in requests]
        of_task: dict[str, list[tuple[int, TokenizedDataset]]] = {}
        for number, request in enumerate(requests):
            for name, dataset in request.datasets.items():
                of_task.setdefault(name, []).append((number, dataset))
        batch = self._packed({name: joined([dataset for _, dataset in parts]) for name, parts in of_task.items()})
        found = self._model.predict(batch)
        for name, parts in of_task.items():
            pieces = found[name].split([_outputs(dataset) for _, dataset in parts])
            for (number, _), piece in zip(parts, pieces, strict=True):
                outputs[number][name] = piece
        return outputs

    def _packed(self, datasets: Mapping[str, TokenizedDataset]) -> Any:
        parts = {name: (dataset, np.arange(len(dataset))) for name, dataset in datasets.items()}
        return pack_tasks(self.recipe.task_names, parts).to(self._predictor.device)

    def _key(self, name: str) -> Any:
        """Return a value that is equal for tasks which encode the same texts alike."""
        config = self.recipe.tasks[name]
        return encoding_key(config), id(INFERENCE_TYPES[config.type].rows_of)


def _outputs(dataset: TokenizedDataset) -> int:
    """Return the number of rows of the model's predictions for a data set."""
    return len(dataset) if dataset.units is None else int(dataset.units.offsets[-1])


def warm_up(predictor: PackedPredictor) -> None:
    """Run the model once, so that the first request need not wait for libraries to load."""
    for name, task in predictor.recipe.tasks.items():
        predictor.predict([predictor.encode([_example(task)], [name])])


def _example(task: TaskConfig) -> Any:
    """Return a text, a pair or a question that the task takes."""
    if task.type in ("choice", "ranking"):
        return ("Which?", ["one", "two"])
    return ("Who?", "A text.") if task.type == "span" or task.pairs == "bi" else "a text"
