"""Checks of a BERT's config.json, and the names of the tensors in its weight files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BertConfig
from transformers.activations import ACT2FN

from fastmtl.errors import UserError, unknown_name

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


def check_config(values: Mapping[str, Any], path: Path) -> BertConfig:
    """Return the configuration of a BERT encoder from the values of its config.json.

    path: the file, named in messages. Raises UserError if fastmtl does not support the encoder.
    """
    positions = values.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"{path}: position_embedding_type '{positions}' is not supported, only 'absolute'")
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise UserError(f"{path}: a decoder (is_decoder, add_cross_attention); fastmtl reads encoders")
    try:
        config = BertConfig.from_dict(dict(values))
        divisible = config.hidden_size % config.num_attention_heads == 0
    except Exception as error:  # transformers raises other classes in other versions
        raise UserError(f"{path}: not a configuration of BERT: {error}") from error
    for name, smallest in SMALLEST_SIZES.items():
        if getattr(config, name) < smallest:
            raise UserError(f"{path}: {name}: {getattr(config, name)} is less than {smallest}; take another encoder")
    if not divisible:
        heads = config.num_attention_heads
        raise UserError(f"{path}: hidden_size {config.hidden_size} is not a multiple of {heads} attention heads")
    if config.hidden_act not in ACT2FN:
        raise UserError(f"{path}: hidden_act: {unknown_name('activation', str(config.hidden_act), ACT2FN)}")
    return config


def encoder_name(name: str) -> str | None:
    """Map a tensor's name in a weight file to its name in PackedBert.

    Return None for a tensor that is not the encoder's, such as one of an MLM head.
    """
    name = base_name(name)
    if name == "embeddings.position_ids":  # a buffer of old transformers versions
        return None
    return name if name.startswith(("embeddings.", "encoder.", "pooler.")) else None


def base_name(name: str) -> str:
    """Map a tensor's name in a weight file to its name in transformers' BertModel.

    This removes `bert.`, the prefix in files of BertForMaskedLM, and replaces `gamma` and `beta`,
    the names of LayerNorm's weight and bias in old files.
    """
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
