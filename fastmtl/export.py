"""A trained model's encoder in the layouts of other libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

import fastmtl
from fastmtl.config import Recipe
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.encoder import PackedBert
from fastmtl.model.pretrained import load_model, save_encoder

Layout = Literal["sentence-transformers", "transformers"]
# fastmtl's name -> sentence-transformers'. BERT's pooler is a dense layer on [CLS] there.
_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "pooler": "cls_token"}


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
                f"--task {task}: its vectors need its adapter, which computes something beside the encoder's layers. "
                "That is no change of BERT's weights, so the layout has no place for it. Leave --task out to export "
                "the encoder alone."
            )
    chosen = None
    if layout == "sentence-transformers":
        chosen = pooling or _own_pooling(recipe, task, adapters=model.adapter is not None)
        if chosen == "pooler":
            model.encoder.use_pooler()
    written = target.with_name(f".{target.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    config = model.encoder.config
    save_encoder(written, config, model.encoder.state_dict(), tokenizer)
    if chosen is not None:
        _write_sentence_transformers(written, model.encoder, chosen)
    if target.exists():
        target.rmdir()
    written.rename(target)
    notes = [] if chosen is None else [f"pooling: {chosen}; texts are cut at {model.encoder.max_length} tokens"]
    if model.adapter is not None:
        notes.append(f"the encoder alone: the adapters of {', '.join(recipe.task_names)} are not in it")
    return notes


def _own_pooling(recipe: Recipe, task: str | None, *, adapters: bool) -> str:
    tasks = recipe.task_names if task is None else [task]
    found = {recipe.tasks[name].pooling for name in tasks}
    if len(found) > 1:
        each = ", ".join(f"{name}: {recipe.tasks[name].pooling}" for name in tasks)
        options = f"--pooling {'|'.join(_POOLINGS)}{'' if adapters else ' or --task'}"
        raise UserError(f"the tasks pool differently ({each}): choose by {options}")
    (name,) = found
    if name not in _POOLINGS:
        raise UserError(f"sentence-transformers has no pooling '{name}': choose by --pooling {'|'.join(_POOLINGS)}")
    return name


def _write_sentence_transformers(directory: Path, encoder: PackedBert, pooling: str) -> None:
    # The keys and module names of sentence-transformers 2 to 5, which 6 reads as well.
    size = encoder.config.hidden_size
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(directory / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    versions = {"fastmtl": fastmtl.__version__, "transformers": transformers.__version__, "pytorch": torch.__version__}
    about = {"__version__": versions, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(directory / "config_sentence_transformers.json", about)
    (directory / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{key}": key == _POOLINGS[pooling] for key in dict.fromkeys(_POOLINGS.values())}
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **modes})
    if pooling == "pooler":
        modules.append(("2_Dense", "Dense"))
        (directory / "2_Dense").mkdir()
        tanh = f"{torch.nn.Tanh.__module__}.{torch.nn.Tanh.__qualname__}"
        dense = {"in_features": size, "out_features": size, "bias": True, "activation_function": tanh}
        _write(directory / "2_Dense" / "config.json", dense)
        assert encoder.pooler is not None
        tensors = {f"linear.{name}": tensor for name, tensor in encoder.pooler.dense.state_dict().items()}
        save_file(tensors, directory / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    names = [f"sentence_transformers.models.{kind}" for _, kind in modules]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": name}
        for index, ((path, _), name) in enumerate(zip(modules, names, strict=True))
    ]
    _write(directory / "modules.json", listed)


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
