"""The table of a run's phases, from its metrics.jsonl."""

from __future__ import annotations

from typing import Any

from fastmtl.config import Recipe
from fastmtl.pages import page
from fastmtl.training.phases import phases_of


def phase_table(recipe: Recipe, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[str]:
    """Return the HTML of a table with a row for each phase that has begun, in a list.

    steps, evaluations: lines of metrics.jsonl. The list is empty for a run without phases.
    """
    rows = []
    for phase in phases_of(recipe) if recipe.phases else []:
        mine = [line for line in steps if line.get("phase") == phase.name]
        if not mine:
            continue
        means = [line["mean"] for line in evaluations if line.get("phase") == phase.name]
        peak: dict[str, float] = {}
        for line in mine:
            for name, rate in line["lr"].items():
                peak[name] = max(rate, peak.get(name, 0.0))
        settings = phase.recipe
        adapts = settings.adapter.name != "none" or settings.lora.used
        rows.append(
            [
                str(phase.name),
                "masked words" if phase.objective == "mlm" else ", ".join(settings.task_names),
                ", ".join(name for name in phase.parts if name != "adapters" or adapts),
                settings.adapter.name,
                settings.sampler.name,
                settings.gradient.method,
                ", ".join(f"{name} {rate:g}" for name, rate in peak.items()),
                f"{mine[0]['step']:,} to {mine[-1]['step']:,}",
                phase.keep,
                f"{max(means):.3f}" if means else "",
            ]
        )
    head = ["phase", "of", "trains", "adapter", "sampler", "gradient", "highest rates", "steps", "keeps", "best mean"]
    return [page.table("The run's phases", head, rows, frozenset())] if rows else []
