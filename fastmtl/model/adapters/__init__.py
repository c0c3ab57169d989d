"""Task-specific functions beside the encoder's layers, by name."""

from __future__ import annotations

from transformers import BertConfig

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.adapters.adapter import Adapter
from fastmtl.model.adapters.lora import Lora
from fastmtl.model.adapters.low_rank import LowRank
from fastmtl.model.adapters.pal import Pal

ADAPTERS: dict[str, type[Adapter]] = {"pal": Pal, "low_rank": LowRank, "lora": Lora}


def build_adapter(config: AdapterConfig, bert: BertConfig, task_names: list[str]) -> Adapter | None:
    """The recipe's adapter, None for `none`. Raises UserError for a name or a setting that does not fit."""
    if config.name == "none":
        return None
    if config.name not in ADAPTERS:
        raise unknown_name("adapter", config.name, ["none", *ADAPTERS])
    if config.projections > 1 and config.name != "pal":
        raise UserError(f"adapter.projections: {config.projections}: {config.name} has no projections, pal has")
    return ADAPTERS[config.name](config, bert, task_names)
