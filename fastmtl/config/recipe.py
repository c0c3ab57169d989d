"""A recipe: all settings of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fastmtl.config.base import Section, Whole
from fastmtl.config.encoder import AdapterConfig, EncoderConfig, LoraConfig
from fastmtl.config.files import DataConfig
from fastmtl.config.phases import PhaseConfig
from fastmtl.config.tasks import TaskConfig
from fastmtl.config.training import (
    EarlyStoppingConfig,
    EngineConfig,
    GradientConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    SmartConfig,
    TrainConfig,
    WeightingConfig,
)
from fastmtl.recipes import yaml_reader as recipe_yaml

NOT_IN_NAMES = '/\\:*?"<>|'
NAME_BYTES = 200  # a file system allows 255 for .NAME-dev.npy and its like


def check_task_name(name: str) -> None:
    """Raise ValueError unless usual file systems allow `name` as a part of a file's name."""
    bad = next((sign for sign in name if sign in NOT_IN_NAMES or not sign.isprintable()), None)
    if bad is not None:
        raise ValueError(f"the name {name[:80]!r} has {bad!r}: a task's name is used in names of files; take another")
    if not name.strip() or name != name.strip() or name.startswith("."):
        raise ValueError(f"the name {name[:80]!r} is empty or begins or ends with a space or begins with a dot")
    if len(name.encode("utf-8")) > NAME_BYTES:
        raise ValueError(f"the name {name[:80]!r}... is longer than {NAME_BYTES} bytes, too long for a file's name")


class Recipe(Section):
    """The settings of a run. Errors name the key, and the nearest valid key for a misspelt one."""

    description: str = ""
    seed: Whole = Field(1, ge=0, le=2**62)  # plus the offsets of phases and ranks it still fits torch's 64 bits
    add_to: str | None = Field(
        None,
        description="a trained model directory: train these tasks on its encoder, frozen, and put them beside its own",
    )
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    data: DataConfig = Field(default_factory=DataConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    weighting: WeightingConfig = Field(default_factory=WeightingConfig)
    smart: SmartConfig = Field(default_factory=SmartConfig)
    gradient: GradientConfig = Field(default_factory=GradientConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        ["tensorboard"], description="libraries that get the numbers of the run, beside metrics.jsonl"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to DeepSpeed")
    phases: list[PhaseConfig] = Field(default_factory=list, description="parts of the run, one after the other")

    @field_validator("tasks")
    @classmethod
    def _names_of_files(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name in tasks:
            check_task_name(name)
        return tasks

    @property
    def task_names(self) -> list[str]:
        """The tasks' names in the recipe's order.

        Segments of a batch, rows of J (the task gradients) and columns of tables have the same
        order.
        """
        return list(self.tasks)

    @property
    def shares(self) -> bool:
        """True if the tasks share trained parameters: an encoder that is not frozen, or a LoRA."""
        return not self.encoder.freeze or (self.lora.shared and self.add_to is None)

    @property
    def jacobian_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the stored task gradients, with `gradient.dtype: auto` resolved.

        `auto` means bfloat16 if the gradients have been rounded to bf16 anyway. With several
        micro-batches it means float32, since bfloat16 would round every sum.
        """
        gradient, engine = self.gradient, self.engine
        if gradient.dtype != "auto":
            return gradient.dtype
        stacked = gradient.storage in ("auto", "stacked") and engine.zero < 3 and not engine.offload
        narrow = engine.precision == "bf16" and engine.accumulation == 1
        merges = gradient.method != "sum" and gradient.scope == "global"
        return "bfloat16" if stacked and merges and narrow else "float32"

    def dump(self) -> str:
        """Return the complete recipe as YAML, defaults included. Running it repeats the run."""
        return recipe_yaml.dump(self.model_dump(mode="json"))
