"""The file of a result. It imports no torch, so a supervisor survives failing measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text

# The fields of its environment that a result must have before it is drawn. The driver is required,
# too, but null on a CPU.
ORIGIN = ("device", "torch", "fastmtl", "commit", "clean")
# Key of a result whose measurement is not finished.
UNFINISHED = "unfinished"


def save(result: dict[str, Any], path: Path) -> None:
    """Replace the file atomically. Devices and pipes are written directly."""
    replace_text(path, json.dumps(result, indent=2) + "\n")


def slug(name: str) -> str:
    """Return a device's name in a form for file names: `NVIDIA H200` gives nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
