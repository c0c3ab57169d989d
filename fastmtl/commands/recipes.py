"""The commands `recipes` and `reproduce`: the bundled recipes, and the reports that they repeat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.commands.options import Debug, Launcher, launcher_words
from fastmtl.errors import UserError, unknown_name


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the commands of this module to the app.

    set_debug: called with the value of the option --debug.
    """

    @app.command()
    def recipes(
        folder: Annotated[
            str | None,
            typer.Argument(
                metavar="FOLDER", help="A folder of recipes. Default: recipes outside of folders.", show_default=False
            ),
        ] = None,
        debug: Debug = False,
    ) -> None:
        """List the bundled recipes.

        Copy a recipe to start your own: [cyan]fastmtl train my.yaml[/cyan].

        [bold]Examples[/bold]

          [cyan]fastmtl recipes[/cyan]
          [cyan]fastmtl recipes papers/pal-lora[/cyan]
        """
        set_debug(debug)
        from rich.console import Console
        from rich.table import Table

        from fastmtl.config import load_recipe
        from fastmtl.recipes.files import bundled_recipes

        found = bundled_recipes()
        folders: dict[str, list[str]] = {}
        for name in found:
            folders.setdefault(name.rpartition("/")[0], []).append(name)
        chosen = (folder or "").strip("/")
        if chosen not in folders:
            raise unknown_name("folder of recipes", chosen, [name for name in folders if name])
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("recipe", "tasks", "description"):
            table.add_column(column, overflow="fold")
        for name in folders[chosen]:
            recipe = load_recipe(name)
            table.add_row(name, ", ".join(recipe.task_names), recipe.description)
        console = Console()
        console.print(table)
        if not chosen:
            lines = [f"fastmtl recipes {name}  ({len(names)})" for name, names in folders.items() if name]
            console.print("\nFolders with more recipes:\n" + "\n".join(lines), highlight=False, markup=False)
        console.print(
            f"\nThe files are in {found[folders[chosen][0]].parent}", highlight=False, markup=False, soft_wrap=True
        )

    @app.command(no_args_is_help=True)
    def reproduce(
        report: Annotated[str, typer.Argument(metavar="REPORT", help="A folder of the bundled recipes in papers/.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="section.key=value", help="Settings for every run.", show_default=False),
        ] = None,
        data: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="The CS224N files. Default: the demo corpus.", show_default=False),
        ] = None,
        fraction: Annotated[float, typer.Option(metavar="F", help="Share of each training set.")] = 1.0,
        encoder: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="A model directory. Default: the recipes' MiniLM.", show_default=False),
        ] = None,
        rows: Annotated[
            str | None, typer.Option(metavar="A,B", help="Recipes of the report. Default: all.", show_default=False)
        ] = None,
        epochs: Annotated[
            int | None, typer.Option(min=1, metavar="N", help="The longest phase of a run.", show_default=False)
        ] = None,
        seeds: Annotated[str, typer.Option(metavar="1,2,3", help="Seeds, with a run for each.")] = "1",
        launcher: Launcher = "",
        output: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="The folder of the runs. Default: runs/papers/REPORT.", show_default=False
            ),
        ] = None,
        debug: Debug = False,
    ) -> None:
        """Run the experiments of a report and show its tables beside ours.

        docs/papers.md lists the reports and their rows. A finished run is not repeated:
        the same command continues after a stop. DIR gets results.md, results.json and
        a folder for each run.

        [bold]Examples[/bold]

        Two rows with three seeds, three epochs:
          [cyan]fastmtl reproduce pal-lora --data data --rows sts_full,sts_pal_lora \\
            --seeds 1,2,3 --epochs 3[/cyan]

        A whole report with its own encoder, on all GPUs of the machine:
          [cyan]fastmtl reproduce pals-and-mnrl --data data --encoder bert \\
            --launcher "deepspeed --no_python"[/cyan]

        A quick test of all runs, on the demo corpus:
          [cyan]fastmtl reproduce master-of-all-trades train.max_steps=5[/cyan]
        """
        set_debug(debug)
        from fastmtl.reproduce.command import run_report
        from fastmtl.reproduce.plan import Options

        try:
            numbers = tuple(int(seed) for seed in seeds.split(","))
        except ValueError:
            raise UserError(f"--seeds {seeds}: write whole numbers with commas between them, as 1,2,3") from None
        options = Options(data, fraction, str(encoder) if encoder else None, epochs, numbers, tuple(overrides or ()))
        names = [name.strip() for name in rows.split(",")] if rows else []
        place = output or Path("runs") / "papers" / report
        raise typer.Exit(run_report(report, names, options, place, launcher_words(launcher)))
