"""BERT on packed sequences. Module and parameter names are those of transformers.BertModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.activations import ACT2FN

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.attention import packed_attention
from fastmtl.model.context import ForwardContext
from fastmtl.model.layers import TaskEmbedding, TaskLayerNorm, TaskLinear

if TYPE_CHECKING:
    from fastmtl.surgery.task_gradients import TaskGradients


class PackedBert(nn.Module):
    """Embeddings and layers of a BERT; N tokens, hidden size d.

    checkpointing: backward computes each layer's activations again instead of keeping them.
    max_length: tokens per sequence, at most the encoder's positions.
    """

    def __init__(self, config: BertConfig, *, checkpointing: bool = False, max_length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.max_length = max_length or config.max_position_embeddings
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.pooler: Pooler | None = None

    def forward(
        self, batch: PackedBatch, adapter: nn.Module | None = None, task_grads: TaskGradients | None = None
    ) -> Tensor:
        """Hidden states [N, d] of the last layer.

        adapter(layer, hidden, context) gives what is added to that layer's feed-forward output, or None.
        """
        context = ForwardContext.build(batch, self.embeddings.word_embeddings.weight.dtype, task_grads)
        hidden = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids, context)
        for index, layer in enumerate(self.encoder.layer):
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(_run, layer, adapter, index, hidden, context, use_reentrant=False)
            else:
                hidden = _run(layer, adapter, index, hidden, context)
        return hidden


def _run(layer: nn.Module, adapter: nn.Module | None, index: int, hidden: Tensor, context: ForwardContext) -> Tensor:
    task_specific = None if adapter is None else adapter(index, hidden, context)
    return layer(hidden, task_specific, context)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = TaskEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = TaskEmbedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = TaskEmbedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = TaskLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        hidden = self.word_embeddings(ids, context) + self.token_type_embeddings(token_types, context)
        hidden = hidden + self.position_embeddings(positions, context)
        return self.dropout(self.LayerNorm(hidden, context))


class Layers(nn.Module):
    """Only holds `layer`, for its name in the weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """h' = LN(h + MHA(h)); LN(h' + FFN(h') + TS(h)), the task-specific TS(h) where there is an adapter."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        attended = self.attention(hidden, context)
        residual = attended if task_specific is None else attended + task_specific
        return self.output(self.intermediate(attended, context), residual, context)


class Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.output(self.self(hidden, context), hidden, context)


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = TaskLinear(config.hidden_size, config.hidden_size)
        self.key = TaskLinear(config.hidden_size, config.hidden_size)
        self.value = TaskLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        query, key, value = (linear(hidden, context) for linear in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        return packed_attention(query, key, value, context.plan, self.num_heads, dropout)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = TaskLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.activation(self.dense(hidden, context))


class Output(nn.Module):
    """LN(residual + dropout(W x + b))."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = TaskLinear(in_features, config.hidden_size)
        self.LayerNorm = TaskLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x, context)) + residual, context)


class Pooler(nn.Module):
    """The pooler's weights, kept for saving. Buffers, since nothing here uses or trains them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Module()
        self.dense.register_buffer("weight", torch.empty(hidden_size, hidden_size))
        self.dense.register_buffer("bias", torch.empty(hidden_size))
