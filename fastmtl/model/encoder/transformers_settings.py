"""Settings of models of transformers, and the settings of a recipe that they do not support."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.model.encoder.settings import EncoderSettings


def check_recipe(name: str, recipe: Recipe) -> None:
    """Raise UserError, naming the key, for settings that need the layers of a packed encoder.

    name: of the class of transformers.
    """
    adapter, encoder = recipe.adapter, recipe.encoder
    settings = {
        f"adapter.name: {adapter.name}": adapter.name != "none",
        f"adapter.top: {adapter.top}": adapter.top != "none",
        "lora": recipe.lora.used,
        "smart": recipe.smart.used,
        "optimizer.layer_decay": recipe.optimizer.layer_decay is not None,
        "engine.cuda_graphs: true": recipe.engine.cuda_graphs,
        f"encoder.layer_norm: {encoder.layer_norm}": encoder.layer_norm != "fastmtl",
    }
    for setting, given in settings.items():
        if given:
            raise UserError(
                f"{setting} needs a packed encoder, and encoder.implementation: {encoder.implementation} runs {name} "
                "of transformers: leave this setting out, or take an encoder of a packed family (docs/models.md)"
            )


def max_tokens(model: nn.Module, config: PretrainedConfig, given: int | None) -> int:
    """Return the usable length of a text. given: the setting encoder.max_length.

    Raises UserError if it is larger than the table of positions, or missing for a model without
    such a table.
    """
    name, positions = type(model).__name__, getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        if given is None:
            raise UserError(f"encoder.max_length: {name} has no largest length of its own: set one, for example 512")
        return given
    for place, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in place and module.num_embeddings == positions:
            # As in RoBERTa, the first token has the row after that of padding.
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    if given is not None and given > positions:
        raise UserError(f"encoder.max_length: {given}, but {name} has {positions} positions")
    return given or positions


def settings_of(config: PretrainedConfig, words: Tensor, length: int) -> EncoderSettings:
    """Return the settings of any configuration; sizes that it does not name are 0.

    words: the word table [V, e]. length: the usable length of a text.
    """

    def first(*names: str, default: Any = 0) -> Any:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if value is not None), default)

    dropout = first("hidden_dropout_prob", "hidden_dropout", "dropout_rate", "dropout")
    return EncoderSettings(
        vocab_size=words.shape[0],
        embedding_size=words.shape[1],
        hidden_size=first("hidden_size", "d_model", "dim"),
        num_hidden_layers=first("num_hidden_layers", "num_layers", "n_layers"),
        num_attention_heads=first("num_attention_heads", "num_heads", "n_heads"),
        intermediate_size=first("intermediate_size", "d_ff"),
        hidden_act=first("hidden_act", "hidden_activation", default=""),
        hidden_dropout_prob=dropout,
        sublayer_dropout_probs=(dropout, dropout),
        attention_probs_dropout_prob=first("attention_probs_dropout_prob", "attention_dropout"),
        layer_norm_eps=first("layer_norm_eps", "layer_norm_epsilon"),
        initializer_range=first("initializer_range", "init_std", default=0.02),
        type_vocab_size=first("type_vocab_size"),
        positions=first("max_position_embeddings"),
        first_position=0,
        max_tokens=length,
    )
