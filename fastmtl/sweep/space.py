"""The search space of a sweep: distributions of settings, and the settings of a trial.

In a grid file, a mapping {low, high} with `log: true` or `step` is a distribution of numbers, and a
list of values a choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmtl.errors import UserError, quoted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KEYS = {"low", "high", "log", "step"}


def is_space(values: Any) -> bool:
    """Return whether the content of a grid file has a distribution."""
    return isinstance(values, dict) and any(isinstance(given, dict) for given in values.values())


class Space:
    """Settings with a distribution each.

    values: {section.key: list of values, or {low, high, log, step}}. file: the grid, for messages.
    Raises UserError, naming the key, for anything else.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.distributions: dict[str, BaseDistribution] = {}
        for key, given in values.items():
            try:
                self.distributions[str(key)] = _distribution(given)
            except ValueError as error:
                raise UserError(f"{file}: {key}: {error}") from None

    def ends(self, key: str) -> list[Any]:
        """Return the values of a list, or low and high of a distribution."""
        from optuna.distributions import CategoricalDistribution

        distribution: Any = self.distributions[key]
        if isinstance(distribution, CategoricalDistribution):
            return [self.settings({key: choice})[key] for choice in distribution.choices]
        return [distribution.low, distribution.high]

    def fits(self, key: str, former: BaseDistribution) -> bool:
        """Return whether the trials of a former distribution can be in one search with this one."""
        from optuna.distributions import check_distribution_compatibility

        try:
            check_distribution_compatibility(former, self.distributions[key])
        except ValueError:
            return False
        return True

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a trial with the parameters `params` of Optuna."""
        return {key: json.loads(value) if isinstance(value, str) else value for key, value in params.items()}


def _distribution(given: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(given, list) and given:
        # As JSON text, since Optuna stores numbers, text, booleans and null only.
        return CategoricalDistribution([json.dumps(value, sort_keys=True) for value in given])
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= KEYS:
        example = "{low: 1.0e-6, high: 1.0e-4, log: true}"
        raise ValueError(f"give a list of values or a distribution like {example}, not {quoted(given)}")
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    numbers = [low, high] + ([] if step is None else [step])
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers) or not isinstance(log, bool):
        raise ValueError(f"low, high and step are numbers, log is true or false, not {quoted(given)}")
    if not all(map(math.isfinite, numbers)) or not low < high or (log and low <= 0) or (step is not None and step <= 0):
        raise ValueError(f"low is below high, both finite, and with log or step above 0: {quoted(given)}")
    if log and step is not None:
        raise ValueError("log and step exclude each other: take one of the two")
    if all(isinstance(n, int) for n in numbers):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=log, step=None if step is None else float(step))
