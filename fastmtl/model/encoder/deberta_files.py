"""The config.json of DeBERTa-v2 and v3, and the names of the tensors in weight files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.errors import UserError
from fastmtl.model.encoder.bert import bert_settings
from fastmtl.model.encoder.config_checks import check_activation, check_heads, check_value, make_config
from fastmtl.model.encoder.family import MaskedLm
from fastmtl.model.encoder.names import Names
from fastmtl.model.encoder.settings import EncoderSettings

_SMALLEST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "type_vocab_size": 0,
    "max_position_embeddings": 8,
}
# Keys that transformers' configuration takes without a check.
_OTHER_KEYS = {
    "position_buckets": int,
    "embedding_size": int,
    "share_att_key": bool,
    "norm_rel_ebd": str,
    "conv_kernel_size": int,
    "conv_groups": int,
    "conv_act": str,
}


@dataclass(frozen=True)
class RelativeSettings:
    """Settings of the attention to relative positions.

    terms: those of the scores, "c2p" (content to position) and "p2c"; empty for plain attention.
    factor: the scores are divided by sqrt(head_dim factor). shared: keys and queries of positions
    have the weights of the texts' keys and queries. buckets: number of buckets of distances, 0 for
    none. max_distance: the largest distance. norm: the table has a LayerNorm.
    """

    terms: tuple[str, ...]
    factor: int
    shared: bool
    buckets: int
    max_distance: int
    norm: bool


def relative_of(config: PretrainedConfig) -> RelativeSettings:
    """Return the settings of relative positions of a configuration."""
    terms = tuple(term for term in ("c2p", "p2c") if term in (config.pos_att_type or ()))
    largest = config.max_relative_positions
    norms = [part.strip() for part in getattr(config, "norm_rel_ebd", "none").lower().split("|")]
    return RelativeSettings(
        terms=terms if config.relative_attention else (),
        factor=1 + len(terms),
        shared=getattr(config, "share_att_key", False),
        buckets=max(getattr(config, "position_buckets", -1), 0),
        max_distance=largest if largest >= 1 else config.max_position_embeddings,
        norm="layer_norm" in norms,
    )


def deberta_settings(config: PretrainedConfig) -> EncoderSettings:
    return replace(
        bert_settings(config),
        embedding_size=getattr(config, "embedding_size", config.hidden_size),
        positions=config.max_position_embeddings if config.position_biased_input else 0,
    )


def check_config(values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration; path: the file, named in messages.

    Raises UserError if fastmtl does not support the encoder.
    """
    config = make_config(values, path, _SMALLEST_SIZES)
    for name, kind in _OTHER_KEYS.items():
        if name in values and type(values[name]) is not kind:
            raise UserError(f"{path}: {name}: {values[name]!r} is no {kind.__name__}")
    check_heads(path, config.hidden_size, config.num_attention_heads)
    check_activation(path, config.hidden_act)
    check_value(path, values, "attention_head_size", config.hidden_size // config.num_attention_heads)
    _check_relative(config, path)
    kernel = getattr(config, "conv_kernel_size", 0)
    if kernel > 0:
        check_activation(path, getattr(config, "conv_act", "tanh"), "conv_act")
        groups = getattr(config, "conv_groups", 1)
        if kernel % 2 == 0:
            raise UserError(f"{path}: conv_kernel_size {kernel} is even, so that the convolution would shorten texts")
        if groups < 1 or config.hidden_size % groups:
            raise UserError(f"{path}: hidden_size {config.hidden_size} is not a multiple of conv_groups {groups}")
    return config


def _check_relative(config: PretrainedConfig, path: Path) -> None:
    """Raise UserError for relative positions that transformers does not compute either."""
    relative = relative_of(config)
    if config.relative_attention and not relative.terms:
        raise UserError(
            f"{path}: relative_attention needs c2p or p2c in pos_att_type, got {config.pos_att_type}; "
            "take another encoder"
        )
    middle = relative.buckets // 2
    if relative.buckets == 1 or (0 < relative.buckets and relative.max_distance - 1 <= middle < _longest(config)):
        raise UserError(
            f"{path}: position_buckets {relative.buckets} with distances up to {relative.max_distance} leaves no "
            "bucket for large distances: max_relative_positions must be more than position_buckets / 2 + 1"
        )


def _longest(config: PretrainedConfig) -> int:
    return int(config.max_position_embeddings) - 1


NAMES = Names(
    parts={
        "embeddings.project": "embeddings.embed_proj",
        "encoder.layer.0.conv": "encoder.conv",
        "attention.self.query": "attention.self.query_proj",
        "attention.self.key": "attention.self.key_proj",
        "attention.self.value": "attention.self.value_proj",
        "attention.self.pos_key": "attention.self.pos_key_proj",
        "attention.self.pos_query": "attention.self.pos_query_proj",
    },
    prefix="deberta.",
    kept=("embeddings.", "encoder."),
    unused=("_embeddings._weight",),  # in files of mDeBERTa, from its pretraining
)
# Files of Microsoft have the second names, and those that transformers saves with `legacy: false`.
MASKED_LM = MaskedLm(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
    other=MaskedLm("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head.bias"),
)
