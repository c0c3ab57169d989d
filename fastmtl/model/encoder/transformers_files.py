"""Models of transformers that fastmtl runs as they are: their class, configuration and weights.

Only classes of the installed transformers run. No code of a model directory is executed: `auto_map`
is not followed, and weights come from `read_weights`, which reads tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging

from fastmtl.errors import UserError, listed, quoted

# Entries of a config.json that could make transformers run code of a directory or of a hub, that
# set the dtype of the weights (here always float32), or that change the form of the output.
_IGNORED = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "auto_map",
    "dtype",
    "torch_dtype",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
}
# Names that configurations give to the dropout of hidden states and of attention probabilities.
_DROPOUT = {
    "hidden_dropout": (
        "hidden_dropout_prob",
        "hidden_dropout",
        "dropout_rate",
        "dropout",
        "embedding_dropout",
        "mlp_dropout",
    ),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
}


def find_class(values: Mapping[str, Any], path: Path) -> tuple[PretrainedConfig, type[nn.Module]]:
    """Return the configuration and the class of a text encoder from the values of its config.json.

    path: the file, named in messages. Raises UserError for a model_type that transformers does not
    have, and for models that are no text encoders.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        said = "no model_type" if kind is None else f"model_type {quoted(kind)}, which transformers does not have"
        why = ", and its own code (auto_map) is not executed" if values.get("auto_map") else ""
        raise UserError(f"{path}: has {said}{why}: take another encoder")
    if values.get("quantization_config"):
        raise UserError(f"{path}: quantization_config: quantized weights cannot be trained; take the original weights")
    try:
        with _quiet():
            config = CONFIG_MAPPING[kind].from_dict(_kept(values))
            found = _class_of(config)
    except Exception as error:  # each configuration raises errors of its own
        raise UserError(f"{path}: not a configuration of {kind}: {str(error) or type(error).__name__}") from error
    if found is None:
        what = (
            "a sequence-to-sequence model, whose encoder has no class of its own in transformers"
            if _is_sequence_to_sequence(config)
            else "no text encoder of transformers (no model with masked words or for text encoding)"
        )
        raise UserError(f"{path}: model_type {quoted(kind)} is {what}: take a text encoder")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UserError(f"{path}: a decoder (is_decoder, add_cross_attention); fastmtl reads encoders")
    return config, found


def set_dropout(config: PretrainedConfig, key: str, rate: float | None) -> None:
    """Set a dropout rate of the configuration, under the names that it has there.

    key: "hidden_dropout" or "attention_dropout". rate: None changes nothing.
    Raises UserError, naming the key, if the configuration has no such rate.
    """
    names = [name for name in _DROPOUT[key] if hasattr(config, name)]
    if rate is not None and not names:
        raise UserError(f"encoder.{key}: {type(config).__name__} of transformers has no such rate: leave it out")
    for name in names if rate is not None else ():
        setattr(config, name, rate)


def build(kind: type[nn.Module], config: PretrainedConfig, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """Return the model with float32 copies of the weights, in training mode.

    weights: {name in the file: tensor}. Tensors of heads, which the model does not have, are left
    out. The global random state stays as it is. source: the directory, for messages.
    Raises UserError if tensors are missing, superfluous within the encoder, or of another shape.
    """
    copies = {
        name: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    # A pooler that the file lacks would be a random one.
    without = {} if any("pooler" in name for name in weights) else {"add_pooling_layer": False}
    with _quiet(), torch.random.fork_rng(devices=[]):
        model, found = _load(kind, config, copies, without, source)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{source} lacks the tensors {listed(missing, 5)} of {kind.__name__}: is it complete?")
    parts = {name for name, _ in model.named_children()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    surplus = [name for name in sorted(found["unexpected_keys"]) if name.removeprefix(prefix).split(".")[0] in parts]
    # Buffers of old versions, and tables from the pretraining of mDeBERTa.
    unused = ("position_ids", "token_type_ids", "_embeddings._weight")
    surplus = [name for name in surplus if not name.endswith(unused)]
    if surplus:
        raise UserError(
            f"{source} holds tensors that {kind.__name__} of its config.json does not have: {listed(surplus, 5)}. Do "
            "these files belong together?"
        )
    return model.train()


def _load(
    kind: Any, config: PretrainedConfig, weights: dict[str, Tensor], extra: Mapping[str, Any], source: str
) -> tuple[nn.Module, dict[str, Sequence[str]]]:
    try:
        try:
            return kind.from_pretrained(
                None, config=config, state_dict=dict(weights), output_loading_info=True, **extra
            )
        except TypeError:
            if not extra:
                raise
            return kind.from_pretrained(None, config=config, state_dict=dict(weights), output_loading_info=True)
    except Exception as error:  # transformers raises many classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: {kind.__name__} of transformers does not load its weights: {first}") from error


def _class_of(config: PretrainedConfig) -> type[nn.Module] | None:
    """Return the class of a text encoder, None for a decoder and for models of other inputs."""
    kind = type(config)
    if _is_sequence_to_sequence(config):
        return _first(MODEL_FOR_TEXT_ENCODING_MAPPING.get(kind, None))
    encodes = kind in MODEL_FOR_TEXT_ENCODING_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    if not encodes and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    return _first(MODEL_MAPPING.get(kind, None) or MODEL_FOR_TEXT_ENCODING_MAPPING.get(kind, None))


def _first(found: Any) -> type[nn.Module] | None:
    return found[0] if isinstance(found, tuple) else found


def _is_sequence_to_sequence(config: PretrainedConfig) -> bool:
    # A saved encoder of such a model says is_encoder_decoder: false.
    return getattr(config, "is_encoder_decoder", False) or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def _kept(values: Any) -> Any:
    """Return the values of a config.json without the ignored entries, at any depth."""
    if isinstance(values, Mapping):
        return {key: _kept(value) for key, value in values.items() if key not in _IGNORED}
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports and progress bars of loading out of a run's output."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
