"""metrics.jsonl: a file with a JSON object per line, for a step or an evaluation.

Floats have full precision, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from fastmtl.errors import UserError


class MetricsFile:
    """A writer that appends lines to the file `path`.

    Lines of steps after `resume_step` are removed first; with resume_step 0 the file starts empty.
    within_epoch: the run ended within an epoch at resume_step; its evaluation there is removed too,
    since an uninterrupted run makes none. `write` passes the line to the operating system before it
    returns, so a killed run leaves at most one incomplete line.
    """

    def __init__(self, path: Path, resume_step: int, *, within_epoch: bool = False) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        if within_epoch:
            kept = [line for line in kept if line["step"] < resume_step or "dev" not in line]
        self.last_evaluation = max((line["step"] for line in kept if "dev" in line), default=0)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_encode(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(_encode(line))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all complete lines; [] if the file is missing.

    An incomplete last line is left out. Raises UserError for an earlier line that is not a JSON
    object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    result = []
    for number, text in enumerate(lines, start=1):
        try:
            value = json.loads(text)
            if not isinstance(value["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a line of metrics (a JSON object with a step)") from None
        result.append(value)
    return result


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return the value with None for every non-finite number, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
