"""Draw the figures of a result file of gpu-check.

    python -m fastmtl.bench.gpu_check.draw RESULT.json DIR

For a figure that fails, the command prints a line that begins with "no figure of". The failure does
not affect measurements.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmtl.bench.plot import plot


def drawable(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, measurements) for each figure that the result has measurements for."""
    for key in ("step", "step-compiled", "graphs", "adapters", "kernels", "peers"):
        if key in result:
            yield key, result[key]
    for key in ("surgery", "engine"):
        for entry in result.get(key, []):
            about = f"{key} {entry['tasks']} tasks {entry['tokens']} tokens"
            yield about, {**entry, "benchmark": about}


def draw(result: dict[str, Any], directory: Path) -> list[str]:
    """Draw all figures into `directory`; return a line for each figure that failed."""
    failures = []
    for name, measured in drawable(result):
        if name == "step-compiled":
            measured = {**measured, "benchmark": "step compiled"}
        try:
            plot({**measured, "environment": result["environment"]}, directory)
        except Exception as error:  # noqa: BLE001 - any error; the other figures are drawn
            failures.append(f"no figure of {name}: {type(error).__name__}: {error}")
    return failures


if __name__ == "__main__":
    found = draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    print("\n".join(found))
