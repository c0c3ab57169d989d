"""The points of a profile, the rows of their steps, and their predicted memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmtl.config import MLM, Recipe
from fastmtl.config.class_weights import BALANCED
from fastmtl.data.class_weights import with_class_weights
from fastmtl.data.corpus import Corpus, CorpusRows
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.stream import BatchStream
from fastmtl.data.tokenized import check_token_types
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.add_task import complete
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.pretrained import load_tokenizer
from fastmtl.model.lora.start import with_settings_of_path
from fastmtl.profile.load import Load
from fastmtl.profile.predict import Prediction, predict
from fastmtl.profile.shape import Shape
from fastmtl.surgery.methods.table import find_method
from fastmtl.training.phase_model import PhaseModel
from fastmtl.training.phases import Phase, phases_of

# The largest step is searched among the first STEPS steps of an epoch, or among fewer, which have
# ROWS rows together.
STEPS, ROWS = 50, 20_000
# Storages of task gradients, the fastest first.
STORAGES = ("stacked", "kept", "replay")
# The number of timed steps.
TIMED = 5


@dataclass(frozen=True)
class Point:
    """One setting of a profile: batch size, method and storage.

    batch_size: rows of each task in a micro-batch. storage: as in a recipe; "none" for `sum`.
    """

    batch_size: int
    method: str
    storage: str

    @property
    def series(self) -> str:
        """The name that points share if they differ in batch size only."""
        return self.method if self.storage == "none" else f"{self.method} {self.storage}"

    def __str__(self) -> str:
        return f"{self.series}, batch size {self.batch_size}"


@dataclass(frozen=True)
class Draw:
    """Steps drawn from the training data.

    stream: the source of an epoch's steps. steps: the micro-batches of the first steps. largest:
    those of the step that has the micro-batch with the most tokens.
    """

    stream: BatchStream
    steps: list[list[PackedBatch]]
    largest: list[PackedBatch]


def choose_phase(recipe: Recipe, name: str | None) -> Phase:
    """Return the named phase, by default the first one that trains the encoder on tasks.

    Raises UserError for an unknown name, and for a phase of masked language modelling.
    """
    recipe = with_settings_of_path(complete(recipe))
    if any(task.class_weights == BALANCED for task in recipe.tasks.values()):
        recipe = with_class_weights(recipe, CorpusRows.read(recipe))
    phases = phases_of(recipe)
    if name is not None:
        names = {phase.name or "": phase for phase in phases}
        if name not in names:
            raise unknown_name("phase", name, names) if any(names) else UserError("--phase: the recipe has no phases")
        phases = [names[name]]
    of_tasks = [phase for phase in phases if phase.objective != MLM]
    if not of_tasks:
        raise UserError("--phase: masked language modelling cannot be profiled: choose a phase that trains tasks")
    return next((phase for phase in of_tasks if "encoder" in phase.parts), of_tasks[0])


def points(recipe: Recipe, batch_sizes: Sequence[int], methods: Sequence[str], storages: Sequence[str]) -> list[Point]:
    """Return a point for each batch size, method and storage; `sum` has no storage.

    methods, storages: the recipe's own if empty. Raises UserError for an unknown name.
    """
    for storage in storages:
        if storage not in STORAGES:
            raise UserError(f"--storages: unknown value '{storage}': use {', '.join(STORAGES[:-1])} or {STORAGES[-1]}")
    asked = list(methods) or [recipe.gradient.method]
    for method in asked:
        find_method(method, options=_options(recipe, method))
    own = recipe.gradient.storage if recipe.gradient.scope == "global" else "none"
    if own == "auto":
        own = "replay" if recipe.engine.zero == 3 or recipe.engine.offload else "stacked"
    series = []
    for method in dict.fromkeys(asked):
        series += [(method, storage) for storage in (["none"] if method == "sum" else dict.fromkeys(storages or [own]))]
    return [Point(size, *pair) for size in dict.fromkeys(batch_sizes) for pair in series]


def settings(phase: Phase, point: Point) -> Phase:
    """Return a copy of the phase with the point's batch size, method and storage."""
    recipe = phase.recipe
    changed = recipe.model_copy(deep=True)
    changed.sampler.batch_tokens = None
    changed.sampler.batch_size = point.batch_size
    changed.gradient.options = _options(recipe, point.method)
    changed.gradient.method = point.method
    if point.storage != "none":
        changed.gradient.scope = "global"
        changed.gradient.storage = point.storage  # type: ignore[assignment]
    return replace(phase, recipe=changed)


def draw(recipe: Recipe, corpus: Corpus) -> Draw:
    """Draw the first steps of an epoch, for a single rank.

    The epoch is made long enough for full batches: small files are repeated.
    """
    rows = recipe.sampler.batch_size
    assert isinstance(rows, int)
    per_step = rows * len(recipe.tasks) * recipe.engine.accumulation
    number = max(TIMED, min(STEPS, ROWS // per_step))
    if recipe.sampler.name != "sequential":  # which reads every row once, so the rows fix its number of steps
        recipe = recipe.model_copy(deep=True)
        recipe.sampler.steps_per_epoch = max(number, recipe.sampler.steps_per_epoch or 0)
    stream = BatchStream(corpus.train, recipe)
    steps = list(itertools.islice(stream.epoch(0), number))
    return Draw(stream, steps, max(steps, key=lambda step: max(batch.num_tokens for batch in step)))


class Plan:
    """Sizes of steps and predicted memory for the points of a phase, without training."""

    def __init__(self, phase: Phase, *, on_gpu: bool) -> None:
        self.phase, self._on_gpu = phase, on_gpu
        tokenizer = load_tokenizer(phase.recipe.encoder)
        self.model = PhaseModel(phase).model.to("meta")
        if not isinstance(self.model.encoder, PackedEncoder):
            raise UserError(
                f"encoder.implementation: {phase.recipe.encoder.implementation} runs transformers' own modules, whose "
                "memory fastmtl profile cannot predict: profile a packed encoder, or train with train.max_steps=5"
            )
        self.corpus = Corpus.load(phase.recipe, tokenizer, self.model.encoder.max_length)
        check_token_types([*self.corpus.train, *self.corpus.dev], self.model.encoder.settings.type_vocab_size)
        self._loads: dict[int, list[Load]] = {}

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def loads(self, batch_size: int) -> list[Load]:
        """Return the size of each micro-batch of the largest step."""
        if batch_size not in self._loads:
            recipe = settings(self.phase, Point(batch_size, "sum", "none")).recipe
            self._loads[batch_size] = list(map(Load.of, draw(recipe, self.corpus).largest))
        return self._loads[batch_size]

    def shape(self, point: Point, world: int = 1) -> Shape:
        recipe = settings(self.phase, point).recipe
        return Shape.of(recipe, self.model, self.loads(point.batch_size), point.storage, world, on_gpu=self._on_gpu)

    def predict(self, point: Point) -> Prediction:
        return predict(self.shape(point))


def _options(recipe: Recipe, method: str) -> dict[str, Any]:
    """Return the recipe's options if `method` is the recipe's own, else no options."""
    return recipe.gradient.options if method == recipe.gradient.method else {}


def device_of_this_machine() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
