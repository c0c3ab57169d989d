"""The arguments by which attention depends on the places of tokens in their sequences.

The formulas are in fastmtl_kernels.varlen_attention.reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels.checks import describe


class PositionTerms(NamedTuple):
    """A window, rotary positions and a bias of the scores; None for each that is absent.

    The fields are the arguments of varlen_attention.
    """

    window: int | None = None
    rotary: Tensor | None = None
    bias: Tensor | None = None
    bias_offsets: Tensor | None = None

    @property
    def given(self) -> bool:
        """True if any of them is present."""
        return self.window is not None or self.rotary is not None or self.bias is not None

    def check(self, qkv: Tensor) -> None:
        """Check types, shapes, dtypes and devices, without reading a tensor.

        Raises:
            ValueError: names the wrong argument.
        """
        if self.window is not None and (type(self.window) is not int or self.window < 0):
            raise ValueError(f"window must be an integer >= 0, or None for no window, got {self.window!r}")
        if self.rotary is not None:
            _check_rotary(self.rotary, qkv)
        if self.bias is not None:
            _check_bias(self.bias, qkv)
        self._check_bias_offsets(qkv)

    def _check_bias_offsets(self, qkv: Tensor) -> None:
        groups, offsets = 0 if self.bias is None else self.bias.shape[0], self.bias_offsets
        if offsets is None:
            if groups > 1:
                raise ValueError(f"bias_offsets must be given where bias has {groups} groups, got None")
            return
        if self.bias is None:
            raise ValueError("bias_offsets must be None where bias is None")
        if not isinstance(offsets, Tensor) or offsets.shape != (groups + 1,) or offsets.dtype != torch.int32:
            raise ValueError(f"bias_offsets must be int32 of shape [{groups + 1}], got {describe(offsets)}")
        if offsets.device != qkv.device:
            raise ValueError(f"bias_offsets must be on {qkv.device} like qkv, got {offsets.device}")

    def check_values(self, cu_seqlens: Sequence[int]) -> None:
        """Check what depends on the sequences. cu_seqlens: on the host. Read bias_offsets.

        Raises:
            ValueError: names the wrong argument.
        """
        longest = max((stop - start for start, stop in pairwise(cu_seqlens)), default=0)
        if self.rotary is not None and self.rotary.shape[1] < longest:
            raise ValueError(
                f"rotary must have a row for each of the {longest} places of the longest sequence, "
                f"got {self.rotary.shape[1]} rows"
            )
        if self.bias is not None and self.bias.shape[2] < 2 * longest - 1:
            raise ValueError(
                f"bias must have at least {2 * longest - 1} columns for the longest sequence of {longest} tokens, "
                f"got {self.bias.shape[2]}"
            )
        if self.bias_offsets is not None:
            offsets, num_sequences = self.bias_offsets.tolist(), len(cu_seqlens) - 1
            if offsets[0] != 0 or offsets[-1] != num_sequences or offsets != sorted(offsets):
                raise ValueError(
                    f"bias_offsets must ascend from 0 to the number of sequences, {num_sequences}, got {offsets}"
                )

    def group_rows(self, cu_seqlens: Tensor) -> Tensor | None:
        """Return the first row of each group and the last's end, [G + 1]; None for one group."""
        if self.bias_offsets is None or len(self.bias_offsets) == 2:
            return None
        return cu_seqlens.index_select(0, self.bias_offsets)

    def groups(self, num_sequences: int) -> list[int]:
        """Return the group of each sequence: its row of bias. Read bias_offsets."""
        if self.bias_offsets is None:
            return [0] * num_sequences
        return [g for g, (start, stop) in enumerate(pairwise(self.bias_offsets.tolist())) for _ in range(start, stop)]


NO_TERMS = PositionTerms()


def _check_rotary(rotary: Tensor, qkv: Tensor) -> None:
    head_dim = qkv.shape[3]
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    if head_dim % 2:
        raise ValueError(f"rotary must be None where head_dim is odd, got it with head_dim {head_dim}")
    if not isinstance(rotary, Tensor) or rotary.dim() != 3 or rotary.shape[::2] != (2, head_dim // 2):
        raise ValueError(f"rotary must have the shape [2, P, head_dim // 2 = {head_dim // 2}], got {describe(rotary)}")
    if rotary.dtype != dtype:
        raise ValueError(f"rotary must be {dtype} for qkv of {qkv.dtype}, got {rotary.dtype}")
    if rotary.device != qkv.device:
        raise ValueError(f"rotary must be on {qkv.device} like qkv, got {rotary.device}")
    if rotary.requires_grad:
        raise ValueError("rotary must not require a gradient, since none is computed; pass rotary.detach()")


def _check_bias(bias: Tensor, qkv: Tensor) -> None:
    num_heads = qkv.shape[2]
    if not isinstance(bias, Tensor) or bias.dim() != 3 or not bias.is_floating_point():
        raise ValueError(f"bias must be floating point of shape [G, heads, 2 R - 1], got {describe(bias)}")
    if bias.shape[0] == 0 or bias.shape[1] != num_heads or bias.shape[2] % 2 == 0:
        raise ValueError(
            f"bias must have the shape [G, {num_heads} heads, 2 R - 1] with G >= 1 and an odd number of columns, "
            f"got {describe(bias)}"
        )
    if bias.device != qkv.device:
        raise ValueError(f"bias must be on {qkv.device} like qkv, got {bias.device}")
