"""The runs of a report as complete recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmtl.config import Recipe, load_recipe
from fastmtl.data.find_places import missing
from fastmtl.errors import UserError, unknown_name
from fastmtl.reproduce.tables import PaperResults, Variant

# The demo corpus in place of the reports' data. It has no binary sentiment, so CFIMDB gets five
# classes.
DEMO_TASKS = {"sst": "sentiment", "cfimdb": "sentiment", "para": "paraphrase", "sts": "similarity"}


@dataclass(frozen=True)
class Options:
    """The user's changes to a report's recipes.

    data: folder with the CS224N files, None for the demo corpus. fraction: share of each training
    set. encoder: a model directory, None for the recipes' own. epochs: the most epochs of a phase,
    None for the recipes' own. seeds: one run of each recipe per seed. overrides:
    `section.key=value`.
    """

    data: Path | None = None
    fraction: float = 1.0
    encoder: str | None = None
    epochs: int | None = None
    seeds: tuple[int, ...] = (1,)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a report.

    missing: files that the data folder lacks; a run with missing files is skipped.
    """

    variant: Variant
    seed: int
    recipe: Recipe
    missing: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder of the run, below the output directory."""
        return Path(self.variant.name) / f"seed-{self.seed}"


def plan(report: str, paper: PaperResults, rows: Sequence[str], options: Options) -> list[PlannedRun]:
    """Return the runs of a report, seed by seed, so that first results come early.

    rows: names of runs (`Variant.name`); empty for all. Raises UserError for an unknown row, and
    for options that do not fit a recipe.
    """
    variants = paper.variants()
    for row in rows:
        if row not in variants:
            raise unknown_name("row", row, variants)
    wanted = [variant for name, variant in variants.items() if not rows or name in rows]
    if options.data is not None and not options.data.is_dir():
        raise UserError(f"--data: there is no folder {options.data}")
    runs = [(variant, seed) for seed in options.seeds for variant in wanted]
    return [_planned(report, variant, seed, options) for variant, seed in runs]


def _planned(report: str, variant: Variant, seed: int, options: Options) -> PlannedRun:
    name = f"papers/{report}/{variant.recipe}"
    tasks = load_recipe(name).task_names
    settings = [_override(key, value) for key, value in variant.settings.items()]
    if options.data is None:
        settings += [line for task in tasks for line in demo_overrides(task)]
    else:
        settings.append(_override("data.dir", str(options.data.resolve())))
    if options.encoder is not None:
        settings.append(_override("encoder.path", options.encoder))
    settings += [_override("data.fraction", options.fraction), _override("seed", seed), *options.overrides]
    recipe = load_recipe(name, settings)
    if options.epochs is not None:
        shorten(recipe, options.epochs)
    return PlannedRun(variant, seed, recipe, _missing_files(recipe))


def demo_overrides(task: str) -> list[str]:
    """Return the overrides by which a report's task is trained on the demo corpus.

    task: `sst`, `cfimdb`, `para` or `sts`.
    """
    files = {split: f"{DEMO_TASKS[task]}-{split}.csv" for split in ("train", "dev")}
    settings = [_override(f"tasks.{task}.data.{split}", file) for split, file in files.items()]
    return [*settings, "tasks.cfimdb.num_labels=5"] if task == "cfimdb" else settings


def shorten(recipe: Recipe, epochs: int) -> None:
    """Limit all phases of a recipe to `epochs` epochs, in place.

    A curriculum keeps its share of a phase.
    """
    whole = recipe.train.epochs
    parts = [(recipe.train, recipe.sampler), *((phase.train, phase.sampler) for phase in recipe.phases)]
    for train, sampler in parts:
        own = train.epochs if train is not None and "epochs" in train.model_fields_set else whole
        if own > epochs and sampler is not None and sampler.curriculum is not None:
            sampler.curriculum *= epochs / own
        if own > epochs and train is not None:
            train.epochs = epochs


def _override(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"  # JSON is YAML


def _missing_files(recipe: Recipe) -> tuple[str, ...]:
    if recipe.data.dir is None:
        return ()
    names = (name for task in recipe.tasks.values() for split in ("train", "dev") for name in task.data.names(split))
    return tuple(name for name in dict.fromkeys(names) if missing(name, recipe.data.dir))


def describe(options: Options, paper: PaperResults, runs: Sequence[PlannedRun]) -> list[str]:
    """Return sentences for the user about the differences between these runs and the report's."""
    encoders = {run.recipe.encoder.path for run in runs}
    notes = []
    if options.data is None:
        notes.append(
            "The demo corpus stands in for the data sets: these numbers show that the recipes run, they cannot be "
            "compared with the report's. --data DIR takes the CS224N files."
        )
    if options.fraction < 1:
        notes.append(f"Of each training set {options.fraction:.3g} of the rows, the same ones in every run.")
    if options.epochs is not None:
        notes.append(f"No phase of a run is longer than {options.epochs} epoch{'s' if options.epochs > 1 else ''}.")
    if options.overrides:
        notes.append(f"In every run: {' '.join(options.overrides)}.")
    if encoders:
        notes.append(f"Encoder: {', '.join(sorted(encoders))}; the report's is {paper.encoder}.")
    return notes
