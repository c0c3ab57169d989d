"""BERT on packed sequences. Module and parameter names are those of transformers.BertModel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PretrainedConfig

from fastmtl.config import Recompute
from fastmtl.model.encoder.bert_files import check_config, names
from fastmtl.model.encoder.bert_layer import Layer, SelfAttention
from fastmtl.model.encoder.context import EMBEDDINGS, ForwardContext
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.family import Family, MaskedLm
from fastmtl.model.encoder.layers import TaskEmbedding, TaskLayerNorm, TaskLinear
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
        sublayer_dropout_probs=(config.hidden_dropout_prob,) * 2,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        type_vocab_size=getattr(config, "type_vocab_size", 0),
        positions=config.max_position_embeddings,
        first_position=first_position,
        max_tokens=config.max_position_embeddings - first_position,
    )


class Embeddings(nn.Module):
    """Embeddings of words, positions and token types, with LayerNorm and dropout.

    settings: a table with 0 rows is left out.
    projects: a linear layer maps the embeddings, of settings.embedding_size, to the hidden size.
    """

    def __init__(self, settings: EncoderSettings, *, projects: bool = False) -> None:
        super().__init__()
        size = settings.embedding_size
        self.word_embeddings = TaskEmbedding(settings.vocab_size, size)
        self.position_embeddings = TaskEmbedding(settings.positions, size) if settings.positions else None
        self.token_type_embeddings = TaskEmbedding(settings.type_vocab_size, size) if settings.type_vocab_size else None
        self.LayerNorm = TaskLayerNorm(size, eps=settings.layer_norm_eps)
        self.dropout = settings.hidden_dropout_prob
        self.first_position = settings.first_position
        self.project = TaskLinear(size, settings.hidden_size) if projects else None

    def forward(self, ids: Tensor, token_types: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Return dropout(LN(words + positions + types)) [N, e], or [N, d] after the projection.

        ids, token_types: int64 [N], the rows of these tables. positions: int64 [N], from 0 in every
        sequence.
        """
        if self.first_position:
            positions = positions + self.first_position
        words, places, types = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        p, seed, norm = self.dropout if self.training else 0.0, context.seed(EMBEDDINGS), self.LayerNorm

        def embed(ids: Tensor) -> Tensor:
            tables = [(words, ids), (places, positions), (types, token_types)]
            if norm.norm_override is not None:
                summed = sum(embedding(rows, table.weight) for table, rows in tables if table is not None)
                assert isinstance(summed, Tensor)
                hidden = norm.norm_override(summed, norm.weight, norm.bias, list(norm.weight.shape), norm.eps)
                return dropout(hidden, p, seed) if p else hidden
            return embed_layer_norm(
                ids,
                None if places is None else positions,
                None if types is None else token_types,
                words.weight,
                None if places is None else places.weight,
                None if types is None else types.weight,
                norm.weight,
                norm.bias,
                dropout_p=p,
                eps=norm.eps,
                seed=seed,
                token_offsets=context.segments,
                task_grads=context.armed,
            )

        owners = [owner for owner in (norm, types, places, words) if owner is not None]
        hidden = within(owners, ids, embed)
        return hidden if self.project is None else self.project(hidden, context)


class Layers(nn.Module):
    """Container of the layers, whose weights thus have transformers' names `encoder.layer.<i>`."""

    def __init__(
        self, settings: EncoderSettings, self_attention: Callable[[EncoderSettings], nn.Module] = SelfAttention
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(settings, self_attention) for _ in range(settings.num_hidden_layers))


MASKED_LM = MaskedLm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
FAMILY = Family(check_config, PackedBert, names("bert.").encoder_name, "BertModel", MASKED_LM)
