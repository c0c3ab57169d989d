"""MPNet: BERT without token types, with a bias of the scores by relative position.

All layers share the bias: a table with a row for each of 32 buckets of distances and a column for
each attention head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.errors import UserError
from fastmtl.model.encoder.bert import Layers, PackedBert, bert_settings
from fastmtl.model.encoder.bert_layer import SelfAttention
from fastmtl.model.encoder.config_checks import check_activation, check_heads, make_config
from fastmtl.model.encoder.context import ForwardContext
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.layers import TaskEmbedding
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.relative import copied, longest
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl.surgery import functional

# transformers' constants, which no key of config.json changes.
_PADDING, _BUCKETS, _LARGEST_DISTANCE = 1, 32, 128
_SMALLEST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": _PADDING + 9,
}


class PackedMpnet(PackedBert):
    """MPNet encoder for packed sequences."""

    encoder: MpnetLayers
    not_recorded = "the length of MPNet's bias by relative position is that of the batch's longest text"

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        self.encoder = MpnetLayers(self.settings, config.relative_attention_num_buckets)

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return bert_settings(config, first_position=_PADDING + 1)

    def begin(self, context: ForwardContext) -> ForwardContext:
        """Return the context with the bias, [G, heads, 2 L - 1] for texts of up to L tokens."""
        table, buckets = self.encoder.relative_attention_bias, _buckets(max(longest(context), 1))
        ids, segments = copied(buckets, context, context.cu_seqlens.device)

        def look_up(ids: Tensor) -> Tensor:
            return functional.embedding(ids, table.weight, segments, context.task_grads)

        bias = within((table,), ids, look_up).unflatten(0, (-1, len(buckets))).transpose(1, 2)
        return replace(context, common=bias.contiguous())  # one copy for all layers


class MpnetLayers(Layers):
    """Container of the layers and of the table of their bias."""

    def __init__(self, settings: EncoderSettings, num_buckets: int) -> None:
        super().__init__(settings, BiasedSelfAttention)
        self.relative_attention_bias = TaskEmbedding(num_buckets, settings.num_attention_heads)


class BiasedSelfAttention(SelfAttention):
    """Attention whose scores have the bias of the context."""

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        return context.attend(qkv, self.num_heads, self.dropout if self.training else 0.0, bias=context.common)


@lru_cache(maxsize=64)
def _buckets(length: int) -> Tensor:
    """Return the bucket of each distance from 1 - length to length - 1, key minus query, int64.

    Half of the buckets are for keys behind the query. In each half, one half are distances below 8,
    and the others grow with the logarithm, which is float32 as in transformers.
    """
    distance = torch.arange(1 - length, length)
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    far = torch.log(distance.abs().clamp(min=exact).float() / exact) / math.log(_LARGEST_DISTANCE / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance.abs() < exact, distance.abs(), far) + half * (distance > 0)


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = make_config(values, path, _SMALLEST_SIZES)
    check_heads(path, config.hidden_size, config.num_attention_heads)
    check_activation(path, config.hidden_act)
    buckets = config.relative_attention_num_buckets
    if not isinstance(buckets, int) or buckets < _BUCKETS:
        raise UserError(
            f"{path}: relative_attention_num_buckets {buckets} is less than {_BUCKETS}, the number of buckets that "
            "MPNet computes"
        )
    return config


NAMES = Names(
    parts={
        "attention.self.query": "attention.attn.q",
        "attention.self.key": "attention.attn.k",
        "attention.self.value": "attention.attn.v",
        "attention.output.dense": "attention.attn.o",
        "attention.output.LayerNorm": "attention.LayerNorm",
    },
    prefix="mpnet.",
    kept=("embeddings.", "encoder.", "pooler."),
)
MASKED_LM = MaskedLm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", activation="gelu")
FAMILY = Family(check_config, PackedMpnet, NAMES.encoder_name, "MPNetModel", MASKED_LM, NAMES.file_name)
