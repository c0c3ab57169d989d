"""The files of encoder families: what config.json may say, and names of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoder_families import FAMILY_CASES
from transformers import AutoConfig

from fastmtl.errors import UserError
from fastmtl.model.encoder import albert, deberta_files, distilbert, modernbert, mpnet
from fastmtl.model.encoder.families import FAMILIES, read_config

_POS_KEY = "encoder.layer.2.attention.self.pos_key_proj.bias"


def config_file(case: str, directory: Path, changes: dict[str, Any]) -> Path:
    kind, values = FAMILY_CASES[case]
    path = directory / "config.json"
    AutoConfig.for_model(kind, **values).save_pretrained(directory)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("roberta", {"pad_token_id": None}, "pad_token_id None is no id of the 100 words"),
        ("roberta", {"max_position_embeddings": 9}, "leaves 7 tokens for a text, since positions start at .* = 2"),
        ("xlm-roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not"),
        ("camembert", {"is_decoder": True}, "a decoder"),
        ("electra", {"embedding_size": 0}, "embedding_size: 0 is less than 1"),
        ("electra", {"hidden_act": "gelo"}, "hidden_act: unknown activation 'gelo'"),
        ("albert", {"inner_group_num": "two"}, "inner_group_num"),
        ("albert", {"num_hidden_groups": 0}, "num_hidden_groups: 0 is less than 1"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets 16 is less than 32"),
        ("mpnet", {"max_position_embeddings": 9}, "max_position_embeddings: 9 is less than 10"),
        ("deberta-v2", {"pos_att_type": ["p2p"]}, "relative_attention needs c2p or p2c in pos_att_type, got "),
        ("deberta-v2", {"position_buckets": 60, "max_relative_positions": 31}, "position_buckets 60 with distances up"),
        ("deberta-v2", {"attention_head_size": 16}, "attention_head_size 16 is not supported, only 8"),
        ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size 4 is even"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 3}, "hidden_size 32 is not a multiple of conv_groups 3"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "tan"}, "conv_act: unknown activation 'tan'"),
        ("deberta-v2", {"position_buckets": "8"}, "position_buckets: '8' is no int"),
        ("deberta-v2", {"norm_rel_ebd": None}, "norm_rel_ebd: None is no str"),
        ("albert", {"num_hidden_layers": 0}, "num_hidden_layers: 0 is less than 1"),
        ("bert", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: 1.5 is no dropout rate"),
        ("modernbert", {"mlp_dropout": -0.5}, "mlp_dropout: -0.5 is no dropout rate"),
        ("distilbert", {"dim": 30}, "dim 30 is not a multiple of 4 attention heads"),
        ("distilbert", {"activation": "gelo"}, "activation: unknown activation 'gelo'"),
        ("distilbert", {"max_position_embeddings": 4}, "max_position_embeddings: 4 is less than 8"),
        ("modernbert", {"norm_bias": True}, "norm_bias True is not supported, only False"),
        ("modernbert", {"hidden_activation": "gelo"}, "hidden_activation: unknown activation 'gelo'"),
        ("modernbert", {"hidden_size": 36}, "hidden_size / num_attention_heads is 9; rotary positions need an even"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
            "rope_parameters: full_attention: rope_type 'linear' is not supported, only 'default'",
        ),
        (
            "modernbert",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": -1.0}}},
            "the base of the rotations of sliding_attention, -1.0, is no positive number",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_named(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = config_file(case, tmp_path, changes)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        read_config(path)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_settings_have_berts_names(case: str, tmp_path: Path) -> None:
    family, config = read_config(config_file(case, tmp_path, {}))
    found = family.encoder.settings_of(config)
    assert (found.hidden_size, found.num_attention_heads, found.intermediate_size, found.vocab_size) == (32, 4, 48, 100)
    if case in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        assert (found.max_tokens, found.first_position) == (78, 2)


def test_names_map_both_ways() -> None:
    pairs = [
        (distilbert.NAMES, "encoder.layer.3.attention.self.query.weight", "transformer.layer.3.attention.q_lin.weight"),
        (distilbert.NAMES, "encoder.layer.0.output.LayerNorm.bias", "transformer.layer.0.output_layer_norm.bias"),
        (albert.NAMES, "groups.1.0.output.dense.bias", "encoder.albert_layer_groups.1.albert_layers.0.ffn_output.bias"),
        (albert.NAMES, "pooler.dense.weight", "pooler.weight"),
        (mpnet.NAMES, "encoder.layer.1.attention.output.LayerNorm.bias", "encoder.layer.1.attention.LayerNorm.bias"),
        (mpnet.NAMES, "encoder.relative_attention_bias.weight", "encoder.relative_attention_bias.weight"),
        (deberta_files.NAMES, "encoder.layer.0.conv.conv.bias", "encoder.conv.conv.bias"),
        (deberta_files.NAMES, "encoder.layer.2.attention.self.pos_key.bias", _POS_KEY),
    ]
    for names, here, there in pairs:
        assert names.file_name(here) == there
        assert names.encoder_name(there) == names.encoder_name(names.prefix + there) == here
    assert deberta_files.NAMES.encoder_name("lm_predictions.lm_head.dense.weight") is None
    assert distilbert.NAMES.encoder_name("vocab_transform.weight") is None
    assert FAMILIES["modernbert"].encoder_name("model.layers.2.attn.Wqkv.weight") == "layers.2.attn.Wqkv.weight"
    assert FAMILIES["modernbert"].encoder_name("head.dense.weight") is None
    assert deberta_files.NAMES.encoder_name("deberta.embeddings.word_embeddings._weight") is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_names_of_old_files(kind: str) -> None:
    """Old files have LayerNorms with gamma and beta, and buffers."""
    prefix = {"camembert": "roberta.", "xlm-roberta": "roberta.", "deberta-v2": "deberta.", "modernbert": "model."}
    encoder_name, before = FAMILIES[kind].encoder_name, prefix.get(kind, f"{kind}.")
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        for start in ("", before):
            assert encoder_name(f"{start}embeddings.LayerNorm.{old}") == f"embeddings.LayerNorm.{new}"
    for buffer in ("position_ids", "token_type_ids"):
        assert encoder_name(f"{before}embeddings.{buffer}") is None


def test_old_keys_of_modernbert(tmp_path: Path) -> None:
    """Files of transformers 4 give the bases of the rotations and every n-th global layer."""
    path = config_file("modernbert", tmp_path, {})
    values = json.loads(path.read_text())
    for name in ("layer_types", "rope_parameters"):
        values.pop(name, None)
    old = {"global_rope_theta": 7e4, "local_rope_theta": 3e3, "global_attn_every_n_layers": 2}
    path.write_text(json.dumps({**values, **old}))
    _, config = read_config(path)
    assert list(modernbert.rope_thetas(config).values()) == [7e4, 3e3]
    assert modernbert.layer_kinds(config) == [modernbert.WHOLE, modernbert.WINDOWED] * 2
