"""The tensors of a model, grouped by task.

In a run of several phases they are copied into the next phase's model, which may have other tasks.
"""

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
SHARED = ("encoder.", "lora.shared.")
ANY = "*"  # replaces the task's index in a tensor's name, since the index differs between models


@dataclass
class TaskWeights:
    """Tensors of a model, split into those of the encoder and those of each task.

    encoder: {name in the state dict: tensor}, with those of a LoRA that all tasks share.
    own: {task: {name: tensor}}. The tensor is either the task's slice of a tensor stacked over the
        tasks, or a tensor of the task's own module in a module list. In the second case `*`
        replaces the task's index in the name: heads.*.dense.weight.
    """

    encoder: Tensors
    own: dict[str, Tensors]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], tasks: list[str]) -> TaskWeights:
        """Split the state dict of a `MultiTaskModel` that has these tasks, in this order."""
        weights = cls({}, {task: {} for task in tasks})
        for name, tensor in state_dict.items():
            if name.startswith(SHARED):
                weights.encoder[name] = tensor
            elif found := ONE_TASKS.match(name):
                weights.own[tasks[int(found[2])]][f"{found[1]}{ANY}{found[3]}"] = tensor
            else:
                assert tensor.shape[0] == len(tasks), f"{name} is not stacked over the tasks"
                for task, of_task in zip(tasks, tensor.unbind(0), strict=True):
                    weights.own[task][name] = of_task
        return weights

    def state_dict(self, tasks: list[str]) -> Tensors:
        """Return the state dict of a `MultiTaskModel` that has these tasks, in this order."""
        result = dict(self.encoder)
        for index, task in enumerate(tasks):
            for name, tensor in self.own[task].items():
                if ANY in name:
                    result[name.replace(ANY, str(index))] = tensor
                elif index == 0:
                    result[name] = torch.stack([self.own[other][name] for other in tasks])
        return result

    def replace(self, newer: TaskWeights, tasks: Iterable[str]) -> None:
        """Replace the encoder's tensors, and those of `tasks`, by the tensors of `newer`.

        If `newer` has no adapters, the adapters of all tasks are dropped: one model has adapters
        for all of its tasks or for none.
        """
        self.encoder = {**self.encoder, **newer.encoder}
        self.own.update({task: newer.own[task] for task in tasks})
        if not any(_is_adapter(name) for tensors in newer.own.values() for name in tensors):
            for task, tensors in self.own.items():
                self.own[task] = {name: tensor for name, tensor in tensors.items() if not _is_adapter(name)}


def read_task_weights(directory: Path) -> tuple[TaskWeights, Recipe]:
    """Read the tensors and the recipe of a `model/` directory.

    Raises UserError as `load_model` does. torch's random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):  # building the model draws random numbers
        model, recipe, _ = load_model(directory)
    return TaskWeights.of(model.state_dict(), recipe.task_names), recipe


def take_over(model: MultiTaskModel, weights: TaskWeights) -> list[str]:
    """Copy `weights` into `model`: the encoder, and each task's own parts where they fit.

    A part fits if `weights` has the same tensor names and shapes for a task of the same name.
    Return the parts that do not fit, which keep their weights: "head of sst", "adapter of sst".
    """
    ours, new = TaskWeights.of(model.state_dict(), model.recipe.task_names), []
    with torch.no_grad():
        for name in ours.encoder.keys() & weights.encoder.keys():  # the model may have a pooler that `weights` lacks
            ours.encoder[name].copy_(weights.encoder[name])
        for task, tensors in ours.own.items():
            for what, prefix in (("adapter", "adapter."), ("lora", "lora."), ("head", "heads.")):
                mine, theirs = (_part(found, prefix) for found in (tensors, weights.own.get(task, {})))
                if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
                    new += [f"{what} of {task}"] if mine else []
                    continue
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name])
    return new


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter.")


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
