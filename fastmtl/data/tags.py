"""The sequences of tags that a scheme allows (BIO and IOBES).

| scheme | an entity of type X |
|---|---|
| bio (IOB2) | B-X, then any number of I-X |
| iobes | S-X for one word; B-X, any number of I-X, then E-X for several |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.config.types.tokens import split_tag


@dataclass(frozen=True)
class Allowed:
    """The allowed sequences of C tags.

    follows: bool [C, C]; tag j may follow tag i if follows[i, j]. first, last: bool [C], tags with
    which a sentence may begin and end.
    """

    follows: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def problem(self, names: Sequence[str], tags: Sequence[int]) -> tuple[int, str] | None:
        """Return the position of the first tag that is not allowed, and the reason, or None.

        tags: those of a sentence; -100 for a word without one, whose neighbours are not checked.
        """
        for position, (before, tag) in enumerate(zip([None, *tags[:-1]], tags, strict=True)):
            if tag < 0 or (before is not None and before < 0):
                continue
            if before is None and not self.first[tag]:
                return position, f"{names[tag]} cannot begin a sentence"
            if before is not None and not self.follows[before, tag]:
                return position, f"{names[tag]} cannot follow {names[before]}"
        if tags and tags[-1] >= 0 and not self.last[tags[-1]]:
            return len(tags) - 1, f"{names[tags[-1]]} cannot end a sentence"
        return None


def allowed(task: TaskConfig) -> Allowed:
    """Return the sequences that the task's scheme allows; all for a task without one."""
    names = task.label_names or []
    tags = [split_tag(name) for name in names]
    match task.tokens.scheme:
        case "none":
            first = last = [True] * len(names)
            follows = [[True] * len(names)] * len(names)
        case "bio":
            first = [prefix != "I" for prefix, _ in tags]
            last = [True] * len(names)
            follows = [[b != "I" or (a in "BI" and x == y) for b, y in tags] for a, x in tags]
        case "iobes":
            first = [prefix in "OBS" for prefix, _ in tags]
            last = [prefix in "OES" for prefix, _ in tags]
            follows = [[(b in "IE" and x == y) if a in "BI" else b in "OBS" for b, y in tags] for a, x in tags]
    return Allowed(np.array(follows), np.array(first), np.array(last))
