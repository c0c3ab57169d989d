"""The steps of `fastmtl sweep` and `fastmtl compare`, up to the written tables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastmtl.config import load_recipe
from fastmtl.errors import UserError
from fastmtl.files.output_folder import OutputFolder
from fastmtl.sweep import compare_page
from fastmtl.sweep.compare import Comparison
from fastmtl.sweep.grid import load_grid, read_grid
from fastmtl.sweep.page import write_page
from fastmtl.sweep.runs import INTERRUPTED, run_points
from fastmtl.sweep.search import Budget, Search, check_optuna
from fastmtl.sweep.space import Space, is_space
from fastmtl.sweep.table import rows_of, write_plot, write_tables


def run_sweep(
    recipe: str,
    grid: Path,
    overrides: Sequence[str],
    output: Path,
    launcher: Sequence[str] = (),
    budget: Budget | None = None,
) -> int:
    """Run a sweep and return the exit status: 0, 1 if a point failed, 130 after a stop.

    launcher: words of a command in front of `fastmtl train`. budget: that of a search with Optuna;
    None for every point of a grid. Raises UserError for an invalid grid or settings, for a grid
    with distributions without a budget, and for an output directory of another sweep.
    """
    _check_launcher("sweep", launcher)
    values = load_grid(grid)
    if budget is None and is_space(values):
        raise UserError(f"{grid}: a grid with distributions is searched: say how long with --trials N")
    search, points = None, []
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if budget is None:
        points = read_grid(grid, recipe, overrides)
    else:
        check_optuna()
        if not isinstance(values, dict) or not values:
            raise UserError(f"{grid}: --trials searches a mapping of settings to lists or distributions of values")
        load_recipe(recipe, overrides)
        search = Search(output, recipe, overrides, Space(grid, values), budget, launcher, say)
        search.check()
    with _alone_in(output):
        results, status = run_points(output, points, say, launcher) if search is None else search.run()
    if not results:
        say("no trial was begun")
        return status
    write_tables(output, results)
    write_plot(output, results)
    if search is not None:
        write_page(output, results, search.importances())
    header, rows = rows_of(results)
    _print(console, f"{len(results)} points, the best mean first", header, rows)
    say(f"{output / 'sweep.md'}\n{output / 'sweep.csv'}" + (f"\n{output / 'sweep.html'}" if search else ""))
    if status == INTERRUPTED:
        say("stopped; run the same command to continue")
    return status


def run_comparison(
    recipe: str,
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    tuning: int | None,
    output: Path,
    launcher: Sequence[str] = (),
) -> int:
    """Compare methods (`Comparison`), print the table and return the exit status as `run_sweep`.

    Raises UserError for unknown methods and invalid settings.
    """
    _check_launcher("compare", launcher)
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    comparison = Comparison(output, recipe, overrides, methods, seeds, tuning, launcher, say)
    comparison.check()
    with _alone_in(output):
        compared, status = comparison.run()
    if any(result.results is not None for one in compared for result in one.results):
        header, rows = compare_page.rows_of(compare_page.write_comparison(output, compared, recipe, overrides))
        _print(console, "dev scores, mean ± standard deviation over the seeds", header, rows)
        say(f"{output / 'compare.html'}\n{output / 'compare.md'}")
    if status == INTERRUPTED:
        say("stopped; run the same command to continue")
    return status


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Create the output directory and lock it for the time of the block."""
    folder = OutputFolder(output, resume=True)
    try:
        yield
    finally:
        folder.release()


def _print(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:  # a file or a pipe has no width that the table must keep
        console = Console(width=console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table, markup=False)


def _check_launcher(command: str, launcher: Sequence[str]) -> None:
    if "RANK" in os.environ:
        raise UserError(f"{command} starts its own processes: run it without a launcher, and name it with --launcher")
    if launcher and shutil.which(launcher[0]) is None:
        raise UserError(f"--launcher: there is no command {launcher[0]}")
