"""Nets of random modules that surgery has a rule for, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from trunk_examples import Example, Inputs

WIDTH, POSITIONS, WORDS = 6, 3, 7


class Scale(nn.Module):
    """A module without a rule of its own: one factor per feature, and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, extra: Any = None) -> tuple[Tensor, dict[str, Any]]:
        return x * self.factor, {"extra": extra, "square": x.square() * self.factor}


class Start(nn.Module):
    """A module without a rule of its own that puts a trained position before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class Gate(nn.Module):
    """A module without a rule of its own around a Linear that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(()))

    def forward(self, *, hidden: Tensor) -> Tensor:
        return hidden + self.gain * self.inner(hidden).tanh()


class Repeating(nn.Module):
    """A module without a rule of its own, in which activation checkpointing repeats another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), Scale())
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x * self.gain, use_reentrant=False)[0].tanh()


class Kind(NamedTuple):
    """A kind of layer: its module, and the layer's output [B, L, WIDTH] for x of this shape."""

    make: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], Tensor]


def _plain(module: Any, x: Tensor) -> Tensor:
    return module(x)


def _channels(module: Any, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2)).transpose(1, 2)


def _image(module: Any, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)


def _volume(module: Any, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2)[..., None, None]).flatten(2).transpose(1, 2)


def _flat(module: Any, x: Tensor) -> Tensor:
    return module(x.flatten(0, 1)).view_as(x)


def _one_position(module: Any, x: Tensor) -> Tensor:
    return x + module(x[:, 0]).unsqueeze(1)


def _places(module: Any, x: Tensor) -> Tensor:
    return x + module(torch.arange(x.shape[1])[None] % POSITIONS)


def _scaled(module: Any, x: Tensor) -> Tensor:
    y, more = module(x, extra=(None, "name", x.sum(2)))
    return y + more["square"] + more["extra"][2].unsqueeze(2)


def _scaled_flat(module: Any, x: Tensor) -> Tensor:
    return module(x.flatten(0, 1))[0].view_as(x)


def _attention(module: Any, x: Tensor) -> Tensor:
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x.tanh(), x, attn_mask=later, need_weights=False)[0]


def _cell(module: Any, x: Tensor) -> Tensor:
    return x + module(x[:, 0], x[:, 1]).unsqueeze(1)


def _bag(module: Any, x: Tensor) -> Tensor:
    return x + module((x[..., 0].abs() * 4).long() % WORDS).unsqueeze(1)


KINDS = {
    "linear": Kind(lambda: nn.Linear(WIDTH, WIDTH), _plain),
    "linear without bias": Kind(lambda: nn.Linear(WIDTH, WIDTH, bias=False), _flat),
    "linear of one position": Kind(lambda: nn.Linear(WIDTH, WIDTH), _one_position),
    "Conv1D": Kind(lambda: Conv1D(WIDTH, WIDTH), _plain),
    "LayerNorm": Kind(lambda: nn.LayerNorm(WIDTH), _plain),
    "LayerNorm without bias": Kind(lambda: nn.LayerNorm(WIDTH, bias=False), _flat),
    "RMSNorm": Kind(lambda: nn.RMSNorm(WIDTH), _plain),
    "RMSNorm with eps": Kind(lambda: nn.RMSNorm(WIDTH, eps=0.1), _flat),
    "conv1d": Kind(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2), _channels),
    "conv2d": Kind(lambda: nn.Conv2d(WIDTH, WIDTH, (3, 1), padding="same", bias=False), _image),
    "conv3d": Kind(lambda: nn.Conv3d(WIDTH, WIDTH, (3, 1, 1), padding=(1, 0, 0)), _volume),
    "GroupNorm": Kind(lambda: nn.GroupNorm(2, WIDTH), _channels),
    "positions": Kind(lambda: nn.Embedding(POSITIONS, WIDTH), _places),
    "scale": Kind(Scale, _scaled),
    "scale of flat rows": Kind(Scale, _scaled_flat),
    "start": Kind(Start, _plain),
    "gate": Kind(Gate, lambda module, x: module(hidden=x)),
    "repeating": Kind(Repeating, _plain),
    "normed": Kind(lambda: weight_norm(nn.Linear(WIDTH, WIDTH)), _flat),
    "attention": Kind(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), _attention),
    "bilinear": Kind(lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda module, x: module(x, x.tanh())),
    "cell": Kind(lambda: nn.GRUCell(WIDTH, WIDTH), _cell),
    "bag": Kind(lambda: nn.EmbeddingBag(WORDS, WIDTH), _bag),
    "transposed conv": Kind(lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1), _channels),
}


class RandomNet(nn.Module):
    """Layers of KINDS one after the other on word embeddings or numbers.

    uses: for each layer, the index of the layer whose module it uses: its own, or that of an
    earlier layer of the same kind. repeats: True if activation checkpointing repeats every layer.
    """

    def __init__(self, kinds: Sequence[str], uses: Sequence[int], *, words: bool, repeats: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=1) if words else None
        self.layers = nn.ModuleList(
            KINDS[kind].make() if uses[k] == k else nn.Identity() for k, kind in enumerate(kinds)
        )
        self._kinds, self._uses, self._repeats = list(kinds), list(uses), repeats

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, WIDTH] for ids int64 [B, L] or numbers [B, L, WIDTH]."""
        if self.words is not None:
            x = self.words(x)
        for kind, use in zip(self._kinds, self._uses, strict=True):
            layer = partial(self._layer, kind, self.layers[use])
            x = checkpoint(layer, x, use_reentrant=False) if self._repeats else layer(x)
        return x.sum(1)

    @staticmethod
    def _layer(kind: str, module: nn.Module, x: Tensor) -> Tensor:
        return module(x) if kind == "start" else x + KINDS[kind].call(module, x.tanh())


def first_uses(kinds: Sequence[str], again: Sequence[bool]) -> list[int]:
    """Return `uses` of a RandomNet: a layer with its flag in `again` uses the first of its kind."""
    return [kinds.index(kind) if flag else k for k, (kind, flag) in enumerate(zip(kinds, again, strict=True))]


def make_example(
    kinds: Sequence[str],
    again: Sequence[bool],
    frozen: Sequence[bool],
    rows: int,
    seed: int,
    *,
    words: bool,
    repeats: bool,
) -> Example:
    """Return a net of these kinds in float64 with a batch. frozen: flags of the layers."""
    torch.manual_seed(seed)
    net = RandomNet(kinds, first_uses(kinds, again), words=words, repeats=repeats)
    for layer, flag in zip(net.layers, frozen, strict=True):
        layer.requires_grad_(not flag)
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    x = torch.randint(0, WORDS, (rows, 4)) if words else torch.randn(rows, 4, WIDTH)
    return Example(net, {"x": x}, features, WIDTH).double()


def features(trunk: nn.Module, inputs: Inputs) -> Tensor:
    return trunk(inputs["x"])
