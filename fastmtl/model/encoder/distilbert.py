"""DistilBERT: BERT without token types, under other names and with fewer dropouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.encoder.config_checks import check_activation, check_heads, make_config
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.settings import EncoderSettings

_SMALLEST_SIZES = {
    "vocab_size": 1,
    "dim": 1,
    "n_heads": 1,
    "hidden_dim": 1,
    "max_position_embeddings": 8,
}


class PackedDistilBert(PackedBert):
    """DistilBERT encoder for packed sequences."""

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return EncoderSettings(
            vocab_size=config.vocab_size,
            embedding_size=config.dim,
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=config.hidden_dim,
            hidden_act=config.activation,
            hidden_dropout_prob=config.dropout,
            sublayer_dropout_probs=(0.0, config.dropout),
            attention_probs_dropout_prob=config.attention_dropout,
            layer_norm_eps=1e-12,
            initializer_range=config.initializer_range,
            type_vocab_size=0,
            positions=config.max_position_embeddings,
            first_position=0,
            max_tokens=config.max_position_embeddings,
        )


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = make_config(values, path, _SMALLEST_SIZES)
    check_heads(path, config.dim, config.n_heads, "dim")
    check_activation(path, config.activation, "activation")
    return config


NAMES = Names(
    parts={
        "encoder.layer": "transformer.layer",
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    },
    prefix="distilbert.",
    kept=("embeddings.", "transformer."),
)
MASKED_LM = MaskedLm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
FAMILY = Family(
    check_config,
    PackedDistilBert,
    NAMES.encoder_name,
    "DistilBertModel",
    MASKED_LM,
    NAMES.file_name,
    hidden_dropout=("dropout",),
    attention_dropout=("attention_dropout",),
)
