"""The part of the report about conflicts between the tasks' gradients."""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from fastmtl.config import Recipe
from fastmtl.pages import page, plots
from fastmtl.pages.heat_map import Cell, heat_map

PAIRS = 10  # curves that a plot can have


def gradient_parts(recipe: Recipe, steps: list[dict[str, Any]]) -> list[str]:
    """Return the HTML of figures and facts; [] if no step has cosines.

    steps: lines of metrics.jsonl.
    """
    with_cosines = [line for line in steps if line["cosines"]]
    if not with_cosines:
        return []
    at = [line["step"] for line in with_cosines]
    pairs = dict.fromkeys(pair for line in with_cosines for pair in line["cosines"])
    cosines = {pair.replace("/", " · "): (at, [line["cosines"].get(pair) for line in with_cosines]) for pair in pairs}
    rate = {"conflict rate": (at, [line["conflict_rate"] for line in with_cosines])}
    norms = {
        name: (at, [line["task_norms"].get(name) for line in with_cosines])
        for name in recipe.task_names
        if any(line["task_norms"].get(name) for line in with_cosines)
    }
    if len(pairs) > PAIRS:
        shown = _cosine_table(recipe.task_names, with_cosines)
    else:
        svg = plots.curves(cosines, name="cosines", ylabel="cosine", zero_line=True, size=plots.WIDE)
        shown = page.figure("Cosine between task gradients", svg)
    result = [
        shown,
        page.figure(
            "Conflict rate",
            plots.curves(rate, name="conflict rate", ylabel="share of pairs", ylim=(-0.03, 1.03)),
        ),
    ]
    if norms:
        svg = plots.curves(norms, name="gradient norms", ylabel="norm", log=True, size=plots.TALL)
        result.append(page.figure("Norm of the task gradients", svg))
    return [*result, _surgery(steps)]


def _surgery(steps: list[dict[str, Any]]) -> str:
    """Return the HTML of three facts: the time and memory of surgery, and the skipped steps."""
    skipped = collections.Counter(line["skipped"] for line in steps if line["skipped"])
    reasons = ", ".join(f"{name} {count:,}" for name, count in skipped.items())
    seconds = statistics.median(line["surgery_seconds"] for line in steps)
    return page.facts(
        {
            "time in surgery, median step": f"{1e3 * seconds:.1f} ms",
            "task gradients held": f"{max(line['surgery_bytes'] for line in steps) / 2**20:.1f} MiB",
            "steps skipped, gradient not finite": f"{sum(skipped.values()):,}{f' ({reasons})' if reasons else ''}",
        }
    )


def _cosine_table(names: list[str], steps: list[dict[str, Any]]) -> str:
    """Return the HTML of the mean cosine of each pair of tasks, with the share of negative ones."""

    def cell(one: str, other: str) -> Cell:
        lines = (line["cosines"] for line in steps)
        found = [line[pair] for line in lines for pair in (f"{one}/{other}", f"{other}/{one}") if pair in line]
        finite = [value for value in found if value is not None]
        if not finite:
            return Cell(math.nan, "")
        mean = statistics.fmean(finite)
        return Cell(mean, f"{mean:.2f}", f"{statistics.fmean(value < 0 for value in finite):.0%}")

    rows = {one: [cell(one, other) for other in names] for one in names}
    return heat_map("Mean cosine between task gradients, share of negative ones", "task", names, rows)
