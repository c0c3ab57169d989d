"""The commands `export` and `merge`, on whole trained models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastmtl.commands.options import Debug, ModelDir
from fastmtl.errors import UserError, printable

OutDir = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write: a new one, or an empty one.")]

_ENCODER = "The encoder alone"
_WHOLE: dict[str, Any] = {"rich_help_panel": "The whole model"}


def register(app: typer.Typer, set_debug: Callable[[bool], None]) -> None:
    """Add the commands of this module to the app.

    set_debug: called with the value of the option --debug.
    """

    @app.command(no_args_is_help=True)
    def export(
        model_dir: ModelDir,
        out: Annotated[
            Path | None,
            typer.Argument(
                metavar="[OUT]", help="The directory for the encoder: a new one, or an empty one.", show_default=False
            ),
        ] = None,
        layout: Annotated[
            Literal["sentence-transformers", "transformers", "peft"],
            typer.Option("--format", help="The library that loads it.", rich_help_panel=_ENCODER),
        ] = "sentence-transformers",
        pooling: Annotated[
            Literal["mean", "cls", "max", "pooler"] | None,
            typer.Option(
                help="Pooling of tokens to one vector. Default: the tasks' pooling, if all have the same.",
                show_default=False,
                rich_help_panel=_ENCODER,
            ),
        ] = None,
        task: Annotated[
            str | None,
            typer.Option(
                metavar="T",
                help="Export the vectors of this task, or its own LoRA. Not for models with adapters.",
                show_default=False,
                rich_help_panel=_ENCODER,
            ),
        ] = None,
        onnx: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Write ONNX graphs for onnxruntime.", show_default=False, **_WHOLE),
        ] = None,
        torch: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Write programs of torch.export (.pt2).", show_default=False, **_WHOLE),
        ] = None,
        int8: Annotated[
            bool,
            typer.Option("--int8", help="Also quantise the ONNX graphs, and measure the loss on dev rows.", **_WHOLE),
        ] = False,
        merge_adapters: Annotated[
            bool, typer.Option("--merge-adapters", help="Add the LoRA to the encoder's weights.", **_WHOLE)
        ] = False,
        per_task: Annotated[
            bool,
            typer.Option("--per-task", help="One graph per task, also where one could hold all heads.", **_WHOLE),
        ] = False,
        data_dir: Annotated[
            Path | None,
            typer.Option(
                "--data", metavar="DIR", help="Folder of the dev rows for --int8.", show_default=False, **_WHOLE
            ),
        ] = None,
        debug: Debug = False,
    ) -> None:
        """Write a model's encoder, or its LoRA, for another library; or a whole model as ONNX.

        [bold]Examples[/bold]

        For sentence_transformers.SentenceTransformer("embeddings"):
          [cyan]fastmtl export runs/demo/model embeddings --pooling mean[/cyan]

        For transformers.AutoModel.from_pretrained("encoder"):
          [cyan]fastmtl export runs/demo/model encoder --format transformers[/cyan]

        For peft.PeftModel.from_pretrained(encoder, "lora"):
          [cyan]fastmtl export runs/demo/model lora --format peft[/cyan]

        For onnxruntime, and for torch.export.load, with adapters and heads:
          [cyan]fastmtl export runs/demo/model --onnx graphs --int8[/cyan]
          [cyan]fastmtl export runs/demo/model --torch programs[/cyan]

        A LoRA is merged into the exported encoder. Adapters and heads are no part of
        the encoder: they are in the graphs and programs only.
        """
        set_debug(debug)
        if onnx is not None or torch is not None:
            if out is not None or layout != "sentence-transformers" or pooling is not None or task is not None:
                raise UserError(
                    "--onnx and --torch export a whole model: leave OUT, --format, --pooling and --task out"
                )
            if onnx == torch:
                raise UserError(f"--onnx and --torch: {onnx} is the same folder: give each its own")
            for folder in (onnx, torch):
                if folder is not None:
                    _check_new(folder)
            from fastmtl.inference.exported.write import export_model
            from fastmtl.model.saved_model import model_directory

            export_model(
                model_directory(model_dir),
                onnx_dir=onnx,
                torch_dir=torch,
                int8=int8,
                merge_adapters=merge_adapters,
                per_task=per_task,
                data_dir=data_dir,
                say=lambda line: print(printable(line), flush=True),
            )
            return
        if int8 or merge_adapters or per_task or data_dir is not None:
            raise UserError(
                "--int8, --merge-adapters, --per-task and --data go with --onnx DIR or --torch DIR: add one"
            )
        if out is None:
            raise UserError(
                "export needs a folder: OUT for the encoder alone, or --onnx DIR or --torch DIR for all tasks"
            )
        if layout != "sentence-transformers" and pooling is not None:
            raise UserError(f"--format {layout} has no pooling: leave --pooling out")
        _check_new(out)
        from fastmtl.inference.export import export as write
        from fastmtl.model.saved_model import model_directory

        for note in write(model_directory(model_dir), out, layout, pooling, task):
            print(printable(note))
        print(printable(f"{layout}: {out}"))

    @app.command(no_args_is_help=True)
    def merge(
        out: OutDir,
        model_dirs: Annotated[
            list[Path], typer.Argument(metavar="MODEL_DIR...", help="Two or more models of one encoder.")
        ],
        rename: Annotated[
            list[str] | None,
            typer.Option(metavar="MODEL_DIR:old=new", help="Give a task another name.", show_default=False),
        ] = None,
        debug: Debug = False,
    ) -> None:
        """Put several models' tasks into one model.

        The encoders have to be equal bit for bit, for example frozen ones, and the
        adapters of the same kind and size. The tasks' predictions do not change.

        [bold]Examples[/bold]

          [cyan]fastmtl merge both/model runs/reviews/model runs/questions/model[/cyan]

        If both have a task of the same name:
          [cyan]fastmtl merge both/model runs/a/model runs/b/model \\
            --rename runs/b/model:sentiment=tone[/cyan]
        """
        set_debug(debug)
        if len(model_dirs) < 2:
            raise UserError("merge needs OUT and at least two models: fastmtl merge OUT MODEL_DIR MODEL_DIR")
        names = _renamed(rename or [], model_dirs)
        _check_new(out)
        from fastmtl.inference.model_card import write_card
        from fastmtl.model.merge import TrainedModel, join, rename_tasks
        from fastmtl.model.saved_model import model_directory

        joined, tokens = None, {}
        for path in model_dirs:
            source = rename_tasks(TrainedModel.read(model_directory(path)), names.get(path, {}))
            tokens[path] = source.recipe.train.eval_tokens
            joined = source if joined is None else join(joined, source)
        assert joined is not None
        joined.save(out)
        write_card(out, joined.recipe, {})
        if len(set(tokens.values())) > 1:
            print(
                f"train.eval_tokens is that of {model_dirs[0]}, {tokens[model_dirs[0]]}: batches of another size may "
                "round the others' predictions differently"
            )
        print(printable(f"{out}: {', '.join(joined.recipe.task_names)}"))


def _renamed(given: list[str], model_dirs: list[Path]) -> dict[Path, dict[str, str]]:
    """Return the values of the option --rename as {model directory: {old name: new name}}."""
    result: dict[Path, dict[str, str]] = {}
    for item in given:
        model, colon, names = item.rpartition(":")
        old, equals, new = names.partition("=")
        if not colon or not equals:
            raise UserError(f"--rename {item}: write MODEL_DIR:old=new")
        if Path(model) not in model_dirs:
            raise UserError(f"--rename {item}: {model} is none of the models {', '.join(map(str, model_dirs))}")
        result.setdefault(Path(model), {})[old] = new
    return result


def _check_new(directory: Path) -> None:
    """Raise UserError for a folder that is not empty or not writable, before a model is loaded."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        used = directory.exists() and any(directory.iterdir())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    if used:
        raise UserError(f"{directory} is not empty: choose another place")
