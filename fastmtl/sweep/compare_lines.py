"""Figures of a comparison: scores, differences from the first method, conflicts, time and memory.

A difference is paired by seed: the same seed draws the same rows and the same new weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.sweep.compare import Compared
from fastmtl.sweep.runs import Result
from fastmtl.tracking.metrics_file import read_metrics
from fastmtl.tracking.titles import title_of

Difference = tuple[float, float | None]  # mean and half-width of its 95 % interval; None with one pair


@dataclass(frozen=True)
class Line:
    """The figures of a method.

    scores: {column: values by seed}; the columns are the tasks' own metrics and "mean".
    differences: {column: paired difference from the first method}; {} for the first method.
    conflicts: {two tasks, or "all": the share of steps in which their gradients' cosine was
    negative}, over all runs; {} for a method that computes no cosines. seconds: of each run.
    memory: MiB at most, of each run. failed: runs without a mean score.
    """

    method: str
    seeds: list[int]
    scores: dict[str, list[float]]
    differences: dict[str, Difference]
    conflicts: dict[str, float]
    seconds: list[float]
    memory: list[float]
    failed: int

    @property
    def difference(self) -> Difference | None:
        return self.differences.get("mean")


def lines_of(directory: Path, compared: Sequence[Compared]) -> list[Line]:
    """Return a line per method, in their order. directory: that of the comparison."""
    lines: list[Line] = []
    for method in compared:
        runs = [(r.point, found) for r in method.results if (found := scored(r))]
        seeds = [point.settings["seed"] for point, _ in runs]
        tasks = method.results[0].point.recipe.tasks
        scores = {
            f"{name} {title_of(task.metric_name)}": [found["dev"][name][task.metric_name] for _, found in runs]
            for name, task in tasks.items()
            if all(name in found["dev"] for _, found in runs)
        }
        scores["mean"] = [found["mean"] for _, found in runs]
        lines.append(
            Line(
                method.method,
                seeds,
                scores,
                _differences(lines[0], seeds, scores) if lines else {},
                _conflicts([directory / "points" / point.folder for point, _ in runs]),
                [found["seconds"] for _, found in runs],
                [found["memory_mib"] for _, found in runs if found.get("memory_mib")],
                len(method.results) - len(runs),
            )
        )
    return lines


def scored(result: Result) -> dict[str, Any] | None:
    """Return the results of a run; None for a failed one, and for a metric that is not a number."""
    return result.results if result.results is not None and result.results["mean"] is not None else None


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % confidence interval of a mean (Student's t)."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text; "" without values."""
    if not values:
        return ""
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):.{digits}f}"


def _differences(first: Line, seeds: Sequence[int], scores: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    found = {}
    for column, values in scores.items():
        others = dict(zip(first.seeds, first.scores.get(column, ()), strict=False))
        pairs = [value - others[seed] for seed, value in zip(seeds, values, strict=True) if seed in others]
        if pairs:
            found[column] = (statistics.mean(pairs), half_width(pairs))
    return found


def _conflicts(places: Sequence[Path]) -> dict[str, float]:
    """Return {two tasks, or "all": share of negative cosines} over all steps of some runs."""
    signs: dict[str, list[bool]] = {}
    for place in places:
        for line in read_metrics(place / "metrics.jsonl"):
            for pair, cosine in line.get("cosines", {}).items():
                if cosine is not None:
                    signs.setdefault("all", []).append(cosine < 0)
                    signs.setdefault(pair, []).append(cosine < 0)
    return {pair: statistics.mean(map(float, negative)) for pair, negative in signs.items()}
