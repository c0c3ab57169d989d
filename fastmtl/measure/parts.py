"""What memory is for. Everything that counts bytes, measured or predicted, splits them so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Part = Literal["weights", "gradients", "optimiser", "task gradients", "activations", "workspace"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimiser", "task gradients", "activations", "workspace")
Bytes = dict[Part, int]

MEANING: Mapping[Part, str] = {
    "weights": "parameters and buffers of the model",
    "gradients": "of the parameters, merged ones and DeepSpeed's buckets and copies included",
    "optimiser": "moments, and float32 masters of the weights",
    "task gradients": "J with its compact rows, or what takes its place",
    "activations": "what forward keeps for backward",
    "workspace": "everything that lives for a moment",
}


def nothing() -> Bytes:
    return dict.fromkeys(PARTS, 0)


def total(parts: Mapping[Part, int]) -> int:
    return sum(parts.values())
