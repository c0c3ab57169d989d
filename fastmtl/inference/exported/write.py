"""The folders that `fastmtl export --onnx` and `--torch` write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastmtl.data.rows import Rows
from fastmtl.errors import UserError
from fastmtl.files.writing import writing
from fastmtl.inference.exported import onnx
from fastmtl.inference.exported.compare import OpenGraph, dev_metrics, largest_difference
from fastmtl.inference.exported.metadata import FILE, Graph, metadata, padding_id
from fastmtl.inference.exported.program import open_program, trace
from fastmtl.inference.predict import Predictor, load, split_rows
from fastmtl.model.heads.embed import Recurrent
from fastmtl.model.padded import PaddedModel

# A graph whose results differ by more is not written. Rounding gives about 1e-6 for trained models,
# and at most 1e-4 for random ones with large weights.
LARGEST_DIFFERENCE = 1e-3


def export_model(
    source: Path,
    *,
    onnx_dir: Path | None = None,
    torch_dir: Path | None = None,
    int8: bool = False,
    merge_adapters: bool = False,
    per_task: bool = False,
    data_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write a whole model, encoder, adapters and heads, for onnxruntime or for torch.export.

    source: a `model/` directory. onnx_dir, torch_dir: new or empty folders, which are written
    completely or not at all. Both get export.json and tokenizer.json, which cuts texts at the
    model's length and pads them. onnx_dir gets `model.onnx`, or `TASK.onnx` for each task if the
    tasks have adapters or `per_task` is set; torch_dir gets `.pt2` files of torch.export.save.
    Inputs and outputs are those of fastmtl.model.padded.PaddedModel: int64 and float32.

    int8: write `*.int8.onnx` too, and measure the dev scores of both on the recipe's dev rows.
    merge_adapters: add the LoRA to the encoder's weights. data_dir: folder of the dev rows; default
    the recipe's. say: gets lines for the user.

    Each graph is run and compared with the model before it is kept.
    Raises UserError for a missing library, for a model that cannot be exported, with
    `merge_adapters` for adapters that are no change of weights, and if results differ.
    """
    if onnx_dir is not None:
        onnx.check_libraries()
    if int8 and onnx_dir is None:
        raise UserError("--int8 quantises ONNX graphs: add --onnx DIR")
    predictor = load(source, "cpu")
    _check(predictor, merge_adapters=merge_adapters)
    rows = _dev_rows(predictor, data_dir, say) if int8 else {}
    names, once = predictor.recipe.task_names, predictor.model.runs_encoder_once
    groups = {"model": names} if once and not per_task else {name: [name] for name in names}
    floats: dict[str, OpenGraph] = {}
    smaller: dict[str, OpenGraph] = {}
    with ExitStack() as stack:
        onnx_folder, torch_folder = (
            None if target is None else stack.enter_context(_new_folder(target, predictor))
            for target in (onnx_dir, torch_dir)
        )
        for stem, tasks in groups.items():
            model = PaddedModel(predictor.model, tasks, merge_lora=merge_adapters)
            program = trace(model, predictor.model.encoder.max_length)
            if torch_folder is not None:
                path = torch_folder.path / f"{stem}.pt2"
                with writing(path):
                    torch.export.save(program, path)
                check_same(predictor, tasks, OpenGraph(open_program(torch.export.load(path)), model.inputs), path, say)
                torch_folder.graphs[path.name] = Graph(tasks, model.inputs)
            if onnx_folder is not None:
                path = onnx_folder.path / f"{stem}.onnx"
                with writing(path):
                    onnx.write_graph(program, model.inputs, path)
                graph = OpenGraph(onnx.open_graph(path), model.inputs)
                check_same(predictor, tasks, graph, path, say)
                floats |= dict.fromkeys(tasks, graph)
                quantized = path.with_suffix(".int8.onnx") if int8 else None
                if quantized is not None:
                    with writing(quantized):
                        onnx.quantize(path, quantized)
                    say(f"{quantized.name}: {_size(quantized)}")
                    smaller |= dict.fromkeys(tasks, OpenGraph(onnx.open_graph(quantized), model.inputs))
                onnx_folder.graphs[path.name] = Graph(
                    tasks, model.inputs, None if quantized is None else quantized.name
                )
    if rows:
        _say_loss(predictor, rows, floats, smaller, say)


def _check(predictor: Predictor, *, merge_adapters: bool) -> None:
    """Raise UserError for a model without an exact graph."""
    model, recipe = predictor.model, predictor.recipe
    for name, head in zip(recipe.task_names, model.heads, strict=True):
        if isinstance(head.embed, Recurrent):
            raise UserError(
                f"task {name}: its {recipe.tasks[name].head.name} head reads texts token by token, and torch.export "
                "would fix the number of tokens: such a model cannot be exported"
            )
    if merge_adapters and model.adapter is not None:
        raise UserError(
            f"--merge-adapters: the adapter {recipe.adapter.summary} computes something beside the encoder's layers, "
            "which is no change of their weights: leave --merge-adapters out"
        )
    if merge_adapters and model.lora is None:
        raise UserError("--merge-adapters: the model has no LoRA to merge: leave it out")


@dataclass(frozen=True)
class _Folder:
    """A folder that is being written. graphs: {file: its graph}."""

    path: Path
    graphs: dict[str, Graph] = field(default_factory=dict)


@contextmanager
def _new_folder(target: Path, predictor: Predictor) -> Iterator[_Folder]:
    """Yield a folder beside `target` with the tokenizer, which gets export.json and then its name.

    It is removed if the block raises an error.
    """
    folder = _Folder(target.with_name(f".{target.name}.new"))
    shutil.rmtree(folder.path, ignore_errors=True)
    try:
        with writing(folder.path):
            folder.path.mkdir(parents=True)
            tokenizer = predictor.tokenizer
            backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
            backend.enable_truncation(max_length=predictor.model.encoder.max_length, strategy="longest_first")
            backend.enable_padding(pad_id=padding_id(predictor), pad_token=tokenizer.pad_token or "", direction="right")
            backend.save(str(folder.path / "tokenizer.json"))
        yield folder
        with writing(target):
            text = json.dumps(metadata(predictor, folder.graphs), indent=1, ensure_ascii=False)
            (folder.path / FILE).write_text(text + "\n", encoding="utf-8")
            if target.exists():
                target.rmdir()
            folder.path.rename(target)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def check_same(
    predictor: Predictor, tasks: list[str], graph: OpenGraph, path: Path, say: Callable[[str], None]
) -> None:
    """Say the size of a graph and its largest difference from the model.

    Raises UserError if the difference is more than rounding.
    """
    found = {name: largest_difference(predictor, name, graph) for name in tasks}
    task = max(found, key=found.__getitem__)
    if not found[task] <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{path.name}: its results for the task {task} differ from the model's by {found[task]:.1e}: this encoder "
            "cannot be exported"
        )
    say(f"{path.name}: {', '.join(tasks)}; {_size(path)}; largest difference from predict {found[task]:.1e}")


def _size(path: Path) -> str:
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
    return f"{size / 1e6:.1f} MB"


def _dev_rows(predictor: Predictor, data_dir: Path | None, say: Callable[[str], None]) -> dict[str, Rows]:
    """Return {task: dev rows} of the recipe, {} if its files are not there.

    Raises UserError if the files are not in a folder that the user has named.
    """
    try:
        rows, notes = split_rows(predictor, "dev", data_dir, None)
    except UserError as error:
        if data_dir is not None:
            raise
        say(f"no dev rows were found, so the loss of int8 is not measured: {error}")
        return {}
    for note in notes:
        say(note)
    return rows


def _say_loss(
    predictor: Predictor,
    rows: dict[str, Rows],
    floats: dict[str, OpenGraph],
    smaller: dict[str, OpenGraph],
    say: Callable[[str], None],
) -> None:
    """Say the dev scores of the graphs in float32 and int8, and the loss."""
    before, after = (dev_metrics(predictor, graphs, rows) for graphs in (floats, smaller))
    say(f"{'task':<20} {'metric':<12} {'float32':>8} {'int8':>8} {'loss':>8}")
    for name in rows:
        metric = predictor.recipe.tasks[name].metric_name
        say(f"{name:<20} {metric:<12} {before[name]:8.4f} {after[name]:8.4f} {before[name] - after[name]:8.4f}")
