"""Every task's files of a recipe, read, checked and tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastmtl.config import Recipe, TaskConfig
from fastmtl.data.augment import augment
from fastmtl.data.filters import drop_longest
from fastmtl.data.readers import read_rows
from fastmtl.data.tokenized import TokenizedDataset, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """One data set per task of the recipe and split, in the recipe's order; `dev` is None for a task without a dev
    file.
    """

    train: list[TokenizedDataset]
    dev: list[TokenizedDataset | None]

    @classmethod
    def load(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
        """Reads the train and dev files. max_length: tokens per text, [CLS] and [SEP] included.

        Raises UserError for a task without a train file, and as `read_rows` does.
        """
        data = recipe.data.model_copy(update={"dir": recipe.data.dir or str(demo_directory())})

        def read(task: TaskConfig, split: Literal["train", "dev"]) -> TokenizedDataset:
            rows = read_rows(task, data, split)
            if split == "train":
                rows = drop_longest(rows, data.drop_longest)
                if task.data.augment is not None:
                    rows = augment(rows, task.data.augment, recipe.seed, data.cache_dir)
            return tokenize(rows, tokenizer, task, max_length, data.cache_dir)

        tasks = recipe.tasks.values()
        return cls(
            train=[read(task, "train") for task in tasks],
            dev=[None if task.data.dev is None else read(task, "dev") for task in tasks],
        )

    def only(self, recipe: Recipe, tasks: list[str]) -> Corpus:
        """The data sets of some of the recipe's tasks, in its order."""
        chosen = [index for index, name in enumerate(recipe.tasks) if name in tasks]
        return Corpus([self.train[index] for index in chosen], [self.dev[index] for index in chosen])


def demo_directory() -> Path:
    """The corpus inside the package."""
    return Path(str(resources.files("fastmtl"))) / "data" / "demo"
