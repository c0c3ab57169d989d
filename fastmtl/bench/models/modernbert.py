"""transformers' ModernBertModel on padded texts; heads on the first token."""

from __future__ import annotations

from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from fastmtl.bench.models import bert
from fastmtl.bench.models.family import Family, text_tokens
from fastmtl.bench.sizes import Shape

# The published base model, and one of MiniLM's width and depth with the same proportions.
_SHAPES = {
    "minilm": Shape("minilm", hidden=384, layers=6, heads=6, intermediate=576, rows=32, vocabulary=50368),
    "bert-base": Shape("bert-base", hidden=768, layers=22, heads=12, intermediate=1152, rows=32, vocabulary=50368),
    "tiny": Shape("tiny", hidden=32, layers=2, heads=2, intermediate=48, rows=4, vocabulary=100, positions=128),
}


def trunk(shape: Shape) -> nn.Module:
    config = ModernBertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    return ModernBertModel(config)


FAMILY = Family(_SHAPES, trunk, 0, bert.inputs, text_tokens)
