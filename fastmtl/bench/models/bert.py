"""transformers' BertModel without its pooler, on padded texts; heads on the first token."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import nn
from transformers import BertConfig, BertModel

from fastmtl.bench.models.family import Family, Inputs, text_tokens, texts
from fastmtl.bench.sizes import SHAPES, Shape, lengths_of


def trunk(shape: Shape) -> nn.Module:
    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def inputs(shape: Shape, tasks: int, random: np.random.Generator) -> list[Inputs]:
    """Return the texts of each task, with the lengths of the other benchmarks."""
    return [texts(random.permutation(lengths), shape.vocabulary, random) for lengths in lengths_of(shape, tasks)]


_SHAPES = {**SHAPES, "bert-base": dataclasses.replace(SHAPES["bert-base"], rows=32)}
FAMILY = Family(_SHAPES, trunk, 0, inputs, text_tokens)
