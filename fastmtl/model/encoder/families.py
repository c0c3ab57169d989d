"""All encoder families, by the `model_type` of their config.json.

A new family is a file and one entry in FAMILIES; docs/extending.md describes the file.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from fastmtl.errors import UserError
from fastmtl.files.json_files import read_json
from fastmtl.model.encoder import albert, bert, deberta, distilbert, electra, modernbert, mpnet, roberta
from fastmtl.model.encoder.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "roberta": roberta.family("RobertaModel"),
    "xlm-roberta": roberta.family("XLMRobertaModel"),
    "camembert": roberta.family("CamembertModel"),
    "electra": electra.FAMILY,
    "albert": albert.FAMILY,
    "distilbert": distilbert.FAMILY,
    "mpnet": mpnet.FAMILY,
    "deberta-v2": deberta.FAMILY,
    "modernbert": modernbert.FAMILY,
}


def runs_packed(implementation: str, path: Path) -> bool:
    """Return True if the encoder of a config.json runs packed.

    implementation: the setting encoder.implementation. Raises UserError if it is "packed" and
    fastmtl has not packed the family.
    """
    if implementation == "auto":
        kind = read_json(path).get("model_type")
        return isinstance(kind, str) and kind in FAMILIES
    if implementation == "packed":
        read_config(path)
    return implementation == "packed"


def read_config(path: Path) -> tuple[Family, PretrainedConfig]:
    """Return the family and the checked configuration of a packed encoder's config.json.

    Raises UserError, naming the file, if fastmtl has not packed the family.
    """
    values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = "has no model_type" if kind is None else f"has model_type '{kind}'"
        supported = " or ".join(f"'{name}'" for name in FAMILIES)
        raise UserError(
            f"{path}: {said}; fastmtl has packed encoders of model_type {supported}; other encoders "
            "run with encoder.implementation: auto"
        )
    family = FAMILIES[kind]
    config = family.check_config(values, path)
    for name in family.hidden_dropout + family.attention_dropout:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{path}: {name}: {getattr(config, name)} is no dropout rate; set one from 0 to below 1")
    return family, config
