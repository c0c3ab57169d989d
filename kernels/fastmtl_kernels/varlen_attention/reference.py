"""Reference of attention over packed sequences in plain torch.

It defines the result and runs on any device.

    P = softmax(softmax_scale * Q K^T)    over the keys of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V    keep[query, key] in {0, 1}, all ones where dropout_p is 0

qkv [N, 3, heads, head_dim] holds Q, K and V of N packed tokens; sequence b is rows
cu_seqlens[b]:cu_seqlens[b + 1]. Rows past cu_seqlens[-1] belong to no sequence: output and gradient
are zero there, whatever qkv contains. Any floating dtype; arithmetic in float32, in float64 for
float64. Gradients by autograd.

The dropout mask is a function of the seed and of an entry's place, so that backward can draw it
again and every implementation draws the same:

    words = Philox4x32-10(key = seed, counter = (key // 4, row, head, 0))
    keep[row, key] = int32(words[key % 4]) >= round(2^32 dropout_p) - 2^31

`row` is the query's row of qkv, `key` the key's position in its sequence: one call of
fastmtl_kernels.philox serves four keys.

Source: Vaswani et al., Attention Is All You Need, 2017, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmtl_kernels.philox import keep_threshold, philox


def varlen_attention(
    qkv: Tensor, offsets: Sequence[int], softmax_scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype.

    offsets: cu_seqlens on the host. seed: of one element.
    """
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    mixed = []
    for start, stop in pairwise(offsets):
        q, k, v = wide[start:stop].permute(1, 2, 0, 3)
        probabilities = (softmax_scale * (q @ k.mT)).softmax(-1)
        if seed is not None and dropout_p > 0:
            keep = keep_mask(seed, start, stop - start, qkv.shape[2], dropout_p)
            probabilities = probabilities * keep / (1 - dropout_p)
        mixed.append((probabilities @ v).transpose(0, 1))
    # Computed from qkv, so that the result is differentiable even if there is no sequence.
    tail = wide[offsets[-1] :, 0].masked_fill(torch.ones((), dtype=torch.bool, device=qkv.device), 0.0)
    return torch.cat([*mixed, tail]).to(qkv.dtype)


def keep_mask(seed: Tensor, first_row: int, length: int, num_heads: int, dropout_p: float) -> Tensor:
    """Return the dropout mask of one sequence, True for a kept entry: bool [heads, query, key].

    The sequence has the rows first_row:first_row + length of qkv.
    """
    groups = torch.arange((length + 3) // 4, device=seed.device)
    rows = torch.arange(first_row, first_row + length, device=seed.device)[:, None]
    heads = torch.arange(num_heads, device=seed.device)[:, None, None]
    words = torch.stack(philox(seed.reshape(()), groups, rows, heads, torch.zeros_like(groups)), dim=-1)
    signed = words - ((words >> 31) << 32)
    return signed.flatten(-2)[..., :length] >= keep_threshold(dropout_p)
