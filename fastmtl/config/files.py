"""The files of a task and the section data of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fastmtl.config.base import Int, Section, Whole
from fastmtl.errors import quoted


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


FROM_PYTHON = "<python>"  # the name of a split whose rows a Python program passes to fastmtl.train

Role = Literal["id", "text", "text_pair", "label", "words", "answers", "answer", "answer_start", "choices", "group"]


class FileConfig(Section):
    """The files of a task.

    `train`, `dev` and `test` name a file or a pattern of files, or several of them. `format` names
    a known layout; `columns` maps id, text, text_pair and label to columns of any CSV, TSV, JSONL
    or Parquet file.
    """

    train: str | list[str] | None = Field(None, description="a file, a pattern such as parts/*.csv, or a list of them")
    dev: str | list[str] | None = Field(None, description="as train")
    test: str | list[str] | None = Field(None, description="as train")
    format: str = "table"
    columns: dict[Role, str | Int | list[str | Int]] = Field(default_factory=dict)
    header: bool | None = Field(
        None, description="whether line 1 of a CSV or TSV names the columns; needed where columns are numbers"
    )
    quotes: Literal["csv", "none"] | None = Field(
        None,
        description="csv: cells in double quotes, quotes inside doubled; none: quotes are text; default: none for "
        "glue and for table with tabs, else csv",
    )
    missing_labels: Literal["error", "leave_out"] = Field(
        "error", description="a row whose label is empty or null: a bad row, or no row of this task"
    )
    limit: Int | None = Field(None, ge=1, description="read at most this many training rows")
    dev_fraction: float | None = Field(
        None, ge=0, lt=1, description="share of the training rows that are the dev rows; default: data.dev_fraction"
    )
    dev_seed: Whole | None = Field(None, ge=0, le=2**62, description="draws these rows; default: data.dev_seed")
    augment: AugmentConfig | None = Field(None, description="classification, binary: make new training rows")

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        if isinstance(names, list) and (not names or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"give the name of a file, or a list of names, not {quoted(names)}")
        return names

    def names(self, split: Literal["train", "dev", "test"]) -> list[str]:
        """Return the names of a split's files; empty if there are none."""
        given = getattr(self, split)
        return given if isinstance(given, list) else [] if given is None else [given]

    @model_validator(mode="after")
    def _dev_rows_once(self) -> FileConfig:
        if self.dev is not None and self.dev_fraction:
            raise ValueError(f"dev_fraction: {self.dev_fraction:g}: the task has dev files too: leave out one of both")
        return self

    @model_validator(mode="after")
    def _columns_by_number(self) -> FileConfig:
        several = [role for role, column in self.columns.items() if isinstance(column, list)]
        for role in several:
            if role not in ("label", "choices") or not self.columns[role]:
                raise ValueError(f"columns.{role}: give the name or number of one column")
        columns = [one for given in self.columns.values() for one in (given if isinstance(given, list) else [given])]
        names = [column for column in columns if isinstance(column, str)]
        if self.header is False and names:
            raise ValueError(f"header: false leaves no names, so columns are numbers from 0, not {quoted(names[0])}")
        if any(isinstance(column, int) and column < 0 for column in columns):
            raise ValueError(f"columns: {self.columns}: numbers of columns begin at 0")
        return self


class DataConfig(Section):
    dir: str | None = Field(
        None, description="folder of the tasks' files with relative paths; default: the bundled demo corpus"
    )
    on_bad_row: Literal["error", "skip"] = "error"
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of each training file, the same rows for every seed and model"
    )
    dev_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the training rows that are the dev rows of a task without a dev file"
    )
    dev_seed: Whole = Field(1, ge=0, le=2**62, description="draws the dev rows of dev_fraction")
    drop_longest: float = Field(0.0, ge=0, lt=1, description="share of a task's training rows with the most words")
    cache_dir: str = Field("~/.cache/fastmtl", description="tokenised texts, keyed by content and tokenizer")
    prefetch: Int = Field(2, ge=0, description="number of steps whose batches are prepared in advance; 0: none")

    def dev_share(self, files: FileConfig) -> float:
        """Return the share of a task's training rows that are its dev rows; 0 for none."""
        if files.dev is not None:
            return 0.0
        return (self.dev_fraction or 0.0) if files.dev_fraction is None else files.dev_fraction

    def seed_of_dev(self, files: FileConfig) -> int:
        """Return the seed that draws a task's dev rows."""
        return self.dev_seed if files.dev_seed is None else files.dev_seed

    def has_dev(self, files: FileConfig) -> bool:
        """Return whether a task has dev rows: files of its own, or a share of its training rows."""
        return files.dev is not None or self.dev_share(files) > 0
