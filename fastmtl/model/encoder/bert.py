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

from fastmtl.config import Recompute
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import UserError
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.encoder.context import EMBEDDINGS, ForwardContext, SegmentContext
from fastmtl.model.encoder.layers import AddLayerNorm, Norm, TaskEmbedding, TaskLayerNorm, TaskLinear
from fastmtl.model.encoder.protocols import LayerAdapter, RecordedEncoder
from fastmtl.model.encoder.recompute import RecomputedResults
from fastmtl.model.owners import within
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import dropout, embed_layer_norm

if TYPE_CHECKING:
    from fastmtl.surgery.sinks.sink import Sink


class PackedBert(nn.Module):
    """BERT encoder for packed sequences of N tokens in all, without padding. Hidden size d.

    recompute: the results that backward computes again instead of keeping them, to save memory.
    "none": no results; "cheap": those of LayerNorm and of the activation; "full": those of every
    layer. Gradients have the same bits in all three cases.
    max_length: largest number of tokens per sequence, at most max_position_embeddings, the default.
    Attribute recorded: replays recordings in training, as CUDA graphs do; None by default.
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
        self.recorded: RecordedEncoder | None = None
        self.pooler: Pooler | UnusedPooler | None = None

    def use_layer_norm(self, norm: Norm) -> None:
        """Use `norm`, another library's function, for every LayerNorm.

        The dropout and the sum before a LayerNorm are still computed by fastmtl.
        """
        for module in self.modules():
            if isinstance(module, (AddLayerNorm, TaskLayerNorm)):
                module.norm_override = norm

    def reserve_pooler(self) -> None:
        """Add a place for pooler weights, which are loaded and saved but not used.

        Call `use_pooler` to use and train them.
        """
        self.pooler = UnusedPooler(self.config.hidden_size)

    def use_pooler(self) -> None:
        """Replace the unused pooler weights by a `Pooler` with these weights, which is trained.

        Raises UserError if the encoder's directory had no pooler weights.
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
        adapter: LayerAdapter | None = None,
        task_grads: Sink | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [N, d] after the last layer, or after the adapter's top.

        adapter(layer, hidden, context): returns the term [N, d] that is added to the feed-forward
        output of this layer, or None for no term.
        task_grads: sink for the gradients per task; used while it is armed.
        noise [N, d]: added to the output of the embeddings.
        """
        layers = self.encoder.layer
        top = None if adapter is None else adapter.top
        num_layers = len(layers) + (0 if top is None else top.num_layers)
        training = self.training or (adapter is not None and adapter.training)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        recomputed = RecomputedResults() if recompute == "cheap" else None
        recorded = self.recorded if self.training and torch.is_grad_enabled() else None
        context = ForwardContext.build(
            batch, num_layers, training=training, task_grads=task_grads, recomputed=recomputed, plan=recorded is None
        )

        def embedded() -> Tensor:
            hidden = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids, context)
            return hidden if noise is None else hidden + noise.to(hidden.dtype)

        if recorded is None:
            hidden = embedded()
        else:
            unsupported = {"an adapter": adapter, "noise": noise, "recompute": recompute != "none" or None}
            extra = [name for name, value in unsupported.items() if value is not None]
            before = None if recorded.embeds(context.armed) and not extra else embedded()
            found = recorded.run(before, batch, context, extra)
            if found is not None:
                return found
            hidden = embedded() if before is None else before
            context = context.planned()
        run = partial(checkpoint, use_reentrant=False) if recompute == "full" else _call
        with nullcontext() if recomputed is None else recomputed.saving():
            for index, layer in enumerate(layers):
                hidden = run(_run, layer, adapter, index, hidden, context)
            return hidden if top is None else run(top, hidden, context)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _run(layer: nn.Module, adapter: LayerAdapter | None, index: int, hidden: Tensor, context: ForwardContext) -> Tensor:
    task_specific = None if adapter is None else adapter(index, hidden, context)
    return layer(hidden, task_specific, context)


class Embeddings(nn.Module):
    """Embeddings of words, positions and token types, with LayerNorm and dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = TaskEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = TaskEmbedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = TaskEmbedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = TaskLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Return dropout(LN(words + positions + types)) [N, d].

        ids, token_types, positions: int64 [N], the rows of the three tables.
        """
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
    """Container of the layers, whose weights thus have transformers' names `encoder.layer.<i>`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """tanh(W x + b) of each sequence's first hidden state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = TaskLinear(hidden_size, hidden_size)

    def forward(self, first: Tensor, batch: PackedBatch, task_grads: Sink | None) -> Tensor:
        """Map the first hidden state of each of the B sequences, [B, d], to [B, d].

        A row is a sequence, so task t has the rows seq_offsets[t]:seq_offsets[t + 1].
        """
        sequences = Segments(batch.seq_offsets, batch.host.seq_offsets)
        return self.dense(first, SegmentContext(sequences, task_grads)).tanh()


class UnusedPooler(nn.Module):
    """Pooler weights that no head uses, kept to be saved with the encoder.

    They are buffers and not parameters, so that the optimiser does not see them.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Module()
        self.dense.register_buffer("weight", torch.empty(hidden_size, hidden_size))
        self.dense.register_buffer("bias", torch.empty(hidden_size))
