"""examples/demo.ipynb from top to bottom, in a folder of its own: no cell fails, and it compares.

Both methods must reach the scores of the demo, and the last cell must draw a picture.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from launch import cpu_environment
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[2] / "examples" / "demo.ipynb"
SCORES = re.compile(r"^(\w+) sentiment (\S+), paraphrase (\S+), similarity (\S+)$", re.MULTILINE)
FLOORS = (0.7, 0.7, 0.8)  # word counts alone reach 0.533, 0.675 and 0.621


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="fewer steps, after which no score is demanded")
    options = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    if options.steps:
        cells["settings"].source += f'\nSETTINGS.append("train.max_steps={options.steps}")'
    with tempfile.TemporaryDirectory(prefix="fastmtl-notebook-") as folder:
        client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}})
        try:
            client.execute(env=cpu_environment())
        except CellExecutionError as error:
            sys.exit(f"{NOTEBOOK}: {error}")
    found = {name: tuple(map(float, numbers)) for name, *numbers in SCORES.findall(printed(cells["scores"]))}
    if set(found) != {"pcgrad", "sum"}:
        sys.exit(f"{NOTEBOOK} shows the scores of {list(found)}: {printed(cells['scores'])}")
    low = [name for name, values in found.items() if any(v < f for v, f in zip(values, FLOORS, strict=True))]
    if low and not options.steps:
        sys.exit(f"{NOTEBOOK}: {', '.join(low)} reached {found}, at least {FLOORS}")
    if not any("image/png" in output.get("data", {}) for output in cells["plot"].outputs):
        sys.exit(f"{NOTEBOOK} draws no picture in its last cell")
    print(json.dumps({name: list(values) for name, values in found.items()}))


def printed(cell: nbformat.NotebookNode) -> str:
    """Return what a cell has printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


if __name__ == "__main__":
    main()
