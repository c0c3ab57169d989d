"""The results of a sweep as a table (sweep.csv, sweep.md) and a plot (sweep.svg)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text
from fastmtl.pages.plots import plain
from fastmtl.sweep.runs import Result


def rows_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table.

    Columns: settings, each task's own metric, their mean, steps, seconds, error. The row with the
    best mean comes first; points without a mean come last.
    """
    keys = list(results[0].point.settings)
    recipe = results[0].point.recipe
    metrics = {name: task.metric_name for name, task in recipe.tasks.items()}
    header = [*keys, *(f"{name} {metric}" for name, metric in metrics.items()), "mean", "steps", "seconds", "error"]

    def row(result: Result) -> list[str]:
        settings = [_text(result.point.settings[key]) for key in keys]
        found = result.results
        if found is None:
            return [*settings, *[""] * (len(metrics) + 3), result.error or "not run yet"]
        own = [found["dev"].get(name, {}).get(task.metric_name) for name, task in result.point.recipe.tasks.items()]
        return [*settings, *map(_score, own), _score(found["mean"]), str(found["steps"]), f"{found['seconds']:.1f}", ""]

    return header, [row(result) for result in sorted(results, key=_mean_score, reverse=True)]


def write_tables(directory: Path, results: Sequence[Result]) -> None:
    header, rows = rows_of(results)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_text(directory / "sweep.csv", text.getvalue())
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    replace_text(directory / "sweep.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def write_plot(directory: Path, results: Sequence[Result]) -> None:
    """Write sweep.svg: for each setting with several values, the mean scores over its values.

    Each finished point is a dot; a line joins the best of each value. Nothing is written if no
    setting has several values.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = [result for result in results if result.results is not None and result.results["mean"] is not None]
    keys = [key for key in results[0].point.settings if len({_text(r.point.settings[key]) for r in found}) > 1]
    if not keys:
        return
    figure = Figure(figsize=(3.4 * len(keys), 2.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        points = [(r.point.settings[key], r.results["mean"]) for r in found if r.results is not None]
        places, ticks, log = _places([value for value, _ in points])
        best: dict[float, float] = {}
        for place, (_, mean) in zip(places, points, strict=True):
            best[place] = max(mean, best.get(place, mean))
        axes.plot(*zip(*sorted(best.items()), strict=True), color="#0069aa", linewidth=1.2)
        axes.plot(places, [mean for _, mean in points], "o", color="#0069aa", markersize=4, alpha=0.6)
        if log:
            axes.set_xscale("log")
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), [plain(tick) for tick in ticks])
        axes.set_xlabel(plain(key))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean dev score")
    FigureCanvasSVG(figure).print_svg(str(directory / "sweep.svg"))


def _places(values: list[Any]) -> tuple[list[float], list[str] | None, bool]:
    """Return positions on an axis for values, names for its ticks, and whether it is logarithmic.

    The names are None if all values are numbers.
    """
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        numbers = [float(value) for value in values]
        return numbers, None, min(numbers) > 0 and max(numbers) / min(numbers) >= 10
    names = list(dict.fromkeys(map(_text, values)))
    return [float(names.index(_text(value))) for value in values], names, False


def _mean_score(result: Result) -> float:
    mean = None if result.results is None else result.results["mean"]
    return float("-inf") if mean is None else mean


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
