"""Options of several commands. Imports no heavy module, like cli.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.errors import UserError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A run's model directory, or the run's directory.")]
Launcher = Annotated[
    str, typer.Option(metavar="COMMAND", help="A command in front of fastmtl train.", show_default=False)
]


def launcher_words(launcher: str) -> list[str]:
    """Return the words of the option --launcher, split as a shell splits them.

    Raises UserError for a quote that is not closed.
    """
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher}: {error}") from None
