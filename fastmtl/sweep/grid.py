"""Grid files, which name the points of a sweep.

A mapping of settings to lists of values stands for every combination of the values. A list of
mappings stands for one point per mapping.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.config import Recipe, load_recipe
from fastmtl.errors import UserError, listed, quoted, shortened
from fastmtl.recipes import yaml_reader as recipe_yaml


@dataclass(frozen=True)
class Point:
    """A point of a sweep: one run.

    settings: {section.key: value}, those of the grid. recipe: the complete recipe of the run.
    """

    settings: dict[str, Any]
    recipe: Recipe

    @classmethod
    def of(cls, recipe: str, overrides: Sequence[str], settings: dict[str, Any]) -> Point:
        """Return the point of a recipe with overrides and, after these, its own settings.

        Raises UserError for invalid settings.
        """
        lines = [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
        return cls(settings, load_recipe(recipe, [*overrides, *lines]))

    @property
    def folder(self) -> str:
        """The name of the point's folder in the sweep's directory.

        It is the beginning of the settings and a digest of all, so it is unique in a sweep.
        """
        text = "_".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in self.settings.items())
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode("utf-8")).hexdigest()
        return f"{text[:60]}-{digest[:8]}"

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={_short(value)}" for key, value in self.settings.items())


def load_grid(file: Path) -> Any:
    """Return the content of a grid file. Raises UserError if it cannot be read as YAML."""
    try:
        return recipe_yaml.load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the grid {file}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not YAML
        raise UserError(f"{file}: not a YAML file: {error}") from None


def read_grid(file: Path, recipe: str, overrides: Sequence[str] = ()) -> list[Point]:
    """Return the points of a sweep, with valid recipes.

    recipe, overrides: those of `fastmtl train`; the grid's settings are applied after the
    overrides. Raises UserError naming the file if it is not a grid, and the point for invalid
    settings.
    """
    points = []
    for settings in _settings(file, load_grid(file)):
        lines = [f"{key}={_json(file, key, value)}" for key, value in settings.items()]
        try:
            points.append(Point.of(recipe, overrides, settings))
        except UserError as error:
            raise UserError(*(f"{file}, point {listed(lines)}: {line}" for line in error.lines)) from None
    folders = [point.folder for point in points]
    for point in points:
        if folders.count(point.folder) > 1:
            raise UserError(f"{file}: the point {point.name} is there twice")
    return points


def _settings(file: Path, values: Any) -> list[dict[str, Any]]:
    if isinstance(values, list) and values and all(isinstance(item, dict) and item for item in values):
        found = [{str(key): value for key, value in item.items()} for item in values]
        if any(item.keys() != found[0].keys() for item in found):
            raise UserError(f"{file}: every point has to give the same settings, as the first: {', '.join(found[0])}")
        return found
    if not isinstance(values, dict) or not values:
        raise UserError(f"{file}: a grid is a mapping like `optimizer.lr: [1e-5, 3e-5]`, or a list of such points")
    for key, choices in values.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{file}: {key}: a list of values is needed, got {quoted(choices)}")
    return [dict(zip(map(str, values), chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _json(file: Path, key: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # dates, sets, binary data, .inf, recursive anchors
        raise UserError(
            f"{file}: {shortened(key)}: {quoted(value)} is no setting: give numbers, text, true, false, null, or lists "
            "and mappings of these (a date as text needs quotes)"
        ) from None


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")
