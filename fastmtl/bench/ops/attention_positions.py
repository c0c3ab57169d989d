"""Cases of varlen_attention with position terms, compared with torch's attention.

A layer of ModernBERT with a window and rotary positions, on texts up to the encoder's length; a
layer of MPNet with a bias by relative position, on a step's texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.bench.ops.case import EAGER, Case, Run, Tensors, Way, Work, ours
from fastmtl.bench.ops.layout import Apart, Padded
from fastmtl.bench.ops.rows import Rows
from fastmtl.bench.sizes import Size
from fastmtl.measure.harness import Skipped
from fastmtl_kernels import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

THETA = 10_000.0


def cases(size: Size) -> list[Case]:
    places = size.shape.positions
    long = Rows(size, [[places, places // 8], [places // 2, places // 4], [places // 4, places // 8]])
    head_dim = size.shape.hidden // size.shape.heads
    frequencies = THETA ** (-torch.arange(0, head_dim, 2, device=long.device) / head_dim)
    angles = torch.arange(places, device=long.device)[:, None] * frequencies
    rotary = {"rotary": torch.stack([angles.cos(), angles.sin()])}
    window = places // 8
    rows = Rows(size)
    bias = {"bias": rows.randn(1, size.shape.heads, 2 * max(rows.lengths) - 1)}
    return [
        _case(size, "varlen_attention window", f"rotary, window of {window}", long, rotary, window),
        _case(size, "varlen_attention bias", "bias by distance", rows, bias, None),
    ]


def _case(size: Size, name: str, about: str, rows: Rows, terms: Tensors, window: int | None) -> Case:
    tokens, heads, head_dim = rows.tokens, size.shape.heads, size.shape.hidden // size.shape.heads
    plan = AttentionPlan.make(rows.offsets, tokens, rows.device)

    def fastmtl(impl: str) -> Run:
        def run(t: Tensors, dropout: float) -> Tensor:
            return varlen_attention(
                t["qkv"],
                rows.cu_seqlens,
                dropout_p=dropout,
                seed=rows.seed,
                impl=impl,  # type: ignore[arg-type]
                plan=plan,
                window=window,
                rotary=t.get("rotary"),
                bias=t.get("bias"),
            )

        return run

    layout = rows.padded({"qkv", "output"})
    one = tokens * heads * head_dim * rows.dtype.itemsize
    furthest = max(rows.lengths) if window is None else window
    pairs = sum(min(length, i + furthest + 1) - max(0, i - furthest) for length in rows.lengths for i in range(length))
    product = 2 * pairs * heads * head_dim
    ways = [
        *ours(rows.device, "varlen_attention", fastmtl),
        Way(EAGER, lambda: _padded(layout, window, _softmax), layout),
        Way("sdpa padded", lambda: _padded(layout, window, F.scaled_dot_product_attention), layout),
        Way("flex_attention, no dropout", lambda: _flex(rows, window), Apart()),
    ]
    if window is not None:
        ways.append(Way("torch varlen, no dropout", lambda: _torch_varlen(rows, window), Apart()))
    return Case(
        name,
        f"{rows.about}, {heads} heads of {head_dim}, {about}",
        {"qkv": rows.randn(tokens, 3, heads, head_dim), **terms},
        fastmtl("reference"),
        ways,
        {"forward": Work(4 * one, 2 * product), "backward": Work(8 * one, 5 * product)},
        rows.randn(tokens, heads, head_dim),
        ("qkv", "bias") if "bias" in terms else ("qkv",),
        size.dropout,
        tokens,
    )


def _rotated(x: Tensor, t: Tensors, places: Tensor) -> Tensor:
    """Return queries or keys [..., heads, head_dim], rotated by their places [...] in the sequence.

    Return x itself if there are no rotary positions.
    """
    if "rotary" not in t:
        return x
    cos, sin = (table[places].unsqueeze(-2) for table in t["rotary"])
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _softmax(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    else:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def _padded(layout: Padded, window: int | None, attention: Callable[..., Tensor]) -> Run:
    places = torch.arange(layout.mask.shape[1], device=layout.mask.device)
    distance = places - places[:, None]
    # A row of padding sees itself: without any key, its result would not be finite.
    seen = (layout.mask[:, None] | (distance == 0))[:, None]
    if window is not None:
        seen = seen & (distance.abs() <= window)

    def run(t: Tensors, dropout: float) -> Tensor:
        q, k, v = t["qkv"].unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (_rotated(q, t, places), _rotated(k, t, places), v))
        mask = seen
        if "bias" in t:
            bias = t["bias"][0]
            mask = bias[:, distance + bias.shape[1] // 2].masked_fill(~seen, float("-inf"))
        return attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)

    return run


def _flex(rows: Rows, window: int | None) -> Run:
    """Return torch's flex_attention on all packed rows, with a mask of the sequences.

    It lacks dropout, so it does less work than the others.
    """
    if rows.device.type == "cpu":
        raise Skipped("torch.nn.attention.flex_attention has no backward on CPUs")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = torch.arange(rows.tokens, device=rows.device)
    lengths = torch.tensor(rows.lengths, device=rows.device)
    sequence = torch.repeat_interleave(torch.arange(len(rows.lengths), device=rows.device), lengths)
    places = tokens - rows.cu_seqlens[sequence]

    def seen(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = sequence[i] == sequence[j]
        return inside if window is None else inside & ((i - j).abs() <= window)

    mask = create_block_mask(seen, None, None, rows.tokens, rows.tokens, device=rows.device)
    attention = torch.compile(flex_attention, dynamic=False)

    def run(t: Tensors, _: float) -> Tensor:
        q, k, v = t["qkv"]
        q, k, v = (x.transpose(0, 1)[None] for x in (_rotated(q, t, places), _rotated(k, t, places), v))
        score = None
        if "bias" in t:
            bias = t["bias"][0]
            middle = bias.shape[1] // 2

            def score(s: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
                # Pairs of two sequences are masked after the bias is read.
                return s + bias[head, (j - i + middle).clamp(0, 2 * middle)]

        out = attention(q, k, v, score_mod=score, block_mask=mask)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    return run


def _torch_varlen(rows: Rows, window: int) -> Run:
    """Return torch's varlen attention. It lacks dropout, so it does less work than the others."""
    if rows.device.type != "cuda" or rows.dtype == torch.float32:
        raise Skipped("torch.nn.attention.varlen needs a GPU, and float16 or bfloat16")
    from torch.nn.attention.varlen import varlen_attn

    longest, places = max(rows.lengths), torch.cat([torch.arange(n, device=rows.device) for n in rows.lengths])

    def run(t: Tensors, _: float) -> Tensor:
        q, k, v = t["qkv"]
        q, k = _rotated(q, t, places), _rotated(k, t, places)
        sides = (window, window)
        out = varlen_attn(q, k, v, rows.cu_seqlens, rows.cu_seqlens, longest, longest, window_size=sides)
        assert isinstance(out, Tensor)
        return out

    return run
