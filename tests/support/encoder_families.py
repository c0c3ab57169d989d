"""Small random encoders of every family, in Hugging Face's format, and transformers' results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from fastmtl.data.packed_batch import PackedBatch

_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
_ROBERTA = {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
_DEBERTA = {
    **_SIZES,
    "layer_norm_eps": 1e-5,
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "position_biased_input": False,
}
_MODERNBERT = {
    **{name: size for name, size in _SIZES.items() if name != "num_hidden_layers"},
    **{"num_hidden_layers": 4, "local_attention": 17, "global_attn_every_n_layers": 3},
    **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
}
# name of a case: (model_type, values of config.json).
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _SIZES),
    "roberta": ("roberta", _ROBERTA),
    "xlm-roberta": ("xlm-roberta", {**_ROBERTA, "hidden_act": "gelu_new"}),
    "camembert": ("camembert", _ROBERTA),
    "electra": ("electra", {**_SIZES, "embedding_size": 16}),
    "electra, wide": ("electra", {**_SIZES, "embedding_size": 32}),
    "albert": ("albert", {**_SIZES, "embedding_size": 16}),
    "albert, groups": (
        "albert",
        {**_SIZES, "embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": 100,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 80,
            "activation": "relu",
        },
    ),
    "deberta-v2": (
        "deberta-v2",
        {**_DEBERTA, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2, other": (
        "deberta-v2",
        {
            **_DEBERTA,
            "position_buckets": -1,
            "max_relative_positions": 20,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "embedding_size": 16,
            "pos_att_type": "p2c|c2p",
            "conv_kernel_size": 3,
            "conv_groups": 2,
            "conv_act": "gelu",
        },
    ),
    "deberta-v2, p2c": ("deberta-v2", {**_DEBERTA, "pos_att_type": ["p2c"], "legacy": False}),
    "mpnet": ("mpnet", {**_SIZES, "layer_norm_eps": 1e-5}),
    "modernbert": ("modernbert", _MODERNBERT),
    "modernbert, biased": (
        "modernbert",
        {**_MODERNBERT, "attention_bias": True, "mlp_bias": True, "hidden_activation": "silu", "num_hidden_layers": 2},
    ),
}


def config_of(case: str, **changes: Any) -> PretrainedConfig:
    """Return transformers' configuration of a case. changes: other values of config.json."""
    kind, values = FAMILY_CASES[case]
    return AutoConfig.for_model(kind, **(values | changes))


def save_encoder_of(case: str, directory: Path, **changes: Any) -> Path:
    """Save a random encoder of a case with an output layer, as AutoModelForMaskedLM does.

    changes: other values of config.json. Return the directory.
    """
    torch.manual_seed(7)
    model = AutoModelForMaskedLM.from_config(config_of(case, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which start as zeros and ones
                parameter += 0.1 * torch.randn(parameter.shape)
            else:
                parameter *= 3
    model.save_pretrained(directory)
    return directory


def padded_hidden(model: PreTrainedModel, batch: PackedBatch, what: str = "last_hidden_state") -> Tensor:
    """Return transformers' results for one padded batch: real tokens, in packed order [N, d].

    what: the result of the model that is returned.
    Token types are given where the model has a table of them with two rows or more.
    """
    bounds = batch.host.cu_seqlens
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    padding = getattr(model.config, "pad_token_id", None) or 0

    def pad(values: Tensor, value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=value)

    mask = pad(torch.ones_like(batch.input_ids))
    types = {}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        types["token_type_ids"] = pad(batch.token_type_ids)
    found = model(input_ids=pad(batch.input_ids, padding), attention_mask=mask, **types)
    return getattr(found, what)[mask.bool()]
