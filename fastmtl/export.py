"""A trained model's encoder in the layouts of other libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import fastmtl
from fastmtl.config import Recipe
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.pretrained import load_model, save_encoder

# What sentence-transformers pools by, under fastmtl's names, which are its own.
POOLINGS = ("mean", "cls", "max")
Layout = Literal["sentence-transformers", "transformers"]


def export(
    source: Path, target: Path, layout: Layout, pooling: str | None = None, task: str | None = None
) -> list[str]:
    """Writes the encoder of the `model/` directory `source`, float32, to `target`, whole or not at all.

    transformers: config.json, model.safetensors and the tokenizer, as a BertModel.
    sentence-transformers: these, and the files that make `SentenceTransformer(target)` cut texts at the model's length
    and pool by `pooling` (default: the task's own, or the one that all tasks have).
    Returns notes for the user. Raises UserError for a task whose vectors an encoder alone cannot give, and where there
    is no pooling to choose.
    """
    model, recipe, tokenizer = load_model(source)
    if task is not None:
        if task not in recipe.tasks:
            raise unknown_name("task", task, recipe.task_names)
        if model.adapter is not None:
            raise UserError(
                f"--task {task}: its vectors need its adapter ({recipe.adapter.name}), which computes something beside "
                "the encoder's layers. That is no change of BERT's weights, so the layout has no place for it. Leave "
                "--task out to export the encoder alone."
            )
    chosen = _pooling(recipe, pooling, task) if layout == "sentence-transformers" else None
    written = target.with_name(f".{target.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    config = model.encoder.config
    save_encoder(written, config, model.encoder.state_dict(), tokenizer)
    if chosen is not None:
        _write_sentence_transformers(written, config.hidden_size, model.encoder.max_length, chosen)
    if target.exists():
        target.rmdir()
    written.rename(target)
    notes = [] if chosen is None else [f"pooling: {chosen}; texts are cut at {model.encoder.max_length} tokens"]
    if model.adapter is not None:
        tasks = ", ".join(recipe.task_names)
        notes.append(f"the encoder alone: the adapters ({recipe.adapter.name}) of {tasks} are not in it")
    return notes


def _pooling(recipe: Recipe, given: str | None, task: str | None) -> str:
    if given is not None:
        return given
    tasks = recipe.task_names if task is None else [task]
    found = {recipe.tasks[name].pooling for name in tasks}
    if len(found) > 1:
        each = ", ".join(f"{name}: {recipe.tasks[name].pooling}" for name in tasks)
        raise UserError(f"the tasks pool differently ({each}): choose by --pooling {'|'.join(POOLINGS)} or --task")
    (name,) = found
    if name not in POOLINGS:
        raise UserError(f"sentence-transformers has no pooling '{name}': choose by --pooling {'|'.join(POOLINGS)}")
    return name


def _write_sentence_transformers(directory: Path, size: int, max_length: int, pooling: str) -> None:
    # The keys and module names of sentence-transformers 2 to 4, which later versions read as well.
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(
        directory / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    versions = {"fastmtl": fastmtl.__version__, "transformers": transformers.__version__, "pytorch": torch.__version__}
    about = {"__version__": versions, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(directory / "config_sentence_transformers.json", about)
    (directory / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{key}": key.startswith(pooling) for key in ("cls_token", "mean_tokens", "max_tokens")}
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **modes})


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
