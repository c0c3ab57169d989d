"""varlen_attention, compared with torch's attention on padded, nested and packed rows.

Padded: softmax and SDPA. Nested: SDPA. Packed: torch.nn.attention.varlen. The cases with position
terms are in attention_positions.py.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops import attention_positions
from fastmtl.bench.ops.case import Case, Run, Tensors, Way, Work, ours, plain
from fastmtl.bench.ops.layout import Apart, Padded
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl.measure.harness import Skipped
from fastmtl_kernels import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan


def cases(size: Size) -> list[Case]:
    rows = Rows(size)
    tokens, heads, head_dim = rows.tokens, size.shape.heads, size.shape.hidden // size.shape.heads
    plan = AttentionPlan.make(rows.offsets, tokens, rows.device)

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return varlen_attention(
                t["qkv"], rows.cu_seqlens, dropout_p=dropout, seed=rows.seed, impl=impl, plan=plan  # type: ignore[arg-type]
            )  # fmt: skip

        return run

    layout = rows.padded({"qkv", "output"})
    one = tokens * heads * head_dim * rows.dtype.itemsize
    product = 2 * sum(length**2 for length in rows.lengths) * heads * head_dim
    return [
        Case(
            "varlen_attention",
            f"{rows.about}, {heads} heads of {head_dim}",
            {"qkv": rows.randn(tokens, 3, heads, head_dim)},
            fastmtl("reference"),
            [
                *ours(rows.device, "varlen_attention", fastmtl),
                *plain(_softmax(layout), layout),
                Way("sdpa padded", lambda: _sdpa(layout), layout),
                Way("sdpa nested", lambda: _nested(rows), Apart()),
                Way("torch varlen, no dropout", lambda: _torch_varlen(rows), Apart()),
            ],
            # Matrix products of forward: Q K^T and P V; of backward: Q K^T again, dP, dV, dQ and
            # dK.
            {"forward": Work(4 * one, 2 * product), "backward": Work(8 * one, 5 * product)},
            rows.randn(tokens, heads, head_dim),
            ("qkv",),
            size.dropout,
            tokens,
        ),
        *attention_positions.cases(size),
    ]


def _softmax(layout: Padded) -> Run:
    """Return BERT's eager attention: it computes scores [B, heads, L, L] with an additive mask."""
    bias = torch.zeros(layout.mask.shape, device=layout.mask.device).masked_fill(~layout.mask, float("-inf"))

    def run(t: Tensors, dropout: float) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in t["qkv"].unbind(2))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias[:, None, None].to(q.dtype)
        return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2)

    return run


def _sdpa(layout: Padded) -> Run:
    mask = layout.mask[:, None, None]

    def run(t: Tensors, dropout: float) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in t["qkv"].unbind(2))
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)

    return run


def _nested(rows: Rows) -> Run:
    offsets, longest = rows.cu_seqlens.long(), max(rows.lengths)
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")

    def run(t: Tensors, dropout: float) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                part, offsets, min_seqlen=min(rows.lengths), max_seqlen=longest
            ).transpose(1, 2)
            for part in t["qkv"]
        )
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).values()
        return out

    return run


def _torch_varlen(rows: Rows) -> Run:
    """Return torch's varlen attention. It lacks dropout, so it does less work than the others."""
    if rows.device.type != "cuda" or rows.dtype == torch.float32:
        raise Skipped("torch.nn.attention.varlen needs a GPU, and float16 or bfloat16")
    from torch.nn.attention.varlen import varlen_attn

    longest = max(rows.lengths)

    def run(t: Tensors, _: float) -> Tensor:
        q, k, v = t["qkv"]
        out = varlen_attn(q, k, v, rows.cu_seqlens, rows.cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out

    return run
