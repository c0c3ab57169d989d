"""The environment variables by which a launcher tells a process its place. Nothing heavy is
imported.
"""

from __future__ import annotations

import os

from fastmtl.errors import UserError, quoted


def number(name: str, default: int | None = None) -> int:
    """Return the whole number, 0 or more, of a variable; `default` where it is not set.

    Raises UserError for anything else, and where it is not set and has no default.
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
    """Return the number of processes, 1 without a launcher. Raises UserError as `number` does, and
    for 0.
    """
    count = number("WORLD_SIZE", None if "RANK" in os.environ else 1)
    if count == 0:
        raise UserError("the environment variable WORLD_SIZE is 0: a run has one process or more")
    return count


def is_first() -> bool:
    """Return whether this process prints for all: the first one, or one whose variables give it no
    place among them.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not rank.isdecimal() or int(rank) == 0 or (world.isdecimal() and int(rank) >= int(world))
