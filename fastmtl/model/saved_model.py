"""Save and load the `model/` directory of a run, described in docs/models.md.

| file | contents |
|---|---|
| config.json, model.safetensors, tokenizer | the encoder, for transformers.AutoModel |
| adapters.safetensors | the adapters |
| lora.safetensors | the LoRA, if there is one |
| heads.safetensors | the heads; names are `<task>.<parameter>` |
| fastmtl.json | the recipe |

The weights are in safetensors files and no code is stored, so loading a model runs no code from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastmtl.config import Recipe, parse_recipe
from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.files.user_path import user_path
from fastmtl.model.encoder.pretrained import load_encoder, load_tokenizer, save_encoder
from fastmtl.model.encoder.weights import load_exactly, read_tensors
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.version import __version__

FORMAT = 1


def save_model(
    directory: Path,
    model: MultiTaskModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the `model/` directory, replacing an earlier one.

    It is written under another name and then renamed, so that `directory` is never half-written.
    state_dict: the tensors to save, if not those of `model`: gathered from the ranks of ZeRO 3, or
    joined from several models. recipe: gives the task names.
    about: further entries of fastmtl.json.
    """
    tensors = model.state_dict() if state_dict is None else state_dict
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "adapter": {}, "lora": {}, "heads": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.detach().cpu().contiguous()
    heads = {_head_name(name, recipe): tensor for name, tensor in parts["heads"].items()}

    written = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    save_encoder(written, model.encoder, parts["encoder"], tokenizer)
    save_file(parts["adapter"], written / "adapters.safetensors", metadata={"format": "pt"})
    if parts["lora"]:
        save_file(parts["lora"], written / "lora.safetensors", metadata={"format": "pt"})
    save_file(heads, written / "heads.safetensors", metadata={"format": "pt"})
    entries = {
        "format": FORMAT,
        "fastmtl": __version__,
        "tasks": recipe.task_names,
        "recipe": recipe.model_dump(mode="json"),
        **(about or {}),
    }
    (written / "fastmtl.json").write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    previous = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    written.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def restore_previous(directory: Path) -> None:
    """Bring back the earlier `model/` directory if `save_model` was killed while replacing it.

    `save_model` renames the earlier directory to `.model.old`, then `.model.new` to `model`.
    """
    previous = directory.with_name(f".{directory.name}.old")
    if previous.is_dir() and not directory.exists():
        previous.rename(directory)


def model_directory(path: str | Path) -> Path:
    """Return the `model/` directory for a path given by the user.

    path: this directory, or the run's directory that contains it.
    Raises UserError if the path is no directory.
    """
    directory = user_path(path)
    if not directory.is_dir():
        raise UserError(f"there is no model directory {directory}")
    inner = directory / "model"
    return inner if inner.is_dir() else directory


def read_about(directory: Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a `model/` directory, and all entries of its fastmtl.json.

    Raises UserError, naming the file, if fastmtl.json is missing, damaged or of another format.
    """
    path = directory / "fastmtl.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory of fastmtl: it has no fastmtl.json")
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: format {about.get('format')!r}, this version of fastmtl reads format {FORMAT}")
    if not isinstance(about.get("recipe"), dict):
        raise UserError(f"{path}: recipe is missing")
    return parse_recipe(_without_former_settings(about["recipe"]), str(path)), about


def _without_former_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a saved recipe without the settings that version 0.1.0 knew for training only."""
    encoder = recipe.get("encoder")
    if not isinstance(encoder, dict):
        return recipe
    kept = {key: value for key, value in encoder.items() if key not in ("checkpointing", "cuda_graphs")}
    return {**recipe, "encoder": kept}


def load_model(directory: Path) -> tuple[MultiTaskModel, Recipe, PreTrainedTokenizerBase]:
    """Load a directory that `save_model` wrote; return its model, recipe and tokenizer.

    The model is float32, on the CPU and in evaluation mode.
    Raises UserError, naming the file, if the directory is damaged or not a model of fastmtl.
    """
    recipe, _ = read_about(directory)
    # A model that was trained with apex's LayerNorm needs no apex here.
    here = recipe.encoder.model_copy(update={"path": str(directory), "layer_norm": "fastmtl"})
    model = MultiTaskModel(recipe, load_encoder(here))
    if model.adapter is not None:
        adapters = directory / "adapters.safetensors"
        load_exactly(model.adapter, read_tensors(adapters), str(adapters))
    if model.lora is not None:
        lora = directory / "lora.safetensors"
        load_exactly(model.lora, read_tensors(lora), str(lora))
    heads = directory / "heads.safetensors"
    names = {name: _head_name(name, recipe) for name in model.heads.state_dict()}
    load_exactly(model.heads, read_tensors(heads), str(heads), names)
    return model.eval(), recipe, load_tokenizer(here)


def _head_name(name: str, recipe: Recipe) -> str:
    index, _, parameter = name.partition(".")
    return f"{recipe.task_names[int(index)]}.{parameter}"
