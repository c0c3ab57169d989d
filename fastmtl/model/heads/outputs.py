"""What a head's outputs mean. A task's type and its loss decide.

| task | loss | kind | outputs | predictions |
|---|---|---|---|---|
| classification | | classes | logits [E, C] | probabilities [E, C] |
| classification | mse | score | score [E, 1] of the class id | shares [E, C] of the two nearest classes |
| binary | | binary | logit of class 1 [E, 1] | its probability [E] |
| regression | | score | score [E, 1] | score [E] in label units |
| regression | cross_entropy | bins | logits [E, bins] | the bins' expected score [E] in label units |

A score is learned in fourths of the label range (of a classification task: 0 to C - 1), 0 at its middle. A fourth is
about the standard deviation of labels that fill the range: an untrained head starts at the middle and a task's loss
starts near 1, whatever its labels are measured in. A range of 0..100 would otherwise drown every other task's gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig

RANGE_WIDTH = 4.0

Kind = Literal["classes", "binary", "score", "bins"]


def kind(task: TaskConfig) -> Kind:
    match task.type:
        case "classification":
            return "score" if "mse" in task.losses else "classes"
        case "binary":
            return "binary"
        case "regression":
            return "bins" if "cross_entropy" in task.losses else "score"


def num_outputs(task: TaskConfig) -> int:
    """Columns of a head's outputs."""
    match kind(task):
        case "classes":
            assert task.num_labels is not None
            return task.num_labels
        case "bins":
            return task.bins
    return 1


def targets(task: TaskConfig, labels: Tensor) -> Tensor:
    """Labels [E] in the units of the outputs: class ids and the nearest bins int64, the others float32."""
    match kind(task):
        case "score":
            middle, unit = _units(task)
            return (labels - middle) / unit
        case "bins":
            low, high = _limits(task)
            return ((labels - low) * ((task.bins - 1) / (high - low))).round().long()
    return labels


def predictions(task: TaskConfig, outputs: Tensor) -> Tensor:
    """Outputs float32 [E, num_outputs] as the table above says. A score may lie outside the range."""
    match kind(task):
        case "classes":
            return outputs.softmax(dim=1)
        case "binary":
            return outputs.squeeze(1).sigmoid()
        case "bins":
            low, high = _limits(task)
            return outputs.softmax(dim=1) @ torch.linspace(low, high, task.bins).to(outputs)
    middle, unit = _units(task)
    score = outputs.squeeze(1) * unit + middle
    return score if task.type == "regression" else _shares(score, num_classes=task.num_labels or 0)


def _shares(score: Tensor, num_classes: int) -> Tensor:
    """Scores [E] between two class ids as shares [E, C] of them: their mean is the score, the largest is the nearest.

    Scores outside are moved to the first or last class.
    """
    distance = score.clamp(0, num_classes - 1)[:, None] - torch.arange(num_classes, device=score.device)
    return functional.relu(1 - distance.abs())


def _units(task: TaskConfig) -> tuple[float, float]:
    low, high = _limits(task)
    return (low + high) / 2, (high - low) / RANGE_WIDTH


def _limits(task: TaskConfig) -> tuple[float, float]:
    if task.type == "classification":
        assert task.num_labels is not None
        return 0.0, task.num_labels - 1.0
    assert task.range is not None
    return task.range
