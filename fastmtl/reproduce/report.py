"""A report's tables with our results beside its own, for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console
from rich.text import Text

from fastmtl.reproduce.plan import PlannedRun
from fastmtl.reproduce.runs import Outcome
from fastmtl.reproduce.tables import PaperResults, Table, value_of


@dataclass(frozen=True)
class Cell:
    """A number of a report's table, and our results for it.

    paper: the report's number, None if it has none. ours: one number per finished seed.
    """

    paper: float | None
    ours: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.ours) if self.ours else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds, None for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None


@dataclass(frozen=True)
class Line:
    """A row of a table.

    name: as in the report. run: `Variant.name`, None for a row without a recipe. cells: one per
    column. outcomes: the finished runs. note: the reason if there are none, else empty.
    """

    name: str
    run: str | None
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    note: str


def lines_of(
    table: Table, runs: Sequence[PlannedRun], outcomes: Mapping[Path, Outcome], failures: Mapping[Path, str]
) -> Iterator[Line]:
    """Yield the rows of a report's table that `runs` contains, and its rows without a recipe.

    outcomes, failures: by `PlannedRun.folder`, the results of finished runs and the reasons of
    failed ones.
    """
    for row in table.rows:
        paper = row.values or (None,) * len(table.columns)
        if row.reason is not None:
            yield Line(row.name, None, tuple(Cell(value, ()) for value in paper), (), f"not run: {row.reason}")
        for name, variant in row.variants():
            own = [run for run in runs if run.variant.name == variant.name]
            if not own:
                continue
            done = tuple(outcomes[run.folder] for run in own if run.folder in outcomes)
            cells = []
            for value, column in zip(paper, table.columns.values(), strict=True):
                ours = (value_of(column, outcome.dev, outcome.train) for outcome in done)
                cells.append(Cell(value, tuple(number for number in ours if number is not None)))
            yield Line(name, variant.name, tuple(cells), done, "" if done else _why_none(own, failures))


def show(title: str, tables: Sequence[tuple[Table, list[Line]]], console: Console) -> None:
    """Print the tables; each row has the report's numbers and below them ours."""
    console.print(title, style="bold", highlight=False, markup=False)
    for table, lines in tables:
        shown = rich.table.Table(title=f"{table.name}: {table.title}", title_justify="left", show_lines=True)
        shown.add_column("row", overflow="fold")
        shown.add_column("")
        for header in (*table.columns, "seconds"):
            shown.add_column(header, justify="right")
        for line in lines:
            cells = (f"{report}\n{ours}" for report, ours in map(_pair, line.cells))
            shown.add_row(Text(line.name), "report\nours", *cells, f"\n{_seconds(line)}")
        console.print(shown)
        for line in lines:
            if line.note:
                console.print(f"{line.name}: {line.note}", highlight=False, markup=False)


def markdown(title: str, notes: Sequence[str], tables: Sequence[tuple[Table, list[Line]]]) -> str:
    """Return a Markdown page with the tables, and a list of the runs behind our numbers."""
    parts = [f"# {title}", *notes]
    for table, lines in tables:
        headers = _headers(table)
        rows = [headers, ["---", *["---:"] * (len(headers) - 1)], *(_texts(line) for line in lines)]
        parts += [f"## {table.name}: {table.title}", "\n".join("| " + " | ".join(row) + " |" for row in rows)]
        parts += [f"{line.name}: {line.note}" for line in lines if line.note]
    runs = {(line.run, outcome.seed): outcome for _, lines in tables for line in lines for outcome in line.outcomes}
    if runs:
        about = [["run", "seed", "steps", "seconds", "commit"], ["---", "---:", "---:", "---:", "---"]]
        about += [
            [str(run), str(seed), str(outcome.steps), f"{outcome.seconds:.0f}", _commit(outcome)]
            for (run, seed), outcome in sorted(runs.items())
        ]
        parts += ["## Runs", "\n".join("| " + " | ".join(row) + " |" for row in about)]
    return "\n\n".join(parts) + "\n"


def as_json(
    report: str, paper: PaperResults, notes: Sequence[str], tables: Sequence[tuple[Table, list[Line]]]
) -> dict[str, Any]:
    """Return the tables as JSON values, with every run's numbers, seed, seconds and commit."""

    def value(line: Line, columns: Mapping[str, str]) -> dict[str, Any]:
        cells = dict(zip(columns, line.cells, strict=True))
        return {
            "row": line.name,
            "run": line.run,
            "paper": {name: cell.paper for name, cell in cells.items()},
            "mean": {name: cell.mean for name, cell in cells.items()},
            "deviation": {name: cell.deviation for name, cell in cells.items()},
            "runs": [asdict(outcome) for outcome in line.outcomes],
            "note": line.note,
        }

    return {
        "report": report,
        "title": paper.title,
        "notes": list(notes),
        "tables": [
            {"name": table.name, "title": table.title, "rows": [value(line, table.columns) for line in lines]}
            for table, lines in tables
        ],
    }


def write(
    output: Path, report: str, paper: PaperResults, notes: Sequence[str], tables: Sequence[tuple[Table, list[Line]]]
) -> None:
    """Write results.md and results.json to the folder `output`.

    tables: the report's tables with their rows, see `lines_of`.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(report, paper, notes, tables), indent=2)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    (output / "results.md").write_text(markdown(paper.title, notes, tables), encoding="utf-8")


def _headers(table: Table) -> list[str]:
    return ["row", *(header for column in table.columns for header in (column, "ours")), "seconds"]


def _texts(line: Line) -> list[str]:
    return [line.name, *(text for cell in line.cells for text in _pair(cell)), _seconds(line)]


def _pair(cell: Cell) -> tuple[str, str]:
    """Return the text of the report's number and that of our mean, with its deviation."""
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.3f}"
    return (
        "" if cell.paper is None else f"{cell.paper:.3f}",
        "" if cell.mean is None else f"{cell.mean:.3f}{spread}",
    )


def _seconds(line: Line) -> str:
    return f"{statistics.mean(outcome.seconds for outcome in line.outcomes):.0f}" if line.outcomes else ""


def _why_none(runs: Sequence[PlannedRun], failures: Mapping[Path, str]) -> str:
    missing = dict.fromkeys(file for run in runs for file in run.missing)
    if missing:
        return f"not run: there is no {', '.join(missing)} in {runs[0].recipe.data.dir}"
    failed = [failures[run.folder] for run in runs if run.folder in failures]
    return failed[0] if failed else "not finished"


def _commit(outcome: Outcome) -> str:
    if outcome.commit is None:
        return ""
    return outcome.commit[:10] + ("" if outcome.clean else ", with changes")
