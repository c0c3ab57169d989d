"""The parts of the losses that change during a run.

They are the weights of the losses (`weighting`), the teacher and the strengths of SMART, and losses
over the pairs of a whole step (`mnr.cached`). The moving average of the weights (`train.ema`) is
here as well, since it changes at the same times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.config import Recipe
from fastmtl.data.corpus import Corpus
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import evaluate_scores
from fastmtl.model.losses.cached_pairs import cache_pairs
from fastmtl.model.losses.smart import Smart
from fastmtl.model.losses.weighting import Famo, StepWeights, step_weights
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.ranks.collectives import sum_over_ranks
from fastmtl.training.average import WeightAverage
from fastmtl_kernels.upload import upload

EMA = "ema."  # before the names of averaged weights in a checkpoint
Metrics = Mapping[str, Mapping[str, float]]


class Objectives:
    """The parts of one model's losses that change during a run.

    The training loop calls the methods around each step and after each epoch. They change nothing
    if the recipe uses no such part, or if the model is trained on another loss than its tasks'
    (masked words). Make this object before the engine, since the teacher starts with the model's
    weights. Every rank makes the object and calls its methods, so its state is equal on all ranks.
    corpus: the rows for `after_epoch`.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, corpus: Corpus | None = None) -> None:
        self._recipe, self._corpus = recipe, corpus
        self._model = model if isinstance(model, MultiTaskModel) else None
        self._weights: StepWeights | None = None if self._model is None else step_weights(recipe)
        batch_weights = None if self._model is None else self._model.batch_weights
        self._famo = batch_weights if isinstance(batch_weights, Famo) else None
        self._rows_of_step: list[PackedBatch] = []
        self._gradient_weights: Tensor | None = None  # of the last step, with excess_mtl
        self._smart: Smart | None = None if self._model is None else self._model.smart
        if self._model is not None and self._smart is not None and self._smart.needs_teacher:
            self._smart.start_teacher(self._model)
        self._average = None if recipe.train.ema is None else WeightAverage(model, recipe.train.ema)

    def prepare(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Return a step's micro-batches, ready for the model.

        With the loss mnr and `mnr.cached`, they get the results of a first pass over the whole
        step.
        """
        prepared = list(micro_batches) if self._model is None else cache_pairs(self._model, micro_batches)
        if self._famo is not None:
            self._rows_of_step = prepared
        return prepared

    def weights(self, of_step: Mapping[str, float] | None) -> Mapping[str, float] | None:
        """Return {task: weight of its loss} for the next step: the run's weights times `of_step`.

        of_step: the sampler's weights for the step, None for 1 each. Without weights that are known
        before a step the result is `of_step`.
        """
        if self._weights is None:
            return of_step
        return {name: weight * (of_step or {}).get(name, 1.0) for name, weight in self._weights.weights().items()}

    def after_step(self, info: SurgeryInfo) -> None:
        """Update the weights of the losses and the teacher after an optimiser step.

        info: the result of surgery in the step. The teacher stays the same after a skipped step.
        """
        if self._weights is not None:
            self._weights.after_step(info)
        if self._famo is not None and info.skipped is None:
            self._famo.after_step(info.losses, self._losses_again())
        self._rows_of_step = []
        if self._recipe.weighting.name == "excess_mtl" and info.weights is not None:
            self._gradient_weights = info.weights
        if self._model is not None and self._smart is not None and self._smart.teacher and info.skipped is None:
            self._smart.follow_model(self._model)
        if self._average is not None and info.skipped is None:
            self._average.update()

    @contextmanager
    def averaged(self) -> Iterator[Mapping[str, Tensor]]:
        """Give the model the averaged weights in the block; yield them by name, float32.

        Without `train.ema` the model keeps its weights, and {} is yielded.
        """
        if self._average is None:
            yield {}
            return
        with self._average.in_model():
            yield self._average.tensors()

    def after_epoch(self, dev: Metrics, evaluate: Callable[[Corpus], Mapping[str, Scores]]) -> list[str]:
        """Update the dynamic weights and SMART's strengths after an epoch; return lines about them.

        The lines are for the user: the new weights, and the gaps between training and dev rows that
        set the strengths. dev: {task: {metric: value}} on the dev rows. evaluate: a function that
        scores a corpus's dev rows.
        """
        notes = []
        if self._weights is not None:
            self._weights.after_epoch()
            notes.append(_listed("weights of the losses", self._weights.weights()))
        if self._gradient_weights is not None:
            weights = dict(zip(self._recipe.task_names, self._gradient_weights.tolist(), strict=True))
            notes.append(_listed("weights of the tasks' gradients", weights))
        if self._smart is not None and self._recipe.smart.follows == "gap":
            scored = evaluate(self._sample(dev))
            tasks = self._recipe.tasks
            gaps = {}
            for name, found in scored.items():
                metrics = evaluate_scores(tasks[name], found)
                gaps[name] = metrics[tasks[name].metric_name] - dev[name][tasks[name].metric_name]
            self._smart.follow(gaps)
            notes.append(_listed("gaps between training and dev rows", gaps))
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values; the rest of it is in `tensors`."""
        state: dict[str, Any] = {}
        if self._weights is not None:
            state["weights"] = self._weights.state_dict()
        if self._famo is not None:
            state["famo"] = self._famo.state_dict()
        if self._smart is not None:
            state["scale"] = self._smart.scale
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of SMART's teacher by name, and those of the average as ema.NAME."""
        taught = {} if self._smart is None or self._smart.teacher is None else self._smart.teacher.state_dict()
        averages = {} if self._average is None else self._average.tensors()
        return {**taught, **{f"{EMA}{name}": tensor for name, tensor in averages.items()}}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take `state_dict` and `tensors` of a checkpoint.

        Raises UserError if its run had other weights of the losses, no SMART or no average.
        """
        if self._weights is not None:
            with _saved(f"weighting.name: {self._recipe.weighting.name}"):
                self._weights.load_state_dict(state["weights"] if "weights" in state else state["average"])  # as in 0.1
        if self._famo is not None:
            with _saved("weighting.name: famo"):
                self._famo.load_state_dict(state["famo"])
        if self._smart is not None:
            with _saved("smart"):
                self._smart.scale.update(state["scale"])
                if self._smart.teacher is not None:
                    names = self._smart.teacher.state_dict()
                    self._smart.teacher.load_state_dict({name: tensors[name] for name in names})
        if self._average is not None:
            averages = {name: tensor for name, tensor in tensors.items() if name.startswith(EMA)}
            with _saved(f"train.ema: {self._recipe.train.ema}"):
                self._average.load({name.removeprefix(EMA): tensor for name, tensor in averages.items()})

    def _losses_again(self) -> dict[str, float]:
        """Return {task: mean loss over all ranks} of the last step's rows with the present weights.

        The forward draws other dropout masks than the step.
        """
        assert self._model is not None
        names = self._recipe.task_names
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=next(self._model.parameters()).device)
        with torch.no_grad():
            for batch in self._rows_of_step:
                losses = self._model(batch).values()
                sums[0] += torch.stack([loss for loss, _ in losses])
                sums[1] += upload(torch.tensor([terms for _, terms in losses], dtype=sums.dtype), sums.device)
        totals, terms = sum_over_ranks(sums).tolist()
        return {name: total / count for name, total, count in zip(names, totals, terms, strict=True) if count}

    def _sample(self, dev: Metrics) -> Corpus:
        """Return a corpus with training rows in place of the dev rows, for scores on training rows.

        Each task gets as many rows as it has dev rows, or all its training rows if they are fewer;
        the rows are evenly spaced. A task without dev metrics has None.
        """
        assert self._corpus is not None
        samples: list[TokenizedDataset | None] = []
        for name, train, rows in zip(self._recipe.task_names, self._corpus.train, self._corpus.dev, strict=True):
            if name not in dev or rows is None or train is None:
                samples.append(None)
                continue
            count = min(train.num_rows, rows.num_rows)
            samples.append(train.take(train.examples_of(np.arange(count) * train.num_rows // count)))
        return dataclasses.replace(self._corpus, dev=samples)


@contextmanager
def _saved(setting: str) -> Iterator[None]:
    """Turn the KeyError for a state that a checkpoint lacks into a UserError about the setting."""
    try:
        yield
    except KeyError:
        raise UserError(
            f"{setting}: the checkpoint has no state of it: keep the former setting, or start a new run from the saved "
            "model"
        ) from None


def _listed(what: str, values: Mapping[str, float]) -> str:
    return f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
