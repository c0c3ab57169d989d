"""Losses of classes, with weights of the classes, label smoothing, focus and order.

Each function takes a task and returns the function that maps outputs and targets to one loss per
example. E examples, C classes; w: class_weights, e: label_smoothing, g: focal_gamma; s: the
sigmoid.

cross_entropy  (1 - e) w[y] (- log p[y]) + e / C sum_c w[c] (- log p[c])
bce            that of two classes with logits 0 and x; for several labels the mean over the labels,
               with w for rows that have the label and 1 for the others
focal          (1 - p[y])^g w[y] (- log p[y])  (Lin et al. 2017, equation 5)
ordinal        w[y] (- log p[y]), p the probabilities of model/ordinal.py

The mean over the examples is taken later: it is not divided by the sum of the weights, as
torch.nn.CrossEntropyLoss does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.config.class_weights import BALANCED, class_weights
from fastmtl.model.ordinal import ordinal_log_probabilities

Function = Callable[[Tensor, Tensor], Tensor]


class Weights:
    """Numbers of a recipe as a tensor on the device of another tensor, made once per device."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = list(numbers)
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """Return the numbers in the dtype and on the device of x."""
        key = x.device, x.dtype
        if key not in self._made:
            # Filled on the device: a copy from the host cannot be part of a CUDA graph.
            numbers = [torch.full((), number, dtype=x.dtype, device=x.device) for number in self._numbers]
            self._made[key] = torch.stack(numbers)
        return self._made[key]


def weights_of(task: TaskConfig) -> Weights | None:
    """Return the task's class weights, None if it has none.

    Raises ValueError for `balanced`, which `with_class_weights` replaces by numbers.
    """
    if task.class_weights == BALANCED:
        raise ValueError("class_weights: balanced: call fastmtl.data.class_weights.with_class_weights first")
    numbers = class_weights(task)
    return None if numbers is None else Weights(numbers)


def cross_entropy(task: TaskConfig, *, ignored: int = -100) -> Function:
    """Return the cross-entropy [E] of logits [E, C]; it is 0 for the target `ignored`."""
    weights, smoothing = weights_of(task), task.label_smoothing

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(
            outputs,
            targets,
            None if weights is None else weights.like(outputs),
            ignore_index=ignored,
            reduction="none",
            label_smoothing=smoothing,
        )

    return loss


def bce(task: TaskConfig) -> Function:
    """Return the cross-entropy [E] of the logit x of class 1, or the mean over several labels.

    Outputs [E, 1] with targets [E], or outputs and targets [E, C]. Without weights and smoothing it
    is - log s(x) for target 1, - log (1 - s(x)) for target 0.
    """
    weights, smoothing, several = weights_of(task), task.label_smoothing, task.type == "multilabel"

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype)
        x = outputs if several else outputs.squeeze(1)
        if smoothing:
            targets = targets * (1 - smoothing) + smoothing / 2
        if weights is None:
            losses = functional.binary_cross_entropy_with_logits(x, targets, reduction="none")
        else:
            negative, positive = _sides(weights.like(outputs), several)
            losses = positive * targets * functional.softplus(-x) + negative * (1 - targets) * functional.softplus(x)
        return losses.mean(1) if several else losses

    return loss


def _sides(weights: Tensor, several: bool) -> tuple[Tensor | float, Tensor | float]:
    """Return the weights of targets 0 and 1; each a number or one for each label, [C]."""
    return (1.0, weights) if several else (weights[0], weights[1])


def focal(task: TaskConfig, *, ignored: int = -100) -> Function:
    """Return the focal loss [E] of logits [E, C], of the logit of class 1, or of several labels."""
    return _focal_classes(task, ignored) if task.type in ("classification", "tokens") else _focal_sides(task)


def _focal_classes(task: TaskConfig, ignored: int) -> Function:
    weights, gamma = weights_of(task), task.focal_gamma

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        there = targets != ignored
        chosen = targets.where(there, 0)
        log_p = outputs.log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
        # p may be rounded to 1, where a power below 1 has no finite derivative.
        rest = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
        losses = -(rest**gamma) * log_p
        if weights is not None:
            losses = losses * weights.like(outputs)[chosen]
        return losses.where(there, 0.0)

    return loss


def _focal_sides(task: TaskConfig) -> Function:
    weights, gamma, several = weights_of(task), task.focal_gamma, task.type == "multilabel"

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        x, y = (outputs if several else outputs.squeeze(1)), targets.to(outputs.dtype)
        negative, positive = (1.0, 1.0) if weights is None else _sides(weights.like(outputs), several)
        # (1 - s(x))^g = exp(g log s(-x))
        of_positive = (gamma * functional.logsigmoid(-x)).exp() * functional.softplus(-x)
        of_negative = (gamma * functional.logsigmoid(x)).exp() * functional.softplus(x)
        losses = positive * y * of_positive + negative * (1 - y) * of_negative
        return losses.mean(1) if several else losses

    return loss


def ordinal(task: TaskConfig) -> Function:
    """Return - log P(y), [E], of outputs [E, C - 1]: the sum of CORN's losses of an example.

    CORN's loss of the logit f_k is that of the two classes y > k and y = k, for examples y >= k.
    """
    weights = weights_of(task)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = -ordinal_log_probabilities(outputs).gather(1, targets[:, None]).squeeze(1)
        return losses if weights is None else losses * weights.like(outputs)[targets]

    return loss
