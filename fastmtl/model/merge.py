"""Join trained models that have the same encoder; every task keeps its weights, bit for bit.

This is possible because tasks share the encoder only. Each task has its own head, and its own part
of the adapter: a slice of parameters stacked over the tasks, [T, ...], or a module in a module list
`tasks`. The joined model has the encoder, and the heads and adapter parts of the first model's
tasks followed by those of the second model's tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fastmtl.config import FROM_PYTHON, Recipe, parse_recipe
from fastmtl.data.corpus import demo_directory
from fastmtl.data.token_cache import tokenizer_state
from fastmtl.errors import UserError, unknown_name
from fastmtl.files.user_path import user_path
from fastmtl.model.lora import Lora
from fastmtl.model.losses.weighting import LEARNED
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import load_model, read_about, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sections with settings for training. A joined model has none, since it was not trained as a
# whole; its origins contain the settings of each training run.
TRAINING_SECTIONS = {
    "seed",
    "sampler",
    "weighting",
    "smart",
    "gradient",
    "optimizer",
    "schedule",
    "train",
    "early_stopping",
    "engine",
    "tracking",
    "deepspeed",
    "phases",
}
# Sections that `join` combines. Any other section, apart from those above, has to be equal in both
# models.
JOINED_SECTIONS = {"description", "add_to", "encoder", "adapter", "lora", "tasks", "data"}
STACKED = ("adapter.", "lora.own.")  # tensors that are stacked over the tasks
# Learned weights of the tasks' losses, which only training needs.
LEARNED_WEIGHT = re.compile(rf"\.({'|'.join(LEARNED.values())})\.")
# Name of a tensor that belongs to one task. The groups are the text before the task's index, the
# index, and the text after it.
ONE_TASKS = re.compile(r"(heads\.|adapter\.(?:.+\.)?tasks\.)(\d+)(\..+)")


class Origin(BaseModel):
    """Training run from which some tasks of a joined model come.

    model: path of the model that the run saved.
    tasks: {name in the joined model: name in the run}. recipe: the run's complete recipe.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    tasks: dict[str, str]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with everything that its `model/` directory contains.

    name: its path, for messages. tensors: all tensors, {name in MultiTaskModel: tensor}.
    origins: the training runs of its tasks; several if the model was joined.
    """

    name: str
    model: MultiTaskModel
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    tensors: Mapping[str, Tensor]
    origins: list[Origin]

    @classmethod
    def read(cls, directory: Path) -> TrainedModel:
        """Read a `model/` directory; tensors are float32 on the CPU.

        torch's random state stays as it was. Raises UserError as `load_model` does.
        """
        with torch.random.fork_rng(devices=[]):
            model, recipe, tokenizer = load_model(directory)
        found = read_about(directory)[1].get("merged_from")
        if found is None:
            origins = [origin(str(directory), recipe)]
        else:
            try:
                origins = TypeAdapter(list[Origin]).validate_python(found)
            except ValidationError as error:
                raise UserError(f"{directory / 'fastmtl.json'}: merged_from: {error.errors()[0]['msg']}") from None
        return cls(str(directory), model, recipe, tokenizer, model.state_dict(), origins)

    def save(self, directory: Path) -> None:
        """Write a `model/` directory as `save_model` does, with the origins in fastmtl.json."""
        about = {"merged_from": [origin.model_dump() for origin in self.origins]}
        save_model(directory, self.model, self.recipe, self.tokenizer, self.tensors, about)


def origin(name: str, recipe: Recipe) -> Origin:
    """Return the origin of a model whose tasks were all trained by one run. name: its path."""
    return Origin(model=name, tasks={task: task for task in recipe.task_names}, recipe=recipe.model_dump(mode="json"))


def rename_tasks(source: TrainedModel, names: Mapping[str, str]) -> TrainedModel:
    """Return the model with renamed tasks. names: {old name: new name}.

    Raises UserError if an old name is unknown, or if a new name is empty or that of another task.
    """
    recipe = source.recipe
    for old in names:
        if old not in recipe.tasks:
            raise unknown_name(f"task of {source.name}", old, recipe.task_names)
    tasks = {names.get(name, name): task for name, task in recipe.tasks.items()}
    if "" in tasks or len(tasks) < len(recipe.tasks):
        would_be = ", ".join(f"'{names.get(name, name)}'" for name in recipe.tasks)
        raise UserError(f"{source.name}: its tasks would be {would_be}: names are unique and not empty")
    dropout = recipe.adapter.dropout
    if isinstance(dropout, dict):
        dropout = {names.get(name, name): rate for name, rate in dropout.items()}
    adapter = recipe.adapter.model_copy(update={"dropout": dropout})
    origins = [
        item.model_copy(update={"tasks": {names.get(here, here): there for here, there in item.tasks.items()}})
        for item in source.origins
    ]
    return replace(source, recipe=recipe.model_copy(update={"tasks": tasks, "adapter": adapter}), origins=origins)


def join(first: TrainedModel, second: TrainedModel, *, rounded: torch.dtype = torch.float32) -> TrainedModel:
    """Return a model with the first model's encoder, its tasks, and then the second's tasks.

    rounded: dtype to which the first encoder is rounded before the comparison with the second.
    After training in bf16 or fp16 the second encoder is a rounded copy of the first.
    Raises UserError, naming the models, if their encoders, tokenizers or adapters differ, or if
    both have a task of the same name.
    """
    common = [name for name in first.recipe.tasks if name in second.recipe.tasks]
    if common:
        raise UserError(
            f"{first.name} and {second.name} both have a task '{common[0]}': rename one, "
            f"as in --rename {second.name}:{common[0]}={common[0]}-2"
        )
    _check_encoders(first, second, rounded)
    _check_adapters(first, second)
    _check_loras(first, second, rounded)
    tensors = {name: tensor for name, tensor in first.tensors.items() if not LEARNED_WEIGHT.search(name)}
    counts = len(first.recipe.tasks), len(second.recipe.tasks)
    for name, tensor in second.tensors.items():
        if LEARNED_WEIGHT.search(name):
            continue
        if found := ONE_TASKS.match(name):
            tensors[f"{found[1]}{int(found[2]) + counts[0]}{found[3]}"] = tensor
        elif name.startswith(STACKED):
            ours = first.tensors[name]
            if (*ours.shape[:1], *tensor.shape[:1]) != counts or ours.shape[1:] != tensor.shape[1:]:
                raise UserError(f"{first.name}: {name} is not stacked over its tasks, so that no task can be added")
            tensors[name] = torch.cat([ours, tensor])
    recipe = _joined_recipe(first, second)
    return replace(first, recipe=recipe, tensors=tensors, origins=first.origins + second.origins)


def _check_encoders(first: TrainedModel, second: TrainedModel, rounded: torch.dtype) -> None:
    between = f"{first.name} and {second.name}"
    one, other = first.model.encoder.beside_weights(), second.model.encoder.beside_weights()
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            raise UserError(f"{between} have different encoders: {key} is {one.get(key)} and {other.get(key)}")
    ours, theirs = (_encoder(source.tensors) for source in (first, second))
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [name for name in ours if name in theirs and not _same_bits(ours[name].to(rounded).float(), theirs[name])]
    if wrong:
        raise UserError(
            f"{between} have different encoders: {len(wrong)} of {len(ours.keys() | theirs.keys())} tensors differ, as "
            f"{wrong[0]}. Their tasks fit together where both were trained on the same encoder with encoder.freeze: "
            "true and the same engine.precision."
        )
    lengths = first.model.encoder.max_length, second.model.encoder.max_length
    if lengths[0] != lengths[1]:
        raise UserError(
            f"{between} cut texts at different lengths: encoder.max_length is {lengths[0]} and {lengths[1]}"
        )
    if tokenizer_state(first.tokenizer) != tokenizer_state(second.tokenizer):
        raise UserError(f"{between} have different tokenizers")


def _check_adapters(first: TrainedModel, second: TrainedModel) -> None:
    if first.model.adapter is None and second.model.adapter is None:
        return
    ours, theirs = (_adapter_settings(source) for source in (first, second))
    wrong = ", ".join(f"adapter.{key} is {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
    if wrong:
        raise UserError(f"{first.name} and {second.name} have different adapters: {wrong}")


def _check_loras(first: TrainedModel, second: TrainedModel, rounded: torch.dtype) -> None:
    """Raise UserError unless both have no LoRA, one for each task, or an equal one for all."""
    between = f"{first.name} and {second.name}"
    loras = [source.model.lora for source in (first, second)]
    ours, theirs = ({} if lora is None else _lora_settings(lora) for lora in loras)
    both = {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs}}
    wrong = ", ".join(f"lora.{key} is {one} and {other}" for key, (one, other) in both.items() if one != other)
    if wrong:
        raise UserError(f"{between} have different LoRAs: {wrong}")
    different = [
        name
        for name, tensor in first.tensors.items()
        if name.startswith("lora.shared.") and not _same_bits(tensor.to(rounded).float(), second.tensors[name])
    ]
    if different:
        raise UserError(
            f"{between} each have a LoRA for all their tasks, and the two differ, as in {different[0]}. One model has "
            "one: train with lora.tasks: own, or train the second model on the encoder that `fastmtl export --format "
            "transformers` writes of the first, with the first LoRA merged into it"
        )


def _lora_settings(lora: Lora) -> dict[str, Any]:
    """Return the settings of a LoRA that have to be equal in both models to join them."""
    config = lora.config
    return {"tasks": config.tasks, "rank": config.rank, "scale": config.scale, "targets": ", ".join(lora.pairs)}


def _adapter_settings(source: TrainedModel) -> dict[str, Any]:
    """Return the adapter's settings that have to be equal in both models to join them."""
    config = source.recipe.adapter
    everywhere = range(source.model.encoder.settings.num_hidden_layers)
    layers = sorted(everywhere if config.layers is None else config.layers)
    return {**config.model_dump(exclude={"dropout", "init"}), "layers": layers}


def _joined_recipe(first: TrainedModel, second: TrainedModel) -> Recipe:
    for section in Recipe.model_fields.keys() - TRAINING_SECTIONS - JOINED_SECTIONS:
        if getattr(first.recipe, section) != getattr(second.recipe, section):
            raise UserError(f"{first.name} and {second.name} differ in the section {section}")
    values = first.recipe.model_dump(mode="json", exclude=TRAINING_SECTIONS | {"description", "add_to"})
    values["data"] = first.recipe.data.model_dump(mode="json", include={"dir", "on_bad_row", "cache_dir"})
    values["train"] = {"eval_tokens": first.recipe.train.eval_tokens}
    values["tasks"] |= {name: task_values(name, first.recipe, second.recipe) for name in second.recipe.tasks}
    for recipe in (first.recipe, second.recipe):
        for name, task in recipe.tasks.items():
            if recipe.data.dev_share(task.data):  # the joined recipe has no data.dev_fraction
                share, seed = recipe.data.dev_share(task.data), recipe.data.seed_of_dev(task.data)
                values["tasks"][name]["data"].update(dev_fraction=share, dev_seed=seed)
    values["lora"]["path"] = None
    rates = {**_dropout_rates(first.recipe), **_dropout_rates(second.recipe)}
    values["adapter"]["dropout"] = rates if len(set(rates.values())) > 1 else next(iter(rates.values()))
    return parse_recipe(values, f"{first.name} and {second.name}")


def task_values(name: str, first: Recipe, second: Recipe) -> dict[str, Any]:
    """Return the section of a task of the second recipe for the joined recipe.

    If the two recipes differ in data.dir, the paths of the task's files become absolute, since the
    joined recipe has the first one's data.dir.
    """
    values = second.tasks[name].model_dump(mode="json")
    if first.data.dir != second.data.dir:
        folder = user_path(second.data.dir or demo_directory()).absolute()
        for split in ("train", "dev", "test"):
            found = [
                file if file == FROM_PYTHON else str(folder / user_path(file))
                for file in second.tasks[name].data.names(split)
            ]
            values["data"][split] = found if isinstance(values["data"][split], list) else next(iter(found), None)
    return values


def _dropout_rates(recipe: Recipe) -> dict[str, float]:
    rates = recipe.adapter.dropout
    return {name: rates.get(name, 0.0) if isinstance(rates, dict) else rates for name in recipe.task_names}


def _encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare float32 tensors bit by bit: 0 and -0 differ, a NaN equals itself."""
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))
