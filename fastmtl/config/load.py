"""Reading of recipes, with overrides, and the messages about their errors."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fastmtl.config.recipe import Recipe
from fastmtl.errors import UserError, quoted, shortened, unknown_name
from fastmtl.recipes import yaml_reader as recipe_yaml
from fastmtl.recipes.files import find_recipe, read_recipe


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """Return a bundled recipe or that of a YAML file, with `section.key=value` overrides.

    The values of overrides are YAML; null removes the recipe's value.

    Raises UserError naming the file and key for anything that is not a valid recipe.
    """
    return parse_recipe(*recipe_values(recipe, overrides))


def recipe_values(recipe: str, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Return {section: settings} of a recipe with overrides, unchecked, and its file's name."""
    path = find_recipe(recipe)
    values = read_recipe(path)
    apply_overrides(values, overrides)
    return values, str(path)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Change {section: settings} in place by `section.key=value` overrides."""
    for override in overrides:
        _apply_override(values, override)


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Return the recipe of a mapping {section: settings}.

    source: the name of the mapping in messages. Raises UserError for invalid settings.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(*(_explain(item, source) for item in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{quoted(override)} is not an override: write section.key=value, for example train.epochs=3")
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{quoted(override)}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node[parent] = dict(child)  # a copy, since a YAML alias has the same mapping elsewhere
        node = node[parent]
    try:
        value = recipe_yaml.load(text)
    except ValueError as error:
        raise UserError(f"{quoted(override)}: the value is not YAML: {error}") from None
    if value is None and last in node:  # as in `extends`: null removes a key
        del node[last]
    else:
        node[last] = value


# After a key that accepts several types, pydantic's location names the type.
_KINDS = ("function-before[", "dict[str,")


def _explain(item: Any, source: str) -> str:
    location = [shortened(str(part)) for part in item["loc"] if not str(part).startswith(_KINDS)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        fields = _fields_at(location[:-1])
        return f"{source}: {unknown_name('key', key, ['.'.join([*location[:-1], name]) for name in fields])}"
    if item["type"] == "missing":
        return f"{source}: {key} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return (
        f"{source}: {key or 'recipe'}: {message} (got {quoted(item['input'])})"
        if not isinstance(item["input"], dict)
        else f"{source}: {key}: {message}"
    )


def _fields_at(location: list[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
            if get_origin(model) in (Union, types.UnionType):
                model = next(arg for arg in get_args(model) if arg is not type(None))
        elif get_origin(model) is dict:  # tasks: any name, one model
            model = get_args(model)[1]
        elif get_origin(model) is list:  # phases: any number, one model
            (model,) = get_args(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
