"""The norm of gradients, however large they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers whose squares are added up in float32, which is off by some 1e-6 then.
_PIECE = 1 << 14


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all numbers together, a float32 scalar on the device of the first tensor.

    torch's norm on CPUs adds up all squares of a tensor in float32: of 10^8 equal numbers it is 6 % too small. So
    pieces are added up in float64.
    """
    pieces = [
        piece
        for gradient in gradients
        for piece in (gradient.flatten().split(_PIECE) if _is_long(gradient) else (gradient,))
    ]
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(piece.dtype for piece in pieces):  # a norm of 16 bits would be rounded to these
        alike = [piece for piece in pieces if piece.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, dtype=torch.promote_types(dtype, torch.float32))
    return torch.linalg.vector_norm(torch.stack(norms).double()).float()


def _is_long(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.numel() > _PIECE
