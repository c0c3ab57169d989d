"""Random calls of varlen_attention with a window, rotary positions and a bias, and exact results.

The exact result is the definition in float64: one score matrix of all tokens, and rotations as
complex products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmtl_kernels.varlen_attention import reference
from fastmtl_kernels.varlen_attention.api import varlen_attention

SEED = torch.tensor([2026])


@dataclass(frozen=True)
class PositionCase:
    """A random call.

    tail: rows past the last sequence. groups: the number of sequences of each group of the bias; ()
    for no bias, None for one group without bias_offsets. further: the number of places of `rotary`
    and `bias` past the longest sequence.
    """

    lengths: list[int]
    tail: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float | None
    dropout_p: float
    window: int | None
    rotary: bool
    groups: tuple[int, ...] | None
    further: int

    @property
    def places(self) -> int:
        return max(self.lengths, default=0) + self.further

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return qkv, the gradient of the output, and the other arguments of varlen_attention."""
        generator = torch.Generator().manual_seed(len(self.lengths))
        num_tokens, width = sum(self.lengths), self.head_dim
        qkv = torch.randn(num_tokens + self.tail, 3, self.num_heads, width, generator=generator).to(self.dtype)
        qkv[num_tokens:] = math.nan
        grad = torch.randn(num_tokens + self.tail, self.num_heads, width, generator=generator).to(self.dtype)
        offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        arguments: dict[str, Any] = {
            "cu_seqlens": offsets,
            "softmax_scale": self.scale,
            "dropout_p": self.dropout_p,
            "seed": SEED.to(device),
            "window": self.window,
        }
        if self.rotary:
            angles = torch.arange(self.places)[:, None] * 100.0 ** (-torch.arange(width // 2) / max(width // 2, 1))
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            arguments["rotary"] = torch.stack([angles.cos(), angles.sin()]).to(device, wide)
        if self.groups != ():
            count = 1 if self.groups is None else len(self.groups)
            shape = count, self.num_heads, 2 * max(self.places, 1) - 1
            arguments["bias"] = (2 * torch.randn(shape, generator=generator)).to(device, self.dtype)
            if self.groups is not None:
                arguments["bias_offsets"] = torch.tensor(
                    [0, *accumulate(self.groups)], dtype=torch.int32, device=device
                )
        return qkv.to(device), grad.to(device), arguments


@st.composite
def position_cases(
    draw: st.DrawFn, *, dtypes: list[torch.dtype], head_dims: list[int], longest: int = 80
) -> PositionCase:
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), st.integers(0, longest)), max_size=6))
    head_dim = draw(st.sampled_from(head_dims))
    groups: tuple[int, ...] | None = draw(st.sampled_from([(), None, (0,)]))
    if groups == (0,):
        bounds = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=2)))
        groups = tuple(stop - start for start, stop in pairwise([0, *bounds, len(lengths)]))
    return PositionCase(
        lengths,
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        head_dim,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([None, 0.3, -1.0, 0.0])),
        draw(st.sampled_from([0.0, 0.1, 0.75])),
        draw(st.sampled_from([None, 0, 1, 5, 64, 1000, 2**70])),
        draw(st.booleans()) and head_dim % 2 == 0,
        groups,
        draw(st.sampled_from([0, 1, 100])),
    )


def results(qkv: Tensor, grad: Tensor, arguments: dict[str, Any], call: Any = varlen_attention) -> list[Tensor]:
    """Return the output, dqkv, and dbias where there is a bias."""
    qkv, bias = qkv.detach().requires_grad_(), arguments.get("bias")
    bias = None if bias is None else bias.detach().requires_grad_()
    out = call(qkv, **arguments | {"bias": bias})
    return [out.detach(), *torch.autograd.grad(out, [qkv] if bias is None else [qkv, bias], grad.to(out.dtype))]


def exact_results(qkv: Tensor, grad: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Return `results` by the definition in float64, with arguments of any dtype on the CPU."""
    wide = {name: x.double() if name in ("rotary", "bias") else x for name, x in arguments.items()}
    return results(qkv.double().nan_to_num(), grad.double(), wide, _dense)


def assert_near_oracle(result: Tensor, oracle: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check the error: at most twice the oracle's own in this dtype, plus rounding.

    A kernel rounds rotated Q and K, P and dS to the dtype of its products: a few units of the
    largest entry.
    """
    assert result.dtype == dtype and result.shape == exact.shape
    size = float(exact.abs().max()) if exact.numel() else 0.0
    off = float((oracle.double() - exact).abs().max()) if exact.numel() else 0.0
    error = (result.double() - exact).abs()
    assert (error <= 2 * off + 8 * torch.finfo(dtype).eps * size + 1e-6).all(), (error.max(), off, size)


def _dense(
    qkv: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float | None,
    dropout_p: float,
    seed: Tensor,
    window: int | None,
    rotary: Tensor | None = None,
    bias: Tensor | None = None,
    bias_offsets: Tensor | None = None,
) -> Tensor:
    offsets = cu_seqlens.tolist()
    num_tokens, num_heads = offsets[-1], qkv.shape[2]
    q, k, v = qkv[:num_tokens].permute(1, 2, 0, 3)
    sequence = torch.bucketize(torch.arange(num_tokens), cu_seqlens[1:].long(), right=True)
    place = torch.arange(num_tokens) - cu_seqlens[sequence]
    if rotary is not None:
        turn = torch.complex(*rotary)[place]
        q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
    scores = (qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale) * (q @ k.mT)
    distance = place - place[:, None]
    if bias is not None:
        bounds = torch.tensor([0, len(offsets) - 1]) if bias_offsets is None else bias_offsets
        group = torch.bucketize(sequence, bounds[1:].long(), right=True)
        index = (distance + bias.shape[2] // 2).clamp(0, bias.shape[2] - 1)
        scores = scores + bias[group[:, None, None], torch.arange(num_heads)[:, None], index[:, None]].transpose(0, 1)
    seen = sequence[:, None] == sequence
    if window is not None:
        seen &= distance.abs() <= min(window, num_tokens)
    probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1)
    if dropout_p > 0:
        keep = [reference.keep_mask(seed, a, b - a, num_heads, dropout_p) for a, b in pairwise(offsets)]
        full = torch.stack([torch.block_diag(*(mask[head] for mask in keep)) for head in range(num_heads)])
        probabilities = probabilities * full / (1 - dropout_p)
    out = (probabilities @ v).transpose(0, 1)
    return torch.cat([out, out.new_zeros(len(qkv) - num_tokens, *out.shape[1:])])
