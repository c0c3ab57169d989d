"""Comparison of two recipes key by key, and the settings that may change when a run is resumed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastmtl.config import Recipe, parse_recipe
from fastmtl.errors import UserError, shortened

# {key of a setting: (value before, value now)}
Changes = dict[str, tuple[Any, Any]]
CHANGES_FILE = "changes.jsonl"  # in the output folder: a line for each resume with other settings

# Settings that may change, since every step stays the same: length of the run, logging,
# checkpoints, and paths of files (rows are compared by their digests).
FREE = re.compile(
    r"description|tracking"
    r"|(phases\.\d+\.)?train\.(epochs|max_steps|eval_tokens|checkpoint_every|log_every)"
    r"|data\.(dir|cache_dir|prefetch)"
    r"|(encoder|lora)\.path"
    r"|tasks\..+\.data\.(train|dev|test)"
)
LENGTH = re.compile(r"(phases\.\d+\.)?train\.(epochs|max_steps)")


def differences(before: Recipe, now: Recipe) -> Changes:
    """Return the settings with different values in two recipes, in the recipe's order.

    A key that a recipe lacks has the value None.
    """
    old, new = (_flat(_compared(recipe)) for recipe in (before, now))
    return {key: (old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)}


def _compared(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values, with `gradient.dtype: auto` replaced by its meaning.

    `auto` stays in a recipe with phases and bf16, where its meaning may differ between the phases.
    """
    values = recipe.model_dump(mode="json")
    if not recipe.phases or recipe.engine.precision != "bf16":
        values["gradient"]["dtype"] = recipe.jacobian_dtype
    return values


def changes_since(saved: Mapping[str, Any], now: Recipe, source: str) -> Changes:
    """Return the differences between a checkpoint's recipe `saved` and the recipe `now`.

    source: the name of `saved` in messages. Raises UserError if this version of fastmtl cannot read
    `saved`.
    """
    try:
        return differences(parse_recipe(dict(saved), source), now)
    except UserError as error:
        raise UserError(f"{error}. It was saved by another version of fastmtl; continue with that version") from None


def refuse(path: str, changes: Changes, accept: bool) -> None:
    """Raise UserError that lists all changes that are not `FREE`, unless the user accepts them.

    path: the checkpoint, for the message. accept: the option --accept-changes.
    """
    refused = {key: values for key, values in changes.items() if not FREE.fullmatch(key)}
    if refused and not accept:
        raise UserError(
            f"{path} was saved by a run with other settings: {listed(refused)}. Resume with the former ones, or add "
            "--accept-changes to continue with these"
        )


def changed_rows(before: Mapping[str, str], now: Mapping[str, str]) -> Changes:
    """Return the data sets whose rows have changed, each with its digests before and now.

    before, now: results of `Corpus.digests`.
    """
    old, new = ({name: digest[:12] for name, digest in digests.items()} for digests in (before, now))
    names = [name for name in new if name in old and old[name] != new[name]]
    return {f"rows of {name} (digest)": (old[name], new[name]) for name in names}


def resume_notes(changes: Changes, recipe: Recipe) -> list[str]:
    """Return lines for the user about the changes with which a run is resumed."""
    if not changes:
        return []
    notes = [f"resumed with other settings: {listed(changes)}"]
    if recipe.schedule.name != "constant" and any(LENGTH.fullmatch(key) for key in changes):
        notes.append(f"schedule.name: {recipe.schedule.name} follows the new number of steps from here on")
    return notes


def listed(changes: Changes) -> str:
    """Return the changes as text: `optimizer.lr: 0.1, now 0.5; seed: 1, now 5`."""
    return "; ".join(f"{key}: {shortened(str(old))}, now {shortened(str(new))}" for key, (old, new) in changes.items())


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
        values = {str(index): value for index, value in enumerate(values)}
    if not isinstance(values, dict):
        return {prefix: values}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}
