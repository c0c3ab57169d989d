"""Reference of disentangled attention over packed sequences in plain torch, text by text.

It defines the result and runs on any device.

    S[i, j] = Q[i] K[j]^T + Q[i] PK[row(i - j)]^T + K[j] PQ[row(i - j)]^T
    P = softmax(softmax_scale * S)       over the keys j of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V

The three terms are content to content, content to position and position to content; without PK or
PQ, its term is left out. qkv [N, 3, heads, head_dim] and cu_seqlens are as in
fastmtl_kernels.varlen_attention.reference, which also defines `keep`. PK (pos_key) and PQ
(pos_query) are [G, R, heads, head_dim]; sequences group_offsets[g]:group_offsets[g + 1] use the
tables g. row(i - j) is position_rows[i - j + L - 1], where position_rows has 2 L - 1 entries. Rows
past cu_seqlens[-1] belong to no sequence: output and gradient are zero there. Any floating dtype;
arithmetic in float32, in float64 for float64. Gradients by autograd.

Source: He et al., DeBERTa, 2021, equations 2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtl_kernels.varlen_attention.reference import keep_mask


def disentangled_attention(
    qkv: Tensor,
    offsets: Sequence[int],
    position_rows: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    groups: Sequence[int],
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype.

    offsets, groups: cu_seqlens and group_offsets on the host. seed: of one element.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    wide = qkv.to(dtype)
    keys, queries = (None if table is None else table.to(dtype) for table in (pos_key, pos_query))
    longest = (len(position_rows) + 1) // 2
    group_of = [g for g, (first, stop) in enumerate(pairwise(groups)) for _ in range(first, stop)]
    mixed = []
    for group, (start, stop) in zip(group_of, pairwise(offsets), strict=True):
        length = stop - start
        if length == 0:
            continue
        q, k, v = wide[start:stop].permute(1, 2, 0, 3)
        rows = position_rows[longest - length : longest + length - 1]
        scores = q @ k.mT
        if keys is not None:
            by_distance = keys[group].index_select(0, rows).transpose(0, 1)
            scores = scores + skew(q @ by_distance.flip(1).mT)
        if queries is not None:
            by_distance = queries[group].index_select(0, rows).transpose(0, 1)
            scores = scores + skew(k @ by_distance.mT).mT
        probabilities = (softmax_scale * scores).softmax(-1)
        if seed is not None and dropout_p > 0:
            probabilities = probabilities * keep_mask(seed, start, length, qkv.shape[2], dropout_p) / (1 - dropout_p)
        mixed.append((probabilities @ v).transpose(0, 1))
    # Computed from all inputs, so that the result is differentiable even if there is no sequence.
    tail = wide[offsets[-1] :, 0].masked_fill(torch.ones((), dtype=torch.bool, device=qkv.device), 0.0)
    for table in (keys, queries):
        if table is not None:
            tail = tail + table[:, :0].sum()
    return torch.cat([*mixed, tail]).to(qkv.dtype)


def skew(products: Tensor) -> Tensor:
    """Return the matrices [..., L, L] with the entries products[..., i, L - 1 - i + j].

    products: [..., L, 2 L - 1]. Views alone would do, but slices and a reshape have a deterministic
    backward on every device, unlike a gather.
    """
    length = products.shape[-2]
    flat = pad(products, (0, 1)).flatten(-2)
    return flat[..., length - 1 : -1].unflatten(-1, (length, 2 * length - 1))[..., :length]
