"""Environment variables by which a launcher gives a process its rank: RANK, WORLD_SIZE and others.

Imports no heavy module.
"""

from __future__ import annotations

import os

from fastmtl.errors import UserError, quoted


def number(name: str, default: int | None = None) -> int:
    """Return the environment variable `name` as a number; `default` if the variable is not set.

    Raises UserError if its value is not a whole number of 0 or more, and if the variable is not set
    and has no default.
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
    """Return the number of processes, 1 without a launcher.

    Raises UserError if WORLD_SIZE is not a whole number of 1 or more.
    """
    count = number("WORLD_SIZE", None if "RANK" in os.environ else 1)
    if count == 0:
        raise UserError("the environment variable WORLD_SIZE is 0: a run has one process or more")
    return count


def is_first() -> bool:
    """Return True if this process prints for all processes of the run.

    That is rank 0, and also a process with invalid variables, whose rank is unknown.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not rank.isdecimal() or int(rank) == 0 or (world.isdecimal() and int(rank) >= int(world))
