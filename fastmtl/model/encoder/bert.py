"""BERT on packed sequences. Module and parameter names are those of transformers.BertModel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.activations import ACT2FN

from fastmtl.config import Recompute
from fastmtl.cuda_graphs.encoder import EncoderGraphs
from fastmtl.cuda_graphs.recorder import Recorder
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.context import (
    ATTENTION,
    ATTENTION_OUTPUT,
    EMBEDDINGS,
    OUTPUT,
    ForwardContext,
    SegmentContext,
    place,
)
from fastmtl.model.encoder.layers import AddLayerNorm, Norm, Projection, TaskEmbedding, TaskLayerNorm, TaskLinear
from fastmtl.model.encoder.remade import Remade
from fastmtl.model.owners import within
from fastmtl.surgery.rules.projections import projections
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import dropout, embed_layer_norm

if TYPE_CHECKING:
    from fastmtl.model.adapters.adapter import Adapter
    from fastmtl.surgery.sinks.task_gradients import TaskGradients


# Activations whose derivative is one of their result, which they keep for it.
_KEEP_THEIR_RESULT = ("relu", "sigmoid", "tanh")


class PackedBert(nn.Module):
    """Embeddings and layers of a BERT; N tokens, hidden size d.

    recompute: what backward computes again instead of keeping it. "cheap": what LayerNorm and the activation return;
    "full": each layer. Gradients have the same bits.
    max_length: tokens per sequence, at most the encoder's positions.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        recompute: Recompute = "none",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.max_length = max_length or config.max_position_embeddings
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.graphs: EncoderGraphs | None = None
        self.pooler: Pooler | UnusedPooler | None = None

    def use_layer_norm(self, norm: Norm) -> None:
        """Makes every LayerNorm another's, after the sum and the dropout that fastmtl's takes in."""
        for module in self.modules():
            if isinstance(module, (AddLayerNorm, TaskLayerNorm)):
                module.norm_override = norm

    def use_cuda_graphs(self, recorder: Recorder | None = None) -> None:
        """Training runs as CUDA graphs where it can (see graphs.py). recorder: in their place, on any device."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        self.graphs = EncoderGraphs(self.embeddings, self.encoder.layer, head_dim, recorder)

    def use_pooler(self) -> None:
        """Makes the weights that came with the encoder a layer that is used and trained.

        Raises UserError where there are none.
        """
        if self.pooler is None:
            raise UserError(
                "pooling: pooler needs the encoder's pooler.dense, and its directory has none: use cls, mean or max"
            )
        if isinstance(self.pooler, UnusedPooler):
            weights = self.pooler.state_dict()
            with torch.device("meta"):
                self.pooler = Pooler(self.config.hidden_size)
            self.pooler.load_state_dict(weights, assign=True)

    def forward(
        self,
        batch: PackedBatch,
        adapter: Adapter | None = None,
        task_grads: TaskGradients | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, d] of the last layer, or of the adapter's top.

        adapter(layer, hidden, context) gives what is added to that layer's feed-forward output, or None.
        noise [N, d] is added to what the layers get from the embeddings.
        """
        layers = self.encoder.layer
        top = None if adapter is None else adapter.top
        num_layers = len(layers) + (0 if top is None else top.num_layers)
        training = self.training or (adapter is not None and adapter.training)
        again = self.recompute if torch.is_grad_enabled() else "none"
        remade = Remade() if again == "cheap" else None
        graphs = self.graphs if self.training and torch.is_grad_enabled() else None
        context = ForwardContext.build(
            batch, num_layers, training=training, task_grads=task_grads, remade=remade, plan=graphs is None
        )

        def embedded() -> Tensor:
            hidden = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids, context)
            return hidden if noise is None else hidden + noise.to(hidden.dtype)

        if graphs is None:
            hidden = embedded()
        else:
            besides = {"an adapter": adapter, "noise": noise, "recompute": again != "none" or None}
            extra = [name for name, value in besides.items() if value is not None]
            before = None if graphs.embeds(context.armed) and not extra else embedded()
            found = graphs.run(before, batch, context, extra)
            if found is not None:
                return found
            hidden = embedded() if before is None else before
            context = context.planned()
        run = partial(checkpoint, use_reentrant=False) if again == "full" else _call
        with nullcontext() if remade is None else remade.saving():
            for index, layer in enumerate(layers):
                hidden = run(_run, layer, adapter, index, hidden, context)
            return hidden if top is None else run(top, hidden, context)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _run(layer: nn.Module, adapter: Adapter | None, index: int, hidden: Tensor, context: ForwardContext) -> Tensor:
    task_specific = None if adapter is None else adapter(index, hidden, context)
    return layer(hidden, task_specific, context)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = TaskEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = TaskEmbedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = TaskEmbedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = TaskLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """dropout(LN(words + positions + types)): int64 [N] each -> [N, d]."""
        words, places, types = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        p, seed, norm = self.dropout if self.training else 0.0, context.seed(EMBEDDINGS), self.LayerNorm

        def embed(ids: Tensor) -> Tensor:
            if norm.norm_override is not None:
                summed = embedding(ids, words.weight) + embedding(positions, places.weight)
                summed = summed + embedding(token_types, types.weight)
                hidden = norm.norm_override(summed, norm.weight, norm.bias, list(norm.weight.shape), norm.eps)
                return dropout(hidden, p, seed) if p else hidden
            return embed_layer_norm(
                ids,
                positions,
                token_types,
                words.weight,
                places.weight,
                types.weight,
                norm.weight,
                norm.bias,
                dropout_p=p,
                eps=norm.eps,
                seed=seed,
                token_offsets=context.segments,
                task_grads=context.armed,
            )

        return within((norm, types, places, words), ids, embed)


class Layers(nn.Module):
    """Only holds `layer`, for its name in the weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))


class Layer(nn.Module):
    """h' = LN(h + MHA(h)); LN(h' + FFN(h') + TS(h)), the task-specific TS(h) where there is an adapter.

    index: from 0.
    """

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config, place(index, OUTPUT))

    def forward(self, hidden: Tensor, task_specific: Tensor | None, context: ForwardContext) -> Tensor:
        attended = self.attention(hidden, context)
        return self.output(self.intermediate(attended, context), attended, task_specific, context)


class Attention(nn.Module):
    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, place(index, ATTENTION))
        self.output = Output(config.hidden_size, config, place(index, ATTENTION_OUTPUT))

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.output(self.self(hidden, context), hidden, None, context)


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig, at: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.at = at
        self.dropout = config.attention_probs_dropout_prob
        self.query = Projection(config.hidden_size, config.hidden_size)
        self.key = Projection(config.hidden_size, config.hidden_size)
        self.value = Projection(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        parts = self.query, self.key, self.value

        def project(hidden: Tensor) -> Tensor:
            weights, biases = [part.weight for part in parts], [part.bias for part in parts]
            return projections(hidden, weights, biases, context.segments, context.task_grads)

        qkv = within(parts, hidden, project)
        return context.attend(qkv, self.num_heads, self.dropout if self.training else 0.0, self.at)


class Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = TaskLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.keeps_result = config.hidden_act in _KEEP_THEIR_RESULT

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        before = self.dense(hidden, context)
        result = self.activation(before)
        if context.remade is not None and result.requires_grad and not self.keeps_result:
            context.remade.register(result, partial(self.activation, before.detach()))
        return result


class Output(nn.Module):
    """LN(residual + dropout(W x + b) + ts)."""

    def __init__(self, in_features: int, config: BertConfig, at: int) -> None:
        super().__init__()
        self.dense = TaskLinear(in_features, config.hidden_size)
        p, eps = config.hidden_dropout_prob, config.layer_norm_eps
        self.LayerNorm = AddLayerNorm(config.hidden_size, eps=eps, p=p, at=at)

    def forward(self, x: Tensor, residual: Tensor, ts: Tensor | None, context: ForwardContext) -> Tensor:
        return self.LayerNorm(residual, self.dense(x, context), ts, context)


class Pooler(nn.Module):
    """tanh(W x + b) of each sequence's first hidden state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = TaskLinear(hidden_size, hidden_size)

    def forward(self, first: Tensor, batch: PackedBatch, task_grads: TaskGradients | None) -> Tensor:
        """[B, d] -> [B, d]: its rows are sequences, so a task's are those of `seq_offsets`."""
        sequences = Segments(batch.seq_offsets, batch.host.seq_offsets)
        return self.dense(first, SegmentContext(sequences, task_grads)).tanh()


class UnusedPooler(nn.Module):
    """A pooler's weights, kept for saving. Buffers, since nothing uses or trains them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Module()
        self.dense.register_buffer("weight", torch.empty(hidden_size, hidden_size))
        self.dense.register_buffer("bias", torch.empty(hidden_size))
