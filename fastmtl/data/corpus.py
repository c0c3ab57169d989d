"""All files of a recipe's tasks, read, checked and tokenised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import FROM_PYTHON, DataConfig, Recipe
from fastmtl.data.augment import augment
from fastmtl.data.filters import drop_longest
from fastmtl.data.places import Table
from fastmtl.data.readers import Split, read_splits
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset, check_pairs, tokenize
from fastmtl.data.wordnet import wordnet_place
from fastmtl.errors import UserError
from fastmtl.files.user_path import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CorpusRows:
    """The checked rows of a recipe's train and dev files, before augmentation.

    Importing this module and reading the files need no torch.

    sizes: number of rows by (task, split). `take` removes the rows that it returns, so that the
    memory of the texts is freed after tokenisation.
    """

    sizes: dict[tuple[str, Split], int]
    _rows: dict[tuple[str, Split], Rows] = field(repr=False)

    @classmethod
    def read(cls, recipe: Recipe, tables: Mapping[tuple[str, str], Table] | None = None) -> CorpusRows:
        """Read the train and dev files of all tasks of a recipe.

        tables: the rows of splits from Python, by task and split. Raises UserError for a task
        without a train file, for a missing file, and where `read_splits` raises it.
        """
        data = folder_of(recipe)
        rows: dict[tuple[str, Split], Rows] = {}
        for name, task in recipe.tasks.items():
            if task.data.augment is not None and task.data.augment.uses_synonyms:
                wordnet_place(task.data.augment.wordnet)
            own = {split: table for (other, split), table in (tables or {}).items() if other == name}
            for split, found in read_splits(task, data, list(_splits(recipe, name)), own).items():
                check_pairs(found, task)
                rows[name, split] = drop_longest(found, data.drop_longest) if split == "train" else found
        return cls({key: len(found) for key, found in rows.items()}, rows)

    def labels(self, task: str) -> np.ndarray | None:
        """Return the labels of a task's training rows, as in Rows; call this before `take`."""
        return self._rows[task, "train"].labels

    def take(self, task: str, split: Split) -> Rows:
        """Return the rows of one file and remove them from this object."""
        return self._rows.pop((task, split))


@dataclass(frozen=True)
class Corpus:
    """The tokenised data sets `train` and `dev`: a list each, one data set per task.

    Tasks are in the recipe's order. `dev` has None for a task without dev rows.
    """

    train: list[TokenizedDataset]
    dev: list[TokenizedDataset | None]

    @classmethod
    def load(
        cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, rows: CorpusRows | None = None
    ) -> Corpus:
        """Tokenise the train and dev files of all tasks of a recipe.

        max_length: the most tokens per sequence, [CLS] and [SEP] included. rows: the rows of the
        files; None reads the files. Raises UserError where `CorpusRows.read` raises it.
        """
        read = rows or CorpusRows.read(recipe)
        made = {}
        for name, task in recipe.tasks.items():
            for split in _splits(recipe, name):
                found = read.take(name, split)
                if split == "train" and task.data.augment is not None:
                    found = augment(found, task.data.augment, recipe.seed, recipe.data.cache_dir)
                keeps = split == "dev" or recipe.smart.follows == "gap"  # evaluated
                cache_dir = recipe.data.cache_dir
                made[name, split] = tokenize(found, tokenizer, task, max_length, cache_dir, keep_rows=keeps)
        return cls([made[name, "train"] for name in recipe.tasks], [made.get((name, "dev")) for name in recipe.tasks])

    def only(self, recipe: Recipe, tasks: list[str]) -> Corpus:
        """Return a corpus of the data sets of `tasks` only, in the recipe's order."""
        chosen = [index for index, name in enumerate(recipe.tasks) if name in tasks]
        return Corpus([self.train[index] for index in chosen], [self.dev[index] for index in chosen])

    def digests(self, recipe: Recipe) -> dict[str, str]:
        """Return the SHA-256 of every data set, by the keys "TASK train" and "TASK dev"."""
        found = {}
        for split, datasets in (("train", self.train), ("dev", self.dev)):
            for name, data in zip(recipe.task_names, datasets, strict=True):
                if data is not None:
                    found[f"{name} {split}"] = data.digest()
        return found


def _splits(recipe: Recipe, task: str) -> Iterator[Split]:
    yield "train"
    if recipe.data.has_dev(recipe.tasks[task].data):
        yield "dev"


def folder_of(recipe: Recipe) -> DataConfig:
    """Return the recipe's `data` section, with the demo directory if it names none.

    Raises UserError if `data.dir` is not a directory.
    """
    data = recipe.data
    files = [file for task in recipe.tasks.values() for split in ("train", "dev") for file in task.data.names(split)]
    relative = [file for file in files if file != FROM_PYTHON and not user_path(file).is_absolute()]
    if relative and data.dir is not None and not user_path(data.dir).is_dir():
        raise UserError(f"data.dir: {data.dir}: no such directory (the working directory is {Path.cwd()})")
    return data.model_copy(update={"dir": data.dir or str(demo_directory())})


def demo_directory() -> Path:
    """Return the folder of the demo corpus, which is part of the package."""
    return Path(str(resources.files("fastmtl"))) / "data" / "demo"
