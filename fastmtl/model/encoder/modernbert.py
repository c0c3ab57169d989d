"""ModernBERT and mmBERT on packed sequences, with the names of transformers.ModernBertModel.

One layer in three sees the whole text; the others see local_attention // 2 tokens on each side.
Both kinds have rotary positions, each with a base of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.errors import UserError
from fastmtl.model.encoder.config_checks import check_activation, check_heads, check_value, make_config
from fastmtl.model.encoder.context import EMBEDDINGS, ForwardContext
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.layers import Norm, TaskEmbedding, TaskLayerNorm
from fastmtl.model.encoder.modernbert_layer import Layer, PreNorm, Rotations
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.rotations import rotation_table
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl_kernels import embed_layer_norm

WHOLE, WINDOWED = "full_attention", "sliding_attention"
_SMALLEST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "local_attention": 2,
    "max_position_embeddings": 8,
}
# Keys of config.json with the only value that is supported.
_SUPPORTED = {"norm_bias": False, "classifier_bias": False, "classifier_activation": "gelu", "decoder_bias": True}


class PackedModernBert(PackedEncoder):
    """ModernBERT encoder for packed sequences."""

    linears: ClassVar[Mapping[str, str]] = {
        "query_key_value": "attn.Wqkv",
        "attention_output": "attn.Wo",
        "intermediate": "mlp.Wi",
        "output": "mlp.Wo",
    }
    pre_norm = True
    gated = True
    embeddings: Embeddings

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        self.embeddings = Embeddings(config)
        window = config.local_attention // 2
        # Not by assignment: the attribute `layers` is a property of the base class.
        self._modules["layers"] = nn.ModuleList(
            Layer(config, first=index == 0, window=None if kind == WHOLE else window)
            for index, kind in enumerate(layer_kinds(config))
        )
        self.final_norm = PreNorm(config.hidden_size, eps=config.norm_eps)
        self.rotations = 2 * self.settings.max_tokens * self.settings.head_dim  # two tables of cosines and sines
        self._rotations: dict[tuple[torch.dtype, torch.device], Rotations] = {}

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return EncoderSettings(
            vocab_size=config.vocab_size,
            embedding_size=config.hidden_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_activation,
            hidden_dropout_prob=config.embedding_dropout,
            sublayer_dropout_probs=(config.attention_dropout, config.mlp_dropout),
            attention_probs_dropout_prob=config.attention_dropout,
            layer_norm_eps=config.norm_eps,
            initializer_range=config.initializer_range,
            type_vocab_size=0,
            positions=0,
            first_position=0,
            max_tokens=config.max_position_embeddings,
        )

    @property
    def layers(self) -> nn.ModuleList:
        layers = self._modules["layers"]
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def words(self) -> nn.Parameter:
        return self.embeddings.tok_embeddings.weight

    def begin(self, context: ForwardContext) -> ForwardContext:
        key = self.words.dtype, self.words.device
        if key not in self._rotations:
            whole, windowed = (
                rotation_table(theta, self.settings.head_dim, self.settings.max_tokens, *key)
                for theta in rope_thetas(self.config).values()
            )
            self._rotations[key] = Rotations(windowed, whole)
        return replace(context, common=self._rotations[key])

    def finish(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return self.final_norm(hidden, context)

    def use_layer_norm(self, norm: Norm) -> None:
        raise UserError("encoder.layer_norm: apex needs a bias, and ModernBERT's LayerNorm has none: use fastmtl")


class Embeddings(nn.Module):
    """Embeddings of words, with LayerNorm and dropout."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.tok_embeddings = TaskEmbedding(config.vocab_size, config.hidden_size)
        self.norm = TaskLayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.dropout = config.embedding_dropout

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Return dropout(LN(words)) [N, d]. ids: int64 [N]; the others are not used."""
        words, norm = self.tok_embeddings, self.norm

        def embed(ids: Tensor) -> Tensor:
            return embed_layer_norm(
                ids,
                None,
                None,
                words.weight,
                None,
                None,
                norm.weight,
                None,
                dropout_p=self.dropout if self.training else 0.0,
                eps=norm.eps,
                seed=context.seed(EMBEDDINGS),
                token_offsets=context.segments,
                task_grads=context.armed,
            )

        return within((norm, words), ids, embed)


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Return WHOLE or WINDOWED for each layer; before transformers 5, the former is every n-th."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    every = config.global_attn_every_n_layers
    return [WINDOWED if index % every else WHOLE for index in range(config.num_hidden_layers)]


def rope_thetas(config: PretrainedConfig) -> dict[str, Any]:
    """Return the base of the rotations of both kinds of layers; old keys before transformers 5."""
    found = getattr(config, "rope_parameters", None)
    if found is not None:
        return {kind: found[kind]["rope_theta"] for kind in (WHOLE, WINDOWED)}
    whole, windowed = config.global_rope_theta, config.local_rope_theta
    return {WHOLE: whole, WINDOWED: whole if windowed is None else windowed}


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    for name, supported in _SUPPORTED.items():
        check_value(path, values, name, supported)
    config = make_config(values, path, _SMALLEST_SIZES)
    check_heads(path, config.hidden_size, config.num_attention_heads)
    check_activation(path, config.hidden_activation, "hidden_activation")
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 2:
        raise UserError(f"{path}: hidden_size / num_attention_heads is {head_dim}; rotary positions need an even size")
    for kind, parameters in (getattr(config, "rope_parameters", None) or {}).items():
        rope = parameters.get("rope_type", "default")
        if rope != "default":
            raise UserError(f"{path}: rope_parameters: {kind}: rope_type '{rope}' is not supported, only 'default'")
    for kind, theta in rope_thetas(config).items():
        if not isinstance(theta, int | float) or theta <= 0:
            raise UserError(f"{path}: the base of the rotations of {kind}, {theta!r}, is no positive number")
    return config


NAMES = Names(parts={}, prefix="model.", kept=("embeddings.", "layers.", "final_norm."))
FAMILY = Family(
    check_config,
    PackedModernBert,
    NAMES.encoder_name,
    "ModernBertModel",
    MaskedLm("head.dense", "head.norm", "decoder.bias", activation="gelu", biased=False),
    NAMES.file_name,
    hidden_dropout=("embedding_dropout", "mlp_dropout"),
    attention_dropout=("attention_dropout",),
)
