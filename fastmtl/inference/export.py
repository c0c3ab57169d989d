"""Export of a trained model's encoder to the file layouts of other libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

from fastmtl.config import Recipe
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.pooler import Pooler
from fastmtl.model.encoder.pretrained import save_encoder
from fastmtl.model.heads.embed import Projection, Recurrent
from fastmtl.model.lora.peft_files import write_folder
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import load_model
from fastmtl.version import __version__

Layout = Literal["sentence-transformers", "transformers", "peft"]
# Poolings of fastmtl -> those of sentence-transformers. There BERT's pooler is the pooling of [CLS]
# with a dense layer after it.
_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "pooler": "cls_token"}


def export(
    source: Path, target: Path, layout: Layout, pooling: str | None = None, task: str | None = None
) -> list[str]:
    """Write the encoder of a trained model, or its LoRA, to a folder in another library's layout.

    source: a `model/` directory. target: a new or empty folder, which is written completely or not
    at all; weights are float32.

    layout: "transformers" writes config.json, model.safetensors and the tokenizer of a BertModel.
    "sentence-transformers" adds the files that make `SentenceTransformer(target)` cut texts at the
    model's length and pool by `pooling` (default: the pooling of the task, or the one that all
    tasks have).

    A LoRA is merged into the encoder: that of all tasks, or the one of `task`. "peft" writes the
    LoRA alone, for PeftModel.from_pretrained on AutoModel of `source`: one folder, or one for each
    task that has its own LoRA.

    task: export the vectors of this task, with its projection if it has one.

    Returns lines for the user. Raises UserError for a task whose vectors need other parts of the
    model, and if no pooling can be chosen.
    """
    model, recipe, tokenizer = load_model(source)
    own_lora = recipe.lora.used and not recipe.lora.shared
    if task is not None:
        if task not in recipe.tasks:
            raise unknown_name("task", task, recipe.task_names)
        if layout != "sentence-transformers" and not own_lora:
            raise UserError(f"--format {layout} has no pooling and no LoRA of {task} alone: leave --task out")
    if layout == "peft":
        return _export_lora(model, recipe, source, target, task)
    if task is not None:
        if model.adapter is not None:
            raise UserError(
                f"--task {task}: its vectors need its adapter, which computes something beside the encoder's layers. "
                "That is no change of BERT's weights, so the layout has no place for it. Leave --task out to export "
                "the encoder alone."
            )
    embed = None if task is None else model.heads[recipe.task_names.index(task)].get_submodule("embed")
    if isinstance(embed, Recurrent):
        kind = recipe.tasks[str(task)].head.name
        raise UserError(
            f"--task {task}: its vectors are states of its {kind} head, for which the layout has no place. Leave "
            "--task out, with --pooling, to export the encoder alone."
        )
    chosen = None
    if layout == "sentence-transformers":
        chosen = pooling or _own_pooling(recipe, task, adapters=model.adapter is not None)
        if chosen == "pooler":
            model.encoder.use_pooler()
    index = None if task is None or not own_lora else recipe.task_names.index(task)
    merges = model.lora is not None and (index is not None or not own_lora)
    if model.lora is not None and merges:
        model.lora.merge_into(model.encoder, index)
    written = _begin(target)
    save_encoder(written, model.encoder, model.encoder.state_dict(), tokenizer)
    if chosen is not None:
        projection = embed.dense if isinstance(embed, Projection) else None
        _write_sentence_transformers(written, model.encoder, chosen, projection)
    _finish(written, target)
    notes = [] if chosen is None else [f"pooling: {chosen}; texts are cut at {model.encoder.max_length} tokens"]
    if model.adapter is not None:
        notes.append(f"the encoder alone: the adapters of {', '.join(recipe.task_names)} are not in it")
    if merges:
        notes.append(f"the LoRA of {task if own_lora else 'all tasks'} is merged into the weights")
    elif model.lora is not None:
        notes.append(f"the encoder without the LoRAs of {', '.join(recipe.task_names)}; --task merges that of a task")
    return notes


def _export_lora(model: MultiTaskModel, recipe: Recipe, source: Path, target: Path, task: str | None) -> list[str]:
    """Write the model's LoRA, or those of its tasks, as PEFT does; return lines for the user."""
    if model.lora is None:
        raise UserError(f"--format peft: {source} has no LoRA; train one with the recipe's section lora")
    assert isinstance(model.encoder, PackedEncoder)
    written = _begin(target)
    folders: dict[Path, int | None] = {written: None}
    if not recipe.lora.shared:
        names = recipe.task_names if task is None else [task]
        folders = {written / name if task is None else written: recipe.task_names.index(name) for name in names}
    for folder, index in folders.items():
        write_folder(folder, model.lora, model.encoder, str(source), index)
    _finish(written, target)
    notes = [f"the LoRA's base model: {source}"]
    if len(folders) > 1:
        notes.append(f"one folder for each task: {', '.join(recipe.task_names)}")
    if model.adapter is not None:
        notes.append(f"the LoRA alone: the adapters of {', '.join(recipe.task_names)} are not in it")
    return notes


def _begin(target: Path) -> Path:
    """Return a new folder beside `target`, for `_finish`."""
    written = target.with_name(f".{target.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    return written


def _finish(written: Path, target: Path) -> None:
    if target.exists():
        target.rmdir()
    written.rename(target)


def _own_pooling(recipe: Recipe, task: str | None, *, adapters: bool) -> str:
    tasks = [name for name in recipe.task_names if recipe.tasks[name].scores != "tokens"] if task is None else [task]
    found = {recipe.tasks[name].pooling for name in tasks}
    if not found or any(recipe.tasks[name].scores == "tokens" for name in tasks):
        named = "the tasks read" if task is None else f"--task {task}: it reads"
        raise UserError(f"{named} the states of tokens, no pooling: choose with --pooling {'|'.join(_POOLINGS)}")
    if len(found) > 1:
        each = ", ".join(f"{name}: {recipe.tasks[name].pooling}" for name in tasks)
        options = f"--pooling {'|'.join(_POOLINGS)}{'' if adapters else ' or --task'}"
        raise UserError(f"the tasks pool differently ({each}): choose with {options}")
    (name,) = found
    if name not in _POOLINGS:
        raise UserError(f"sentence-transformers has no pooling '{name}': choose with --pooling {'|'.join(_POOLINGS)}")
    return name


def _write_sentence_transformers(
    directory: Path, encoder: Encoder, pooling: str, projection: torch.nn.Linear | None
) -> None:
    # The keys and module names of sentence-transformers 2 to 5, which 6 reads as well.
    size = encoder.settings.hidden_size
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(directory / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    versions = {"fastmtl": __version__, "transformers": transformers.__version__, "pytorch": torch.__version__}
    about = {"__version__": versions, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(directory / "config_sentence_transformers.json", about)
    (directory / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{key}": key == _POOLINGS[pooling] for key in dict.fromkeys(_POOLINGS.values())}
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **modes})
    dense: list[tuple[torch.nn.Linear, type[torch.nn.Module]]] = []
    if pooling == "pooler":
        assert isinstance(encoder.pooler, Pooler)
        dense.append((encoder.pooler.dense, torch.nn.Tanh))
    if projection is not None:
        dense.append((projection, torch.nn.Identity))
    for number, (linear, activation) in enumerate(dense, start=2):
        modules.append((f"{number}_Dense", "Dense"))
        _write_dense(directory / f"{number}_Dense", linear, activation)
    names = [f"sentence_transformers.models.{kind}" for _, kind in modules]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": name}
        for index, ((path, _), name) in enumerate(zip(modules, names, strict=True))
    ]
    _write(directory / "modules.json", listed)


def _write_dense(directory: Path, linear: torch.nn.Linear, activation: type[torch.nn.Module]) -> None:
    directory.mkdir()
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    function = f"{activation.__module__}.{activation.__qualname__}"
    _write(directory / "config.json", {**sizes, "activation_function": function})
    tensors = {f"linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
