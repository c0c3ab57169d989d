"""The runs of `fastmtl compare`: one recipe with several methods, each with several seeds.

A method is a gradient method, with options as in `cagrad:c=0.4`, a weighting of the losses, or
`tuned`: the plain sum with weights of the tasks that Optuna has searched for the first seed. The
search of `tuned` has as many runs as the other methods together, unless the user says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fastmtl.config import WeightingConfig, load_recipe
from fastmtl.errors import UserError
from fastmtl.recipes import yaml_reader
from fastmtl.sweep.grid import Point
from fastmtl.sweep.runs import INTERRUPTED, OK, Result, check_unchanged, run_points
from fastmtl.sweep.search import Budget, Search, check_optuna
from fastmtl.sweep.space import Space

TUNED = "tuned"
WEIGHTS = {"low": 0.1, "high": 10.0, "log": True}  # the range of the searched weights


@dataclass(frozen=True)
class Compared:
    """The results of a method, one per seed.

    weights: {task: weight} of `tuned`, else None. trials: those that searched the weights.
    """

    method: str
    results: list[Result]
    weights: dict[str, float] | None = None
    trials: int = 0


@dataclass
class Comparison:
    """The methods to compare on one recipe.

    recipe, overrides: those of `fastmtl train`. tuning: the number of trials of `tuned`; None for
    as many as the runs of all other methods. say: prints a line for the user.
    """

    directory: Path
    recipe: str
    overrides: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    tuning: int | None
    launcher: Sequence[str]
    say: Callable[[str], None]

    def check(self) -> None:
        """Raise UserError for bad methods or settings, no dev rows, and other former runs."""
        from fastmtl.training.phases import phases_of

        for given, what in ((self.methods, "method"), (self.seeds, "seed")):
            if not given or len(set(given)) < len(given):
                raise UserError(f"--{what}s: name at least one, and each once")
        recipe = load_recipe(self.recipe, self.overrides)
        if not any(recipe.data.has_dev(task.data) for task in recipe.tasks.values()):
            raise UserError("compare needs dev rows: name a dev file, as tasks.<task>.data.dev, or set dev_fraction")
        for method in self.methods:
            if method == TUNED:
                check_optuna()
            settings = {} if method == TUNED else settings_of(method)
            phases_of(Point.of(self.recipe, self.overrides, settings).recipe)
            if method != TUNED:  # its points are known after the search, which compares recipes itself
                check_unchanged(self.directory, self._points(settings))

    def _points(self, settings: dict[str, Any]) -> list[Point]:
        return [Point.of(self.recipe, self.overrides, {**settings, "seed": seed}) for seed in self.seeds]

    def run(self) -> tuple[list[Compared], int]:
        """Run all methods that are not finished; return their results and a status."""
        found: list[Compared] = []
        status = OK
        for method in self.methods:
            weights = None
            if method == TUNED:
                weights, status = self._searched(status)
                if status == INTERRUPTED:
                    return found, status
                if weights is None:
                    self.say(f"method {TUNED}: no trial has a score, so it is left out")
                    continue
            settings = tuned_settings(weights) if weights is not None else settings_of(method)
            self.say(f"method {method}")
            results, new = run_points(self.directory, self._points(settings), self.say, self.launcher)
            found.append(Compared(method, results, weights, self._trials if weights else 0))
            if new == INTERRUPTED:
                return found, new
            status = max(status, new)
        return found, status

    @property
    def _trials(self) -> int:
        return self.tuning or max(1, len(self.methods) - 1) * len(self.seeds)

    def _searched(self, status: int) -> tuple[dict[str, float] | None, int]:
        """Search the weights of the tasks; return the best ones, None after a stop or failure."""
        trials = self._trials
        tasks = load_recipe(self.recipe, self.overrides).task_names
        space = Space(Path("--methods tuned"), {f"tasks.{name}.weight": WEIGHTS for name in tasks})
        directory = self.directory / "tuning"
        directory.mkdir(parents=True, exist_ok=True)
        fixed = [f"{key}={value}" for key, value in settings_of("sum").items()]
        lines = [*self.overrides, *fixed, f"seed={self.seeds[0]}"]
        self.say(f"method {TUNED}: searching the tasks' weights in {trials} trials")
        search = Search(directory, self.recipe, lines, space, Budget(trials), self.launcher, self.say)
        results, new = search.run()
        scored = [result for result in results if result.results is not None and result.results["mean"] is not None]
        if new == INTERRUPTED or not scored:
            return None, max(status, new)
        best = max(scored, key=lambda result: (result.results or {})["mean"])
        return {key.split(".")[1]: value for key, value in best.point.settings.items()}, max(status, new)


def settings_of(method: str) -> dict[str, Any]:
    """Return the settings of a method by name, with the options after a colon (`cagrad:c=0.4`).

    Raises UserError for an unknown name, and for options that are not KEY=VALUE.
    """
    from fastmtl.surgery.methods.table import method_names, unknown_method

    method, *given = method.split(":")
    options = dict(_option(method, text) for text in given)
    weightings = get_args(WeightingConfig.model_fields["name"].annotation)
    if method in weightings and method != "fixed" and not options:
        gradient = "equal" if method in ("gradnorm", "excess_mtl") else "sum"
        return {"gradient.method": gradient, "weighting.name": method}
    if method not in method_names():
        known = [*method_names(), *(name for name in weightings if name != "fixed"), TUNED]
        if options and method in known:
            raise UserError(f"--methods {method}: options after a colon are for gradient methods")
        raise unknown_method("method", method, known)
    settings = {"gradient.method": method, "weighting.name": "fixed"}
    return {**settings, "gradient.options": options} if options else settings


def _option(method: str, text: str) -> tuple[str, Any]:
    """Return the key and the value of `key=value`; the value is read as YAML, as an override is."""
    key, equals, value = text.partition("=")
    try:
        if key and equals and value:
            return key, yaml_reader.load(value)
    except ValueError:
        pass
    raise UserError(f"--methods {method}:{text}: an option is written KEY=VALUE, as in cagrad:c=0.4")


def tuned_settings(weights: dict[str, float]) -> dict[str, Any]:
    """Return the settings of the sum with these weights of the tasks."""
    return {**settings_of("sum"), **{f"tasks.{name}.weight": weight for name, weight in weights.items()}}
