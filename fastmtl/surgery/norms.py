"""Euclidean norms of gradients, accurate for any number of elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Number of elements whose squares are summed in float32, with a relative error of about 1e-6.
_PIECE = 1 << 14


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all tensors, a float32 scalar on the device of the first one.

    On CPUs, torch sums all squares of a tensor in float32: for 10^8 equal numbers, the norm is 6 %
    too small. So the norms of short pieces are combined in float64.
    """
    return torch.linalg.vector_norm(tensor_norms(gradients)).float()


def tensor_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, float64 [number of tensors].

    The norms are as accurate as that of `total_norm`.
    """
    split = [gradient.flatten().split(_PIECE) if _is_long(gradient) else (gradient,) for gradient in gradients]
    pieces = [piece for parts in split for piece in parts]
    norms: list[Tensor] = [gradients[0]] * len(pieces)
    for dtype in dict.fromkeys(piece.dtype for piece in pieces):  # else a norm of 16-bit numbers is rounded to 16 bits
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
