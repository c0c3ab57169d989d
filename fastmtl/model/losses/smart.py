"""SMART: two terms of a task's loss that keep the model from fitting its rows too closely.

    adversarial   strength * l(f(x + n), f(x)). n is a perturbation of the embedded tokens x. The
                  absolute value of its numbers is at most epsilon. A few steps of gradient ascent
                  make the term large.
    proximal      proximal * l(f(x), f'(x)). f' is the teacher, the same model with a moving average
                  of the weights.

f(x) are the outputs of the task's head. l is the symmetric KL divergence for classes, bins and
binary tasks, and the squared difference for scores. Each term is a mean over a task's rows and is
added to its loss. All forward passes draw the same dropout masks, so that l measures only the
effect of n, or of the teacher's weights.
Source: Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language
Models through Principled Regularized Optimization", equations 1 to 4 and algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data.packed_batch import PackedBatch, Units
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.examples import Examples
from fastmtl.model.heads.outputs import kind, num_outputs
from fastmtl.model.ordinal import ordinal_log_probabilities
from fastmtl.model.types import UNIT_TYPES
from fastmtl.surgery.random_state import RandomState
from fastmtl_kernels import pool

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink

# Distance from 1 to the next larger number, by precision.
_SPACING = {"bf16": 2**-7, "fp16": 2**-10}


class Smart:
    """SMART's terms for all tasks of a run, and the teacher.

    It is not an nn.Module, since the teacher's weights must not be parameters of the model.
    Attribute scale: {task: factor of its strength and proximal}; `follow` changes it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._config, self._recipe = recipe.smart, recipe
        names = recipe.task_names
        self._adversarial = _per_task("smart.strength", recipe.smart.strength, names)
        self._proximal = _per_task("smart.proximal", recipe.smart.proximal, names)
        if recipe.smart.follows == "gap":
            for name, task in recipe.tasks.items():
                if (self._adversarial[name] or self._proximal[name]) and not recipe.data.has_dev(task.data):
                    raise UserError(
                        f"smart.follows: gap needs dev rows of every task with a term; {name} has no dev file"
                    )
        for name, task in recipe.tasks.items():
            if self._adversarial[name] or self._proximal[name]:
                _check_divergence(name, task)
        self.scale = dict.fromkeys(names, 0.0 if recipe.smart.follows == "gap" else 1.0)
        self.teacher: SmartModel | None = None
        _check(recipe, any(self._adversarial.values()))

    @property
    def needs_teacher(self) -> bool:
        return any(self._proximal.values())

    @property
    def active(self) -> bool:
        """True if at least one task has a term that is not zero at present."""
        return any(self.scale[name] * (self._adversarial[name] + self._proximal[name]) for name in self.scale)

    def start_teacher(self, model: SmartModel) -> None:
        """Make the teacher: a float32 copy of the model with its present weights.

        Call this before DeepSpeed takes the model over, which may convert or divide its weights.
        """
        smart, model.smart = model.smart, None
        self.teacher = copy.deepcopy(model).float().requires_grad_(False)
        model.smart = smart

    def follow_model(self, model: nn.Module) -> None:
        """Update the teacher after an optimiser step: momentum teacher + (1 - momentum) model."""
        assert self.teacher is not None
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs.to(ours.device, ours.dtype), 1 - self._config.momentum)

    def follow(self, gaps: Mapping[str, float]) -> None:
        """Set `scale` to the tasks' gaps, for the setting `follows: gap`.

        gaps: {task: its metric on training rows minus that on dev rows}, positive if the training
        rows are better. A negative gap gives 0.
        """
        self.scale.update({name: max(0.0, gap) for name, gap in gaps.items()})

    def terms(
        self,
        model: SmartModel,
        batch: PackedBatch,
        task_grads: Sink | None,
        found: list[Examples],
        begun: RandomState,
    ) -> list[Tensor]:
        """Return one term per task to add to its loss: the sum over its rows, 0-dim.

        found: the examples that the model computed for this batch.
        begun: the random state before that forward. The further passes start from it, which gives
        them the same dropout masks.
        """
        outputs = [examples.outputs for examples in found]
        terms = [output[:0].sum() for output in outputs]
        tasks = list(enumerate(self._recipe.tasks.items()))
        if self._any(self._proximal):
            targets = self._taught(batch, begun, model.training)
            for index, (name, task) in tasks:
                strength, units = self.scale[name] * self._proximal[name], found[index].units
                if strength:
                    distance = divergence(task, outputs[index], targets[index], units).sum()
                    terms[index] = terms[index] + strength * distance
        if self._any(self._adversarial):
            noise = self.noise(batch, outputs[0].device, model.hidden_size)
            after = RandomState.capture(outputs[0].device)
            noise = self._perturbation(model, batch, [output.detach() for output in outputs], begun, noise)
            begun.restore()
            perturbed = model.examples(batch, task_grads, noise)
            after.restore()
            for index, (name, task) in tasks:
                strength, other = self.scale[name] * self._adversarial[name], perturbed[index].outputs
                # Outputs of tasks without a term are part of the graph too, as a sum of no rows: a
                # layer's backward needs gradients for the rows of all tasks.
                units = found[index].units
                term = strength * divergence(task, other, outputs[index], units).sum() if strength else other[:0].sum()
                terms[index] = terms[index] + term
        return terms

    def noise(self, batch: PackedBatch, device: torch.device, size: int) -> Tensor:
        """Return a random perturbation [N, size] with which the gradient ascent starts."""
        return self._config.noise * torch.randn(batch.num_tokens, size, device=device)

    def _any(self, strengths: Mapping[str, float]) -> bool:
        return any(self.scale[name] * strength for name, strength in strengths.items())

    def _taught(self, batch: PackedBatch, begun: RandomState, training: bool) -> list[Tensor]:
        if self.teacher is None:
            raise ValueError("smart.proximal: there is no teacher yet: call start_teacher before the first step")
        self.teacher.to(batch.input_ids.device).train(training)
        after = RandomState.capture(batch.input_ids.device)
        begun.restore()
        with torch.no_grad():
            found = self.teacher.examples(batch)
        after.restore()
        return [examples.outputs for examples in found]

    def _perturbation(
        self, model: SmartModel, batch: PackedBatch, outputs: list[Tensor], begun: RandomState, noise: Tensor
    ) -> Tensor:
        """Return the perturbation n [N, d] after the steps of gradient ascent from `noise`.

        The model runs without the sink, since only the perturbation needs a gradient.
        """
        lengths = batch.cu_seqlens.diff()
        for _ in range(self._config.steps):
            noise.requires_grad_()
            begun.restore()
            found = model.examples(batch, noise=noise)
            tasks = enumerate(self._recipe.tasks.items())
            distance = sum(
                divergence(task, found[index].outputs, outputs[index], found[index].units).sum()
                for index, (name, task) in tasks
                if self.scale[name] * self._adversarial[name]
            )
            assert isinstance(distance, Tensor)
            (gradient,) = torch.autograd.grad(distance, noise)
            largest = pool(gradient.abs(), batch.cu_seqlens, mode="max").amax(dim=1, keepdim=True)
            unit = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny).repeat_interleave(
                lengths, dim=0, output_size=len(gradient)
            )
            noise = (noise.detach() + self._config.step_size * unit).clamp(-self._config.epsilon, self._config.epsilon)
        return noise


class SmartModel(nn.Module):
    """Base class of a model whose losses can have SMART's terms.

    smart: computes the terms; None for a model without them.
    """

    smart: Smart | None

    @property
    def hidden_size(self) -> int:
        """Number of columns of the embedded tokens, so of the noise."""
        raise NotImplementedError

    def examples(
        self, batch: PackedBatch, task_grads: Sink | None = None, noise: Tensor | None = None
    ) -> list[Examples]:
        """Return an `Examples` for each task.

        task_grads: sink for the gradients per task. noise [N, d]: added to the embedded tokens.
        """
        raise NotImplementedError


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units | None = None) -> Tensor:
    """Return l(p, q) [E], the distance of two outputs p and q [E, num_outputs] of a task's head.

    For scores it is the squared difference, for a head that scores units the divergence of its
    type, otherwise KL(p, q) + KL(q, p), which is summed over the labels of type multilabel.
    """
    match kind(task):
        case "units":
            assert units is not None
            return UNIT_TYPES[task.type].divergence(task, p, q, units)
        case "score":
            return (p - q).square().sum(1)
        case "binary" | "labels":
            return ((p.sigmoid() - q.sigmoid()) * (p - q)).sum(1)
    # The sum of both divergences is one product of differences. Computed one by one, divergences
    # of nearly equal outputs would be little more than rounding errors.
    of = ordinal_log_probabilities if kind(task) == "ordinal" else partial(torch.log_softmax, dim=1)
    log_p, log_q = of(p), of(q)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


def _check_divergence(name: str, task: TaskConfig) -> None:
    """Raise UserError if the outputs of a task's head have no distance."""
    none = torch.zeros(0, num_outputs(task))
    example = torch.zeros(0, dtype=torch.int64)
    try:
        divergence(task, none, none, Units(example, torch.zeros(1, dtype=torch.int64), None, (0,)))
    except UserError as error:
        raise UserError(f"tasks.{name}: {error}") from None


def _per_task(key: str, given: float | Mapping[str, float], tasks: list[str]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(tasks, given)
    for name in given:
        if name not in tasks:
            raise unknown_name(f"task in {key}", name, tasks)
    return {name: given.get(name, 0.0) for name in tasks}


def _check(recipe: Recipe, adversarial: bool) -> None:
    config, precision = recipe.smart, recipe.engine.precision
    if recipe.engine.zero == 3:
        raise UserError(
            "smart with engine.zero: 3: its inner gradients and its teacher need weights outside of the forward and "
            "backward for which ZeRO 3 gathers them; use engine.zero 0, 1 or 2"
        )
    if recipe.deepspeed.get("torch_autocast", {}).get("enabled"):
        precision = "bf16"
    if adversarial and precision in _SPACING:
        for key in ("noise", "epsilon"):
            value = getattr(config, key)
            if value < _SPACING[precision]:
                raise UserError(
                    f"smart.{key}: {value} is lost: {precision} rounds an embedding of 1 to {_SPACING[precision]:.2g}. "
                    "Use at least that, or precision: fp32"
                )
