"""transformers' LlamaModel with PEFT's LoRA on all projections; heads on the last token."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import LlamaConfig, LlamaModel

from fastmtl.bench.models.family import Family, Inputs, text_tokens, texts
from fastmtl.bench.sizes import Shape
from fastmtl.errors import UserError

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraShape(Shape):
    """tokens: of every text. key_heads: heads of keys and values. rank: of the low-rank layers."""

    tokens: int = 128
    key_heads: int = 8
    rank: int = 8


_SHAPES: dict[str, Shape] = {
    "llama-1024": LoraShape(
        "llama-1024", hidden=1024, layers=8, heads=16, intermediate=2816, rows=16, vocabulary=32000
    ),
    "tiny": LoraShape(
        "tiny",
        hidden=32,
        layers=2,
        heads=4,
        intermediate=64,
        rows=4,
        vocabulary=100,
        positions=16,
        tokens=8,
        key_heads=2,
        rank=2,
    ),
}


def trunk(shape: Shape) -> nn.Module:
    """Return the model; only LoRA's factors are trained. Raises UserError without PEFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(f"--model llama-lora needs PEFT ({error}): pip install 'fastmtl-torch[bench]'") from None
    assert isinstance(shape, LoraShape)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        use_cache=False,
    )
    # Both factors are random. By default one of them is zero, and the other one has no gradient.
    lora = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=PROJECTIONS, init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers calls deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(LlamaModel(config), lora)


def inputs(shape: Shape, tasks: int, random: np.random.Generator) -> list[Inputs]:
    """Return the texts of each task, all of the same length."""
    assert isinstance(shape, LoraShape)
    return [texts(np.full(shape.rows, shape.tokens), shape.vocabulary, random) for _ in range(tasks)]


FAMILY = Family(_SHAPES, trunk, -1, inputs, text_tokens)
