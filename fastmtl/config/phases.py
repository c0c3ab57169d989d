"""The phases of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from fastmtl.config.base import Int, Section
from fastmtl.config.encoder import AdapterConfig
from fastmtl.config.training import (
    EarlyStoppingConfig,
    GradientConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)

MLM = "mlm"  # the objective of masked language modelling, and its loss
TRAINS = ("all", "heads", "adapters", "adapters+heads", "encoder", "encoder+heads", "encoder+adapters")


class PhaseConfig(Section):
    """A part of a run. Its sections override single settings of the recipe in this phase only."""

    name: str | None = Field(None, description="default: phase-1, phase-2, ...")
    objective: Literal["tasks", "mlm"] = Field("tasks", description="mlm: masked words of the tasks' training texts")
    trains: str = Field("all", description=f"the rest is frozen: {', '.join(TRAINS)}")
    tasks: list[str] | None = Field(None, description="the others stay as they are; default: all")
    keep: Literal["best", "best_of_each", "last"] = Field(
        "best", description="epoch whose weights are kept; best_of_each: the best per task, with a frozen encoder"
    )
    loss: dict[str, Any] = Field(default_factory=dict, description="per task, for example {para: bce}")
    adapter: AdapterConfig | None = None
    sampler: SamplerConfig | None = None
    gradient: GradientConfig | None = None
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None
    train: TrainConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    accumulation: Int | None = Field(None, ge=1, description="default: engine.accumulation")

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = serialize(self)
        return {key: _given(getattr(self, key), values[key]) for key in values if key in self.model_fields_set}


def _given(value: Any, dumped: Any) -> Any:
    if not isinstance(value, Section):
        return dumped
    return {key: dumped[key] for key in dumped if key in value.model_fields_set}
