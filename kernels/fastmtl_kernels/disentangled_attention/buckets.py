"""The rows of a table of relative positions that DeBERTa-v2 uses for each distance.

    bucket(x) = x                                                      for |x| <= m
    bucket(x) = sign(x) (m + ceil((m - 1) log(|x| / m) / log((M - 1) / m)))    beyond
    row(x) = clamp(bucket(x) + span, 0, 2 span - 1)

x is the place of the query minus that of the key, m half the number of buckets, M the largest
distance; span is the number of buckets. Without buckets, bucket(x) = x and span = M. The logarithms
are float32, as in transformers, since they decide between two buckets.

Source: He et al., DeBERTa, 2021, equation 3; transformers' modeling_deberta_v2.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def span(buckets: int, max_distance: int) -> int:
    """Return half the number of the table's rows."""
    return buckets if buckets > 0 else max_distance


@lru_cache(maxsize=64)
def position_rows(longest: int, buckets: int, max_distance: int) -> tuple[int, int, Tensor]:
    """Return the rows of the table that sequences of up to `longest` tokens use.

    buckets: an even number of at least 4, or 0 or less for none. max_distance: M, more than
    buckets / 2 + 1.

    Returns:
        The first row in use, the row after the last one, and for each distance from 1 - longest to
        longest - 1 its row minus the first one, int32 [2 longest - 1] on the CPU.
    """
    half = span(buckets, max_distance)
    if longest == 0:
        return half, half, torch.empty(0, dtype=torch.int32)
    distance = torch.arange(1 - longest, longest)
    rows = (_bucket(distance, buckets // 2, max_distance) if buckets > 0 else distance) + half
    rows = rows.clamp(0, 2 * half - 1)
    first = int(rows[0])
    return first, int(rows[-1]) + 1, (rows - first).int()


def _bucket(distance: Tensor, middle: int, max_distance: int) -> Tensor:
    far = distance.abs().clamp(min=middle)
    scale = torch.log(torch.tensor((max_distance - 1) / middle))
    beyond = torch.ceil(torch.log(far / middle) / scale * (middle - 1)) + middle
    return torch.where(distance.abs() <= middle, distance, (beyond * distance.sign()).long())
