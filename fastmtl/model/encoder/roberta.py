"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions that start behind the padding's row.

The table of positions begins with rows for padding. A text's first token has the row
padding_idx + 1, so that a text has at most max_position_embeddings - padding_idx - 1 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.errors import UserError
from fastmtl.model.encoder import bert_files
from fastmtl.model.encoder.bert import PackedBert, bert_settings
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.settings import EncoderSettings

# Smallest allowed number of usable positions, that of the setting encoder.max_length.
_SHORTEST = 8


class PackedRoberta(PackedBert):
    """RoBERTa encoder for packed sequences."""

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return bert_settings(config, first_position=config.pad_token_id + 1)


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = bert_files.check_config(values, path)
    padding, positions, words = config.pad_token_id, config.max_position_embeddings, config.vocab_size
    if not isinstance(padding, int) or not 0 <= padding < words:
        raise UserError(
            f"{path}: pad_token_id {padding} is no id of the {words} words, and positions start behind it: give the id "
            "of the tokenizer's padding"
        )
    if positions - padding - 1 < _SHORTEST:
        raise UserError(
            f"{path}: max_position_embeddings {positions} leaves {positions - padding - 1} tokens for a text, since "
            f"positions start at pad_token_id + 1 = {padding + 1}; at least {_SHORTEST} are needed"
        )
    return config


MASKED_LM = MaskedLm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", activation="gelu")


def family(architecture: str) -> Family:
    """Return the family of one of transformers' classes with RoBERTa's layers."""
    return Family(check_config, PackedRoberta, bert_files.names("roberta.").encoder_name, architecture, MASKED_LM)
