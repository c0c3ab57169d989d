"""Checks of a config.json with BERT's names, and the names of the tensors in weight files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.model.encoder.config_checks import check_activation, check_heads, check_value, make_config
from fastmtl.model.encoder.names import Names

# Smallest values allowed in config.json. max_position_embeddings is at least 8, the smallest value
# of the setting encoder.max_length.
SMALLEST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "type_vocab_size": 1,
    "max_position_embeddings": 8,
}


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration of an encoder whose config.json has BERT's names.

    path: the file, named in messages. Raises UserError if fastmtl does not support the encoder.
    """
    check_value(path, values, "position_embedding_type", "absolute")
    config = make_config(values, path, SMALLEST_SIZES)
    check_heads(path, config.hidden_size, config.num_attention_heads)
    check_activation(path, config.hidden_act)
    return config


def names(prefix: str) -> Names:
    """Return the names of a family whose modules have the names in its files."""
    return Names(parts={}, prefix=prefix, kept=("embeddings.", "encoder.", "pooler."))
