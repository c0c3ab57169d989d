"""The phases of a run: trained parts, settings and kept weights.

Every phase has its own recipe, the run's recipe with the phase's sections and tasks. A recipe
without `phases` is the recipe of its only phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from fastmtl.config import MLM, TRAINS, GradientConfig, PhaseConfig, Recipe, Section
from fastmtl.errors import UserError, unknown_name
from fastmtl.inference.selection import check_early_stopping, check_metrics

SEED_STEP = 10_000  # added per phase, so that each has another order of rows and other new weights
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    index: from 0. name: None for a run without phases. recipe: the recipe of this phase, without
    `phases`. parts: the trained ones of "encoder", "adapters" and "heads". objective: the losses of
    the tasks, or masked words. keep: the epoch whose weights are kept; best_of_each: for each task
    its best.
    """

    index: int
    name: str | None
    recipe: Recipe
    parts: tuple[str, ...]
    objective: Literal["tasks", "mlm"] = "tasks"
    keep: Literal["best", "best_of_each", "last"] = "best"

    @property
    def trains_shared(self) -> bool:
        """True if weights that tasks share are trained: the encoder, or a LoRA for all tasks."""
        return not self.recipe.encoder.freeze or (self.recipe.shares and "adapters" in self.parts)

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses in a step: the tasks, or `mlm`."""
        return [MLM] if self.objective == MLM else self.recipe.task_names


def phases_of(recipe: Recipe) -> list[Phase]:
    """Return the phases of a recipe in order; a recipe without `phases` has one.

    Raises UserError naming the phase for unknown names, contradicting settings and a phase that
    trains nothing.
    """
    from fastmtl.surgery.methods.table import find_method

    phases = split(recipe)
    for phase in phases:
        with _named(phase):
            find_method(phase.recipe.gradient.method, options=phase.recipe.gradient.options)
    return phases


def split(recipe: Recipe) -> list[Phase]:
    """Return the phases without checking their gradient methods, which would import torch."""
    if not recipe.phases:
        phases = [Phase(0, None, recipe, ("encoder", "adapters", "heads"))]
    else:
        if recipe.add_to is not None:
            raise UserError("phases do not go with add_to, which trains new tasks on an encoder that stays as it is")
        names = [given.name or f"phase-{index}" for index, given in enumerate(recipe.phases, start=1)]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"phases: two of them are named {name}")
        phases = []
        for index, (given, name) in enumerate(zip(recipe.phases, names, strict=True)):
            try:
                phases.append(_phase(recipe, given, index, name))
            except UserError as error:
                raise UserError(f"phases.{index} ({name}): {error}") from None
        _check_adapters(phases)
    for phase in phases:
        with _named(phase):
            check_metrics(phase.recipe)
            _check_average(phase.recipe)
            if phase.objective == "tasks":
                check_early_stopping(phase.recipe)
    return phases


@contextmanager
def _named(phase: Phase) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if phase.name is None:
            raise
        raise UserError(f"phases.{phase.index} ({phase.name}): {error}") from None


def _phase(recipe: Recipe, given: PhaseConfig, index: int, name: str) -> Phase:
    tasks = _tasks(recipe, given)
    update: dict[str, Any] = {
        "phases": [],
        "tasks": tasks,
        "seed": recipe.seed + SEED_STEP * index,
        "smart": _merged("smart", recipe.smart, None, list(tasks)),
        **{key: _merged(key, getattr(recipe, key), getattr(given, key), list(tasks)) for key in _SECTIONS},
    }
    if given.accumulation is not None:
        update["engine"] = recipe.engine.model_copy(update={"accumulation": given.accumulation})
    if given.objective == MLM:
        return _mlm_phase(recipe, given, update, index, name)
    if given.trains not in TRAINS:
        raise unknown_name("part to train", given.trains, TRAINS)
    parts = ("encoder", "adapters", "heads") if given.trains == "all" else tuple(given.trains.split("+"))
    freeze = recipe.encoder.freeze if given.trains == "all" else "encoder" not in parts
    update["encoder"] = recipe.encoder.model_copy(update={"freeze": freeze})
    adapts = recipe.lora.used or not update["adapter"].name == update["adapter"].top == "none"
    if "adapters" in parts and given.trains != "all" and not adapts:
        raise UserError(f"trains: {given.trains}, but adapter.name is none and there is no lora")
    phase = Phase(index, name, recipe.model_copy(update=update), parts, keep=given.keep)
    if given.keep == "best_of_each" and phase.trains_shared:
        other = "trains: heads, adapters or adapters+heads" if not recipe.lora.shared else "trains: heads"
        raise UserError(
            "keep: best_of_each needs a frozen encoder and no trained lora.tasks: shared: where tasks share what is "
            f"trained, the best epoch of one cannot be taken alone; use {other}"
        )
    if not phase.trains_shared and given.gradient is None:  # sum: the tasks share nothing that is trained
        phase.recipe.gradient = GradientConfig()
    return phase


def _mlm_phase(recipe: Recipe, given: PhaseConfig, update: dict[str, Any], index: int, name: str) -> Phase:
    if given.trains not in ("all", "encoder"):
        raise UserError(f"objective: mlm trains the encoder, not {given.trains}")
    if "keep" in given.model_fields_set and given.keep != "last":
        raise UserError(f"objective: mlm has no dev scores that keep: {given.keep} could choose by; leave keep out")
    if given.gradient is not None and update["gradient"].method != "sum":
        raise UserError(
            f"objective: mlm has one loss over all texts, so gradient.method: {update['gradient'].method} has nothing "
            "to merge; leave it out"
        )
    if recipe.engine.zero == 3:
        raise UserError(
            "objective: mlm reads the word embeddings a second time, as the output layer; ZeRO 3 holds weights only "
            "inside their own module's forward: use engine.zero 0, 1 or 2"
        )
    if update["sampler"].name == "compromise":
        raise UserError("objective: mlm has one loss, and sampler.name: compromise weighs those of tasks; use another")
    update["gradient"] = GradientConfig(method="sum")
    update["encoder"] = recipe.encoder.model_copy(update={"freeze": False})
    return Phase(index, name, recipe.model_copy(update=update), ("encoder",), "mlm", "last")


_SECTIONS = ("adapter", "sampler", "gradient", "optimizer", "schedule", "train", "early_stopping")
_BY_TASK = {"sampler": ("batch_size", "subsample"), "adapter": ("dropout",), "smart": ("strength", "proximal")}


def _merged(key: str, ours: S, given: S | None, tasks: Iterable[str]) -> S:
    """Return the recipe's section `ours` with the settings that the phase gives in `given`.

    key: the name of the section. Numbers per task are kept for `tasks` only.
    """
    values = {name: getattr(ours, name) for name in type(ours).model_fields}
    for name in _BY_TASK.get(key, ()):
        if isinstance(values[name], dict):
            values[name] = {task: number for task, number in values[name].items() if task in tasks}
    if given is not None:
        values.update({name: getattr(given, name) for name in given.model_fields_set})
    return type(ours).model_validate(values)


def _tasks(recipe: Recipe, given: PhaseConfig) -> dict[str, Any]:
    for name in [*(given.tasks or ()), *given.loss]:
        if name not in recipe.tasks:
            raise unknown_name("task", name, recipe.tasks)
    if given.tasks is not None and not given.tasks:
        raise UserError("tasks: name at least one, or leave the key out for all")
    chosen = {name: task for name, task in recipe.tasks.items() if given.tasks is None or name in given.tasks}
    for name, loss in given.loss.items():
        if name not in chosen:
            raise UserError(f"loss: {name} is none of the phase's tasks: {', '.join(chosen)}")
        try:
            chosen[name] = type(chosen[name]).model_validate({**chosen[name].model_dump(), "loss": loss})
        except ValidationError as error:
            raise UserError(f"loss: {name}: {error.errors()[0]['msg']}") from None
    return chosen


def _check_average(recipe: Recipe) -> None:
    """Raise UserError for `train.ema` in ZeRO 3, which keeps no whole weights between passes."""
    if recipe.train.ema is not None and recipe.engine.zero == 3:
        raise UserError("train.ema averages whole weights, which ZeRO 3 divides: use engine.zero 0, 1 or 2")


def _check_adapters(phases: list[Phase]) -> None:
    """Raise UserError if a phase changes the adapters but leaves out a task of an earlier phase.

    All tasks of a model have the same kind of adapter, so the left-out task could not keep its own.
    """
    known: set[str] = set()
    before = phases[0].recipe.adapter
    for phase in phases:
        adapter = phase.recipe.adapter
        missing = known - set(phase.recipe.tasks)
        if missing and adapter.model_copy(update={"dropout": before.dropout, "init": before.init}) != before:
            raise UserError(
                f"phases.{phase.index} ({phase.name}): it changes the adapters of all tasks, but leaves out "
                f"{', '.join(sorted(missing))}, which an earlier phase trains; name every task so far"
            )
        known |= set(phase.recipe.tasks)
        before = adapter
