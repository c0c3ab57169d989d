"""The command `fastmtl profile`: memory and speed of a recipe before training."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmtl.commands.options import Debug
from fastmtl.errors import UserError

if TYPE_CHECKING:
    from fastmtl.config import Recipe
    from fastmtl.profile.plan import Point
    from fastmtl.training.phases import Phase

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the command of this module to the app.

    set_debug: called with the value of the option --debug.
    """

    @app.command(no_args_is_help=True)
    def profile(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled recipe or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="section.key=value", help="Settings that override the recipe's.", show_default=False
            ),
        ] = None,
        batch_sizes: Annotated[
            str, typer.Option(metavar="N,N,...", help="Rows of each task in a micro-batch.")
        ] = "8,16,32",
        methods: Annotated[
            str | None,
            typer.Option(metavar="M,M,...", help="Gradient methods. Default: the recipe's.", show_default=False),
        ] = None,
        storages: Annotated[
            str | None,
            typer.Option(
                metavar="S,S,...", help="Any of stacked, kept, replay. Default: the recipe's.", show_default=False
            ),
        ] = None,
        phase: Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                help="A phase of the recipe. Default: the first that trains the encoder.",
                show_default=False,
            ),
        ] = None,
        search: Annotated[bool, typer.Option("--find-max", help="Search the largest batch that fits.")] = False,
        memory_limit: Annotated[
            str | None,
            typer.Option(
                metavar="SIZE", help="Available memory, for example 24GiB. Default: this machine's.", show_default=False
            ),
        ] = None,
        trace: Annotated[bool, typer.Option("--trace", help="Also trace a few steps for Perfetto.")] = False,
        scale_out: Annotated[
            bool, typer.Option("--scale-out", help="Predict steps of up to 1,024 ranks instead.")
        ] = False,
        link: Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                help="--scale-out: ethernet, slow, or RANKS:GB/s:us:GB/s:us in and between nodes. Default: nvlink.",
                show_default=False,
            ),
        ] = None,
        floors: Annotated[
            str | None,
            typer.Option(
                metavar="DEVICE",
                help="--scale-out: use the data sheet of h200 or a100 instead of measuring.",
                show_default=False,
            ),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="The folder of the results. Default: profiles/RECIPE.", show_default=False
            ),
        ] = None,
        commit: Annotated[
            str | None,
            typer.Option(
                metavar="COMMIT",
                help="`git describe --always --dirty` of a copy without .git.",
                show_default=False,
            ),
        ] = None,
        debug: Debug = False,
    ) -> None:
        """Measure a recipe's memory and speed by batch size and method, beside a model's
        prediction.

        Every point runs real training steps in a separate process, on the first GPU or
        the CPU.

        [bold]Examples[/bold]

        Two methods side by side, in three minutes on two cores:
          [cyan]fastmtl profile demo --batch-sizes 4,8,16 --methods sum,pcgrad[/cyan]

        The largest batch that fits a card, by the storage of J:
          [cyan]fastmtl profile demo --methods pcgrad --storages stacked,kept \\
            --find-max --memory-limit 24GiB[/cyan]

        A trace of the time, with other settings:
          [cyan]fastmtl profile demo --batch-sizes 16 --trace engine.zero=2 \\
            engine.precision=bf16[/cyan]

        The gain of more ranks, with 100 Gbit/s between machines:
          [cyan]fastmtl profile demo --batch-sizes 16 --methods sum,pcgrad \\
            --scale-out --link ethernet[/cyan]

        DIR gets profile.json (after every point), plots and traces. docs/profiling.md
        explains them.
        """
        set_debug(debug)
        sizes = _batch_sizes(batch_sizes)
        if not scale_out and (floors is not None or link is not None):
            raise UserError("--link and --floors need --scale-out")
        if scale_out and (search or trace or memory_limit is not None):
            raise UserError("--scale-out only predicts: leave out --find-max, --memory-limit and --trace")
        limit = _bytes(memory_limit) if memory_limit is not None else None
        from fastmtl.config import load_recipe
        from fastmtl.data.completion import with_class_names

        settings = with_class_names(load_recipe(recipe, overrides or []))
        directory = output or Path("profiles") / Path(recipe).stem
        _writable(directory)
        from fastmtl.bench.report import progress, wide
        from fastmtl.profile import plan, plots, run, table

        chosen = plan.choose_phase(settings, phase)
        points = plan.points(chosen.recipe, sizes, _names(methods), _names(storages))
        if scale_out:
            _scale_out(settings, chosen, recipe, points, directory, link or "nvlink", floors, commit)
            return
        with progress() as say:
            result = run.profile(
                settings,
                chosen,
                recipe,
                points,
                directory,
                say,
                memory_limit=limit,
                search=search,
                trace=trace,
                commit=commit,
            )
        table.show(result, wide())
        print(f"results: {directory / 'profile.json'}")
        _show_plots(lambda: plots.draw(result, directory))
        if all(point["measured"] is None for point in result["points"]):
            raise UserError("no point could be measured; see the reasons above")


def _scale_out(
    settings: Recipe,
    phase: Phase,
    name: str,
    points: Sequence[Point],
    directory: Path,
    link: str,
    floors: str | None,
    commit: str | None,
) -> None:
    from fastmtl.bench.report import progress, wide
    from fastmtl.profile import plots, scale_out_run
    from fastmtl.profile.links import find_cluster

    cluster = find_cluster(link)
    with progress() as say:
        result = scale_out_run.predict_scale(
            settings, phase, name, points, directory, say, cluster, device_of_floors=floors, commit=commit
        )
    scale_out_run.show(result, wide())
    print(f"results: {directory / 'scale-out.json'}")
    _show_plots(lambda: [plots.draw_scale_out(result, directory)])


def _show_plots(draw: Callable[[], list[Path]]) -> None:
    """Draw plots and print the names of their files.

    draw: writes the plots and returns their files. If it raises NoOrigin, its reason is printed.
    """
    from fastmtl.profile.plots import NoOrigin

    try:
        for file in draw():
            print(f"plot: {file}")
    except NoOrigin as error:
        print(error)


def _batch_sizes(text: str) -> list[int]:
    sizes = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) < 2**31:
            raise UserError(f"--batch-sizes: '{part.strip()}' is no number of rows: write them as 8,16,32")
        sizes.append(int(part))
    return sizes


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text is not None else []


def _bytes(text: str) -> int:
    """Return the bytes of 24GiB, 24GB, 24G (meaning GB), 500MiB or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory-limit: '{text}' is no size: write it as 24GiB or 500MiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write to {directory}: {error.strerror}") from None
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output: cannot write to {directory}: no permission")
