"""The files in a run's output directory besides metrics and checkpoints, written by rank 0."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastmtl.config import Recipe
from fastmtl.data.corpus import Corpus
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.data.types import DATA_TYPES
from fastmtl.engine.distributed import Ranks
from fastmtl.engine.recipe_changes import CHANGES_FILE, Changes
from fastmtl.files.writing import replace_text
from fastmtl.inference.model_card import write_card
from fastmtl.inference.predictions import CS224N_COLUMN, write_cs224n, write_table
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import with_thresholds
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.model.add_task import Addition
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.saved_model import read_about, save_model
from fastmtl.model.task_weights import TaskWeights, read_task_weights
from fastmtl.training.phases import Phase
from fastmtl.training.results import collect_results

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASIDE = ".set-aside"
KEPT = ("model", "predictions")


class RunFiles:
    """The writer of config.yaml, model/ and predictions/ in a run's output directory.

    config.yaml is written when the object is made, the others when an epoch's weights are kept.
    Every rank makes the object and calls its methods; only rank 0 writes.
    """

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        ranks: Ranks,
    ) -> None:
        self.output = output
        self._recipe, self._tokenizer, self._corpus = recipe, tokenizer, corpus
        self._ranks = ranks
        self._addition = Addition(recipe) if ranks.is_main and recipe.add_to is not None else None
        if ranks.is_main:
            output.mkdir(parents=True, exist_ok=True)
            replace_text(output / "config.yaml", recipe.dump())

    def notes(self) -> list[str]:
        """Return lines for the user about the data files and `add_to`, before the run starts."""
        notes = [] if self._addition is None else [self._addition.note]
        for name, split, dataset in self._datasets():
            notes.extend(f"{name} {split}: {note}" for note in dataset.notes)
            if dataset.skipped:
                notes.append(f"{name} {split}: {len(dataset.skipped)} bad rows skipped, first {dataset.skipped[0]}")
            if dataset.truncated:
                cut = DATA_TYPES[self._recipe.tasks[name].type].cut
                notes.append(f"{name} {split}: {dataset.truncated} of {len(dataset)} {cut}")
        return notes

    def keep(
        self,
        phase: Phase,
        scored: Mapping[str, Scores],
        state_dict: dict[str, Tensor] | None,
        model: MultiTaskModel,
        tasks: list[str],
    ) -> None:
        """Write model/ and predictions/<task>-dev.csv of `tasks`, and their scores for the report.

        scored: the scores of the dev rows by task. state_dict: that of `model`, complete on rank 0.
        In a run of several phases, model/ has all tasks so far; tasks that are not in `tasks` keep
        their weights.
        """
        if not self._ranks.is_main:
            return
        assert state_dict is not None
        recipe, directory = with_thresholds(phase.recipe, scored), self.output / "model"
        if phase.name is not None and directory.is_dir():
            recipe, state_dict = self._with_others(recipe, state_dict, tasks)
        save = save_model if self._addition is None else self._addition.save
        save(directory, model, recipe, self._tokenizer, state_dict)
        folder = self.output / "predictions"
        folder.mkdir(exist_ok=True)
        for name, task in scored.items():
            if name in tasks:
                config = self._recipe.tasks[name]
                write = write_cs224n if config.type in CS224N_COLUMN else write_table
                write(folder / f"{name}-dev.csv", config, task)
                np.save(folder / f".{name}-dev.npy", task.scores)  # for the report, also after a resume
        for name in self._recipe.task_names if phase.trains_shared else []:
            if name not in scored:  # existing files are of older shared weights
                for file in (folder / f"{name}-dev.csv", folder / f".{name}-dev.npy"):
                    file.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Copy model/ and predictions/ to a hidden folder, for `take_back`.

        If train.max_steps ends a run within an epoch, the final evaluation may replace both. A
        longer run that resumes from there needs the old ones. An existing copy is not replaced: it
        is the right one, made by an earlier attempt to end the run that was interrupted.
        """
        aside = self.output / ASIDE
        if not self._ranks.is_main or aside.exists() or not (self.output / "model").is_dir():
            return
        making = aside.with_name(f"{ASIDE}.new")
        shutil.rmtree(making, ignore_errors=True)
        for name in KEPT:
            shutil.copytree(self.output / name, making / name)
        making.rename(aside)

    def take_back(self) -> None:
        """Restore model/ and predictions/ from the copies of `set_aside`, if there are any."""
        aside = self.output / ASIDE
        if not self._ranks.is_main or not aside.is_dir():
            return
        for name in KEPT:
            if (aside / name).is_dir():  # a killed process may have moved one back
                shutil.rmtree(self.output / name, ignore_errors=True)
                (aside / name).rename(self.output / name)
        aside.rmdir()

    def record(self, step: int, changes: Changes) -> None:
        """Append the changes with which a run is resumed to changes.jsonl.

        step: the optimiser step after which the run is resumed.
        """
        if self._ranks.is_main and changes:
            line = {"step": step, "changes": changes, "time": round(time.time(), 3)}
            with (self.output / CHANGES_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _with_others(
        self, recipe: Recipe, state_dict: dict[str, Tensor], tasks: list[str]
    ) -> tuple[Recipe, dict[str, Tensor]]:
        kept, before = read_task_weights(self.output / "model")
        kept.replace(TaskWeights.of(state_dict, recipe.task_names), tasks)
        # A task that keeps its weights keeps its thresholds too.
        known = {**recipe.tasks, **before.tasks, **{name: recipe.tasks[name] for name in tasks}}
        ordered = {name: known[name] for name in self._recipe.tasks if name in known}
        return recipe.model_copy(update={"tasks": ordered}), kept.state_dict(list(ordered))

    def results(self, steps: int, seconds: float) -> dict[str, Any] | None:
        """Return the results of the run as JSON values, and write the model's card with them.

        None on ranks other than 0.

        They are computed from the scores that `keep` has written. steps, seconds: of the whole run.
        """
        if not self._ranks.is_main:
            return None
        kept = {}
        for name, split, dataset in self._datasets():
            file = self.output / "predictions" / f".{name}-dev.npy"
            if split == "dev" and file.is_file():
                kept[name] = Scores(dataset, np.load(file))
        counts: dict[str, dict[str, dict[str, Any]]] = {}
        for name, split, dataset in self._datasets():
            numbers: dict[str, Any] = {
                "rows": dataset.num_rows,
                "skipped": len(dataset.skipped),
                "truncated": dataset.truncated,
            }
            if len(dataset):
                config = self._recipe.tasks[name]
                numbers["labels"] = INFERENCE_TYPES[config.type].statistics(config, dataset)
            counts.setdefault(name, {})[split] = numbers
        results = collect_results(
            self._recipe, kept, counts, steps=steps, seconds=seconds, world_size=self._ranks.world
        )
        directory = self.output / "model"
        if directory.is_dir():
            write_card(directory, read_about(directory)[0], results["dev"])
        return results

    def _datasets(self) -> list[tuple[str, str, TokenizedDataset]]:
        named = zip(self._recipe.task_names, self._corpus.train, self._corpus.dev, strict=True)
        pairs = [
            (name, split, data) for name, *both in named for split, data in zip(("train", "dev"), both, strict=True)
        ]
        return [(name, split, data) for name, split, data in pairs if data is not None]
