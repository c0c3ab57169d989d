"""The first weights of a LoRA: drawn, those of a folder of PEFT, or those of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastmtl.config import LoraConfig, Recipe
from fastmtl.errors import UserError
from fastmtl.files.user_path import user_path
from fastmtl.model.encoder.families import Family, read_config
from fastmtl.model.encoder.pretrained import encoder_directory
from fastmtl.model.encoder.weights import load_exactly, read_tensors
from fastmtl.model.lora.lora import Lora
from fastmtl.model.lora.peft_files import CONFIG, load_matrices, read_matrices, read_settings
from fastmtl.model.saved_model import model_directory


def with_settings_of_path(recipe: Recipe) -> Recipe:
    """Return the recipe with the section `lora` completed by the settings of `lora.path`.

    A recipe without `lora.path` is returned unchanged.
    Raises UserError, naming the key, if the recipe sets one of these values differently.
    """
    if recipe.lora.path is None:
        return recipe
    values: dict[str, Any] = {}
    for folder in _folders(recipe):
        found = read_settings(folder, _family(recipe))
        for key in values:
            if values[key] != found[key]:
                raise UserError(f"lora.path: {folder}: {key} is {found[key]}, in another task's folder {values[key]}")
        values = found
    for key, value in values.items():
        given = getattr(recipe.lora, key)
        if key in recipe.lora.model_fields_set and given is not None and given != value:
            raise UserError(f"lora.{key}: {given}, but lora.path: {recipe.lora.path} has {value}; leave lora.{key} out")
    try:
        lora = LoraConfig.model_validate({**recipe.lora.model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"lora.path: {recipe.lora.path}: {CONFIG}: {first['loc'][0]}: {first['msg']}") from None
    return recipe.model_copy(update={"lora": lora})


def load_start(lora: Lora, recipe: Recipe) -> None:
    """Load the first weights that `lora.path` or `add_to` name; without either they stay as drawn.

    With add_to, a LoRA that all tasks share is that of the trained model and stays as it is.
    Raises UserError, naming the file, if the weights do not fit.
    """
    if recipe.add_to is not None:
        if recipe.lora.shared:
            path = model_directory(recipe.add_to) / "lora.safetensors"
            load_exactly(lora, read_tensors(path), str(path))
            lora.requires_grad_(False)
    elif recipe.lora.path is not None:
        folders = _folders(recipe)
        matrices = [read_matrices(folder, _family(recipe)) for folder in folders]
        load_exactly(lora, load_matrices(lora, matrices), recipe.lora.path)


def _family(recipe: Recipe) -> Family:
    return read_config(encoder_directory(recipe.encoder.path) / "config.json")[0]


def _folders(recipe: Recipe) -> list[Path]:
    """Return the folder of PEFT at `lora.path`; with `tasks: own` one for each task.

    All tasks begin with the same weights if `lora.path` has no folder per task.
    """
    assert recipe.lora.path is not None
    directory = user_path(recipe.lora.path)
    if not directory.is_dir():
        raise UserError(f"lora.path: no directory {recipe.lora.path}")
    if recipe.lora.tasks == "shared":
        return [directory]
    names = recipe.task_names
    return [directory if (directory / CONFIG).is_file() else directory / name for name in names]
