"""What several commands share. As in cli.py, nothing heavy is imported."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.errors import UserError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A run's model directory, or the run's directory.")]
Launcher = Annotated[str, typer.Option(metavar="COMMAND", help="Put in front of fastmtl train.", show_default=False)]


def launcher_words(launcher: str) -> list[str]:
    """The words of a `Launcher`, as a shell splits them. Raises UserError for a quote that does not
    end.
    """
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher}: {error}") from None
