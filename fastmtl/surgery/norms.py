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
    return torch.linalg.vector_norm(tensor_norms(gradients)).float()


def tensor_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, float64 [number of tensors], as exact as `total_norm`."""
    split = [gradient.flatten().split(_PIECE) if _is_long(gradient) else (gradient,) for gradient in gradients]
    pieces = [piece for parts in split for piece in parts]
    norms: list[Tensor] = [gradients[0]] * len(pieces)
    for dtype in dict.fromkeys(piece.dtype for piece in pieces):  # a norm of 16 bits would be rounded to these
        places = [k for k, piece in enumerate(pieces) if piece.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        found = torch._foreach_norm([pieces[k] for k in places], 2, dtype=wide)
        for k, norm in zip(places, found, strict=True):
            norms[k] = norm
    joined = torch.stack(norms).double()
    if len(pieces) == len(gradients):
        return joined
    return torch.stack([torch.linalg.vector_norm(part) for part in joined.split([len(parts) for parts in split])])


def _is_long(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.numel() > _PIECE
