"""Completion of a recipe by what the training rows bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from fastmtl.config import DataConfig, Recipe, TaskConfig
from fastmtl.config.class_weights import class_weights
from fastmtl.config.types.spec import may_bring_names
from fastmtl.data.class_names import NAMED, names_of_labels, opened
from fastmtl.data.corpus import folder_of
from fastmtl.data.find_places import find_places
from fastmtl.data.places import Place, Table
from fastmtl.errors import UserError


def with_class_names(recipe: Recipe, tables: Mapping[tuple[str, str], Table] | None = None) -> Recipe:
    """Return the recipe with `label_names` of tasks without, where the training rows bring them.

    tables: the rows from Python, by task and split. Raises UserError naming the task if it needs
    names that are nowhere.
    """
    named = {}
    data = None
    for name, task in recipe.tasks.items():
        if task.type not in NAMED or task.label_names is not None or not may_bring_names(task):
            continue
        table = (tables or {}).get((name, "train"))
        data = data or folder_of(recipe)
        try:
            named[name] = _named(task, data, [table] if table is not None else None)
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from None
    return recipe.model_copy(update={"tasks": {**recipe.tasks, **named}}) if named else recipe


def _named(task: TaskConfig, data: DataConfig, given: Sequence[Place] | None) -> TaskConfig:
    places = find_places(task.data.names("train"), data.dir or ".", "train") if given is None else given
    for place in places:
        found = names_of_labels(opened(place), task)
        if found is not None:
            try:
                values = task.model_dump(exclude_unset=True)
                return TaskConfig.model_validate({**values, "label_names": found[1]})
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise UserError(f"{place}, column {found[0]}: {reason}") from None
    if task.num_labels is None and task.type != "binary":
        also = " (or num_labels)" if task.type == "classification" else ""
        raise UserError(f"{places[0]}: its labels have no names of classes, so the task needs label_names{also}")
    try:
        class_weights(task)
    except ValueError as error:
        raise UserError(str(error)) from None
    return task
