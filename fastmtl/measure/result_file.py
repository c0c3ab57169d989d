"""Writing of result files.

This module does not import torch, so that an error of torch cannot stop a process that only
supervises measurements.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastmtl.files.writing import replace_text

# Fields that the environment of a result must have before the result is drawn. It must have the
# driver, too, which is null on a CPU.
ORIGIN = ("device", "torch", "fastmtl", "commit", "clean")
# Key that is true in a result whose measurement has not finished.
UNFINISHED = "unfinished"


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON and replace the file atomically.

    Devices and pipes are written directly.
    """
    replace_text(path, json.dumps(result, indent=2) + "\n")


def slug(name: str) -> str:
    """Return a device's name in the form of a file name: `NVIDIA H200` gives nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
