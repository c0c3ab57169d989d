"""The command `fastmtl compare`, which trains one recipe with several methods and seeds."""

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
    def compare(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled recipe or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="section.key=value", help="Settings for every run.", show_default=False),
        ] = None,
        methods: Annotated[
            str, typer.Option(metavar="A,B,...", help="Gradient methods, weightings of the losses, and tuned.")
        ] = "sum,tuned,pcgrad",
        seeds: Annotated[str, typer.Option(metavar="N,N,...", help="A run per method and seed.")] = "1,2,3",
        tuning: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Trials of tuned. Default: the runs of all other methods.", show_default=False
            ),
        ] = None,
        output: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Default: runs/compare/RECIPE.", show_default=False)
        ] = None,
        launcher: Launcher = "",
        debug: Debug = False,
    ) -> None:
        """Compare gradient surgery and loss balancing on a recipe, over several seeds.

        DIR gets compare.html, compare.md and compare.json with means, spreads, paired
        differences, time and memory. `tuned` is the weighted sum whose weights Optuna
        has searched. A finished run is not run again: the same command continues.

        [bold]Example[/bold]

          [cyan]fastmtl compare demo --methods sum,tuned,pcgrad,famo --seeds 1,2,3[/cyan]
        """
        set_debug(debug)
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {seeds}: whole numbers with commas between them") from None
        from fastmtl.sweep.command import run_comparison

        names = [name.strip() for name in methods.split(",") if name.strip()]
        place = output or Path("runs") / "compare" / Path(recipe).stem
        raise typer.Exit(
            run_comparison(recipe, overrides or [], names, numbers, tuning, place, launcher_words(launcher))
        )
