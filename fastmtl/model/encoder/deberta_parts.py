"""Parts of DeBERTa beside its attention: projected embeddings and the first layer's convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastmtl.model.encoder.bert import Embeddings
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.encoder.context import ATTENTION, EMBEDDINGS, OUTPUT, ForwardContext, SegmentContext
from fastmtl.model.encoder.layers import AddLayerNorm, TaskLayerNorm, TaskLinear
from fastmtl.model.encoder.relative import longest
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl.surgery import functional
from fastmtl.surgery.rules.conv import conv1d
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import dropout
from fastmtl_kernels.texts import to_rows, to_texts


def layer_norm(norm: TaskLayerNorm, x: Tensor, context: SegmentContext) -> Tensor:
    """Return LayerNorm of x [N, d]; call it inside the forward of `norm`."""
    if norm.norm_override is not None:
        return norm.norm_override(x, norm.weight, norm.bias, list(norm.weight.shape), norm.eps)
    return functional.layer_norm(x, norm.weight, norm.bias, norm.eps, context.segments, context.task_grads)


class ProjectedEmbeddings(Embeddings):
    """Embeddings [e] that a matrix maps to the hidden size d, then LayerNorm and dropout.

    settings: a table with 0 rows is left out.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.LayerNorm = TaskLayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.project: TaskLinear = TaskLinear(settings.embedding_size, settings.hidden_size, bias=False)

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Return dropout(LN(W (words + positions + types))) [N, d].

        ids, token_types, positions: int64 [N], the rows of these tables.
        """
        tables = [
            (self.word_embeddings, ids),
            (self.position_embeddings, positions),
            (self.token_type_embeddings, token_types),
        ]
        used = [(table, rows) for table, rows in tables if table is not None]

        def embed(_: Tensor) -> Tensor:
            sink, segments = context.task_grads, context.segments
            parts = [functional.embedding(rows, table.weight, segments, sink) for table, rows in used]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        hidden = self.project(within([table for table, _ in used], ids, embed), context)
        hidden = within((self.LayerNorm,), hidden, lambda x: layer_norm(self.LayerNorm, x, context))
        p = self.dropout if self.training else 0.0
        return dropout(hidden, p, context.seed(EMBEDDINGS)) if p else hidden


class ConvolvedLayer(Layer):
    """First layer, whose output LN(layer(h) + activation(dropout(convolution of h))) is."""

    def __init__(
        self,
        settings: EncoderSettings,
        self_attention: Callable[[EncoderSettings], nn.Module],
        *,
        kernel: int,
        groups: int,
        activation: str,
    ) -> None:
        super().__init__(settings, self_attention)
        self.conv = Convolution(settings, kernel, groups, activation)

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        return self.conv(hidden, super().forward(hidden, task_specific, context), context)


class Convolution(nn.Module):
    """LN(residual + activation(dropout(convolution over the places of each text)))."""

    def __init__(self, settings: EncoderSettings, kernel: int, groups: int, activation: str) -> None:
        super().__init__()
        size = settings.hidden_size
        self.conv = TaskConv1d(size, size, kernel, padding=(kernel - 1) // 2, groups=groups)
        self.LayerNorm = AddLayerNorm(size, eps=settings.layer_norm_eps, p=0.0, at=OUTPUT)
        self.activation = ACT2FN[activation]
        self.dropout = settings.hidden_dropout_prob

    def forward(self, hidden: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden and residual [N, d] to [N, d]."""
        assert context.batch is not None
        bounds = context.cu_seqlens.long()
        # A row of the convolution is a text.
        texts = Segments(context.batch.seq_offsets, context.batch.host.seq_offsets)
        padded = to_texts(hidden, bounds, longest(context)).transpose(1, 2)
        x = to_rows(self.conv(padded, replace(context, segments=texts)).transpose(1, 2), bounds, len(hidden))
        if self.training and self.dropout:
            seed = context.seed(ATTENTION)
            assert seed is not None
            # All seeds of a layer have a use already; another key of the generator is independent.
            x = dropout(x, self.dropout, seed + 1)
        return self.LayerNorm(residual, self.activation(x), None, context)


class TaskConv1d(nn.Conv1d):
    """Convolution with zeros at both ends, stride 1."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor, context: SegmentContext) -> Tensor:  # type: ignore[override]
        """Map [B, in, L] to [B, out, L]; the context's segments are of the B rows."""
        padding = self.padding[0]
        assert isinstance(padding, int)
        return conv1d(x, self.weight, self.bias, padding, self.groups, context.segments, context.task_grads)
