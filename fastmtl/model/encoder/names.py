"""Names of tensors in weight files, and those of the modules' tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Buffers that old versions of transformers saved.
_BUFFERS = ("position_ids", "token_type_ids")


def base_name(name: str, prefix: str = "") -> str:
    """Map a tensor's name in a weight file to its name in transformers' base model.

    prefix: of the encoder's tensors in files of a model with a head; it is removed. `gamma` and
    `beta`, the names of LayerNorm's weight and bias in old files, are replaced.
    """
    name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


@dataclass(frozen=True)
class Names:
    """Names of an encoder's tensors, in its modules and in files of transformers' class.

    parts: {part of a name in the modules: that part in the files}. A part is a whole sequence of
        the name's pieces between dots, and `*` in both stands for one number.
    prefix: of the encoder's tensors in files of a model with a head, such as `distilbert.`.
    kept: beginnings of the names of the encoder's tensors in files, after the prefix.
    unused: ends of the names of tensors that no encoder of the family reads.
    """

    parts: Mapping[str, str]
    prefix: str
    kept: tuple[str, ...]
    unused: tuple[str, ...] = ()

    def encoder_name(self, name: str) -> str | None:
        """Map a name in a file to the module's, None for a tensor that is not the encoder's."""
        name = base_name(name, self.prefix)
        if not name.startswith(self.kept) or name.endswith(_BUFFERS + self.unused):
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
