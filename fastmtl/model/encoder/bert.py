"""BERT on packed sequences. Module and parameter names are those of transformers.BertModel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.model.encoder.bert_files import check_config, encoder_name
from fastmtl.model.encoder.bert_layer import Layer
from fastmtl.model.encoder.context import EMBEDDINGS, ForwardContext
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.family import Family
from fastmtl.model.encoder.layers import TaskEmbedding, TaskLayerNorm
from fastmtl.model.encoder.settings import EncoderSettings
from fastmtl.model.owners import within
from fastmtl_kernels import dropout, embed_layer_norm


class PackedBert(PackedEncoder):
    """BERT encoder for packed sequences."""

    embeddings: Embeddings

    def __init__(
        self, config: PretrainedConfig, *, recompute: Recompute = "none", max_length: int | None = None
    ) -> None:
        super().__init__(config, recompute=recompute, max_length=max_length)
        self.embeddings = Embeddings(self.settings)
        self.encoder = Layers(self.settings)

    @staticmethod
    def settings_of(config: PretrainedConfig) -> EncoderSettings:
        return bert_settings(config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.layer

    @property
    def words(self) -> nn.Parameter:
        return self.embeddings.word_embeddings.weight


def bert_settings(config: PretrainedConfig, first_position: int = 0) -> EncoderSettings:
    """Return the settings of a configuration with BERT's names."""
    return EncoderSettings(
        vocab_size=config.vocab_size,
        embedding_size=config.hidden_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        type_vocab_size=config.type_vocab_size,
        positions=config.max_position_embeddings,
        first_position=first_position,
        max_tokens=config.max_position_embeddings - first_position,
    )


class Embeddings(nn.Module):
    """Embeddings of words, positions and token types, with LayerNorm and dropout."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.word_embeddings = TaskEmbedding(settings.vocab_size, settings.embedding_size)
        self.position_embeddings = TaskEmbedding(settings.positions, settings.embedding_size)
        self.token_type_embeddings = TaskEmbedding(settings.type_vocab_size, settings.embedding_size)
        self.LayerNorm = TaskLayerNorm(settings.embedding_size, eps=settings.layer_norm_eps)
        self.dropout = settings.hidden_dropout_prob
        self.first_position = settings.first_position

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Return dropout(LN(words + positions + types)) [N, e].

        ids, token_types: int64 [N], the rows of these tables. positions: int64 [N], from 0 in every
        sequence.
        """
        if self.first_position:
            positions = positions + self.first_position
        words, places, types = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        p, seed, norm = self.dropout if self.training else 0.0, context.seed(EMBEDDINGS), self.LayerNorm

        def embed(ids: Tensor) -> Tensor:
            if norm.norm_override is not None:
                summed = embedding(ids, words.weight) + embedding(positions, places.weight)
                summed = summed + embedding(token_types, types.weight)
                hidden = norm.norm_override(summed, norm.weight, norm.bias, list(norm.weight.shape), norm.eps)
                return dropout(hidden, p, seed) if p else hidden
            return embed_layer_norm(
                ids,
                positions,
                token_types,
                words.weight,
                places.weight,
                types.weight,
                norm.weight,
                norm.bias,
                dropout_p=p,
                eps=norm.eps,
                seed=seed,
                token_offsets=context.segments,
                task_grads=context.armed,
            )

        return within((norm, types, places, words), ids, embed)


class Layers(nn.Module):
    """Container of the layers, whose weights thus have transformers' names `encoder.layer.<i>`."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))


FAMILY = Family(check_config, PackedBert, encoder_name, "BertModel")
