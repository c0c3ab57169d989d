"""What several commands share. As in cli.py, nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A run's model directory, or the run's directory.")]
