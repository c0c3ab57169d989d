"""Protocol of a tracker of another library, which gets the numbers of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastmtl.config import Recipe
from fastmtl.files.writing import replace_text

IDS = "tracking.json"  # in a run's folder: the ids that the libraries gave to the run


class Backend(Protocol):
    """A tracker, created with the output folder, the recipe and the step of a resume, or 0."""

    def __init__(self, output: Path, recipe: Recipe, resume_step: int) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name, such as loss/sst, after optimiser step `step`."""

    def close(self) -> None: ...


def known_id(output: Path, name: str) -> str | None:
    """Return the id that a library gave to the run in `output` before, None if there is none."""
    try:
        return json.loads((output / IDS).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError):
        return None


def keep_id(output: Path, name: str, value: str) -> None:
    """Remember the id of the run in the library `name` for a later resume."""
    path = output / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    replace_text(path, json.dumps({**ids, name: value}) + "\n")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings or numbers under names such as engine/zero."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found
