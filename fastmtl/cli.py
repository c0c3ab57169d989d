"""The command line. Commands import what they need when they run, so help needs no torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from fastmtl.commands import bench, compare, models, profile, recipes, serve, sweep
from fastmtl.commands.options import Debug, ModelDir
from fastmtl.errors import UserError, one_line, printable
from fastmtl.files.output_folder import OutputFolder, check_output
from fastmtl.system.failures import explained
from fastmtl.system.garbage import without_collections
from fastmtl.system.launcher_variables import is_first, world_size
from fastmtl.system.streams import hide_stored_exceptions, secure
from fastmtl.version import __version__

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """The group of commands; Ctrl-C ends a command with status 130, as in a shell."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]fastmtl train demo[/bold]. Help for one command: [bold]fastmtl train --help[/bold].",
)

_debug = False


def _set_debug(debug: bool) -> None:
    global _debug
    _debug = _debug or debug


def _print_version(value: bool) -> None:
    if value:
        print(f"fastmtl {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    context: typer.Context,
    debug: Debug = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune one BERT-style encoder on many tasks, with task adapters and gradient surgery."""
    _set_debug(debug)
    context.obj = local_rank


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A bundled recipe (fastmtl recipes) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.key=value", help="Settings that override the recipe's.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of the run. Default: runs/RECIPE.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in DIR.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="With --resume: allow other settings or other training files.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check everything that a run needs, without training.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe.

    [bold]Examples[/bold]

    One process, on the first GPU or the CPU:
      [cyan]fastmtl train demo[/cyan]

    Other settings, another folder:
      [cyan]fastmtl train demo train.epochs=1 gradient.method=sum --output runs/joint[/cyan]

    Your own files:
      [cyan]fastmtl train cs224n data.dir=data/cs224n[/cyan]

    Under the launcher, every GPU (or two CPU processes):
      [cyan]deepspeed --no_python fastmtl train demo[/cyan]
      [cyan]DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --no_python fastmtl train demo[/cyan]

    Continue after a stop:
      [cyan]fastmtl train demo --resume[/cyan]

    All checks of a start in seconds, before the job waits in a queue:
      [cyan]fastmtl train my.yaml --check[/cyan]

    New tasks for a trained model; its own tasks stay as they are:
      [cyan]fastmtl train new-task.yaml add_to=runs/demo/model[/cyan]

    DIR gets config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/,
    predictions/ and report.html.
    """
    with without_collections():
        from fastmtl.config import load_recipe
        from fastmtl.engine.early_errors import errors_reach_rank_0
        from fastmtl.training.early_checks import check_recipe

    _set_debug(debug)
    directory = output or Path("runs") / Path(recipe).stem
    if accept_changes and not resume:
        raise UserError("--accept-changes needs --resume: a new run has no earlier settings to differ from")
    folder = None
    with errors_reach_rank_0():
        settings = load_recipe(recipe, overrides or [])
        if is_first():
            if check:
                check_output(directory, resume=resume)
            else:
                folder = OutputFolder(directory, resume=resume)
        settings, rows = check_recipe(settings, world_size())
    if check:
        from fastmtl.training.prepare import check_run

        found = check_run(
            settings, directory, resume=resume, accept_changes=accept_changes, local_rank=context.obj, rows=rows
        )
        if found is not None:
            print(found)
        return
    with without_collections():
        from fastmtl.loop import train as run

    run(settings, directory, resume=resume, accept_changes=accept_changes, local_rank=context.obj, rows=rows)
    if folder is not None:
        folder.release()


@app.command(no_args_is_help=True)
def evaluate(
    model_dir: ModelDir,
    task: Annotated[str | None, typer.Option(metavar="T", help="Evaluate this task only.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="F", help="Labelled rows of task T, in its format.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the recipe's files. Default: as in training.")
    ] = None,
    split: Annotated[Literal["train", "dev", "test"], typer.Option(help="The recipe's files to use.")] = "dev",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Score a trained model.

    [bold]Examples[/bold]

    The dev files of its recipe:
      [cyan]fastmtl evaluate runs/demo/model[/cyan]

    The same files elsewhere, and their test split:
      [cyan]fastmtl evaluate runs/demo/model --data data/cs224n --split test[/cyan]

    One file, with output for a program:
      [cyan]fastmtl evaluate runs/demo/model --task paraphrase --file pairs.csv --json[/cyan]
    """
    _set_debug(debug)
    if file is not None and task is None:
        raise UserError("--file needs --task, the task of its rows")
    if file is not None and data is not None:
        raise UserError("--file and --data exclude each other: one file of one task, or the files of the recipe")
    from fastmtl.inference.predict import evaluate_file, evaluate_split, load

    predictor = load(model_dir)
    if file is not None and task is not None:
        result = evaluate_file(predictor, task, file)
    else:
        result = evaluate_split(predictor, split, data, [task] if task is not None else None)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    from rich.console import Console

    from fastmtl.tracking.display import scores_table

    title = f"{file}" if file is not None else f"{split} scores"
    console = Console()
    console.print(scores_table(predictor.recipe, result.metrics, result.mean, title))
    for note in result.notes:
        console.print(printable(note), highlight=False, markup=False)


@app.command(no_args_is_help=True)
def predict(
    model_dir: ModelDir,
    input_file: Annotated[
        Path, typer.Option("--input", metavar="F", help="Rows of the task, in its format; no labels needed.")
    ],
    output_file: Annotated[
        Path, typer.Option("--output", metavar="F", help="The CSV file to write; with --all-tasks a folder.")
    ],
    task: Annotated[str | None, typer.Option(metavar="T", help="The task to predict.", show_default=False)] = None,
    all_tasks: Annotated[bool, typer.Option("--all-tasks", help="Predict all tasks of the model.")] = False,
    layout: Annotated[
        Literal["table", "cs224n", "squad"],
        typer.Option("--format", help="CSV with probabilities, the CS224N hand-in format, or SQuAD's JSON."),
    ] = "table",
    debug: Debug = False,
) -> None:
    """Predict labels for a file.

    The file is read like the task's training files, but labels may be missing.
    A table has the columns id, predicted and the probabilities of the classes
    (regression: id, predicted).

    [bold]Examples[/bold]

      [cyan]fastmtl predict runs/demo/model --task sentiment --input reviews.csv \\
        --output reviews-predicted.csv[/cyan]

    All tasks, which read the same column; the encoder runs once:
      [cyan]fastmtl predict runs/demo/model --all-tasks --input reviews.csv --output out[/cyan]

    A file to hand in for CS224N:
      [cyan]fastmtl predict runs/cs224n/model --task sst --input test.csv \\
        --output sst-out.csv --format cs224n[/cyan]
    """
    _set_debug(debug)
    if (task is None) != all_tasks or (all_tasks and layout != "table"):
        raise UserError("give --task T for one task, or --all-tasks for all of them (as tables)")
    from fastmtl.inference.predict import load, predict_all_tasks, predict_file

    predictor = load(model_dir)
    if task is None:
        rows, notes = predict_all_tasks(predictor, input_file, output_file)
    else:
        rows, notes = predict_file(predictor, task, input_file, output_file, layout)
    for note in notes:
        print(printable(note))
    print(printable(f"{rows} prediction{'s' if rows != 1 else ''} in {output_file}"))


models.register(app, _set_debug)
profile.register(app, _set_debug)
recipes.register(app, _set_debug)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, debug: Debug = False) -> None:
    """Show versions, GPUs, and the implementation of every kernel with the reason.

    The exit status is 1 if something that training needs is missing or broken.
    """
    _set_debug(debug)
    import dataclasses

    from rich.console import Console

    from fastmtl.commands.doctor import diagnose, show

    findings = diagnose()
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        show(findings, Console())
    if any(finding.required and finding.status != "ok" for finding in findings):
        raise typer.Exit(EXIT_FAILURE)


bench.register(app, _set_debug)
compare.register(app, _set_debug)
serve.register(app, _set_debug)
sweep.register(app, _set_debug)


def main() -> None:
    """Run the command line; the installed script `fastmtl` calls this function.

    A UserError prints one message and gives status 2, a TrainingError one message and status 1. Any
    other exception prints a short message and gives status 1.
    """
    secure()
    hide_stored_exceptions()
    try:
        app(prog_name="fastmtl")
    except UserError as error:
        _fail(str(error), EXIT_USER_ERROR, everywhere=False)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        advice = explained(error)
        if advice is not None:
            _fail(advice, EXIT_FAILURE, everywhere=True)
        text = one_line(f"{type(error).__name__}: {error}")
        _fail(f"{text}\nrun with --debug for the traceback; this is a bug in fastmtl", EXIT_FAILURE, everywhere=True)


def _fail(message: str, status: int, *, everywhere: bool) -> NoReturn:
    """Print a message and end the process with `status`. Called inside an `except` block.

    everywhere: print on all ranks. Otherwise only rank 0 prints, since a UserError ends all ranks.
    With --debug the traceback is printed instead.
    """
    if _debug:
        traceback.print_exc()
    elif everywhere or is_first():
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if everywhere and rank is not None else ""
        print(f"fastmtl{where}: {message}", file=sys.stderr)
    raise SystemExit(status) from None
