"""Every task's files of a recipe, read, checked and tokenised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fastmtl.config import Recipe
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
    def load(
        cls,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        in_turn: Callable[[Callable[[], Corpus]], Corpus] = lambda read: read(),
    ) -> Corpus:
        """Reads the train and dev files.

        max_length: tokens per text, [CLS] and [SEP] included.
        in_turn: runs the reading on the first process of each machine before the others, which then find the cache.
        """
        return in_turn(lambda: cls._read(recipe, tokenizer, max_length))

    @classmethod
    def _read(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
        data = recipe.data.model_copy(update={"dir": recipe.data.dir or str(demo_directory())})

        def read(name: str, split: str) -> TokenizedDataset | None:
            task = recipe.tasks[name]
            if getattr(task.data, split) is None:
                return None
            rows = read_rows(task, data, split)
            return tokenize(rows, tokenizer, task, max_length, data.cache_dir)

        return cls(
            train=[read(name, "train") for name in recipe.task_names],
            dev=[read(name, "dev") for name in recipe.task_names],
        )


def demo_directory() -> Path:
    """The corpus inside the package."""
    return Path(str(resources.files("fastmtl"))) / "data" / "demo"
