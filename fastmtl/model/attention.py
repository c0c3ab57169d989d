"""Attention over packed sequences: scaled dot products on blocks of sequences of nearly equal length.

Sequences are grouped by length once per batch (`AttentionPlan`), every group is padded to its longest sequence, and
PyTorch's SDPA runs on the padded groups. Everything outside of it stays packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# A group may hold this share of padding: fewer groups mean fewer calls, less padding means less work per call.
MAX_PADDING = 0.1
# Scores per head of one group. SDPA with dropout materialises them on CPUs.
MAX_SCORES = 1 << 20


@dataclass(frozen=True)
class Block:
    """A group padded to `length`. mask: 0 or -inf [num_sequences, 1, 1, length], None where nothing is padding."""

    num_sequences: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Where the packed rows go in the padded groups, M rows in all.

    source: int64 [M], the packed row of every padded row (any row where it is padding); is_padding: bool [M, 1] or
    None where there is none;
    target: int64 [N], the padded row of every packed row.
    """

    blocks: tuple[Block, ...]
    source: Tensor
    is_padding: Tensor | None
    target: Tensor

    @classmethod
    def build(cls, cu_seqlens: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> AttentionPlan:
        """cu_seqlens: [B + 1] host integers; dtype: that of the queries, which a mask has to match."""
        starts = torch.tensor(cu_seqlens[:-1], dtype=torch.int64)
        lengths = torch.tensor(cu_seqlens[1:], dtype=torch.int64) - starts
        order = torch.argsort(lengths, stable=True)
        order = order[lengths[order] > 0]
        sorted_lengths = lengths[order].tolist()
        source, is_padding, masks, shapes = [], [], [], []
        for first, stop in _groups(sorted_lengths):
            members, longest = order[first:stop], sorted_lengths[stop - 1]
            columns = torch.arange(longest)
            member_lengths = lengths[members, None]
            padding = columns >= member_lengths
            source.append((starts[members, None] + torch.minimum(columns, member_lengths - 1)).flatten())
            is_padding.append(padding.flatten())
            shapes.append((stop - first, longest))
            masks.append(padding if sorted_lengths[first] < longest else None)
        rows = torch.cat(source) if source else torch.empty(0, dtype=torch.int64)
        padded = torch.cat(is_padding) if source else torch.empty(0, dtype=torch.bool)
        real = torch.nonzero(~padded).squeeze(1)
        target = torch.empty(cu_seqlens[-1], dtype=torch.int64)
        target[rows[real]] = real
        blocks = tuple(
            Block(count, length, None if mask is None else _additive(mask, dtype, device))
            for (count, length), mask in zip(shapes, masks, strict=True)
        )
        return cls(
            blocks,
            rows.to(device, non_blocking=True),
            padded[:, None].to(device, non_blocking=True) if padded.any() else None,
            target.to(device, non_blocking=True),
        )


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, num_heads: int, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T / sqrt(head size)) V within every sequence; dropout on the probabilities.

    query, key, value: [N, num_heads * head size], packed rows. Returns [N, num_heads * head size].
    """
    if not plan.blocks:
        return query + key + value  # no rows, but all three stay in the graph: under ZeRO 3 every rank has to run them
    sizes = [block.num_sequences * block.length for block in plan.blocks]
    parts = [_ToBlocks.apply(x, plan).split(sizes) for x in (query, key, value)]
    outputs = []
    for block, *rows in zip(plan.blocks, *parts, strict=True):
        shape = (block.num_sequences, block.length, num_heads, -1)
        q, k, v = (x.view(shape).transpose(1, 2) for x in rows)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, dropout_p=dropout)
        outputs.append(mixed.transpose(1, 2).reshape(block.num_sequences * block.length, -1))
    return _FromBlocks.apply(torch.cat(outputs), plan)


class _ToBlocks(torch.autograd.Function):
    """Packed rows to padded rows. Padding gets no gradient (masked keys, dropped outputs): backward is a gather
    too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.target), None


class _FromBlocks(torch.autograd.Function):
    """Padded rows back to packed rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.index_select(0, ctx.plan.source)
        if ctx.plan.is_padding is not None:
            padded.masked_fill_(ctx.plan.is_padding, 0)
        return padded, None


def _groups(lengths: list[int]) -> list[tuple[int, int]]:
    """Cuts ascending lengths into runs [first, stop) that hold little padding and not too many scores."""
    groups, first, total = [], 0, 0
    for index, length in enumerate(lengths):
        count = index - first + 1
        padded = count * length
        if index > first and (padded - total - length > MAX_PADDING * padded or padded * length > MAX_SCORES):
            groups.append((first, index))
            first, total = index, 0
        total += length
    if lengths:
        groups.append((first, len(lengths)))
    return groups


def _additive(padding: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, float("-inf"))
    return mask[:, None, None, :].to(device, non_blocking=True)
