"""The published result tables of the reports: `recipes/papers/REPORT/table.yaml`.

A row names a recipe in the same folder, or gives the reason why there is none. A row with a sweep
stands for several runs: one per label, with the recipe and that label's settings. A column names a
value of a run, see `value_of`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastmtl.errors import UserError, unknown_name
from fastmtl.recipes.files import TABLE, read_mapping, recipes_root

_METRIC = re.compile(r"(?P<train>train:)?(?P<task>\w+)/(?P<metric>\w+)")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    name: str
    recipe: str | None = None
    reason: str | None = None  # why there is no recipe
    values: tuple[float | None, ...] | None = None  # by column; None: the report has no number
    sweep: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _one_of_two(self) -> Row:
        if (self.recipe is None) == (self.reason is None):
            raise ValueError(f"{self.name}: either recipe or reason")
        return self

    def variants(self) -> Iterator[tuple[str, Variant]]:
        """Yield (name in a table, variant) of each run, nothing for a row without a recipe."""
        if self.recipe is None:
            return
        if not self.sweep:
            yield self.name, Variant(self.recipe, self.recipe, {})
        for label, settings in self.sweep.items():
            slug = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")
            name = f"{self.recipe}@{slug}" if settings else self.recipe  # without settings: the recipe itself
            yield f"{self.name}: {label}", Variant(name, self.recipe, settings)


class Table(_Part):
    name: str
    title: str
    columns: dict[str, str]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _aligned(self) -> Table:
        for row in self.rows:
            if row.values is not None and len(row.values) != len(self.columns):
                raise ValueError(f"{self.name}, {row.name}: {len(row.values)} values, {len(self.columns)} columns")
        return self


class PaperResults(_Part):
    """The published results of a report.

    title, encoder: of the report. tables: in the report's order.
    """

    title: str
    encoder: str
    tables: tuple[Table, ...]

    def variants(self) -> dict[str, Variant]:
        """Return all runs of the report by name; a run in several tables is there once."""
        rows = (row for table in self.tables for row in table.rows)
        return {variant.name: variant for row in rows for _, variant in row.variants()}

    @property
    def needs_train_scores(self) -> bool:
        return any(column.startswith("train:") for table in self.tables for column in table.columns.values())


@dataclass(frozen=True)
class Variant:
    """A run of a report: a recipe with some settings.

    name: the name of the run's folder, and the name for the option --rows. recipe: name of a file
    in the table's folder. settings: overrides of the recipe.
    """

    name: str
    recipe: str
    settings: Mapping[str, Any]


def reports() -> list[str]:
    """Return the names of the reports with a table."""
    return sorted(path.parent.name for path in (recipes_root() / "papers").glob(f"*/{TABLE}"))


def load_results(report: str) -> PaperResults:
    """Return the published results of a report.

    Raises UserError for an unknown report.
    """
    if report not in reports():
        raise unknown_name("report", report, reports())
    path = recipes_root() / "papers" / report / TABLE
    try:
        return PaperResults.model_validate(read_mapping(path))
    except ValidationError as error:
        raise UserError(f"{path}: {error}") from None


def value_of(
    column: str, dev: Mapping[str, Mapping[str, float]], train: Mapping[str, Mapping[str, float]]
) -> float | None:
    """Return the value of a table's column for one run, None if the run has no such task.

    dev, train: {task: {metric: value}}. column: `sst/accuracy` is on the dev rows,
    `train:sst/accuracy` on the training rows. `mean` is the mean of the accuracies of SST and
    paraphrases and the correlation r of STS. `leaderboard` is the same with (r + 1) / 2, like
    CS224N's leaderboard.
    """
    if column in ("mean", "leaderboard"):
        parts = [value_of(name, dev, train) for name in ("sst/accuracy", "para/accuracy", "sts/pearson")]
        if any(part is None for part in parts):
            return None
        sst, para, sts = (float(part) for part in parts if part is not None)
        return (sst + para + ((sts + 1) / 2 if column == "leaderboard" else sts)) / 3
    found = _METRIC.fullmatch(column)
    assert found is not None, column
    return (train if found["train"] else dev).get(found["task"], {}).get(found["metric"])
