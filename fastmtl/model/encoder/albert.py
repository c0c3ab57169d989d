"""ALBERT: layers that share their weights, and embeddings that are projected to the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.model.encoder import bert_files
from fastmtl.model.encoder.bert import Embeddings, bert_settings
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.encoder.config_checks import check_sizes
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.settings import EncoderSettings


class PackedAlbert(PackedEncoder):
    """ALBERT encoder for packed sequences.

    `groups` holds the layers that exist. Each layer of the encoder is one of them.
    """

    embeddings: Embeddings

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        sizes = self.settings
        self.embeddings = Embeddings(sizes, projects=True)
        self.groups = nn.ModuleList(
            nn.ModuleList(Layer(sizes) for _ in range(config.inner_group_num)) for _ in range(config.num_hidden_groups)
        )

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return replace(
            bert_settings(config),
            embedding_size=config.embedding_size,
            num_hidden_layers=config.num_hidden_layers * config.inner_group_num,
            sublayer_dropout_probs=(config.hidden_dropout_prob, 0.0),
        )

    @property
    def layers(self) -> nn.ModuleList:
        number, groups = self.config.num_hidden_layers, len(self.groups)
        used = [self.groups[int(index / (number / groups))] for index in range(number)]
        return nn.ModuleList(layer for group in used for layer in group.children())

    @property
    def words(self) -> nn.Parameter:
        return self.embeddings.word_embeddings.weight


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = bert_files.check_config(values, path)
    least = dict.fromkeys(("embedding_size", "num_hidden_layers", "num_hidden_groups", "inner_group_num"), 1)
    check_sizes(path, config, least)
    return config


NAMES = Names(
    parts={
        "embeddings.project": "encoder.embedding_hidden_mapping_in",
        "groups.*.*": "encoder.albert_layer_groups.*.albert_layers.*",
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.dense",
        "attention.output.LayerNorm": "attention.LayerNorm",
        "intermediate.dense": "ffn",
        "output.dense": "ffn_output",
        "output.LayerNorm": "full_layer_layer_norm",
        "pooler.dense": "pooler",
    },
    prefix="albert.",
    kept=("embeddings.", "encoder.", "pooler."),
)
MASKED_LM = MaskedLm("predictions.dense", "predictions.LayerNorm", "predictions.bias")
FAMILY = Family(check_config, PackedAlbert, NAMES.encoder_name, "AlbertModel", MASKED_LM, NAMES.file_name)
