"""Files of a comparison: compare.html, compare.md, compare.json and compare.svg.

A method's score is the mean over the seeds, with the standard deviation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text
from fastmtl.pages import page
from fastmtl.pages.plots import plain
from fastmtl.sweep.compare import Compared
from fastmtl.sweep.compare_lines import Difference, Line, lines_of, spread

EXPLANATION = (
    "Mean over the seeds ± standard deviation. The difference from the first method is paired by seed, with its "
    "95 % confidence interval: if the interval has 0, the runs show no difference. Conflicts: the share of negative "
    "cosines between the gradients of two tasks, over all steps and runs, for methods that compute cosines."
)
DIFFERENCES = (
    "The mean over the seeds of the paired differences, with its 95 % confidence interval, by task. An interval that "
    "leaves out 0 is bold; of twenty such intervals, one leaves out 0 by chance."
)
BLUE = "#0069aa"


def rows_of(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    columns = list(lines[0].scores)
    header = ["method", *columns, f"mean less {lines[0].method}", "conflicts", "seconds", "MiB", "failed"]
    rows = [
        [
            line.method,
            *(spread(line.scores.get(column, []), 4) for column in columns),
            _signed(line.difference),
            f"{line.conflicts['all']:.0%}" if line.conflicts else "",
            spread(line.seconds, 1),
            spread(line.memory, 0),
            str(line.failed or ""),
        ]
        for line in lines
    ]
    return header, rows


def write_comparison(
    directory: Path, compared: Sequence[Compared], recipe: str, overrides: Sequence[str] = ()
) -> list[Line]:
    """Write the files of a comparison to its directory; return the lines of the table."""
    import torch

    from fastmtl.measure.environment import environment

    lines = lines_of(directory, compared)
    seeds = ", ".join(str(result.point.settings["seed"]) for result in compared[0].results)
    runs = str(sum(len(one.results) for one in compared))
    facts = {"recipe": " ".join([recipe, *overrides]), "seeds": seeds, "runs": runs}
    notes = [_note(one) for one in compared if one.weights]
    replace_text(directory / "compare.svg", figure_of(lines))
    _write_page(directory, lines, facts, notes)
    tables = (
        [_markdown(*rows_of(lines)), _markdown(*_difference_rows(lines))] if lines[1:] else [_markdown(*rows_of(lines))]
    )
    replace_text(directory / "compare.md", "\n".join([*tables, *(f"{note}\n" for note in notes)]))
    values: dict[str, Any] = {**facts, "weights": [one.weights for one in compared if one.weights]}
    values["trials"] = [one.trials for one in compared if one.weights]
    values["environment"] = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    values["methods"] = {
        line.method: {
            "scores": line.scores,
            "difference": line.difference,
            "differences": line.differences,
            "conflicts": line.conflicts,
            "seconds": line.seconds,
            "memory_mib": line.memory,
            "failed": line.failed,
        }
        for line in lines
    }
    replace_text(directory / "compare.json", json.dumps(values, indent=1) + "\n")
    return lines


def figure_of(lines: Sequence[Line]) -> str:
    """Return the SVG of the paired differences from the first method, a plot for each column."""
    import io

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    others = [line for line in lines[1:] if line.differences]
    columns = list(lines[0].scores)
    figure = Figure(figsize=(2.6 * len(columns), 0.8 + 0.28 * max(1, len(others))), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        axes.axvline(0, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
        for row, line in enumerate(others):
            if column in line.differences:
                middle, half = line.differences[column]
                axes.errorbar(middle, row, xerr=half, fmt="o", color=BLUE, markersize=4, capsize=2, linewidth=1.2)
        axes.set_yticks(range(len(others)), [plain(line.method) for line in others])
        axes.set_title(plain(column), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(max(1, len(others)) - 0.5, -0.5)  # the first method on top
    figure.supxlabel(plain(f"difference from {lines[0].method}, 95 % confidence interval"), fontsize=8)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()


def _write_page(directory: Path, lines: Sequence[Line], facts: dict[str, str], notes: Sequence[str]) -> None:
    header, rows = rows_of(lines)
    best = [_best(lines, column) for column in lines[0].scores]
    own = frozenset((row, 1 + column) for column, row in enumerate(best) if row is not None)
    body = [
        f"<h1>{page.escape(directory.resolve().name)}</h1>",
        page.facts(facts),
        page.section("Scores on the dev rows", EXPLANATION, [page.table("Methods", header, rows, own)]),
        *(f"<p>{page.escape(note)}</p>" for note in notes),
    ]
    if lines[1:]:
        header, rows = _difference_rows(lines)
        clear = frozenset(
            (row, 1 + column)
            for row, line in enumerate(lines[1:])
            for column, name in enumerate(lines[0].scores)
            if is_clear(line.differences.get(name))
        )
        plot = (directory / "compare.svg").read_text(encoding="utf-8")
        plot = plot[plot.index("<svg") :]
        content = [page.table("Differences", header, rows, clear), page.NEW_LINE, page.figure("", plot)]
        body.append(page.section(f"Differences from {lines[0].method}", DIFFERENCES, content))
        shares = [
            [line.method, *(f"{share:.1%}" for share in line.conflicts.values())] for line in lines if line.conflicts
        ]
        if shares:
            pairs = next(list(line.conflicts) for line in lines if line.conflicts)
            table = page.table("Negative cosines", ["method", *pairs], shares, frozenset())
            body.append(page.section("Conflicts", "The share of negative cosines over all steps and runs.", [table]))
    replace_text(directory / "compare.html", page.page("fastmtl compare", body))


def is_clear(difference: Difference | None) -> bool:
    """Return True if the 95 % interval of a difference leaves out 0."""
    return difference is not None and difference[1] is not None and abs(difference[0]) > difference[1]


def _difference_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    columns = list(lines[0].scores)
    rows = [[line.method, *(_signed(line.differences.get(column)) for column in columns)] for line in lines[1:]]
    return [f"less {lines[0].method}", *columns], rows


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return ""
    middle, half = difference
    return f"{middle:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def _note(one: Compared) -> str:
    weights = ", ".join(f"{name} {value:.3g}" for name, value in (one.weights or {}).items())
    seed = one.results[0].point.settings["seed"]
    return (
        f"tuned: weights {weights}. They are the best of {one.trials} trials with seed {seed} by the same dev rows, "
        f"so the score of seed {seed} is favourable."
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in table)


def _best(lines: Sequence[Line], column: str) -> int | None:
    """Return the number of the line with the best mean in a column."""
    means = [statistics.mean(line.scores[column]) if line.scores.get(column) else -math.inf for line in lines]
    return means.index(max(means)) if max(means) > -math.inf else None
