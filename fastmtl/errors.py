"""The one exception that means: the input is wrong, not the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. Its message names the file, line, key or argument and what to do; the commands print
    it without a traceback.
    """


class TrainingError(RuntimeError):
    """The run cannot go on, though nothing in its input is malformed. Its message says what to change."""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a misspelt name: it gives the nearest valid one and lists the others."""
    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {what} '{name}'.{hint} Valid: {', '.join(choices)}.")
