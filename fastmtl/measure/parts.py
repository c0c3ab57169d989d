"""The parts into which a step's memory is split by use, both measured and predicted memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Part = Literal["weights", "gradients", "optimiser", "task gradients", "activations", "workspace"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimiser", "task gradients", "activations", "workspace")
Bytes = dict[Part, int]

MEANING: Mapping[Part, str] = {
    "weights": "parameters and buffers of the model",
    "gradients": "gradients of the parameters, with merged ones and DeepSpeed's buckets and copies",
    "optimiser": "moments, and float32 master weights",
    "task gradients": "J with its compact rows, or its replacement",
    "activations": "tensors that forward keeps for backward",
    "workspace": "temporary tensors",
}


def zero_bytes() -> Bytes:
    return dict.fromkeys(PARTS, 0)


def total(parts: Mapping[Part, int]) -> int:
    return sum(parts.values())
