"""ELECTRA: BERT with embeddings that a linear layer projects to the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.model.encoder import bert_files
from fastmtl.model.encoder.bert import Embeddings, PackedBert, bert_settings
from fastmtl.model.encoder.config_checks import check_sizes
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.settings import EncoderSettings


class PackedElectra(PackedBert):
    """ELECTRA encoder for packed sequences, generator or discriminator."""

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        sizes = self.settings
        self.embeddings = Embeddings(sizes, projects=sizes.embedding_size != sizes.hidden_size)

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return replace(bert_settings(config), embedding_size=config.embedding_size)


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = bert_files.check_config(values, path)
    check_sizes(path, config, {"embedding_size": 1})
    return config


NAMES = Names(
    parts={"embeddings.project": "embeddings_project"},
    prefix="electra.",
    kept=("embeddings.", "embeddings_project.", "encoder."),
)
MASKED_LM = MaskedLm(
    "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias", activation="gelu"
)
FAMILY = Family(check_config, PackedElectra, NAMES.encoder_name, "ElectraModel", MASKED_LM, NAMES.file_name)
