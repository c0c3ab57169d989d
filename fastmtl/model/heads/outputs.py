"""Meaning of a head's outputs, which depends on the task's type and loss.

E examples, C classes. An empty loss stands for any other loss that supports the type.

| task | loss | kind | outputs | predictions |
|---|---|---|---|---|
| classification | | classes | logits [E, C] | probabilities [E, C] |
| classification | ordinal | ordinal | logits [E, C - 1] (ordinal.py) | probabilities [E, C] |
| classification | mse | score | score [E, 1] of the class id | shares [E, C] of 2 nearest classes |
| binary | | binary | logit of class 1 [E, 1] | its probability [E] |
| regression | | score | score [E, 1] | score [E] in label units |
| regression | cross_entropy | bins | logits [E, bins] | expected score [E] in label units |
| multilabel | | labels | logits [E, C] of each label | their probabilities [E, C] |

The unit of a score is a quarter of the label range, and its zero is the middle of the range. (The
range of a classification task is 0 to C - 1.) A quarter is about the standard deviation of labels
that fill the range. An untrained head therefore starts at the middle, and a task's loss starts near
1, whatever the unit of its labels. Without this, a task with labels in 0..100 would dominate the
gradients of all other tasks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.model.ordinal import ordinal_log_probabilities
from fastmtl.model.types import UNIT_TYPES

RANGE_WIDTH = 4.0

Kind = Literal["classes", "binary", "score", "bins", "labels", "ordinal", "units"]


def kind(task: TaskConfig) -> Kind:
    """Return the kind of a task's outputs, as in the table above.

    "units" stands for the outputs of the types in fastmtl.model.types.
    """
    match task.type:
        case "classification":
            return "score" if "mse" in task.losses else "ordinal" if "ordinal" in task.losses else "classes"
        case "binary":
            return "binary"
        case "regression":
            return "bins" if "cross_entropy" in task.losses else "score"
        case "multilabel":
            return "labels"
        case _:
            return "units"


def num_outputs(task: TaskConfig) -> int:
    """Return the number of columns of the outputs of a task's head."""
    match kind(task):
        case "classes" | "labels":
            assert task.num_labels is not None
            return task.num_labels
        case "ordinal":
            assert task.num_labels is not None
            return task.num_labels - 1
        case "bins":
            return task.bins
        case "units":
            return UNIT_TYPES[task.type].num_outputs(task)
    return 1


def targets(task: TaskConfig, labels: Tensor) -> Tensor:
    """Map labels [E] to the targets [E] of a loss of the outputs; labels: [E, C] to [E, C].

    classes, ordinal: the int64 class ids. bins: the int64 index of the nearest bin. binary, labels:
    the labels. score: float32, in quarters of the label range.
    """
    match kind(task):
        case "score":
            middle, unit = _units(task)
            return (labels - middle) / unit
        case "bins":
            low, high = _limits(task)
            return ((labels - low) * ((task.bins - 1) / (high - low))).round().long()
    return labels


def predictions(task: TaskConfig, outputs: Tensor) -> Tensor:
    """Map a head's outputs, float32 [E, num_outputs], to the predictions in the table above.

    A predicted score of a regression task can lie outside the label range.
    """
    match kind(task):
        case "classes":
            return outputs.softmax(dim=1)
        case "binary":
            return outputs.squeeze(1).sigmoid()
        case "labels":
            return outputs.sigmoid()
        case "ordinal":
            return ordinal_log_probabilities(outputs).exp()
        case "bins":
            low, high = _limits(task)
            return outputs.softmax(dim=1) @ torch.linspace(low, high, task.bins).to(outputs)
    middle, unit = _units(task)
    score = outputs.squeeze(1) * unit + middle
    return score if task.type == "regression" else _shares(score, num_classes=task.num_labels or 0)


def _shares(score: Tensor, num_classes: int) -> Tensor:
    """Map scores [E] of class ids to shares [E, C], which add up to 1 and serve as probabilities.

    The two classes nearest to the score share the 1 so that the mean class id is the score: 2.3
    gives class 2 the share 0.7 and class 3 the share 0.3. A score outside the range gives the first
    or the last class the share 1.
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
