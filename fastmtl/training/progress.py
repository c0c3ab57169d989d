"""The position of a run, which checkpoints save, and the remaining steps of a phase."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastmtl.config import MLM
from fastmtl.data.corpus import Corpus
from fastmtl.data.masking import MaskedStream
from fastmtl.data.stream import BatchStream
from fastmtl.engine.checkpoint import Found
from fastmtl.engine.distributed import Ranks
from fastmtl.errors import UserError
from fastmtl.training.phases import Phase


@dataclass
class Progress:
    """The position of a run, saved in every checkpoint.

    All fields except step, seconds and data belong to the current phase. surgery, objectives:
    results of `state_dict` of GradientSurgery and Objectives. If train.max_steps ends a run within
    an epoch, the last checkpoint is saved before the final evaluation. So a longer run resumes as
    if it had not ended there, and a run of the same length only evaluates again.
    """

    step: int = 0  # optimiser steps done
    epoch: int = 0  # the current epoch, from 0
    step_in_epoch: int = 0
    epoch_steps: int = 0  # steps of the current epoch; depends on the number of processes
    best: float | None = None  # best value of early_stopping.metric so far
    epochs_without_gain: int = 0
    seconds: float = 0.0
    surgery: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    phase: int = 0  # from 0
    first_step: int = 0  # optimiser steps before the phase
    early: bool = False  # early stopping has ended the phase
    bests: dict[str, float] = field(default_factory=dict)  # for keep: best_of_each: best value of each task's metric
    data: dict[str, str] = field(default_factory=dict)  # digest of each task's rows, by task and split

    def next_phase(self) -> Progress:
        return Progress(
            step=self.step, seconds=self.seconds, phase=self.phase + 1, first_step=self.step, data=self.data
        )

    def gained(self, phase: Phase, dev: dict[str, dict[str, float]], value: float | None) -> list[str]:
        """Return the tasks whose current weights are the best so far, and record their metrics.

        dev: {task: {metric: value}}. value: that of early_stopping.metric, None without dev rows.
        With `keep: best_of_each` each task is judged by its own metric, and a task without dev rows
        is always returned. Otherwise `value` decides for all tasks together.
        """
        tasks = phase.recipe.tasks
        if phase.keep == "best_of_each":
            own = {name: dev[name][task.metric_name] for name, task in tasks.items() if name in dev}
            better = [name for name in tasks if name not in own or own[name] > self.bests.get(name, -math.inf)]
            self.bests.update({name: own[name] for name in better if name in own})
            return better
        if value is not None and self.best is not None and not value > self.best:
            return []
        self.best = value
        return list(tasks)


@dataclass
class Job:
    """A phase with its rows (`corpus`) and the stream of its training batches."""

    phase: Phase
    corpus: Corpus
    stream: BatchStream

    @classmethod
    def of(cls, phase: Phase, corpus: Corpus, tokenizer: Any, ranks: Ranks) -> Job:
        stream = BatchStream(corpus.train, phase.recipe, ranks.rank, ranks.world)
        if phase.objective == MLM:
            stream = MaskedStream(corpus.train, phase.recipe, tokenizer, ranks.rank, ranks.world)
        return cls(phase, corpus, stream)

    def last_step(self, at: Progress) -> int:
        """Return the optimiser step that ends the phase, counted from the start of the run."""
        train = self.phase.recipe.train
        steps = sum(self.stream.steps(epoch) for epoch in range(at.epoch, train.epochs)) - at.step_in_epoch
        last = at.step + max(steps, 0)
        return last if train.max_steps is None else min(last, at.first_step + train.max_steps)

    def is_over(self, at: Progress) -> bool:
        """Return True if the phase has no step left and its last epoch has been evaluated."""
        return at.early or at.epoch >= self.phase.recipe.train.epochs or self._is_cut(at)

    def _is_cut(self, at: Progress) -> bool:
        return at.step >= self.last_step(at) and at.step_in_epoch == 0

    def fit(self, at: Progress) -> str | None:
        """Correct `at`, in place, if its epoch has another number of steps than when it was saved.

        The number depends on the number of processes. The new position is at the same share of the
        epoch. Returns a line for the user about the correction, or None.
        """
        if not at.step_in_epoch or at.epoch >= self.phase.recipe.train.epochs:
            return None
        before, now = at.epoch_steps, self.stream.steps(at.epoch)
        if before == now:
            return None
        done = at.step_in_epoch
        at.step_in_epoch = min(now, round(done * now / before))
        return f"epoch {at.epoch + 1} had {before} steps and has {now} now: step {done} became step {at.step_in_epoch}"


def resumed(found: Found | None, phases: list[Phase]) -> Progress:
    """Return the position that a checkpoint has saved, or the beginning of a run for None.

    Raises UserError if the recipe's phases do not include the checkpoint's.
    """
    if found is None:
        return Progress()
    at, name = Progress(**found.state), found.manifest.get("phase")
    if at.phase >= len(phases) or phases[at.phase].name != name:
        names = [phase.name or "the only one" for phase in phases]
        raise UserError(
            f"{found.path} was saved in phase {at.phase} ({name or 'the only one'}), the recipe's phases are "
            f"{', '.join(names)}; a resumed run keeps them"
        )
    return at
