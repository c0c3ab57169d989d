"""transformers' configuration of each packed family, for the encoders of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fastmtl.bench.sizes import Shape

# DeBERTa-v3's settings.
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def _like_bert(family: str, shape: Shape, dropout: float, **others: Any) -> PretrainedConfig:
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
    }
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return AutoConfig.for_model(family, **sizes, **rates, **others)


def _distilbert(shape: Shape, dropout: float) -> PretrainedConfig:
    return AutoConfig.for_model(
        "distilbert",
        vocab_size=shape.vocabulary,
        dim=shape.hidden,
        n_layers=shape.layers,
        n_heads=shape.heads,
        hidden_dim=shape.intermediate,
        max_position_embeddings=shape.positions,
        dropout=dropout,
        attention_dropout=dropout,
    )


def _modernbert(shape: Shape, dropout: float) -> PretrainedConfig:
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), dropout)
    return _like_bert("modernbert", shape, dropout, **ids, **rates)


# {family: its configuration, from a shape and the dropout}. The id of padding is 0.
CONFIGS: dict[str, Callable[[Shape, float], PretrainedConfig]] = {
    "bert": partial(_like_bert, "bert"),
    "electra": partial(_like_bert, "electra"),
    "albert": partial(_like_bert, "albert"),
    **{
        family: partial(_like_bert, family, pad_token_id=0)
        for family in ("roberta", "xlm-roberta", "camembert", "mpnet")
    },
    "deberta-v2": partial(_like_bert, "deberta-v2", **_RELATIVE),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}
