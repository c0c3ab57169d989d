"""Checks of the values of a config.json that families share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from fastmtl.errors import UserError, unknown_name


def make_config(values: Mapping[str, Any], path: Path, smallest: Mapping[str, int]) -> PretrainedConfig:
    """Return transformers' configuration of the `model_type` in `values`.

    path: the file, named in messages.
    smallest: {name of a size: smallest value that is allowed}.
    Raises UserError for values that transformers refuses, for a decoder and for smaller sizes.
    """
    kind = values["model_type"]
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise UserError(f"{path}: a decoder (is_decoder, add_cross_attention); fastmtl reads encoders")
    try:
        config = type(AutoConfig.for_model(kind)).from_dict(dict(values))
    except Exception as error:  # transformers raises other classes in other versions
        raise UserError(f"{path}: not a configuration of {kind}: {error}") from error
    check_sizes(path, config, smallest)
    return config


def check_sizes(path: Path, config: PretrainedConfig, smallest: Mapping[str, int]) -> None:
    """Raise UserError if a size of the configuration is no integer or less than in `smallest`."""
    for name, least in smallest.items():
        size = getattr(config, name, None)
        if not isinstance(size, int):
            raise UserError(f"{path}: {name}: {size!r} is not an integer")
        if size < least:
            raise UserError(f"{path}: {name}: {size} is less than {least}; take another encoder")


def check_heads(path: Path, width: int, heads: int, name: str = "hidden_size") -> None:
    """Raise UserError if a width, with its name in config.json, is no multiple of the heads."""
    if width % heads:
        raise UserError(f"{path}: {name} {width} is not a multiple of {heads} attention heads")


def check_activation(path: Path, activation: object, name: str = "hidden_act") -> None:
    """Raise UserError if transformers has no such activation; name: its key in config.json."""
    if activation not in ACT2FN:
        raise UserError(f"{path}: {name}: {unknown_name('activation', str(activation), ACT2FN)}")


def check_value(path: Path, values: Mapping[str, Any], name: str, supported: Any) -> None:
    """Raise UserError if config.json has this key with another value than the supported one."""
    found = values.get(name, supported)
    if found != supported:
        raise UserError(f"{path}: {name} {found!r} is not supported, only {supported!r}")
