"""Tiny directories of text encoders that fastmtl never packs, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_bert import WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastmtl.model.encoder.transformers_files import find_class

_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
# name: (model_type, values of config.json).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convbert": ("convbert", {**_SIZES, "embedding_size": 12, "head_ratio": 1, "conv_kernel_size": 3}),
    "squeezebert": ("squeezebert", {**_SIZES, "embedding_size": 16}),
    "megatron": ("megatron-bert", _SIZES),
    "longformer": ("longformer", {**_SIZES, "attention_window": 8, "pad_token_id": 1}),
    "t5": ("t5", {**_T5, "is_encoder_decoder": True}),
}


def save_other(name: str, directory: Path) -> Path:
    """Save a random encoder of this kind, and its tokenizer. T5's has no [CLS], as usual."""
    first = None if name == "t5" else "[CLS]"
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "[CLS]", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    begin = f"{first} " if first else ""
    words.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A [SEP]", pair=f"{begin}$A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 2)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]"} | ({"cls_token": first} if first else {})
    kind, values = KINDS[name]
    given = {"vocab_size": len(vocabulary), "pad_token_id": 0, **values, "model_type": kind}
    config, found = find_class(given, directory / "config.json")
    torch.manual_seed(0)
    model: Any = found(config)
    model.save_pretrained(directory)
    inputs = ["input_ids", "attention_mask", *([] if name == "t5" else ["token_type_ids"])]
    PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **named).save_pretrained(directory)
    return directory


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
