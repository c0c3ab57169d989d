"""The random number generator Philox4x32-10 in plain torch, and the mask of row-wise dropout.

The mask of an element depends only on the seed, its row and its column. So backward can draw the
mask again, and all implementations draw the same mask. In a matrix whose rows are tokens:

    words = Philox4x32-10(key = seed, counter = (column // 4, row, 0, 1))
    keep[row, column] = int32(words[column % 4]) >= round(2^32 dropout_p) - 2^31

The probability is exact to 2^-33. Attention's dropout (fastmtl_kernels.varlen_attention.reference)
has 0 as the last word of the counter instead of 1, so one seed may serve attention and one row-wise
dropout. Two row-wise calls with the same seed drop the same elements, so every row-wise dropout of
a step needs its own seed.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011 (also the generator of
Triton's `tl.rand`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four random words of each counter (c0, c1, c2, c3), in [0, 2^32).

    seed: the key, 64 bits. All tensors are int64; the counters are broadcast against each other.

    A product of two words may overflow int64. This does no harm: only the bits of the product are
    used, and they are the same as without overflow.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """Return the smallest random word, as a signed 32-bit integer, for which an element is kept."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def keep_mask(seed: Tensor, num_rows: int, num_columns: int, dropout_p: float) -> Tensor:
    """Return the dropout mask, True for a kept element.

    bool [num_rows, num_columns] on the seed's device.
    """
    groups = torch.arange((num_columns + 3) // 4, device=seed.device)
    rows = torch.arange(num_rows, device=seed.device)[:, None]
    zero = torch.zeros_like(groups)
    words = torch.stack(philox(seed.reshape(()), groups, rows, zero, zero + 1), dim=-1)
    signed = words - ((words >> 31) << 32)
    return signed.flatten(-2)[:, :num_columns] >= keep_threshold(dropout_p)
