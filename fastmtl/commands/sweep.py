"""The command `fastmtl sweep`, which trains one recipe with many settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.commands.options import Debug, Launcher, launcher_words


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
        launcher: Launcher = "",
        debug: Debug = False,
    ) -> None:
        """Train a recipe with many settings, one after the other, and show the scores in a table.

        GRID.yaml maps settings to lists of values (every combination is a point),
        or is a list of points. A finished point is not run again: the same command
        continues after a stop, also with more values in the grid. A failed point is
        listed, and the next one begins. DIR gets sweep.csv, sweep.md, sweep.svg and
        a folder for each point.

        [bold]Examples[/bold]

        Four points, with a grid of the two lines
        `optimizer.lr: [1e-5, 3e-5]` and `engine.clip: [0.5, 1.0]`:
          [cyan]fastmtl sweep cs224n grid.yaml data.dir=data/cs224n[/cyan]

        On all GPUs of the machine:
          [cyan]fastmtl sweep demo grid.yaml --launcher "deepspeed --no_python"[/cyan]
        """
        set_debug(debug)
        from fastmtl.sweep.command import run_sweep

        place = output or Path("runs") / "sweeps" / f"{Path(recipe).stem}-{grid.stem}"
        raise typer.Exit(run_sweep(recipe, grid, overrides or [], place, launcher_words(launcher)))
