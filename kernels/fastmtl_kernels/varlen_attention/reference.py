"""Reference of attention over packed sequences in plain torch.

It defines the result and runs on any device.

    P = softmax(softmax_scale * Q K^T)    over the keys of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V    keep[query, key] in {0, 1}, all ones where dropout_p is 0

Position terms, each optional, with i the place of the query in its sequence and j that of the key:

    rotary [2, P, head_dim // 2]    Q and K are first rotated: [x1 cos - x2 sin, x2 cos + x1 sin],
                                    x = [x1, x2] a row, cos and sin those of the row's place
    bias [G, heads, 2 R - 1]        bias[g, head, j - i + R - 1] is added to
                                    softmax_scale * Q K^T, g the group of the sequence
    window                          the softmax is over the keys with |i - j| <= window

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

Sources: Vaswani et al., Attention Is All You Need, 2017, equation 1; Su et al., RoFormer, 2021
(rotary positions); Raffel et al., T5, 2020 (bias by relative position); Beltagy et al., Longformer,
2020 (window).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmtl_kernels.philox import keep_threshold, philox
from fastmtl_kernels.varlen_attention.position_terms import NO_TERMS, PositionTerms


def varlen_attention(
    qkv: Tensor,
    offsets: Sequence[int],
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    terms: PositionTerms = NO_TERMS,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype.

    offsets: cu_seqlens on the host. seed: of one element.
    """
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    biases = None if terms.bias is None else terms.bias.to(wide.dtype)
    mixed = []
    for group, (start, stop) in zip(terms.groups(len(offsets) - 1), pairwise(offsets), strict=True):
        q, k, v = wide[start:stop].permute(1, 2, 0, 3)
        if terms.rotary is not None:
            q, k = rotate(q, terms.rotary), rotate(k, terms.rotary)
        scores = softmax_scale * (q @ k.mT)
        if biases is not None:
            scores = scores + _by_distance(biases[group], stop - start)
        if terms.window is not None:
            scores = scores.masked_fill(_outside(terms.window, stop - start, qkv.device), float("-inf"))
        probabilities = scores.softmax(-1)
        if seed is not None and dropout_p > 0:
            keep = keep_mask(seed, start, stop - start, qkv.shape[2], dropout_p)
            probabilities = probabilities * keep / (1 - dropout_p)
        mixed.append((probabilities @ v).transpose(0, 1))
    # Computed from qkv and bias, so that the result is differentiable even if there is no sequence.
    tail = wide[offsets[-1] :, 0].masked_fill(torch.ones((), dtype=torch.bool, device=qkv.device), 0.0)
    if biases is not None:
        tail = tail + biases.flatten()[:0].sum()
    return torch.cat([*mixed, tail]).to(qkv.dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Return the rotated rows of x [..., L, head_dim]; row i takes rotary[:, i]."""
    cos, sin = rotary[:, : x.shape[-2]]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _by_distance(bias: Tensor, length: int) -> Tensor:
    """Return bias[:, j - i + R - 1] as [heads, i, j], from bias [heads, 2 R - 1].

    Its gradient is a sum in a fixed order, unlike that of an index.
    """
    centre = bias.shape[1] // 2
    nearby = bias[:, centre - max(length - 1, 0) : centre + max(length, 1)]
    return nearby.unfold(1, length, 1).flip(1)[:, :length]


def _outside(window: int, length: int, device: torch.device) -> Tensor:
    """Return True for each query and key that are more than `window` places apart, bool [i, j]."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() > min(window, length)


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
