"""The description of an encoder family: how its files are read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fastmtl.model.encoder.encoder import PackedEncoder


def same_name(name: str) -> str:
    """Return the name unchanged: that of a module and that in files are the same."""
    return name


@dataclass(frozen=True)
class MaskedLm:
    """The output layer for masked language modelling in transformers' class of a family.

    It computes W LN(activation(A h + a)) + b, with the word table W.
    dense, norm, bias: names of A and a, of LN, and of b in files of this class. A and LN have
        `.weight` and `.bias`.
    activation: None for the encoder's hidden_act.
    biased: True if A and LN have biases.
    other: the same layer under the names that other files have, or None.
    """

    dense: str
    norm: str
    bias: str
    activation: str | None = None
    biased: bool = True
    other: MaskedLm | None = None


@dataclass(frozen=True)
class Family:
    """Functions that read, build and save the encoders of one `model_type`.

    check_config(values of config.json, its path): returns transformers' configuration, or raises
        UserError naming the path.
    encoder: the module class.
    encoder_name(name of a tensor in a weight file): returns the parameter's name in the encoder,
        None for a tensor that is not the encoder's.
    architecture: name of transformers' class, written into config.json as `architectures`.
    file_name(name of a tensor in the encoder's state_dict): returns its name in `architecture`, so
        that transformers.AutoModel loads a saved encoder.
    masked_lm: the output layer that weight files may have beside the encoder.
    hidden_dropout, attention_dropout: the attributes of the configuration that the settings
        encoder.hidden_dropout and encoder.attention_dropout replace.
    """

    check_config: Callable[[Mapping[str, Any], Path], PretrainedConfig]
    encoder: type[PackedEncoder]
    encoder_name: Callable[[str], str | None]
    architecture: str
    masked_lm: MaskedLm
    file_name: Callable[[str], str] = same_name
    hidden_dropout: tuple[str, ...] = ("hidden_dropout_prob",)
    attention_dropout: tuple[str, ...] = ("attention_probs_dropout_prob",)
