"""The layer of a parameter, from its name."""

from __future__ import annotations

import os
from collections.abc import Sequence


def layers_of(names: Sequence[str]) -> list[str]:
    """Return the layer of each parameter.

    A block of a list is a layer: `encoder.layer.3` for `encoder.layer.3.attention.self.key.weight`,
    the name up to its first number. Elsewhere it is the name up to the first component that is not
    the same in all names: `embeddings` for `embeddings.word_embeddings.weight`.
    """
    parts = [name.split(".") for name in names]
    common = len(os.path.commonprefix(parts))
    return [".".join(of_name[: _end(of_name, common)]) for of_name in parts]


def _end(parts: Sequence[str], common: int) -> int:
    numbers = [k for k, part in enumerate(parts) if part.isdigit()]
    return 1 + (numbers[0] if numbers else common)
