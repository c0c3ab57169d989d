"""The environment variables of launchers for a process's rank. Imports no heavy module."""

from __future__ import annotations

import os

from fastmtl.errors import UserError, quoted


def number(name: str, default: int | None = None) -> int:
    """Return the value of a variable, a whole number of 0 or more; `default` if it is not set.

    Raises UserError for any other value, and if the variable is not set and has no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"RANK is set and {name} is not: start the run by a launcher, which sets both, or unset RANK")
    if not text.strip().isdecimal():
        raise UserError(
            f"the environment variable {name} is {quoted(text)}: a launcher sets it to a whole number; unset it for a "
            "run of one process"
        )
    return int(text)


def world_size() -> int:
    """Return the number of processes, 1 without a launcher. Raises UserError like `number`, and for
    0.
    """
    count = number("WORLD_SIZE", None if "RANK" in os.environ else 1)
    if count == 0:
        raise UserError("the environment variable WORLD_SIZE is 0: a run has one process or more")
    return count


def is_first() -> bool:
    """Return whether this process prints for all: rank 0, or a process with invalid variables."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not rank.isdecimal() or int(rank) == 0 or (world.isdecimal() and int(rank) >= int(world))
