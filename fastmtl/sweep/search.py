"""A search with Optuna: trials in child processes, pruned by their dev scores.

study.db in the sweep's directory has all trials, so that the same command continues a search. A
trial that a stop has interrupted continues from its checkpoint.
"""

from __future__ import annotations

import json
import os
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
from fastmtl.sweep.grid import Point
from fastmtl.sweep.runs import FAILED, INTERRUPTED, OK, Result, ended, finished, starting, training_arguments
from fastmtl.sweep.space import Space

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
class Running:
    """A trial that runs.

    number: that of the message, from 1. slot: from 0. reported: the number of evaluations that
    Optuna knows. told: the process has been told to end.
    """

    trial: Any
    number: int
    point: Point
    process: subprocess.Popen[bytes]
    place: Path
    slot: int
    reported: int = 0
    pruned: bool = False
    told: bool = False


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

    def run(self) -> tuple[list[Result], int]:
        """Run trials until the budget is used; return all results and a status.

        The status is 0, 1 if a trial failed, 130 after a stop (SIGTERM, Ctrl-C).
        """
        from optuna.trial import TrialState

        study = self._study()
        running: list[Running] = []
        until = None if self.budget.hours is None else time.monotonic() + 3600 * self.budget.hours
        with self._signals():
            while True:
                while not self._stopped and len(running) < self.budget.parallel and self._more(study, running, until):
                    running.append(self._begin(study, running))
                running = [one for one in running if not self._look(study, one)]
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

        study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{self.directory / 'study.db'}")
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

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="sweep",
            storage=f"sqlite:///{self.directory / 'study.db'}",
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
            load_if_exists=True,
        )
        # Another seed in each call, which would otherwise draw the first trials again.
        seed = load_recipe(self.recipe, self.overrides).seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.budget.parallel > 1)
        names = [name for trial in study.trials[:1] for name in trial.params]
        if names and set(names) != set(self.space.distributions):
            raise UserError(
                f"{self.directory} has a search of {', '.join(sorted(names))}: choose another place with --output"
            )
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

    def _begin(self, study: Any, running: list[Running]) -> Running:
        trial = study.ask(self.space.distributions)
        point = self._point(trial)
        place = self.directory / "points" / point.folder
        number = self._used(study) + len(running) + 1
        self.say(f"trial {number} of {self.budget.trials}: {point.name}")
        place.mkdir(parents=True, exist_ok=True)
        taken = {one.slot for one in running}
        slot = next(free for free in range(self.budget.parallel) if free not in taken)
        with (place / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*starting(self.launcher), *training_arguments(place, point)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,  # Ctrl-C reaches this process only, which ends its children
            )
        return Running(trial, number, point, process, place, slot)

    def _point(self, trial: Any) -> Point:
        return Point.of(self.recipe, self.overrides, self.space.settings(trial.params))

    def _environment(self, slot: int) -> dict[str, str]:
        """Return the environment of a trial: with several, one GPU or a part of the cores each."""
        environment = dict(os.environ)
        if self.budget.parallel > 1 and not self.launcher:
            devices = visible_devices()
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
            else:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.budget.parallel)))
        return environment

    def _look(self, study: Any, one: Running) -> bool:
        """Report a trial's new dev scores, and its end; return True if it has ended."""
        from optuna.trial import TrialState

        status = one.process.poll()
        means = evaluations(one.place)
        for number in range(one.reported, len(means)):
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
            results = None if error else finished(one.place)
            if results is None or results["mean"] is None:
                one.trial.set_user_attr("error", error or "the recipe has no dev rows, so there is no mean")
                study.tell(one.trial, state=TrialState.FAIL)
                self.say(f"trial {one.number}: {one.trial.user_attrs['error']}")
            else:
                study.tell(one.trial, results["mean"])
                self.say(f"trial {one.number}: mean {results['mean']:.4f}")
        return True

    def _result(self, trial: Any) -> Result:
        point = self._point(trial)
        if "pruned" in trial.user_attrs:
            return Result(point, None, f"pruned after {trial.user_attrs['pruned']} evaluations")
        return Result(point, finished(self.directory / "points" / point.folder), trial.user_attrs.get("error", ""))

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


def evaluations(place: Path) -> list[float]:
    """Return the mean dev score of each evaluation of a run so far.

    The last line of metrics.jsonl may be incomplete while the run writes it.
    """
    try:
        lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    means = []
    for line in lines:
        if '"dev"' in line:
            try:
                means.append(json.loads(line)["mean"])
            except (ValueError, KeyError):
                continue
    return means


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
