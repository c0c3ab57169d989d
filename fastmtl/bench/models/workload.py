"""The workload of a model of another library: the model with heads, and rows for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.bench.models import bert, llama_lora, modernbert, vit
from fastmtl.bench.models.family import Family, Inputs, joined
from fastmtl.bench.sizes import PRECISIONS, SEED, SHAPES, Shape, Size
from fastmtl.bench.textbook import TaskModel
from fastmtl.bench.workload import KINDS, labels_of, make_conflicts
from fastmtl.errors import UserError

MODELS: dict[str, Family] = {
    "hf-bert": bert.FAMILY,
    "hf-modernbert": modernbert.FAMILY,
    "llama-lora": llama_lora.FAMILY,
    "vit": vit.FAMILY,
}


def shape_of(model: str | None, name: str | None) -> Shape:
    """Return the named shape of a model, by default its first one; model None: fastmtl's encoder.

    Raises UserError for a shape that the model does not have.
    """
    shapes = SHAPES if model is None else MODELS[model].shapes
    if name is not None and name not in shapes:
        whose = "fastmtl's encoder" if model is None else f"--model {model}"
        raise UserError(f"--shape {name}: {whose} has the shapes {', '.join(shapes)}")
    return next(iter(shapes.values())) if name is None else shapes[name]


@dataclass(frozen=True)
class Batch:
    """The rows of one task. labels: [B], as in textbook.py."""

    inputs: Inputs
    labels: Tensor


class TrunkModel(TaskModel):
    """A model of another library, and a linear head per task on the hidden state of one token."""

    def __init__(self, trunk: nn.Module, width: int, kinds: Sequence[tuple[str, int]], position: int) -> None:
        super().__init__(trunk, width, kinds)
        self._position = position

    def features(self, batch: Batch) -> Tensor:
        return self.hidden(batch.inputs)

    def hidden(self, inputs: Inputs) -> Tensor:
        """Return the hidden state of each row's token, [B, width]."""
        return self.encoder(**inputs).last_hidden_state[:, self._position]


class ModelWorkload:
    """The rows of a step, for each task and as one batch, and the model that runs on them.

    padded: the model. padded_batches: one batch per task, each padded to its longest row. joint:
    the rows of all tasks in this order, padded to the longest of all. tokens: their number, without
    and with padding.

    same_rows: True if all tasks have the same rows, those of the first one. `joint` has them once.
    """

    def __init__(self, model: str, size: Size, *, same_rows: bool = False) -> None:
        family, tasks, shape = MODELS[model], size.tasks, size.shape
        self.tasks, self.device, self.dtype = tasks, torch.device(size.device), PRECISIONS[size.precision]
        self.names = [f"task{task}" for task in range(tasks)]
        kinds = [KINDS[task % len(KINDS)] for task in range(tasks)]
        random = np.random.default_rng(SEED)
        parts = [self._placed(inputs) for inputs in family.inputs(shape, tasks, random)]
        self.same_rows, parts = same_rows, parts[:1] * tasks if same_rows else parts
        labels = [torch.from_numpy(labels_of(*kind, shape.rows, random)).to(self.device) for kind in kinds]
        self.padded_batches = [Batch(*pair) for pair in zip(parts, labels, strict=True)]
        self.counts = [len(values) for values in labels]
        self.joint = joined(parts[:1] if same_rows else parts)
        self.tokens = family.tokens(shape, self.joint)
        torch.manual_seed(SEED)
        self.padded = TrunkModel(family.trunk(shape), shape.hidden, kinds, family.position)
        make_conflicts(self.padded.heads, kinds)
        self.padded.to(self.device, self.dtype)

    def features(self, model: TrunkModel) -> Sequence[Tensor]:
        """Run the joint batch; return the features of each task's rows, [B, width]."""
        return self.of_tasks(model.hidden(self.joint))

    def of_tasks(self, hidden: Tensor) -> Sequence[Tensor]:
        """Return each task's rows of the hidden states of the joint batch.

        They are views, from which a backward finds the gradient of each task.
        """
        return [hidden.view_as(hidden) for _ in self.names] if self.same_rows else hidden.split(self.counts)

    def _placed(self, inputs: Inputs) -> Inputs:
        """Return the inputs on the device; images get the precision of the model."""
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
