"""`add_to`: add new tasks to a trained model without changing its own tasks.

The run trains a second model that has only the new tasks. Its encoder is that of the trained model,
frozen, and its adapters are of the same kind. A LoRA that the trained model's tasks share is frozen
as well. The second model contains no weight of an old task, so neither the optimiser nor weight
decay can change one. At the end it is joined with the trained
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.files.user_path import user_path
from fastmtl.model.merge import TrainedModel, join, origin
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import model_directory, read_about

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FOR_TRAINING = {
    "adapter": {"dropout", "init"},
    "lora": {"dropout"},
    "encoder": {"hidden_dropout", "attention_dropout", "recompute", "layer_norm"},
}


def complete(recipe: Recipe) -> Recipe:
    """Return the recipe with its sections encoder, adapter and lora set as in the model `add_to`.

    A recipe without `add_to` is returned unchanged.
    Raises UserError, naming the key, if the recipe sets one of these values differently, or has a
    task with the name of a task of that model.
    """
    if recipe.add_to is None:
        return recipe
    directory = model_directory(recipe.add_to)
    base, _ = read_about(directory)
    common = [name for name in recipe.tasks if name in base.tasks]
    if common:
        raise UserError(f"tasks.{common[0]}: add_to: {directory} has a task of this name, which stays as it is")
    encoder = base.encoder.model_copy(update={"path": str(directory), "freeze": True})
    sections = {
        "encoder": _section(recipe, "encoder", encoder.model_dump(), directory),
        "adapter": _section(recipe, "adapter", base.adapter.model_dump(), directory),
        "lora": _section(recipe, "lora", {**base.lora.model_dump(), "path": None}, directory),
    }
    return recipe.model_copy(update=sections)


def _section(recipe: Recipe, name: str, base: Mapping[str, Any], directory: Path) -> Any:
    """Return the section `name` with the trained model's values.

    Settings that only affect training (_FOR_TRAINING) are those of this recipe.
    base: the section's values in the trained model, which is in `directory`.
    """
    section = getattr(recipe, name)
    values = {}
    for key, value in base.items():
        given = getattr(section, key)
        if key in _FOR_TRAINING[name]:
            values[key] = given
        elif key not in section.model_fields_set or given == value or (key == "path" and _same_model(given, directory)):
            values[key] = value
        else:
            raise UserError(f"{name}.{key}: {given}, but add_to: {directory} has {value}; leave {name}.{key} out")
    return section.model_validate(values)


def _same_model(path: str, directory: Path) -> bool:
    given = user_path(path)
    return given.is_dir() and model_directory(given).resolve() == directory.resolve()


class Addition:
    """The trained model named by `add_to`; only the rank that writes the run's files reads it."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.add_to is not None
        self._base = TrainedModel.read(model_directory(recipe.add_to))

    @property
    def note(self) -> str:
        """One line for the user before the run: the tasks that the saved model will also have."""
        return f"the model will also have the tasks of {self._base.name}: {', '.join(self._base.recipe.task_names)}"

    def save(
        self,
        directory: Path,
        model: MultiTaskModel,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor],
    ) -> None:
        """Save one model with the old tasks followed by the new ones.

        The arguments are those of `save_model`, for the model of the new tasks.
        Raises UserError if the two cannot be joined, for instance because the directory of the
        trained model has changed since the run began.
        """
        name = str(directory)
        new = TrainedModel(name, model, recipe, tokenizer, state_dict, [origin(name, recipe)])
        join(self._base, new, rounded=_DTYPES[recipe.engine.precision]).save(directory)
