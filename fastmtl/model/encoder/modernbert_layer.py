"""One layer of ModernBERT on packed sequences: LayerNorms before each part, rotations, GeGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from fastmtl.model.encoder.context import ATTENTION_OUTPUT, OUTPUT, ForwardContext
from fastmtl.model.encoder.layers import TaskLinear
from fastmtl.model.encoder.rotations import rotate_rounded
from fastmtl_kernels import add_layer_norm, add_layer_norm_with_sum, dropout, geglu

# transformers' names of the activations that `geglu` computes, and its formula for each.
_GEGLU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class Rotations(NamedTuple):
    """Tables of rotations of the layers with a window and of those without."""

    windowed: Tensor
    whole: Tensor


class Layer(nn.Module):
    """One layer: h' = h + Attention(LN(h)), and its output h' + FFN(LN(h')) + TS(h).

    TS(h) is the task-specific output of an adapter, left out if the layer has none. The first layer
    has no LayerNorm before attention, since the embeddings end with one.
    window: tokens on each side that attention sees; None for the whole text.
    """

    def __init__(self, config: PretrainedConfig, *, first: bool, window: int | None) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attn_norm = None if first else PreNorm(size, eps=eps)
        self.attn = Attention(config, window)
        self.mlp_norm = AddPreNorm(size, eps=eps, p=config.attention_dropout)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        """Map hidden states h [N, d] to [N, d]. task_specific: TS(h) [N, d], or None."""
        hidden, normed = self.mlp_norm(hidden, self._attended(hidden, context), context)
        hidden = hidden + self.mlp(normed, context)
        return hidden if task_specific is None else hidden + task_specific

    def _attended(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.attn(hidden if self.attn_norm is None else self.attn_norm(hidden, context), context)


class PreNorm(nn.LayerNorm):
    """LayerNorm without bias of hidden states that are read again later."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__(size, eps=eps, bias=False)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        """Map [N, d] to [N, d]."""
        return add_layer_norm(
            hidden,
            None,
            self.weight,
            None,
            eps=self.eps,
            token_offsets=context.segments,
            task_grads=context.armed,
            register=None if context.recomputed is None else context.recomputed.register,
        )


class AddPreNorm(nn.LayerNorm):
    """Sum of the hidden states and a layer's part, and LayerNorm without bias of the sum.

    p: the dropout rate of the part in training.
    """

    def __init__(self, size: int, *, eps: float, p: float) -> None:
        super().__init__(size, eps=eps, bias=False)
        self.p = p

    def forward(  # type: ignore[override]
        self, hidden: Tensor, part: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Return hidden + dropout(part) and its LayerNorm, each [N, d]."""
        return add_layer_norm_with_sum(
            hidden,
            part,
            self.weight,
            None,
            dropout_p=self.p if self.training else 0.0,
            eps=self.eps,
            seed=context.seed(ATTENTION_OUTPUT),
            token_offsets=context.segments,
            task_grads=context.armed,
            register=None if context.recomputed is None else context.recomputed.register,
        )


class Attention(nn.Module):
    """Multi-head attention within each sequence, with rotary positions: W MHA(Wqkv x)."""

    def __init__(self, config: PretrainedConfig, window: int | None) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.num_heads, self.dropout, self.window = config.num_attention_heads, config.attention_dropout, window
        self.Wqkv = TaskLinear(size, 3 * size, bias=bias)
        self.Wo = TaskLinear(size, size, bias=bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Map [N, d] to [N, d]. context.common: Rotations."""
        qkv = self.Wqkv(x, context).unflatten(1, (3, -1))
        table = context.common.whole if self.window is None else context.common.windowed
        rotary: Tensor | None = table
        if qkv.dtype == torch.float64:
            heads = qkv.unflatten(2, (self.num_heads, -1))
            qkv, rotary = rotate_rounded(heads, table, context.cu_seqlens).flatten(2), None
        p = self.dropout if self.training else 0.0
        return self.Wo(context.attend(qkv, self.num_heads, p, window=self.window, rotary=rotary), context)


class FeedForward(nn.Module):
    """Gated feed-forward part: Wo (activation(a) b), where a and b are the halves of Wi x."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.Wi = TaskLinear(size, 2 * inner, bias=bias)
        self.Wo = TaskLinear(inner, size, bias=bias)
        self.dropout = config.mlp_dropout
        self.gated = _gated(config.hidden_activation)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Map [N, d] to [N, d]."""
        return self.Wo(self._activated(self.Wi(x, context), context), context)

    def _activated(self, before: Tensor, context: ForwardContext) -> Tensor:
        """Map Wi x [N, 2 f] to dropout(activation(a) b) [N, f]."""
        p, seed = self.dropout if self.training else 0.0, context.seed(OUTPUT)

        def make(before: Tensor) -> Tensor:
            return dropout(self.gated(before), p, seed)

        result = make(before)
        if context.recomputed is not None and result.requires_grad:
            context.recomputed.register(result, partial(make, before.detach()))
        return result


def _gated(activation: str) -> Callable[[Tensor], Tensor]:
    """Return the function from Wi x [N, 2 f] to activation(a) b [N, f]."""
    if activation in _GEGLU:
        return partial(geglu, approximate=_GEGLU[activation])  # type: ignore[arg-type]
    function = ACT2FN[activation]

    def gated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return function(a) * b

    return gated
