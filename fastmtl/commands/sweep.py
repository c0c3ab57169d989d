"""The command that trains one recipe with many settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.commands.options import Debug, Launcher, launcher_words


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Adds the command to the app."""

    @app.command(no_args_is_help=True)
    def sweep(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As of fastmtl train.")],
        grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Settings and their values.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="section.key=value", help="Settings for every point.", show_default=False),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Where it is kept. Default: runs/sweeps/RECIPE-GRID.", show_default=False),
        ] = None,
        launcher: Launcher = "",
        debug: Debug = False,
    ) -> None:
        """Train a recipe with many settings, one after the other, and show what they reach in one
        table.

        GRID.yaml maps settings to lists of values (every combination is a point), or is a list of
        points. A finished point is not made again: the same command goes on after a stop, and with
        more values in the grid. A point that fails is noted, and the next one begins. DIR gets
        sweep.csv, sweep.md, sweep.svg and a folder for each point.

        [bold]Examples[/bold]

        With the grid `optimizer.lr: [1e-5, 3e-5]` and, in a second line, `engine.clip: [0.5, 1.0]`,
          four points: [cyan]fastmtl sweep cs224n grid.yaml data.dir=data/cs224n[/cyan]

        On all GPUs of the machine:
          [cyan]fastmtl sweep demo grid.yaml --launcher "deepspeed --no_python"[/cyan]
        """
        set_debug(debug)
        from fastmtl.sweep.command import run_sweep

        place = output or Path("runs") / "sweeps" / f"{Path(recipe).stem}-{grid.stem}"
        raise typer.Exit(run_sweep(recipe, grid, overrides or [], place, launcher_words(launcher)))
