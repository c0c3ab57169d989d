"""Reading of JSON files that a user may have changed or damaged. Imports no heavy module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file as a dictionary.

    Raises UserError naming the file if it is missing, damaged or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
