"""The settings of an encoder that fastmtl's modules read, under the same names for every family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes, rates and the activation of an encoder, under the names that BERT's config.json has.

    Each family makes them from transformers' configuration, whose names differ between families.

    embedding_size: width of the word table; other than hidden_size if the family projects it.
    hidden_dropout_prob: the rate after the embeddings. sublayer_dropout_probs: the rates after the
        attention part and after the feed-forward part of a layer.
    hidden_act: name of the activation in transformers' ACT2FN.
    type_vocab_size: rows of the table of token types, 0 without one.
    positions: rows of the table of positions, 0 without one.
    first_position: row of a text's first token in the table of positions.
    max_tokens: largest number of tokens of a text, [CLS] and [SEP] included.
    """

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    sublayer_dropout_probs: tuple[float, float]
    attention_probs_dropout_prob: float
    layer_norm_eps: float
    initializer_range: float
    type_vocab_size: int
    positions: int
    first_position: int
    max_tokens: int

    @property
    def head_dim(self) -> int:
        """The number of columns of an attention head."""
        return self.hidden_size // self.num_attention_heads
