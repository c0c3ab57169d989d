"""The sections of a recipe that set how its tasks are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, model_validator

from fastmtl.config.base import Int, Section, Whole


class WeightingConfig(Section):
    """Weights of the tasks' losses, multiplied by the fixed `tasks.<task>.weight`."""

    name: Literal["fixed", "uncertainty", "imtl_l", "dwa", "rlw", "stch", "famo", "gradnorm", "excess_mtl"] = Field(
        "fixed", description="docs/recipes.md gives the formulas"
    )
    temperature: float = Field(2.0, gt=0, description="dwa: the higher, the more equal the weights")
    mu: float = Field(1.0, gt=0, description="stch: the smaller, the more the largest loss counts")
    alpha: float = Field(1.5, ge=0, description="gradnorm: the higher, the more a task that trains slowly counts")
    lr: float = Field(0.025, gt=0, description="famo, gradnorm: learning rate of the weights")
    weight_decay: float = Field(1e-3, ge=0, description="famo: of the weights' logits")
    step_size: float = Field(0.01, gt=0, description="excess_mtl: of the weights' logits")
    warmup_steps: Int = Field(10, ge=0, description="excess_mtl: steps with equal weights, which give the baseline")

    @model_validator(mode="after")
    def _own_keys(self) -> WeightingConfig:
        for key, names in _WEIGHTING_KEYS.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for weighting.name: {' and '.join(names)}, this one is {self.name}")
        return self


_WEIGHTING_KEYS = {
    "temperature": ("dwa",),
    "mu": ("stch",),
    "alpha": ("gradnorm",),
    "lr": ("famo", "gradnorm"),
    "weight_decay": ("famo",),
    "step_size": ("excess_mtl",),
    "warmup_steps": ("excess_mtl",),
}


class SmartConfig(Section):
    """SMART's terms in the tasks' losses.

    A strength is one number for all tasks, or {task: number} for the tasks that have the term.
    """

    strength: float | dict[str, float] = Field(0.0, description="of the adversarial term")
    proximal: float | dict[str, float] = Field(0.0, description="of the distance from the teacher")
    follows: Literal["fixed", "gap"] = Field(
        "fixed", description="gap: multiply both by the task's metric on training rows minus that on dev rows"
    )
    momentum: float = Field(0.99, ge=0, lt=1, description="of the teacher, per optimiser step")
    steps: Int = Field(1, ge=1, description="of gradient ascent for the perturbation")
    step_size: float = Field(1e-3, gt=0)
    noise: float = Field(1e-5, gt=0, description="standard deviation of the random perturbation before the first step")
    epsilon: float = Field(1e-5, gt=0, description="largest element of a perturbation")

    @property
    def used(self) -> bool:
        strengths = [s if isinstance(s, dict) else {"": s} for s in (self.strength, self.proximal)]
        return any(value for strength in strengths for value in strength.values())

    @model_validator(mode="after")
    def _not_negative(self) -> SmartConfig:
        for key in ("strength", "proximal"):
            value = getattr(self, key)
            if any(number < 0 for number in (value.values() if isinstance(value, dict) else [value])):
                raise ValueError(f"{key}: {value}: a strength is 0 (none) or more")
        return self


class SamplerConfig(Section):
    """The rows of each task in a micro-batch.

    Either `batch_size` rows per task and rank, or `batch_tokens` tokens per rank over all tasks.
    """

    name: str = "proportional"
    batch_size: Int | dict[str, Int] = Field(
        16, description="rows per task, micro-batch and rank (proportional and annealed share out the sum)"
    )
    batch_tokens: Int | None = Field(None, ge=16, description="tokens per micro-batch and rank instead of batch_size")
    steps_per_epoch: Int | None = Field(
        None, ge=1, description="optimiser steps per epoch; default: enough for as many rows as the training files have"
    )
    subsample: dict[str, Int] = Field(
        default_factory=dict, description="most rows of a task per epoch; the next epoch takes others"
    )
    oversample: float = Field(
        1.0, ge=1, description="a small set counts as up to this many times its rows, at most as the largest set"
    )
    curriculum: float | None = Field(
        None,
        gt=0,
        description="epochs over which the smaller sets join the largest, one after the other",
    )
    batches_per_step: Int | None = Field(
        None, ge=1, description="compromise: batches of batch_size rows in a step, each of one task"
    )


class GradientConfig(Section):
    """The merging of the tasks' gradients of the shared parameters.

    docs/surgery-reference.md gives the cost of each choice.
    """

    method: str = Field(
        "sum", description="sum, pcgrad, gradvac, or with fastmtl-torch[torchjd] upgrad, mgda, cagrad, ..."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the method's own, for example {c: 0.4} for cagrad"
    )
    storage: Literal["auto", "stacked", "kept", "replay"] = Field(
        "auto", description="auto: stacked for ZeRO 0-2, replay for ZeRO 3 and offload; kept: for ZeRO 0-2, without J"
    )
    scope: Literal["global", "tensor"] = Field(
        "global", description="tensor: surgery on each parameter tensor by itself, inside backward"
    )
    reduce: Literal["exact", "local", "sketch"] = Field(
        "exact", description="over ranks; local: project on each rank, then average; sketch: for slow networks"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="stacked: dtype of the stored task gradients; auto: bfloat16 under bf16 without accumulation",
    )
    sketch_size: Int = Field(32_768, ge=16, description="sketch: buckets per task")
    reduction: Literal["sum", "mean"] = Field(
        "sum",
        description="pcgrad, gradvac: the sum (the paper) or the mean of the modified gradients",
    )


Beta = Annotated[StrictFloat, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-4, ge=0, description="encoder")
    adapter_lr: float | None = Field(None, ge=0, description="default: lr")
    head_lr: float | None = Field(None, ge=0, description="default: lr")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="the encoder's rate is lr in its last layer, and this factor less per layer below"
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, description="sgd")
    weight_decay: float = Field(0.01, ge=0, description="not on biases and LayerNorm weights")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.06, ge=0, lt=1, description="share of all steps")


class EarlyStoppingConfig(Section):
    metric: str = Field("mean", description="`mean` of the tasks' metrics, or `<task>/<metric>`")
    patience: Int | None = Field(None, ge=1, description="epochs without a better value; default: never stop")


class EngineConfig(Section):
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 1
    offload: bool = Field(
        False, description="ZeRO 3: parameters and optimiser state in host memory; ZeRO 1, 2: optimiser state"
    )
    accumulation: Int = Field(1, ge=1, description="micro-batches per optimiser step")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    fused_optimizer: Literal["torch", "deepspeed", "apex"] = Field(
        "torch", description="source of Adam; deepspeed: compiled once; apex: NVIDIA Apex has to be installed"
    )
    flat_parameters: bool = Field(
        False, description="ZeRO 0, 1, 2: DeepSpeed gets one parameter per group; the model's are views of it"
    )
    cuda_graphs: bool = Field(
        False, description="on a GPU: start a step's forward, backward and surgery with a few calls, not thousands"
    )


class TrainConfig(Section):
    epochs: Whole = Field(1, ge=1, le=1_000_000)
    max_steps: Int | None = Field(None, ge=1, description="stop after this many optimiser steps")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay per step of a moving average of the weights, which is evaluated and saved"
    )
    eval_tokens: Int = Field(8192, ge=16, description="tokens per evaluation batch")
    checkpoint_every: Int | None = Field(
        None, ge=1, description="optimiser steps; in addition to the end of each epoch"
    )
    log_every: Int = Field(1, ge=1, description="optimiser steps between lines of metrics.jsonl")
