"""Adapters by name. An adapter adds a task-specific function to each layer of the encoder."""

from __future__ import annotations

from fastmtl.config import AdapterConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.adapters.adapter import Adapter, NoAdapter
from fastmtl.model.adapters.lora import Lora
from fastmtl.model.adapters.low_rank import LowRank
from fastmtl.model.adapters.pal import Pal
from fastmtl.model.adapters.top import TOPS
from fastmtl.model.encoder.settings import EncoderSettings

ADAPTERS: dict[str, type[Adapter]] = {"pal": Pal, "low_rank": LowRank, "lora": Lora}


def build_adapter(config: AdapterConfig, encoder: EncoderSettings, task_names: list[str]) -> Adapter | None:
    """Build the adapter of a recipe, with its top; None if the recipe has neither.

    A top is a layer per task after the encoder (top.py). encoder: the encoder's settings.
    Raises UserError, naming the key, for settings that do not fit together.
    """
    if config.name == "none" and config.top == "none":
        return None
    if config.name != "none" and config.name not in ADAPTERS:
        raise unknown_name("adapter", config.name, ["none", *ADAPTERS])
    if config.projections > 1 and "pal" not in (config.name, config.top):
        raise UserError(f"adapter.projections: {config.projections}: {config.name} has no projections, pal has")
    if config.top_size is not None and config.top != "pal":
        raise UserError(f"adapter.top_size: {config.top_size}: adapter.top: {config.top} has no size, pal has")
    adapter = (NoAdapter if config.name == "none" else ADAPTERS[config.name])(config, encoder, task_names)
    if config.top != "none":
        adapter.top = TOPS[config.top](config, encoder, task_names)
    return adapter
