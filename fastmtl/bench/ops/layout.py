"""Layouts of rows of tokens: packed [N, ...], or padded to the longest sequence [B, L, ...]."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


class Layout:
    """The packed layout. Cases give their tensors in it, so `to` and `back` change nothing."""

    def to(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def back(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


PACKED = Layout()


class Padded(Layout):
    """The padded layout.

    names: the tensors with a row per token, which are converted; "output" is the operation's
    output. mask: bool [B, L], True for the real tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, names: Collection[str]) -> None:
        sizes = torch.tensor(lengths, device=device)
        self.mask = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
        self._names = names

    def to(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor with zeros in the padding if it is one of `names`, else as it is."""
        if name not in self._names:
            return tensor
        padded = tensor.new_zeros(*self.mask.shape, *tensor.shape[1:])
        padded[self.mask] = tensor
        return padded

    def back(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[self.mask] if name in self._names else tensor


class Apart(Layout):
    """The packed layout with separate queries, keys and values: qkv is [3, N, heads, head_dim]."""

    def to(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, 0).contiguous() if name == "qkv" else tensor

    def back(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.movedim(0, 1) if name == "qkv" else tensor
