"""Encoder families: for each supported `model_type` of config.json, how to read and build it.

A new family is one entry in FAMILIES; docs/extending.md lists the files that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BertConfig

from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.model.encoder import bert_files
from fastmtl.model.encoder.bert import PackedBert


@dataclass(frozen=True)
class Family:
    """Functions that read, build and save the encoders of one `model_type`.

    check_config(values of config.json, its path): returns the configuration, or raises UserError
        naming the path.
    encoder: the module class. Its parameters have the names that they have in transformers' class
        `architecture`, so that transformers.AutoModel loads a saved encoder.
    encoder_name(name of a tensor in a weight file): returns the parameter's name in the encoder,
        None for a tensor that is not the encoder's.
    architecture: name of transformers' class, written into config.json as `architectures`.
    """

    check_config: Callable[[Mapping[str, Any], Path], BertConfig]
    encoder: type[PackedBert]
    encoder_name: Callable[[str], str | None]
    architecture: str


FAMILIES: dict[str, Family] = {
    "bert": Family(bert_files.check_config, PackedBert, bert_files.encoder_name, "BertModel"),
}


def read_config(path: Path) -> tuple[Family, BertConfig]:
    """Return the family and the checked configuration of an encoder's config.json.

    Raises UserError, naming the file, if fastmtl does not support the encoder.
    """
    values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = "has no model_type" if kind is None else f"has model_type '{kind}'"
        supported = " or ".join(f"'{name}'" for name in FAMILIES)
        raise UserError(f"{path}: {said}; fastmtl reads encoders of model_type {supported}")
    return FAMILIES[kind], FAMILIES[kind].check_config(values, path)
