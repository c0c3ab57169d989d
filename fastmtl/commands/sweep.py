"""The command `fastmtl sweep`, which trains one recipe with many settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.commands.options import Debug, Launcher, launcher_words
from fastmtl.errors import UserError


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the command of this module to the app.

    set_debug: called with the value of the option --debug.
    """

    @app.command(no_args_is_help=True)
    def sweep(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled recipe or a YAML file.")],
        grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Settings and their values.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="section.key=value", help="Settings for every point.", show_default=False),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="The folder of the sweep. Default: runs/sweeps/RECIPE-GRID.", show_default=False
            ),
        ] = None,
        trials: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Search with Optuna until N trials are done.", show_default=False),
        ] = None,
        hours: Annotated[
            float | None,
            typer.Option(min=0.0, metavar="H", help="A search begins no trial after H hours.", show_default=False),
        ] = None,
        parallel: Annotated[int, typer.Option(min=1, metavar="N", help="Trials of a search at the same time.")] = 1,
        launcher: Launcher = "",
        debug: Debug = False,
    ) -> None:
        """Train a recipe with many settings, one after the other, and show the scores in a table.

        GRID.yaml maps settings to lists of values (every combination is a point),
        or is a list of points. A finished point is not run again: the same command
        continues after a stop, also with more values in the grid. A failed point is
        listed, and the next one begins. DIR gets sweep.csv, sweep.md, sweep.svg and
        a folder for each point.

        With --trials, GRID.yaml may also have distributions like
        `optimizer.lr: {low: 1.0e-6, high: 1.0e-4, log: true}`. Optuna chooses the
        settings of each trial and stops trials whose dev scores are low; DIR also
        gets study.db and sweep.html.

        [bold]Examples[/bold]

        Four points, with a grid of the two lines
        `optimizer.lr: [1e-5, 3e-5]` and `engine.clip: [0.5, 1.0]`:
          [cyan]fastmtl sweep cs224n grid.yaml data.dir=data/cs224n[/cyan]

        On all GPUs of the machine:
          [cyan]fastmtl sweep demo grid.yaml --launcher "deepspeed --no_python"[/cyan]

        A search of 30 trials, two at a time:
          [cyan]fastmtl sweep demo space.yaml --trials 30 --parallel 2[/cyan]
        """
        set_debug(debug)
        from fastmtl.sweep.command import run_sweep
        from fastmtl.sweep.search import Budget

        place = output or Path("runs") / "sweeps" / f"{Path(recipe).stem}-{grid.stem}"
        if trials is None and (hours is not None or parallel > 1):
            raise UserError("--hours and --parallel are for a search: give --trials as well")
        budget = None if trials is None else Budget(trials, hours, parallel)
        raise typer.Exit(run_sweep(recipe, grid, overrides or [], place, launcher_words(launcher), budget))
