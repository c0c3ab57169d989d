"""The file that keeps a result. Imports no torch: what supervises measurements must survive them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text

# What a result must name before anything is drawn of it; beside the driver, which a CPU has none of.
ORIGIN = ("device", "torch", "fastmtl", "commit", "clean")
# Key of a result whose measurement has not come to its end.
UNFINISHED = "unfinished"


def save(result: dict[str, Any], path: Path) -> None:
    """Replace the file as a whole, so that a reader never sees half a result. A device or a pipe is written to."""
    replace_text(path, json.dumps(result, indent=2) + "\n")


def slug(name: str) -> str:
    """Return a device's name as a file's: `NVIDIA H200` gives nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
