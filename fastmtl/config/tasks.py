"""A task of a recipe: its type, labels, head and losses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, field_validator, model_validator

from fastmtl.config.base import Int, Section
from fastmtl.config.class_weights import check_class_weights
from fastmtl.config.files import FileConfig
from fastmtl.config.types import TYPES, ChoiceConfig, MultilabelConfig, RankingConfig, SpanConfig, TokensConfig
from fastmtl.errors import quoted
from fastmtl.files.label_text import as_label


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


Weight = Annotated[float, Field(gt=0)]
SECTIONS = {spec.section for spec in TYPES.values() if spec.section is not None}


class TaskConfig(Section):
    type: Literal["classification", "binary", "regression", "tokens", "span", "multilabel", "choice", "ranking"]
    num_labels: Int | None = Field(None, ge=2, description="classification: number of classes")
    label_names: list[str] | None = Field(
        None, description="text labels in the order of their ids; tokens: the tags; multilabel: the labels"
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
        None, description="one, several (their sum), or {loss: weight}; default: that of the type"
    )
    bins: Int = Field(6, ge=2, description="regression by cross_entropy: scores, evenly spread over the range")
    mnr: MnrConfig = Field(default_factory=MnrConfig)
    margin: float = Field(0.0, ge=-1, lt=1, description="cosine_embedding: largest cosine of class 0 without a loss")
    class_weights: Literal["balanced"] | list[Weight] | dict[str | Int, Weight] | None = Field(
        None,
        description="factors of the losses of the classes, in their order or by name; multilabel: of rows that have "
        "the label; balanced: from the training rows",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="cross_entropy, bce: share of the target for all classes"
    )
    focal_gamma: float = Field(2.0, ge=0, description="focal: how much less rows count that are already right")
    weight: float = Field(1.0, gt=0, description="fixed weight of the task's loss, applied before gradient surgery")
    metric: str | None = Field(None, description="default: that of the type, such as accuracy or pearson")
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    span: SpanConfig = Field(default_factory=SpanConfig)
    multilabel: MultilabelConfig = Field(default_factory=MultilabelConfig)
    choice: ChoiceConfig = Field(default_factory=ChoiceConfig)
    ranking: RankingConfig = Field(default_factory=RankingConfig)

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
        spec = TYPES[self.type]
        for name in SECTIONS - {spec.section}:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: settings of tasks of type {name}, this one is of type {self.type}")
        for role in self.data.columns:
            if role not in ("id", *spec.roles):
                raise ValueError(
                    f"data.columns.{role}: a task of type {self.type} has the columns id, {', '.join(spec.roles)}"
                )
        spec.check(self)
        if isinstance(self.data.columns.get("label"), list) and self.type != "multilabel":
            raise ValueError("data.columns.label: several columns are for tasks of type multilabel: name one")
        if not self.losses or any(weight <= 0 for weight in self.losses.values()):
            raise ValueError("loss: name at least one, each with a weight above 0")
        if isinstance(self.loss, list) and len(self.losses) < len(self.loss):
            raise ValueError(f"loss: {self.loss}: name each once; {{{self.loss[0]}: 2.0}} gives it a weight")
        check_class_weights(self)
        return self

    @property
    def losses(self) -> dict[str, float]:
        """{loss: weight} of the losses whose weighted sum is the task's loss."""
        if isinstance(self.loss, dict):
            return self.loss
        return dict.fromkeys(
            [self.loss or TYPES[self.type].loss] if isinstance(self.loss, str | None) else self.loss, 1.0
        )

    @property
    def loss_name(self) -> str:
        return " + ".join(self.losses)

    @property
    def metric_name(self) -> str:
        return self.metric or TYPES[self.type].metric(self)

    @property
    def scores(self) -> Literal["rows", "tokens", "sequences"]:
        """The units that the head scores: rows, tokens or sequences of a row (see TypeSpec)."""
        return TYPES[self.type].scores
