"""Tables of a comparison: compare.html, compare.md and compare.json.

A method's score is the mean over the seeds, with the standard deviation. Its difference from the
first method is paired by seed: the same seed draws the same rows and the same new weights.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text
from fastmtl.pages import page
from fastmtl.sweep.compare import Compared
from fastmtl.sweep.runs import Result
from fastmtl.tracking.titles import title_of


@dataclass(frozen=True)
class Line:
    """The figures of a method.

    scores: {column: values by seed}; the columns are the tasks' own metrics and "mean". difference:
    mean and half-width of the 95 % interval of the paired difference of the mean score from that of
    the first method; None for it, and with one seed no half-width. seconds: of each run. memory:
    MiB at most, of each run. failed: runs without a mean score.
    """

    method: str
    scores: dict[str, list[float]]
    difference: tuple[float, float | None] | None
    seconds: list[float]
    memory: list[float]
    failed: int


def lines_of(compared: Sequence[Compared]) -> list[Line]:
    """Return a line per method, in their order."""
    first: dict[int, float] = {}
    lines = []
    for number, method in enumerate(compared):
        runs = [(result.point.settings["seed"], found) for result in method.results if (found := scored(result))]
        tasks = method.results[0].point.recipe.tasks
        scores = {
            f"{name} {title_of(task.metric_name)}": [found["dev"][name][task.metric_name] for _, found in runs]
            for name, task in tasks.items()
            if all(name in found["dev"] for _, found in runs)
        }
        scores["mean"] = [found["mean"] for _, found in runs]
        if not number:
            first = {seed: found["mean"] for seed, found in runs}
        pairs = [found["mean"] - first[seed] for seed, found in runs if seed in first]
        lines.append(
            Line(
                method.method,
                scores,
                None if not number or not pairs else (statistics.mean(pairs), half_width(pairs)),
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


def rows_of(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    columns = list(lines[0].scores)
    header = ["method", *columns, f"mean less {lines[0].method}", "seconds", "MiB", "failed"]
    rows = []
    for line in lines:
        difference = ""
        if line.difference is not None:
            middle, half = line.difference
            difference = f"{middle:+.4f}" + ("" if half is None else f" ± {half:.4f}")
        rows.append(
            [
                line.method,
                *(spread(line.scores.get(column, []), 4) for column in columns),
                difference,
                spread(line.seconds, 1),
                spread(line.memory, 0),
                str(line.failed or ""),
            ]
        )
    return header, rows


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text; "" without values."""
    if not values:
        return ""
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):.{digits}f}"


def write_comparison(directory: Path, compared: Sequence[Compared], recipe: str) -> list[Line]:
    """Write compare.html, compare.md and compare.json to the directory; return the lines."""
    lines = lines_of(compared)
    header, rows = rows_of(lines)
    seeds = [str(result.point.settings["seed"]) for result in compared[0].results]
    facts = {"recipe": recipe, "seeds": ", ".join(seeds), "runs": str(sum(len(one.results) for one in compared))}
    weights = [one for one in compared if one.weights]
    notes = [
        f"tuned: weights {', '.join(f'{name} {value:.3g}' for name, value in (one.weights or {}).items())}"
        for one in weights
    ]
    best = [_best(lines, column) for column in header[1 : 1 + len(lines[0].scores)]]
    own = frozenset((row, 1 + column) for column, row in enumerate(best) if row is not None)
    explanation = (
        "Mean over the seeds ± standard deviation. The difference from the first method is paired by seed, with its "
        "95 % confidence interval: if the interval has 0, the runs show no difference."
    )
    body = [
        f"<h1>{page.escape(directory.resolve().name)}</h1>",
        page.facts(facts),
        page.section("Scores on the dev rows", explanation, [page.table("Methods", header, rows, own)]),
        *(f"<p>{page.escape(note)}</p>" for note in notes),
    ]
    replace_text(directory / "compare.html", page.page("fastmtl compare", body))
    table = [header, ["---"] * len(header), *rows]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in table)
    replace_text(directory / "compare.md", text + "".join(f"\n{note}\n" for note in notes))
    values: dict[str, Any] = {**facts, "weights": [one.weights for one in weights]}
    values["methods"] = {
        line.method: {
            "scores": line.scores,
            "difference": line.difference,
            "seconds": line.seconds,
            "memory_mib": line.memory,
            "failed": line.failed,
        }
        for line in lines
    }
    replace_text(directory / "compare.json", json.dumps(values, indent=1) + "\n")
    return lines


def _best(lines: Sequence[Line], column: str) -> int | None:
    """Return the number of the line with the best mean in a column."""
    means = [statistics.mean(line.scores[column]) if line.scores.get(column) else -math.inf for line in lines]
    return means.index(max(means)) if max(means) > -math.inf else None
