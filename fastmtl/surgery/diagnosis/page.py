"""The page of a diagnosis: heat maps by layer, norms, and the history over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmtl.pages import page, plots
from fastmtl.pages.heat_map import Cell, heat_map
from fastmtl.surgery.diagnosis.measured import ALL, Measured, mean

_BINS = 16  # columns of a history
_STRONGEST = 0.5  # cosine of this size has the full shade: gradients of many numbers rarely exceed it


def diagnosis_page(measured: Measured) -> str:
    """Return the HTML of a page on at least one measured step."""
    body = [
        f"<h1>Do the tasks agree, layer by layer?</h1>\n{page.facts(_facts(measured))}",
        page.section(
            "Cosine by layer and pair of tasks",
            "Mean cosine between two tasks' gradients of a layer's parameters, and the share of the measured steps in "
            "which it was negative. Blue: the tasks pull in one direction; orange: they conflict.",
            _cosines(measured),
        ),
        page.section(
            "History by layer",
            "Mean cosine over all pairs, in groups of neighbouring measured steps; a column begins at its step.",
            _history_by_layer(measured),
        ),
        page.section("History of all layers together", "", _curves(measured)),
        page.section(
            "Norm by layer and task",
            "Mean norm of a task's gradient, shaded by its share of the task's largest layer.",
            [_norms(measured)],
        ),
        page.section("Numbers of all layers together", "", _table(measured)),
    ]
    return page.page("fastmtl: diagnosis", [part for part in body if part])


def _facts(measured: Measured) -> dict[str, str]:
    conflicts = mean(measured.conflicts(), (0, 2))
    steps = measured.steps
    facts = {
        "measured steps": f"{len(steps):,} of steps {steps[0]:,} to {steps[-1]:,}",
        "tasks": f"{len(measured.tasks)}",
        "layers": f"{len(measured.layers) - 1}",
    }
    if not np.isnan(conflicts).all():
        worst = int(np.nanargmax(conflicts[:-1]))
        facts["conflict rate of all layers"] = f"{conflicts[-1]:.0%}"
        facts["highest conflict rate"] = f"{measured.layers[worst]}: {conflicts[worst]:.0%}"
    if measured.left_out:
        facts["steps left out, not finite"] = f"{measured.left_out:,}"
    return facts


def _cosines(measured: Measured) -> list[str]:
    if not measured.pairs:
        return []
    cosines, rates = measured.mean_cosines(), mean(measured.conflicts(), 0)
    rows = {
        layer: [_cosine(value, f"{rate:.0%}") for value, rate in zip(values, rates_of_layer, strict=True)]
        for layer, values, rates_of_layer in zip(measured.layers, cosines, rates, strict=True)
    }
    return [heat_map("Mean cosine, share of negative ones", "layer", _spaced(measured.pair_names), rows)]


def _history_by_layer(measured: Measured) -> list[str]:
    if not measured.pairs or len(measured.steps) < 2:
        return []
    groups = np.array_split(np.arange(len(measured.steps)), min(_BINS, len(measured.steps)))
    values = np.stack([mean(measured.cosines[group], (0, 2)) for group in groups], axis=1)
    rows = {
        layer: [_cosine(value) for value in of_layer] for layer, of_layer in zip(measured.layers, values, strict=True)
    }
    return [heat_map("Mean cosine of all pairs", "layer", [f"{measured.steps[group[0]]:,}" for group in groups], rows)]


def _curves(measured: Measured) -> list[str]:
    steps, result = measured.steps, []
    if measured.pairs:
        cosines = {
            name: (steps, measured.cosines[:, -1, k].tolist()) for k, name in enumerate(_spaced(measured.pair_names))
        }
        conflicts = measured.conflicts()
        rates = {
            ALL: (steps, mean(conflicts[:, -1], 1).tolist()),
            "mean of the layers": (steps, mean(conflicts[:, :-1], (1, 2)).tolist()),
        }
        result += [
            page.figure(
                "Cosine between task gradients",
                plots.curves(cosines, name="cosines", ylabel="cosine", zero_line=True, size=plots.WIDE),
            ),
            page.figure(
                "Conflict rate",
                plots.curves(rates, name="conflict rate", ylabel="share of pairs", ylim=(-0.03, 1.03), size=plots.TALL),
            ),
        ]
    norms = {
        task: (steps, [norm or None for norm in measured.norms[:, -1, t].tolist()])
        for t, task in enumerate(measured.tasks)
        if measured.norms[:, -1, t].any()
    }
    if norms:
        svg = plots.curves(norms, name="gradient norms", ylabel="norm", log=True, size=plots.TALL)
        result.append(page.figure("Norm of the task gradients", svg))
    return result


def _norms(measured: Measured) -> str:
    norms = mean(measured.norms, 0)
    largest = norms[:-1].max(axis=0)
    rows = {
        layer: [Cell(norm / top if top else 0.0, f"{norm:.3g}") for norm, top in zip(of_layer, largest, strict=True)]
        for layer, of_layer in zip(measured.layers, norms, strict=True)
    }
    return heat_map("Mean norm", "layer", measured.tasks, rows)


def _table(measured: Measured) -> list[str]:
    rows = []
    for k, name in enumerate(_spaced(measured.pair_names)):
        found = measured.cosines[:, -1, k]
        found = found[~np.isnan(found)]
        if len(found):
            numbers = [found.mean(), found.std(), found.min(), found.max()]
            cells = [f"{number:.3f}" for number in numbers]
            rows.append([name, f"{len(found):,}", *cells, f"{(found < 0).mean():.0%}"])
    head = ["pair of tasks", "steps", "mean cosine", "standard deviation", "lowest", "highest", "negative"]
    return [page.table("Cosines", head, rows, frozenset())] if rows else []


def _cosine(value: float, note: str = "") -> Cell:
    if np.isnan(value):
        return Cell(value, "–")
    return Cell(float(value) / _STRONGEST, f"{value:.2f}", note)


def _spaced(pairs: Sequence[str]) -> list[str]:
    return [pair.replace("/", " · ") for pair in pairs]
