"""varlen_attention on CPUs: outputs and gradients against float64, SDPA and BERT's own layer."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention import reference
from fastmtl_kernels.varlen_attention.api import varlen_attention

REASON = unsupported_reason("varlen_attention", "cpp", torch.device("cpu"))
IMPLS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(bool(REASON), reason=REASON or "built"))]
HEAD_DIMS = [1, 8, 11, 16, 17, 32, 34, 64, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([2026])


def random_batch(
    lengths: list[int], num_heads: int, head_dim: int, *, tail: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return qkv [N, 3, heads, head_dim] and cu_seqlens; rows past the last sequence are NaN."""
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(sum(lengths) + tail, 3, num_heads, head_dim, generator=generator).to(dtype)
    qkv[sum(lengths) :] = math.nan
    return qkv, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def with_gradient(call: Any, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of call(qkv), and the gradient of qkv for the result's gradient `grad`."""
    qkv = qkv.detach().clone().requires_grad_()
    out = call(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, grad.to(out.dtype))
    return out.detach(), dqkv


def dense(qkv: Tensor, cu_seqlens: Tensor, scale: float, keep: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The definition in float64: one score matrix of all tokens, -inf between sequences."""
    num_rows = int(cu_seqlens[-1])
    sequence = torch.bucketize(torch.arange(num_rows), cu_seqlens[1:].long(), right=True)
    q, k, v = qkv[:num_rows].double().permute(1, 2, 0, 3)
    scores = torch.einsum("hmd,hnd->hmn", q, k) * scale
    probabilities = scores.masked_fill(sequence[:, None] != sequence, -math.inf).softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    out = torch.einsum("hmn,hnd->mhd", probabilities, v)
    return torch.cat([out, out.new_zeros(len(qkv) - num_rows, *out.shape[1:])])


def dense_keep(cu_seqlens: Tensor, num_heads: int, dropout_p: float) -> Tensor:
    """Return keep_mask of every sequence as blocks of [heads, N, N]."""
    keep = torch.zeros(num_heads, int(cu_seqlens[-1]), int(cu_seqlens[-1]), dtype=torch.bool)
    for start, stop in pairwise(cu_seqlens.tolist()):
        keep[:, start:stop, start:stop] = reference.keep_mask(SEED, start, stop - start, num_heads, dropout_p)
    return keep


def assert_near(result: Tensor, exact: Tensor, dtype: torch.dtype, largest_score: float) -> None:
    """Check the error: roundings of a 16-bit result, and of float32 sums at the largest entry.

    A score s is rounded by about 2^-24 s, and so is the share of its key.
    """
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    size = float(exact.abs().max()) if exact.numel() else 0.0
    assert result.dtype == dtype and result.shape == exact.shape
    error = (result.double() - exact).abs()
    assert (error <= rounding * exact.abs() + (4 + largest_score) * 2**-22 * size + 1e-7).all(), error.max() / size


def largest_score(qkv: Tensor, scale: float) -> float:
    q, k = qkv[:, :2].double().nan_to_num().permute(1, 2, 0, 3)
    return float((q @ k.mT).abs().max()) * abs(scale) if len(qkv) else 0.0


lengths_of_sequences = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 80)), max_size=6)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_of_sequences,
    tail=st.integers(0, 3),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.3, -1.0, 0.0]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.75]),
)
def test_against_float64(
    impl: Any,
    lengths: list[int],
    tail: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float | None,
    dropout_p: float,
) -> None:
    qkv, cu_seqlens = random_batch(lengths, num_heads, head_dim, tail=tail, dtype=dtype)
    # Rounded to the dtype, so that both implementations get the same numbers.
    grad = torch.randn(len(qkv), num_heads, head_dim).to(dtype)
    out, dqkv = with_gradient(
        lambda x: varlen_attention(x, cu_seqlens, softmax_scale=scale, dropout_p=dropout_p, seed=SEED, impl=impl),
        qkv,
        grad,
    )
    keep = dense_keep(cu_seqlens, num_heads, dropout_p)
    factor = head_dim**-0.5 if scale is None else scale
    exact, exact_dqkv = with_gradient(
        lambda x: dense(x, cu_seqlens, factor, keep, dropout_p), qkv.double().nan_to_num(), grad.double()
    )
    assert_near(out, exact, dtype, largest_score(qkv, factor))
    assert_near(dqkv, exact_dqkv, dtype, largest_score(qkv, factor))
    if tail:
        assert not out[-tail:].any() and not dqkv[-tail:].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_against_sdpa_on_each_sequence(impl: Any, head_dim: int) -> None:
    """One to 512 tokens in one batch."""
    qkv, cu_seqlens = random_batch([25, 512, 1, 0, 64, 65, 129, 7], 2, head_dim)
    grad = torch.randn(len(qkv), 2, head_dim)

    def sdpa(x: Tensor) -> Tensor:
        parts = []
        for start, stop in pairwise(cu_seqlens.tolist()):
            q, k, v = x[start:stop].permute(1, 2, 0, 3)
            parts.append(functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        return torch.cat(parts)

    out, dqkv = with_gradient(lambda x: varlen_attention(x, cu_seqlens, impl=impl), qkv, grad)
    exact, exact_dqkv = with_gradient(sdpa, qkv.double(), grad.double())
    assert_near(out, exact, torch.float32, largest_score(qkv, head_dim**-0.5))
    assert_near(dqkv, exact_dqkv, torch.float32, largest_score(qkv, head_dim**-0.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_attention_of_transformers_bert(impl: Any) -> None:
    """The result equals that of BERT's layer on a padded batch of the same sequences."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_attention_heads=3, attn_implementation="eager")  # type: ignore[call-arg]
    layer = BertSelfAttention(config).eval()
    lengths = [9, 1, 17]
    x = torch.randn(sum(lengths), 48)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(*real.shape, 48).masked_scatter(real[..., None], x)
    mask = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    expected = layer(padded, attention_mask=mask)[0][real]
    qkv = torch.stack([layer.query(x), layer.key(x), layer.value(x)], dim=1).view(-1, 3, 3, 16)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    torch.testing.assert_close(varlen_attention(qkv, cu_seqlens, impl=impl).flatten(1), expected)


@pytest.mark.slow
def test_gradient_of_the_oracle_by_differences() -> None:
    qkv, cu_seqlens = random_batch([3, 1, 6], 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: varlen_attention(x, cu_seqlens, dropout_p=0.3, seed=SEED), qkv.requires_grad_()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", [1, 2], ids=["heads", "heads and columns"])
def test_not_contiguous(impl: Any, step: int) -> None:
    """Views of wider tensors, of transposed ones, and gradients that are expanded or transposed."""
    wide, cu_seqlens = random_batch([12, 5], 4, 22)
    views = [lambda x: x[:, :, ::2, ::step], lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)[:, :, 1:3]]
    for view in views:
        width = view(wide).shape[-1]
        assert not view(wide).is_contiguous()
        for grad in (torch.ones(()).expand(17, 2, width), torch.randn(width, 2, 17).permute(2, 1, 0)):
            out, dwide = with_gradient(
                lambda x, view=view: varlen_attention(view(x), cu_seqlens, dropout_p=0.2, seed=SEED, impl=impl),
                wide,
                grad,
            )
            expected, dqkv = with_gradient(
                lambda x: varlen_attention(x, cu_seqlens, dropout_p=0.2, seed=SEED, impl=impl),
                view(wide).contiguous(),
                grad.contiguous(),
            )
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(view(dwide), dqkv, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("tail", [0, 3])
def test_no_tokens_at_all(impl: Any, lengths: list[int], tail: int) -> None:
    qkv, cu_seqlens = random_batch(lengths, 2, 16, tail=tail)
    out, dqkv = with_gradient(lambda x: varlen_attention(x, cu_seqlens, impl=impl), qkv, torch.ones(tail, 2, 16))
    assert out.shape == (tail, 2, 16) and not out.any() and not dqkv.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_scores_of_any_size(impl: Any, size: float) -> None:
    """No overflow where one key takes all, no underflow where all keys are alike."""
    qkv, cu_seqlens = random_batch([40, 3], 2, 16)
    qkv[:, :2] *= size
    exact = dense(qkv, cu_seqlens, 0.25)
    out = varlen_attention(qkv, cu_seqlens, impl=impl)
    # In float32 a score of 1e8 is exact to a few units: P is compared where scores differ by more.
    assert out.isfinite().all()
    if size < 1:
        assert_near(out, exact, torch.float32, 0.0)
    else:
        assert ((out - exact).abs().amax(-1) < 1e-3).double().mean() > 0.9


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_values_stay_in_their_sequence(impl: Any, bad: float) -> None:
    qkv, cu_seqlens = random_batch([5, 7, 9], 2, 8)
    qkv[6, 1, 0, 3] = bad
    out, dqkv = with_gradient(lambda x: varlen_attention(x, cu_seqlens, impl=impl), qkv, torch.ones(21, 2, 8))
    others = torch.cat([torch.arange(5), torch.arange(12, 21)])
    assert out[others].isfinite().all() and dqkv[others].isfinite().all()
    assert not out[5:12, 0].isfinite().all() and not dqkv[5:12, :, 0].isfinite().all()


def kept(impl: Any, lengths: list[int], num_heads: int, dropout_p: float, seed: Tensor) -> list[Tensor]:
    """Return the mask of an implementation from its output, bool [heads, query, key] per sequence.

    All scores are 0; V is a unit matrix, for as many keys at a time as a head has columns.
    """
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    width, parts = 64, []
    for first in range(0, max(lengths), width):
        qkv = torch.zeros(sum(lengths), 3, num_heads, width)
        for start, stop in pairwise(cu_seqlens.tolist()):
            for key in range(first, min(first + width, stop - start)):
                qkv[start + key, 2, :, key - first] = 1
        parts.append(varlen_attention(qkv, cu_seqlens, dropout_p=dropout_p, seed=seed, impl=impl))
    weights = torch.cat(parts, dim=-1)
    return [
        weights[start:stop, :, : stop - start].transpose(0, 1) * (stop - start) * (1 - dropout_p) > 0.5
        for start, stop in pairwise(cu_seqlens.tolist())
    ]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_keeps_the_right_share_independently(impl: Any, dropout_p: float) -> None:
    """Rates overall, per row, key and head; no correlation between neighbours, heads or seeds.

    The tolerance is 5 standard deviations, which one in 1.7 million fair samples exceeds.
    """
    first, second = (kept(impl, [200, 90, 35], 4, dropout_p, torch.tensor([seed])) for seed in (1, 2))
    variance = dropout_p * (1 - dropout_p)
    for keep in first:
        dropped = (~keep).double()
        assert abs(dropped.mean() - dropout_p) <= 5 * math.sqrt(variance / keep.numel())
        for dim in range(3):
            others = [d for d in range(3) if d != dim]
            share = dropped.mean(others)
            assert ((share - dropout_p).abs() <= 5 * math.sqrt(variance * len(share) / keep.numel())).all()
    centred = [(~keep).double() - dropout_p for keep in first]
    long = centred[0]
    pairs = [
        (long[:, :, 1:], long[:, :, :-1]),
        (long[:, :, 4:], long[:, :, :-4]),
        (long[:, 1:], long[:, :-1]),
        (long[1:], long[:-1]),
        (long[:, :90, :90], centred[1]),
        (long, (~second[0]).double() - dropout_p),
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) <= 5 * variance / math.sqrt(a.numel())


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_what_the_oracle_says(impl: Any) -> None:
    for seed in (0, 7, -1, 2**40 + 3, -(2**63)):
        lengths = [70, 1, 33, 4]
        for keep, start in zip(
            kept(impl, lengths, 3, 0.4, torch.tensor([seed])), accumulate([0, *lengths]), strict=False
        ):
            assert torch.equal(keep, reference.keep_mask(torch.tensor(seed), start, keep.shape[1], 3, 0.4))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_bits_for_any_number_of_threads(impl: Any) -> None:
    qkv, cu_seqlens = random_batch([200, 3, 0, 77, 130, 1, 9], 3, 20)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(
                with_gradient(
                    lambda x: varlen_attention(x, cu_seqlens, dropout_p=0.1, seed=SEED, impl=impl), qkv, qkv[:, 0]
                )
            )
    finally:
        torch.set_num_threads(before)
    for out, dqkv in results[1:]:
        if impl == "cpp":  # the reference uses the vendor's matrix product, which promises less
            assert torch.equal(out, results[0][0]) and torch.equal(dqkv, results[0][1])
        else:
            torch.testing.assert_close((out, dqkv), results[0])


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-33, math.nextafter(1, 0)])
def test_the_threshold_is_the_probability(dropout_p: float) -> None:
    """Words below the threshold are dropped, but never all 2^32."""
    dropped = keep_threshold(dropout_p) + 2**31
    assert 0 <= dropped < 2**32 and abs(dropped / 2**32 - dropout_p) <= 2**-32


@pytest.mark.parametrize("impl", IMPLS)
def test_the_seed_alone_decides(impl: Any) -> None:
    """The mask depends on the seed only, not on the global generator, which stays unchanged.

    The gradient has the same mask.
    """
    qkv, cu_seqlens = random_batch([30, 70], 2, 16)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        return with_gradient(
            lambda x: varlen_attention(x, cu_seqlens, dropout_p=0.5, seed=torch.tensor([seed]), impl=impl),
            qkv,
            torch.ones(100, 2, 16),
        )

    state = torch.get_rng_state()
    first = run(3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again, other = run(3), run(4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
