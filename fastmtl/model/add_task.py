"""`add_to`: add new tasks to a trained model without changing its own tasks.

The run trains a model of the new tasks alone, on the trained model's frozen encoder, with adapters
of the same kind. This model holds no weight of an old task, so neither the optimiser nor weight
decay can change one. Its result is then joined with the trained model.
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
    "encoder": {"hidden_dropout", "attention_dropout", "recompute", "layer_norm"},
}


def complete(recipe: Recipe) -> Recipe:
    """Return the recipe with the sections encoder and adapter of the model that `add_to` names.

    Without `add_to`, return the recipe itself. Raises UserError, naming the key, where the recipe
    sets another value there or trains a task that the model already has.
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
    }
    return recipe.model_copy(update=sections)


def _section(recipe: Recipe, name: str, base: Mapping[str, Any], directory: Path) -> Any:
    """Return the trained model's section with this recipe's settings for training."""
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
    """The trained model that a run adds to, in the process that writes the run's files."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.add_to is not None
        self._base = TrainedModel.read(model_directory(recipe.add_to))

    @property
    def note(self) -> str:
        """A line for the user before the run."""
        return f"the model will also have the tasks of {self._base.name}: {', '.join(self._base.recipe.task_names)}"

    def save(
        self,
        directory: Path,
        model: MultiTaskModel,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor],
    ) -> None:
        """Save the trained model with the new tasks after its own; arguments as of `save_model`.

        Raises UserError if the trained model has changed since the run began.
        """
        name = str(directory)
        new = TrainedModel(name, model, recipe, tokenizer, state_dict, [origin(name, recipe)])
        join(self._base, new, rounded=_DTYPES[recipe.engine.precision]).save(directory)
