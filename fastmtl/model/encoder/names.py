"""Names of tensors in weight files, for families whose names differ from those of their modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names of an encoder's tensors, in its modules and in files of transformers' class.

    parts: {part of a name in the modules: that part in the files}. A part is a whole sequence of
        the name's pieces between dots, and `*` in both stands for one number.
    prefix: of the encoder's tensors in files of a model with a head, such as `distilbert.`.
    kept: beginnings of the names of the encoder's tensors in files, after the prefix.
    """

    parts: Mapping[str, str]
    prefix: str
    kept: tuple[str, ...]

    def encoder_name(self, name: str) -> str | None:
        """Map a name in a file to the module's, None for a tensor that is not the encoder's."""
        name = name.removeprefix(self.prefix)
        if not name.startswith(self.kept) or name.endswith("position_ids"):  # a buffer of old versions
            return None
        return _replaced(name, {there: here for here, there in self.parts.items()})

    def file_name(self, name: str) -> str:
        """Map a name in the encoder's state_dict to the name in files."""
        return _replaced(name, self.parts)


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    """Return the name with each part that occurs in it replaced, one after the other."""
    for old, new in parts.items():
        pattern = r"(?:^|(?<=\.))" + re.escape(old).replace(r"\*", r"(\d+)") + r"(?=\.|$)"
        pieces = new.split("*")
        name = re.sub(pattern, pieces[0] + "".join(rf"\g<{n}>{piece}" for n, piece in enumerate(pieces[1:], 1)), name)
    return name
