"""A search with Optuna: trials in child processes, pruned by their dev scores.

study.db in the sweep's directory has all trials, so that the same command continues a search. A
trial that a stop has interrupted continues from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from fastmtl.config import load_recipe
from fastmtl.errors import UserError
from fastmtl.sweep.child_process import end_with_parent
from fastmtl.sweep.grid import Point
from fastmtl.sweep.runs import (
    FAILED,
    INTERRUPTED,
    OK,
    Result,
    ended,
    finished,
    starting,
    training_arguments,
    wait_until_free,
)
from fastmtl.sweep.space import Space
from fastmtl.sweep.study import open_study
from fastmtl.sweep.trials import Running, ended_at_errors, environment_of, evaluations

POLL = 0.5  # seconds between two looks at the running trials


@dataclass(frozen=True)
class Budget:
    """The extent of a search.

    trials: the number of trials in the study. hours: no trial begins after this time; or None.
    parallel: the number of trials that run at the same time.
    """

    trials: int
    hours: float | None = None
    parallel: int = 1


@dataclass
class Search:
    """A search in one directory.

    recipe, overrides: those of `fastmtl train`; a trial's settings are applied after them.
    launcher: words of a command in front of `fastmtl train`. say: prints a line for the user.
    """

    directory: Path
    recipe: str
    overrides: Sequence[str]
    space: Space
    budget: Budget
    launcher: Sequence[str]
    say: Callable[[str], None]
    _stopped: bool = field(default=False, init=False)

    def check(self) -> None:
        """Raise UserError for a space with a value that the recipe cannot have.

        Every value of a list and both ends of a distribution are tried, with the first value of
        each other setting.
        """
        first = {key: self.space.ends(key)[0] for key in self.space.distributions}
        for key in self.space.distributions:
            for value in self.space.ends(key):
                try:
                    Point.of(self.recipe, self.overrides, {**first, key: value})
                except UserError as error:
                    raise UserError(*(f"{self.space.file}, {key}={value}: {line}" for line in error.lines)) from None

    def run(self) -> tuple[list[Result], int]:
        """Run trials until the budget is used; return all results and a status.

        The status is 0, 1 if a trial failed, 130 after a stop (SIGTERM, Ctrl-C). Raises UserError
        for a directory with another search.
        """
        from optuna.trial import TrialState

        study = self._study()
        running: list[Running] = []
        until = None if self.budget.hours is None else time.monotonic() + 3600 * self.budget.hours
        with self._signals(), ended_at_errors(running):
            while True:
                while not self._stopped and len(running) < self.budget.parallel and self._more(study, running, until):
                    begun = self._begin(study, running)
                    if begun is not None:
                        running.append(begun)
                running[:] = [one for one in running if not self._look(study, one)]
                if not running and (self._stopped or not self._more(study, running, until)):
                    break
                time.sleep(POLL)
        results = [
            self._result(trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.state != TrialState.FAIL or "error" in trial.user_attrs  # others have been begun again
        ]
        failed = any(result.results is None and result.error.startswith("failed") for result in results)
        return results, INTERRUPTED if self._stopped else FAILED if failed else OK

    def importances(self) -> dict[str, float]:
        """Return {setting: share of the variance of the scores that it explains}, largest first.

        {} with fewer than four finished trials, or if all scores are equal.
        """
        import optuna
        from optuna.trial import TrialState

        study = open_study(self.directory, load_recipe(self.recipe, self.overrides), self.space)
        found = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(found) < 4 or len({trial.value for trial in found}) < 2:
            return {}
        return optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )

    def _study(self) -> Any:
        """Open the study; put the trials that a stop has interrupted in front of all others."""
        import optuna
        from optuna.trial import TrialState

        recipe = load_recipe(self.recipe, self.overrides)
        study = open_study(self.directory, recipe, self.space)
        # Another seed in each call, which would otherwise draw the first trials again.
        seed = recipe.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.budget.parallel > 1)
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        return study

    def _more(self, study: Any, running: list[Running], until: float | None) -> bool:
        in_time = until is None or time.monotonic() < until
        return in_time and self._used(study) + len(running) < self.budget.trials

    def _used(self, study: Any) -> int:
        """Return the number of trials that have ended, without those that a stop interrupted."""
        from optuna.trial import TrialState

        ends = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        return sum(trial.state != TrialState.FAIL or "error" in trial.user_attrs for trial in ends)

    def _begin(self, study: Any, running: list[Running]) -> Running | None:
        """Start the next trial; return None if it has ended at once.

        Its settings may be invalid together, or those of an earlier trial, which is not repeated.
        """
        trial = study.ask(self.space.distributions)
        number = self._used(study) + len(running) + 1
        try:
            point = self._point(trial)
        except UserError as error:
            self.say(f"trial {number} of {self.budget.trials}: {self.space.settings(trial.params)}")
            self._fail(study, trial, number, f"failed: {error}")
            return None
        self.say(f"trial {number} of {self.budget.trials}: {point.name}")
        place = self._place(trial, point, running)
        if (known := finished(place)) is not None:
            self._end(study, trial, number, known)
            return None
        taken = {one.slot for one in running}
        slot = next(free for free in range(self.budget.parallel) if free not in taken)
        wait_until_free(place)
        with (place / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*starting(self.launcher), *training_arguments(place, point)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_of(slot, 1 if self.launcher else self.budget.parallel),
                start_new_session=True,  # Ctrl-C reaches this process only, which ends its children
                preexec_fn=end_with_parent,
            )
        return Running(trial, number, point, process, place, slot)

    def _place(self, trial: Any, point: Point, running: list[Running]) -> Path:
        """Return the folder of a trial: another one if a running trial has the same settings."""
        taken = {one.place.name for one in running}
        names = [point.folder, *(f"{point.folder}-{number}" for number in range(2, len(taken) + 2))]
        name = next(name for name in names if name not in taken)
        trial.set_user_attr("folder", name)
        return self.directory / "points" / name

    def _point(self, trial: Any) -> Point:
        return Point.of(self.recipe, self.overrides, self.space.settings(trial.params))

    def _look(self, study: Any, one: Running) -> bool:
        """Report a trial's new dev scores, and its end; return True if it has ended."""
        from optuna.trial import TrialState

        status = one.process.poll()
        means = evaluations(one.place)
        for number in range(one.reported, len(means)):
            if math.isfinite(means[number]):
                one.trial.report(means[number], number)
        one.reported = len(means)
        if status is None:
            one.pruned = one.pruned or (not self._stopped and one.trial.should_prune())
            if (one.pruned or self._stopped) and not one.told:
                one.told = True
                one.process.terminate()
            return False
        if one.pruned:
            one.trial.set_user_attr("pruned", one.reported)
            study.tell(one.trial, state=TrialState.PRUNED)
            shutil.rmtree(one.place / "checkpoints", ignore_errors=True)
            self.say(f"trial {one.number}: pruned after {one.reported} evaluations")
        elif self._stopped:
            pass  # it stays a running trial of the study, for the next call
        else:
            error = ended(one.place, status)
            results = finished(one.place)
            if error or results is None:
                self._fail(study, one.trial, one.number, error)
            else:
                self._end(study, one.trial, one.number, results)
        return True

    def _end(self, study: Any, trial: Any, number: int, results: dict[str, Any]) -> None:
        if results["mean"] is None:
            why = "a metric is not a number" if results["dev"] else "the recipe has no dev rows"
            self._fail(study, trial, number, f"failed: there is no mean dev score: {why}")
            return
        study.tell(trial, results["mean"])
        self.say(f"trial {number}: mean {results['mean']:.4f}")

    def _fail(self, study: Any, trial: Any, number: int, error: str) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("error", error)
        study.tell(trial, state=TrialState.FAIL)
        self.say(f"trial {number}: {error}")

    def _result(self, trial: Any) -> Result:
        error = trial.user_attrs.get("error", "")
        try:
            point = self._point(trial)
        except UserError:
            return Result(
                Point(self.space.settings(trial.params), load_recipe(self.recipe, self.overrides)), None, error
            )
        if "pruned" in trial.user_attrs:
            return Result(point, None, f"pruned after {trial.user_attrs['pruned']} evaluations")
        place = self.directory / "points" / trial.user_attrs.get("folder", point.folder)
        return Result(point, None if error else finished(place), error)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop the search on SIGTERM and Ctrl-C: running trials save a checkpoint and end."""

        def stop(number: int, _: FrameType | None) -> None:
            self._stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UserError("a search over distributions needs Optuna: pip install 'fastmtl-torch[optuna]'")
