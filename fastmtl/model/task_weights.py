"""Tensors of a model by task, to copy them into a model of other tasks in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.model.merge import ONE_TASKS
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import load_model

Tensors = dict[str, Tensor]
ANY = "*"  # stands for the task's index in a name


@dataclass
class TaskWeights:
    """Tensors of a model, split into those of the encoder and those of each task.

    encoder: {name in the state dict: tensor}.
    own: {task: {name: tensor}}. The tensor is the task's slice of an adapter that is stacked over
        the tasks, or belongs to the task's module of a module list; its name is then without index.
    """

    encoder: Tensors
    own: dict[str, Tensors]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], tasks: list[str]) -> TaskWeights:
        """Split the state dict of a `MultiTaskModel` of these tasks."""
        weights = cls({}, {task: {} for task in tasks})
        for name, tensor in state_dict.items():
            if name.startswith("encoder."):
                weights.encoder[name] = tensor
            elif found := ONE_TASKS.match(name):
                weights.own[tasks[int(found[2])]][f"{found[1]}{ANY}{found[3]}"] = tensor
            else:
                assert tensor.shape[0] == len(tasks), f"{name} is not stacked over the tasks"
                for task, of_task in zip(tasks, tensor.unbind(0), strict=True):
                    weights.own[task][name] = of_task
        return weights

    def state_dict(self, tasks: list[str]) -> Tensors:
        """Join the tensors to the state dict of a `MultiTaskModel` of these tasks."""
        result = dict(self.encoder)
        for index, task in enumerate(tasks):
            for name, tensor in self.own[task].items():
                if ANY in name:
                    result[name.replace(ANY, str(index))] = tensor
                elif index == 0:
                    result[name] = torch.stack([self.own[other][name] for other in tasks])
        return result

    def replace(self, newer: TaskWeights, tasks: Iterable[str]) -> None:
        """Take the encoder and the tensors of `tasks` from `newer`.

        If `newer` has no adapters, the adapters of all tasks are dropped.
        """
        self.encoder = {**self.encoder, **newer.encoder}
        self.own.update({task: newer.own[task] for task in tasks})
        if not any(_is_adapter(name) for tensors in newer.own.values() for name in tensors):
            for task, tensors in self.own.items():
                self.own[task] = {name: tensor for name, tensor in tensors.items() if not _is_adapter(name)}


def read_task_weights(directory: Path) -> tuple[TaskWeights, Recipe]:
    """Read the tensors and the recipe of a `model/` directory. Raises UserError as `load_model`."""
    with torch.random.fork_rng(devices=[]):  # building the model draws random numbers
        model, recipe, _ = load_model(directory)
    return TaskWeights.of(model.state_dict(), recipe.task_names), recipe


def take_over(model: MultiTaskModel, weights: TaskWeights) -> list[str]:
    """Copy `weights` into `model` by task, name and shape.

    Return the parts that keep the model's own weights: "head of sst", "adapter of sst".
    """
    ours, new = TaskWeights.of(model.state_dict(), model.recipe.task_names), []
    with torch.no_grad():
        for name in ours.encoder.keys() & weights.encoder.keys():  # a pooler may be new
            ours.encoder[name].copy_(weights.encoder[name])
        for task, tensors in ours.own.items():
            for what in ("adapter", "head"):
                mine, theirs = (_part(found, what == "adapter") for found in (tensors, weights.own.get(task, {})))
                if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
                    new += [f"{what} of {task}"] if mine else []
                    continue
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name])
    return new


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter.")


def _part(tensors: Tensors, adapter: bool) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if _is_adapter(name) == adapter}
