"""disentangled_attention, compared with the attention of transformers' DeBERTa on padded rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import Case, Run, Tensors, Work, ours, plain
from fastmtl.bench.ops.layout import Padded
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl_kernels import disentangled_attention
from fastmtl_kernels.disentangled_attention.buckets import position_rows

# Those of DeBERTa-v3.
BUCKETS, LARGEST_DISTANCE = 256, 512


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, heads, head_dim = rows.tokens, size.shape.heads, size.shape.hidden // size.shape.heads
    first, stop, near = position_rows(max(rows.lengths), BUCKETS, LARGEST_DISTANCE)
    near = near.to(rows.device)

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return disentangled_attention(
                t["qkv"],
                rows.cu_seqlens,
                near,
                pos_key=t["pos_key"],
                pos_query=t["pos_query"],
                dropout_p=dropout,
                seed=rows.seed,
                impl=impl,  # type: ignore[arg-type]
            )

        return run

    layout = rows.padded({"qkv", "output"})
    one = tokens * heads * head_dim * rows.dtype.itemsize
    table = (stop - first) * heads * head_dim * rows.dtype.itemsize
    # Each of the two terms of positions is as many products as content to content.
    product = 2 * sum(length**2 for length in rows.lengths) * heads * head_dim
    return [
        Case(
            "disentangled_attention",
            f"{rows.about}, {heads} heads of {head_dim}, {stop - first} relative positions",
            {
                "qkv": rows.randn(tokens, 3, heads, head_dim),
                "pos_key": rows.randn(1, stop - first, heads, head_dim),
                "pos_query": rows.randn(1, stop - first, heads, head_dim),
            },
            fastmtl("reference"),
            [*ours(rows.device, "disentangled_attention", fastmtl), *plain(_transformers(layout, near), layout)],
            {
                "forward": Work(4 * one + 2 * table, 4 * product),
                "backward": Work(8 * one + 4 * table, 11 * product),
            },
            rows.randn(tokens, heads, head_dim),
            ("qkv", "pos_key", "pos_query"),
            size.dropout,
            tokens,
        )
    ]


def _transformers(layout: Padded, near: Tensor) -> Run:
    """Return transformers' way: products with all positions, then a gather for each pair."""
    bias = torch.zeros(layout.mask.shape, device=layout.mask.device).masked_fill(~layout.mask, float("-inf"))
    place = torch.arange(layout.mask.shape[1], device=near.device)
    pairs = near.long()[place[:, None] - place + len(place) - 1]

    def run(t: Tensors, dropout: float) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in t["qkv"].unbind(2))
        key, query = (t[name][0].transpose(0, 1) for name in ("pos_key", "pos_query"))
        index = pairs.expand(*q.shape[:2], -1, -1)
        scores = q @ k.mT + (q @ key.mT).gather(-1, index) + (k @ query.mT).gather(-1, index.mT).mT
        scores = scores * (3 * q.shape[-1]) ** -0.5 + bias[:, None, None].to(q.dtype)
        return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2)

    return run
