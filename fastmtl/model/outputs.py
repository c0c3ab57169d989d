"""What a head's outputs mean.

| task | outputs | predictions |
|---|---|---|
| classification | logits [E, C] | probabilities [E, C] |
| binary | logit of class 1 [E, 1] | its probability [E] |
| regression | score [E, 1] in fourths of the label range, 0 at its middle | score [E] in label units |

Regression is learned in units of a fourth of the range, about the standard deviation of labels that fill it: an
untrained head starts at the middle of the range and a task's loss starts near 1, whatever its labels are measured in.
A range of 0..100 would otherwise drown every other task's gradient.
"""

from __future__ import annotations

from torch import Tensor

from fastmtl.config import TaskConfig

RANGE_WIDTH = 4.0


def num_outputs(task: TaskConfig) -> int:
    """Columns of a head's outputs."""
    return task.num_labels or 1 if task.type == "classification" else 1


def targets(task: TaskConfig, labels: Tensor) -> Tensor:
    """Labels [E] in the units of the outputs: class ids int64 stay, the others are float32."""
    if task.type != "regression":
        return labels
    middle, unit = _units(task)
    return (labels - middle) / unit


def predictions(task: TaskConfig, outputs: Tensor) -> Tensor:
    """Outputs float32 [E, num_outputs] as the table above says. A score may lie outside the range."""
    if task.type == "classification":
        return outputs.softmax(dim=1)
    if task.type == "binary":
        return outputs.squeeze(1).sigmoid()
    middle, unit = _units(task)
    return outputs.squeeze(1) * unit + middle


def _units(task: TaskConfig) -> tuple[float, float]:
    assert task.range is not None
    low, high = task.range
    return (low + high) / 2, (high - low) / RANGE_WIDTH
