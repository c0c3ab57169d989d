"""Disentangled attention in plain torch on padded texts, for devices without a kernel of their own.

The formulas and shapes are those of fastmtl_kernels.disentangled_attention.reference. All sequences
are padded to L tokens, B sequences in all, so that each product is one call. Every copy of rows has
a copy or a product as its backward, never an unordered sum, so that equal inputs give equal bits on
a GPU. Nothing waits for the device. Any device and floating dtype; products in qkv's dtype, sums of
scores and softmax in float32 or wider. Gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.disentangled_attention.reference import skew
from fastmtl_kernels.philox import keep_threshold, philox
from fastmtl_kernels.texts import to_rows, to_texts


def disentangled_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    position_rows: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    group_offsets: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype. seed: of one element."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    length, num_rows, num_heads = (len(position_rows) + 1) // 2, qkv.shape[0], qkv.shape[2]
    bounds = cu_seqlens.long()
    if num_rows == 0 or len(bounds) == 1 or length == 0:
        # Computed from all inputs, so that the result is differentiable.
        empty = qkv[:, 0].masked_fill(torch.ones((), dtype=torch.bool, device=qkv.device), 0.0)
        return sum((table[:, :0].sum() for table in (pos_key, pos_query) if table is not None), empty)
    rows = bounds[:-1, None] + torch.arange(length, device=qkv.device)  # [B, L]
    real = rows < bounds[1:, None]
    q, k, v = to_texts(qkv, bounds, length).permute(2, 0, 3, 1, 4)  # [B, heads, L, head_dim] each
    scores = (q @ k.mT).to(dtype)
    if pos_key is not None:
        by_distance = _by_distance(pos_key, position_rows, group_offsets, len(bounds) - 1)
        scores = scores + skew(q @ by_distance.flip(2).mT).to(dtype)
    if pos_query is not None:
        by_distance = _by_distance(pos_query, position_rows, group_offsets, len(bounds) - 1)
        scores = scores + skew(k @ by_distance.mT).mT.to(dtype)
    # The result of a padded query is not used. It has all keys, so that it has a softmax.
    seen = real[:, None, None] | ~real[:, None, :, None]
    probabilities = (softmax_scale * scores).masked_fill(~seen, -torch.inf).softmax(-1)
    if seed is not None and dropout_p > 0:
        probabilities = probabilities * _keep(seed, rows, num_heads, dropout_p) / (1 - dropout_p)
    mixed = probabilities.to(qkv.dtype) @ v
    return to_rows(mixed.transpose(1, 2), bounds, num_rows)


def _by_distance(table: Tensor, position_rows: Tensor, group_offsets: Tensor | None, num_sequences: int) -> Tensor:
    """Return the table's row for each distance, [B, heads, 2 L - 1, head_dim]; B is 1 if G is 1.

    The copies are products with matrices of zeros and ones, since the backward of an index is an
    unordered sum on GPUs.
    """
    num_groups, num_rows = table.shape[:2]
    chosen = position_rows[:, None] == torch.arange(num_rows, device=table.device)
    by_distance = chosen.to(table.dtype) @ table.transpose(1, 2)
    if group_offsets is None or num_groups == 1:
        return by_distance
    sequence = torch.arange(num_sequences, device=table.device)[:, None]
    of_group = (group_offsets[:-1] <= sequence) & (sequence < group_offsets[1:])
    return (of_group.to(table.dtype) @ by_distance.flatten(1)).unflatten(1, by_distance.shape[1:])


def _keep(seed: Tensor, rows: Tensor, num_heads: int, dropout_p: float) -> Tensor:
    """Return the dropout mask of queries `rows` [B, L] and all keys, bool [B, heads, L, L]."""
    length = rows.shape[1]
    quads = torch.arange((length + 3) // 4, device=rows.device)
    heads = torch.arange(num_heads, device=rows.device)[:, None, None]
    words = torch.stack(philox(seed.reshape(()), quads, rows[:, None, :, None], heads, torch.zeros_like(quads)), -1)
    signed = words - ((words >> 31) << 32)
    return signed.flatten(-2)[..., :length] >= keep_threshold(dropout_p)
