"""The part of the report about the predictions on the dev rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmtl.config import Recipe
from fastmtl.inference.types.texts import shown
from fastmtl.pages import page, plots
from fastmtl.tracking.titles import title_of

CLASSES = 16  # rows of a confusion matrix that can be read
LABELS = 30  # rows of a table that is not folded


def prediction_parts(recipe: Recipe, results: dict[str, Any]) -> list[str]:
    """Return the HTML of figures and tables, task by task.

    results: the values of results.json. Those of older versions have fewer parts.
    """
    found: list[str] = []
    for name, task in recipe.tasks.items():
        if found and found[-1] != page.NEW_LINE:
            found.append(page.NEW_LINE)
        if name in results["confusion"]:
            counts = results["confusion"][name]
            given = results.get("names", {}).get(name) or task.label_names
            names, kept = fold(given or [str(label) for label in range(len(counts))], counts)
            found.append(page.matrix(f"{name}: confusion matrix", names, kept))
        if name in results["scatter"]:
            points, limits = results["scatter"][name], task.range
            assert limits is not None  # the recipe demands it of a regression task
            svg = plots.scatter(points["labels"], points["scores"], limits, name=f"predictions of {name}")
            found.append(page.figure(f"{name}: predictions against labels", svg))
        if name in results.get("per_label", {}):
            values = results["per_label"][name]
            found.append(_table(f"{name}: metrics by {values['head'][0]}", values))
        if name in results.get("errors", {}) and results["errors"][name]["rows"]:
            found.append(_table(f"{name}: largest errors", results["errors"][name], texts=True))
    return found


def fold(names: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[list[str], list[list[int]]]:
    """Return a confusion matrix of at most CLASSES rows; the rarest classes are summed in the last.

    names: [C]; counts: [C, C], true classes by predicted ones.
    """
    if len(names) <= CLASSES:
        return list(names), [list(row) for row in counts]
    whole = np.array(counts)
    largest = np.argsort(-(whole.sum(0) + whole.sum(1)), kind="stable")[: CLASSES - 1]
    place = np.full(len(names), CLASSES - 1)
    place[np.sort(largest)] = np.arange(CLASSES - 1)
    folded = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    np.add.at(folded, (place[:, None], place[None, :]), whole)
    return [*(names[label] for label in np.sort(largest)), f"{len(names) - CLASSES + 1} others"], folded.tolist()


def _table(caption: str, table: dict[str, Any], *, texts: bool = False) -> str:
    """Return the HTML of a `Table` as results.json has it."""
    head = [title_of(name) for name in table["head"]]
    rows = [[shown(cell) for cell in row] for row in table["rows"]] if texts else table["rows"]
    html = page.table(caption, head, rows, frozenset(), texts=texts)
    return html if len(table["rows"]) <= LABELS else page.folded(f"{caption} ({len(table['rows'])} rows)", html)
