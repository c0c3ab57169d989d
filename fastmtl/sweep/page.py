"""sweep.html: the page of a search, in one file without external assets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastmtl.files.writing import replace_text
from fastmtl.pages import page, plots
from fastmtl.sweep.runs import Result
from fastmtl.sweep.table import rows_of


def write_page(directory: Path, results: Sequence[Result], importances: Mapping[str, float]) -> None:
    """Write sweep.html to a search's directory.

    results: those of the trials in their order. importances: {setting: share of the variance of the
    scores that it explains}; {} if there are too few trials.
    """
    means = [None if result.results is None else result.results["mean"] for result in results]
    best: list[float | None] = []
    for mean in means:
        known = [value for value in (mean, best[-1] if best else None) if value is not None]
        best.append(max(known) if known else None)
    numbers = list(range(1, len(results) + 1))
    history = plots.curves(
        {"mean dev score": (numbers, means), "best so far": (numbers, best)},
        name="scores of the trials",
        ylabel="mean dev score",
        xlabel="trial",
        smooth=False,
        markers=True,
        size=plots.WIDE,
    )
    header, rows = rows_of(results)
    shares = [[name, f"{share:.1%}"] for name, share in importances.items()]
    plot = directory / "sweep.svg"
    body = [
        f"<h1>{page.escape(directory.resolve().name)}</h1>",
        page.facts(
            {
                "trials": str(len(results)),
                "finished": str(sum(mean is not None for mean in means)),
                "pruned": str(sum(result.error.startswith("pruned") for result in results)),
                "best mean dev score": "–" if not best or best[-1] is None else f"{best[-1]:.4f}",
            }
        ),
        page.section(
            "Scores", "Trials that are pruned or failed have no dot.", [page.figure("Trials in order", history)]
        ),
        page.section(
            "Settings that matter",
            "The share of the variance of the scores that each setting explains (fANOVA of Optuna).",
            [page.table("Importance", ["setting", "share"], shares, frozenset())] if shares else [],
        ),
        page.section(
            "Scores by setting",
            "Each finished trial is a dot; a line joins the best of each value.",
            [page.figure("", plot.read_text(encoding="utf-8"))] if plot.is_file() else [],
        ),
        page.section("Trials", "The best mean first.", [page.table("Trials", header, rows, frozenset())]),
    ]
    title = f"fastmtl sweep: {directory.resolve().name}"
    replace_text(directory / "sweep.html", page.page(title, [part for part in body if part]))
