"""The steps of `fastmtl sweep`, from the grid to the written tables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastmtl.errors import UserError
from fastmtl.sweep.grid import read_grid
from fastmtl.sweep.runs import INTERRUPTED, run_points
from fastmtl.sweep.table import rows_of, write_plot, write_tables


def run_sweep(recipe: str, grid: Path, overrides: Sequence[str], output: Path, launcher: Sequence[str] = ()) -> int:
    """Run a sweep and return the exit status: 0, 1 if a point failed, 130 after a stop.

    launcher: words of a command in front of `fastmtl train`. Raises UserError for an invalid grid
    or settings, and for an output directory of another sweep.
    """
    if "RANK" in os.environ:
        raise UserError("sweep starts its own processes: run it without a launcher, and name it with --launcher")
    if launcher and shutil.which(launcher[0]) is None:
        raise UserError(f"--launcher: there is no command {launcher[0]}")
    points = read_grid(grid, recipe, overrides)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the output directory {output}: {error.strerror}") from None
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    results, status = run_points(output, points, say, launcher)
    write_tables(output, results)
    write_plot(output, results)
    header, rows = rows_of(results)
    table = Table(title=f"{len(points)} points, the best mean first", title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    say(f"{output / 'sweep.md'}\n{output / 'sweep.csv'}")
    if status == INTERRUPTED:
        say("stopped; run the same command to continue")
    return status
