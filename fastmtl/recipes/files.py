"""Recipe files: the bundled ones, a user's files, and `extends`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError, unknown_name
from fastmtl.recipes import yaml_reader as recipe_yaml

TABLE = "table.yaml"  # a file beside recipes, with the results of a published report


def recipes_root() -> Path:
    """Return the folder of the bundled recipes."""
    return Path(str(resources.files("fastmtl"))) / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Return {name: file} of the recipes in the package.

    The name of a recipe in a sub-folder contains the folder: `papers/pal-lora/pal_lora`.
    """
    root = recipes_root()
    files = (path for path in sorted(root.rglob("*.yaml")) if path.name != TABLE)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe, given its bundled name or its path.

    beside: the folder from which a path in `extends` counts. Raises UserError if there is no such
    file; for a misspelt bundled name it lists the names in the same folder.
    """
    bundled = bundled_recipes()
    path = bundled.get(name) or (Path(name) if beside is None else beside / name)
    if path.is_file():
        return path
    folder = name.rpartition("/")[0]
    beside_it = [other for other in bundled if other.rpartition("/")[0] == folder]
    if name.endswith((".yaml", ".yml")) or (folder and not beside_it):
        raise UserError(f"no recipe file {path}")
    raise unknown_name("recipe", name, beside_it)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings in a recipe file, merged into those of the recipe that it `extends`.

    That recipe may extend another one. The merge is JSON Merge Patch (RFC 7396): sections are
    merged key by key, any other value replaces the extended recipe's, and null removes the key
    (`tasks: {para: null}` removes a task). Raises UserError naming the file.
    """
    return _read(path, ())


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `above` merged into `below` by RFC 7396. Neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            old = merged.get(key)
            merged[key] = merge(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    values = read_mapping(path)
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected the name or file of one recipe, found {base!r}")
    chain = (*seen, path.resolve())
    try:
        file = find_recipe(base, path.parent)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from None
    if file.resolve() in chain:
        raise UserError(f"{path}: extends: {base} extends this recipe itself")
    return merge(_read(file, chain), values)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, without following `extends`.

    Raises UserError naming the file if it contains anything else.
    """
    try:
        values = recipe_yaml.load(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not YAML
        raise UserError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    return values
