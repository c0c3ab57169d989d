"""DeBERTa-v2 and v3: attention whose scores have terms of relative positions.

The positions are rows of one table, with a LayerNorm of its own, which all layers project to keys
and queries. fastmtl_kernels.disentangled_attention has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.model.encoder.bert import Layers, PackedBert
from fastmtl.model.encoder.bert_layer import SelfAttention
from fastmtl.model.encoder.context import ATTENTION, ForwardContext
from fastmtl.model.encoder.deberta_files import (
    MASKED_LM,
    NAMES,
    RelativeSettings,
    check_config,
    deberta_settings,
    relative_of,
)
from fastmtl.model.encoder.deberta_parts import ConvolvedLayer, ProjectedEmbeddings, layer_norm
from fastmtl.model.encoder.family import Family
from fastmtl.model.encoder.layers import Projection, TaskEmbedding, TaskLayerNorm, project
from fastmtl.model.encoder.relative import copied, longest
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl.surgery import functional
from fastmtl.surgery.segments import Segments
from fastmtl_kernels import disentangled_attention, dropout, varlen_attention
from fastmtl_kernels.disentangled_attention.buckets import position_rows, span
from fastmtl_kernels.upload import upload


class PackedDeberta(PackedBert):
    """DeBERTa-v2 or v3 encoder for packed sequences."""

    encoder: DebertaLayers
    not_recorded = "the relative positions of DeBERTa are as many as the batch's longest text needs"

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        sizes, self.relative = self.settings, relative_of(config)
        if sizes.embedding_size != sizes.hidden_size:
            self.embeddings = ProjectedEmbeddings(sizes)
        attention = partial(DisentangledSelfAttention, relative=self.relative)
        self.encoder = DebertaLayers(sizes, attention, self.relative)
        kernel = getattr(config, "conv_kernel_size", 0)
        if kernel > 0:
            groups, activation = getattr(config, "conv_groups", 1), getattr(config, "conv_act", "tanh")
            first = ConvolvedLayer(sizes, attention, kernel=kernel, groups=groups, activation=activation)
            self.encoder.layer[0] = first
        if self.encoder.rel_embeddings is not None:
            self.distances, self.terms = self.encoder.rel_embeddings.num_embeddings, len(self.relative.terms)
        if not sizes.positions:  # files of DeBERTa-v3 have this table
            self.left_out = frozenset({"embeddings.position_embeddings.weight"})

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return deberta_settings(config)

    def begin(self, context: ForwardContext) -> ForwardContext:
        """Return the context with the relative positions of the batch, unless there are none."""
        table, norm = self.encoder.rel_embeddings, self.encoder.LayerNorm
        if table is None:
            return context
        first, stop, rows = position_rows(longest(context), self.relative.buckets, self.relative.max_distance)
        device = context.cu_seqlens.device
        ids, segments = copied(torch.arange(first, stop), context, device)
        of_table = replace(context, segments=segments)

        def look_up(ids: Tensor) -> Tensor:
            hidden = functional.embedding(ids, table.weight, segments, context.task_grads)
            return hidden if norm is None else layer_norm(norm, hidden, of_table)

        hidden = within([owner for owner in (norm, table) if owner is not None], ids, look_up)
        return replace(context, common=Relative(hidden, segments, upload(rows, device)))


class DebertaLayers(Layers):
    """Container of the layers, and of the table of relative positions with its LayerNorm."""

    def __init__(
        self,
        settings: EncoderSettings,
        self_attention: Callable[[EncoderSettings], nn.Module],
        relative: RelativeSettings,
    ) -> None:
        super().__init__(settings, self_attention)
        size, rows = settings.hidden_size, 2 * span(relative.buckets, relative.max_distance)
        self.rel_embeddings = TaskEmbedding(rows, size) if relative.terms else None
        self.LayerNorm = TaskLayerNorm(size, eps=settings.layer_norm_eps) if relative.norm else None


@dataclass(frozen=True, eq=False)
class Relative:
    """The relative positions of a batch, which all layers read.

    hidden: [G R, d], G copies of R rows of the table after its LayerNorm. segments: of the copies.
    rows: int32 [2 L - 1], the row of each distance, as in `disentangled_attention`.
    """

    hidden: Tensor
    segments: Segments
    rows: Tensor

    @property
    def groups(self) -> int:
        return self.segments.num_tasks

    def dropped(self, p: float, seed: Tensor | None) -> Tensor:
        """Return `hidden` with dropout; all copies have the same mask."""
        if not p or not len(self.hidden):
            return self.hidden
        return torch.cat([dropout(copy, p, seed) for copy in self.hidden.chunk(self.groups)])


class DisentangledSelfAttention(SelfAttention):
    """Multi-head attention to contents and relative positions within each sequence."""

    def __init__(self, settings: EncoderSettings, relative: RelativeSettings) -> None:
        super().__init__(settings)
        self.relative = relative
        self.position_dropout = settings.hidden_dropout_prob
        size = settings.hidden_size
        own = () if relative.shared else relative.terms
        self.pos_key = Projection(size, size) if "c2p" in own else None
        self.pos_query = Projection(size, size) if "p2c" in own else None
        # As transformers, which rounds the root to float32.
        self.scale = 1 / float(np.sqrt(np.float32(settings.head_dim * relative.factor)))

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        qkv = qkv.unflatten(2, (self.num_heads, -1))
        p, seed = self.dropout if self.training else 0.0, context.seed(ATTENTION)
        if context.common is None:
            mixed = varlen_attention(
                qkv, context.cu_seqlens, softmax_scale=self.scale, dropout_p=p, seed=seed, plan=context.plan
            )
            return mixed.flatten(1)
        relative: Relative = context.common
        assert context.batch is not None
        pos_key, pos_query = self._tables(relative, context)
        return disentangled_attention(
            qkv,
            context.cu_seqlens,
            relative.rows,
            pos_key=pos_key,
            pos_query=pos_query,
            group_offsets=context.batch.seq_offsets if relative.groups > 1 else None,
            softmax_scale=self.scale,
            dropout_p=p,
            seed=seed,
        ).flatten(1)

    def _tables(self, relative: Relative, context: ForwardContext) -> tuple[Tensor | None, Tensor | None]:
        """Return pos_key and pos_query of `disentangled_attention`, None without such a term."""
        shared, terms = self.relative.shared, self.relative.terms
        key, query = (self.key, self.query) if shared else (self.pos_key, self.pos_query)
        parts = [key if "c2p" in terms else None, query if "p2c" in terms else None]
        used = [part for part in parts if part is not None]
        # A mask of rows and one of attention are independent for the same seed.
        hidden = relative.dropped(self.position_dropout if self.training else 0.0, context.seed(ATTENTION))
        tables = project(used, hidden, replace(context, segments=relative.segments))
        heads = iter(tables.unflatten(2, (self.num_heads, -1)).unflatten(0, (relative.groups, -1)).unbind(2))
        pos_key, pos_query = (None if part is None else next(heads) for part in parts)
        return pos_key, pos_query


FAMILY = Family(check_config, PackedDeberta, NAMES.encoder_name, "DebertaV2Model", MASKED_LM, NAMES.file_name)
