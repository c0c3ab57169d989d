"""disentangled_attention on CPUs against float64 and the layer of transformers' DeBERTa-v2."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl_kernels.disentangled_attention.api import disentangled_attention
from fastmtl_kernels.disentangled_attention.buckets import position_rows, span
from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.varlen_attention import reference

REASON = unsupported_reason("disentangled_attention", "cpp", torch.device("cpu"))
IMPLS = ["reference", "padded", pytest.param("cpp", marks=pytest.mark.skipif(bool(REASON), reason=REASON or "built"))]
SEED = torch.tensor([2026])


def batch_of(
    lengths: list[int], tail: int, heads: int, head_dim: int, groups: int, rows: int, dtype: torch.dtype
) -> Any:
    """Return qkv, tables, cu_seqlens and group_offsets; rows past the last sequence are NaN."""
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(sum(lengths) + tail, 3, heads, head_dim, generator=generator).to(dtype)
    qkv[sum(lengths) :] = math.nan
    key, query = torch.randn(2, groups, rows, heads, head_dim, generator=generator).to(dtype)
    cut = sorted(torch.randint(len(lengths) + 1, (groups - 1,), generator=generator).tolist())
    return (
        qkv,
        key,
        query,
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        torch.tensor([0, *cut, len(lengths)], dtype=torch.int32),
    )


def dense(
    qkv: Tensor,
    key: Tensor | None,
    query: Tensor | None,
    cu: Tensor,
    groups: Tensor,
    rows: Tensor,
    scale: float,
    p: float,
) -> Tensor:
    """The definition in float64, entry by entry of the score matrix."""
    parts, longest = [], (len(rows) + 1) // 2
    for b, (start, stop) in enumerate(pairwise(cu.tolist())):
        group = sum(b >= stop_group for stop_group in groups[1:].tolist())
        q, k, v = qkv[start:stop].unbind(1)
        place = torch.arange(stop - start)
        row = rows[(place[:, None] - place + longest - 1)].long()  # [query, key]
        scores = torch.einsum("ihd,jhd->hij", q, k)
        if key is not None:
            scores = scores + torch.einsum("ihd,ijhd->hij", q, key[group][row])
        if query is not None:
            scores = scores + torch.einsum("jhd,ijhd->hij", k, query[group][row])
        keep = reference.keep_mask(SEED, start, stop - start, qkv.shape[2], p) if p else 1
        parts.append(torch.einsum("hij,jhd->ihd", (scores * scale).softmax(-1) * keep / (1 - p), v))
    return torch.cat([*parts, torch.zeros_like(qkv[int(cu[-1]) :, 0]) + qkv[:0].sum()])


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 80)), max_size=6),
    tail=st.integers(0, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 11, 16, 17, 64]),
    groups=st.integers(1, 3),
    tables=st.sampled_from(["both", "key", "query"]),
    buckets=st.sampled_from([-1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=st.sampled_from([None, 0.3, -1.0]),
    p=st.sampled_from([0.0, 0.1, 0.75]),
    more=st.integers(0, 5),
)
@example([70, 0, 130, 1], 1, 2, 16, 2, "both", 16, torch.float32, None, 0.1, 0)
def test_against_float64(
    impl: Any,
    lengths: list[int],
    tail: int,
    heads: int,
    head_dim: int,
    groups: int,
    tables: str,
    buckets: int,
    dtype: torch.dtype,
    scale: float | None,
    p: float,
    more: int,
) -> None:
    """The table may have rows for longer sequences, and tables are views with large strides."""
    if impl == "cpp" and dtype == torch.float64:
        dtype = torch.float32
    longest = max(lengths, default=0) + more
    first, stop, rows = position_rows(longest, buckets, 60)
    qkv, key, query, cu, offsets = batch_of(lengths, tail, heads, head_dim, groups, stop - first, dtype)
    key, query = (torch.stack([t, t], 2)[:, :, 1] for t in (key, query))
    key, query = (None if tables == "query" else key), (None if tables == "key" else query)
    grad = torch.randn(len(qkv), heads, head_dim).to(dtype)
    inputs = [t.detach().requires_grad_() for t in (qkv, key, query) if t is not None]
    named = dict(zip(["qkv", *(n for n, t in (("key", key), ("query", query)) if t is not None)], inputs, strict=True))
    out = disentangled_attention(
        named["qkv"],
        cu,
        rows,
        pos_key=named.get("key"),
        pos_query=named.get("query"),
        group_offsets=offsets if groups > 1 else None,
        softmax_scale=scale,
        dropout_p=p,
        seed=SEED,
        impl=impl,
    )
    found = [out.detach(), *gradients(out, inputs, grad)]
    exact = {name: t.detach().double().nan_to_num().requires_grad_() for name, t in named.items()}
    factor = (head_dim * (1 + len(inputs) - 1)) ** -0.5 if scale is None else scale
    wide = dense(exact["qkv"], exact.get("key"), exact.get("query"), cu, offsets, rows, factor, p)
    expected = [wide.detach(), *gradients(wide, list(exact.values()), grad.double())]
    size = (
        1
        + 3
        * abs(factor)
        * float(max(1, *(t.detach().abs().max() if t.numel() else 0 for t in exact.values()))) ** 2
        * head_dim
    )
    precision = 2**-52 if dtype == torch.float64 else 2**-23
    rounding = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    if impl == "padded":  # its products are of qkv's dtype
        precision = max(precision, rounding)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        error = (ours.double() - theirs).abs()
        assert (error <= rounding * theirs.abs() + 4 * size * precision * largest + 1e-7).all(), error.max()
    if tail:
        assert not found[0][-tail:].any() and not found[1][-tail:].any()


@pytest.mark.skipif(bool(REASON), reason=REASON or "built")
def test_equal_bits_for_any_number_of_threads() -> None:
    _, stop, rows = position_rows(200, -1, 200)
    lengths = [200, 3, 0, 77, 130, 1, 9, *[40] * 12]
    qkv, key, query, cu, groups = batch_of(lengths, 0, 3, 20, 2, stop, torch.float32)
    inputs = [qkv.requires_grad_(), key.requires_grad_(), query.requires_grad_()]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            out = disentangled_attention(
                qkv, cu, rows, pos_key=key, pos_query=query, group_offsets=groups, dropout_p=0.1, seed=SEED, impl="cpp"
            )
            results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_rows_are_those_of_transformers() -> None:
    """Buckets of both signs, in the linear part, on its edge, beyond it and past the last row."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    for longest, buckets, largest in [(1, -1, 3), (9, -1, 4), (40, 6, 20), (600, 256, 512), (30, 5, 90)]:
        q, half = torch.zeros(longest, 1), span(buckets, largest)
        theirs = build_relative_position(q, q, buckets, largest)[0] + half
        theirs = theirs.clamp(0, 2 * half - 1)
        first, stop, rows = position_rows(longest, buckets, largest)
        place = torch.arange(longest)
        assert torch.equal(rows[place[:, None] - place + longest - 1] + first, theirs.int())
        assert (first, stop) == (theirs.min(), theirs.max() + 1)
    assert position_rows(0, 4, 9)[2].numel() == 0


@pytest.mark.parametrize("impl", ["reference", "padded"])
@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["p2c"], ["c2p"]])
def test_is_the_attention_of_transformers(impl: Any, kinds: list[str]) -> None:
    """The result equals that of DeBERTa's layer on a padded batch of the same sequences."""
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    torch.manual_seed(0)
    config = DebertaV2Config(  # type: ignore[call-arg]
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        pos_att_type=kinds,
        position_buckets=6,
        max_relative_positions=20,
        share_att_key=False,
    )
    layer = DisentangledSelfAttention(config).eval().double()
    lengths = [9, 1, 30]
    x, table = torch.randn(sum(lengths), 24).double(), torch.randn(12, 24).double()
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(*real.shape, 24).double().masked_scatter(real[..., None], x)
    mask = (real[:, None, None] & real[:, None, :, None]).int()
    first, stop, rows = position_rows(max(lengths), 6, 20)
    expected = layer(padded, mask, rel_embeddings=table)[0][real]
    qkv = torch.stack([layer.query_proj(x), layer.key_proj(x), layer.value_proj(x)], dim=1).view(-1, 3, 3, 8)
    used = table[first:stop]
    out = disentangled_attention(
        qkv,
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        rows,
        pos_key=layer.pos_key_proj(used).view(1, -1, 3, 8) if "c2p" in kinds else None,
        pos_query=layer.pos_query_proj(used).view(1, -1, 3, 8) if "p2c" in kinds else None,
        # transformers rounds the square root to float32.
        softmax_scale=1 / float(torch.tensor(8.0 * (1 + len(kinds))).sqrt()),
        impl=impl,
    )
    torch.testing.assert_close(out.flatten(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"qkv": torch.ones(10, 2, 2, 4)},
            r"qkv must be .*\[N, 3, heads, head_dim\], got torch.float32 \[10, 2, 2, 4\]",
        ),
        ({"qkv": torch.ones(10, 3, 0, 4)}, "qkv must have at least one head"),
        ({"cu_seqlens": torch.tensor([0, 4, 10])}, r"cu_seqlens must be an int32 .*\[B \+ 1\], got torch.int64 \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 11], dtype=torch.int32)}, "cu_seqlens must end within the 10 rows"),
        ({"position_rows": torch.zeros(11)}, "position_rows must be an int32"),
        ({"position_rows": torch.zeros(9, dtype=torch.int32)}, "position_rows must have at least 11 rows .* 6 tokens"),
        ({"position_rows": torch.full((11,), 3, dtype=torch.int32)}, r"position_rows must be in \[0, 3\).*3 to 3"),
        ({"pos_key": None}, "pos_key or pos_query must be given"),
        ({"pos_key": torch.ones(3, 2, 4)}, r"pos_key must be .*\[G, R, 2, 4\], got torch.float32 \[3, 2, 4\]"),
        ({"pos_key": torch.ones(1, 3, 4, 2)}, "pos_key must have the shape"),
        ({"pos_query": torch.ones(1, 4, 2, 4)}, "pos_query must have the shape .* like pos_key"),
        ({"pos_query": torch.ones(1, 3, 2, 4, device="meta")}, "pos_query must be on cpu like qkv, got meta"),
        ({"pos_key": torch.ones(2, 3, 2, 4)}, "group_offsets must be given for tables of 2 groups"),
        ({"group_offsets": torch.tensor([0, 1, 2], dtype=torch.int32)}, "group_offsets must have 2 elements"),
        ({"group_offsets": torch.tensor([0, 1], dtype=torch.int32)}, r"ascend from 0 to the 2 sequences, got \[0, 1\]"),
        ({"softmax_scale": math.nan}, "softmax_scale must be finite"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"impl": "triton"}, "impl must be 'auto', .*'triton'"),
    ],
    ids=str,
)
def test_bad_input_is_named(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.ones(10, 3, 2, 4),
        "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32),
        "position_rows": torch.zeros(11, dtype=torch.int32),
        "pos_key": torch.ones(1, 3, 2, 4),
        "impl": "reference",
    } | wrong
    with pytest.raises(ValueError, match=message):
        disentangled_attention(**arguments)
