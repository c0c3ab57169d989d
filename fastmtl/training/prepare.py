"""Preparation of a run: all checks and loading before the first DeepSpeed engine is made.

`train` continues after the preparation and `train --check` stops there, so both give the same
errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastmtl.config import Recipe
from fastmtl.data.class_weights import with_class_weights
from fastmtl.data.completion import with_class_names
from fastmtl.data.corpus import Corpus, CorpusRows, folder_of
from fastmtl.data.find_places import find_places
from fastmtl.data.tokenized import check_token_types
from fastmtl.engine.build import check_engine
from fastmtl.engine.checkpoint import Checkpoints, Found
from fastmtl.engine.distributed import Ranks, join, this_process
from fastmtl.engine.early_errors import errors_reach_rank_0
from fastmtl.engine.fused_optimizers import check_fused_optimizer
from fastmtl.engine.recipe_changes import Changes, changed_rows, refuse, resume_notes
from fastmtl.errors import UserError
from fastmtl.files.output_folder import check_room
from fastmtl.model.add_task import complete
from fastmtl.model.encoder.one_pass import check_one_pass
from fastmtl.model.encoder.pretrained import load_tokenizer
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.model.heads import RECURRENT
from fastmtl.model.lora.start import with_settings_of_path
from fastmtl.tracking.backends import check_tracking
from fastmtl.training.early_checks import check_schedules
from fastmtl.training.phase_model import PhaseModel
from fastmtl.training.phases import Phase, phases_of
from fastmtl.training.progress import Job, Progress, resumed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Start:
    """A run that is ready to begin.

    recipe: the complete recipe. found: the checkpoint to resume from, or None. changes: settings
    and rows that differ from those of `found`. at: the position in the run. model: the model of the
    phase at that position. jobs: one per phase. notes: lines for the user about the resume.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    checkpoints: Checkpoints
    found: Found | None
    changes: Changes
    at: Progress
    model: PhaseModel
    jobs: list[Job]
    notes: list[str]


def prepare(
    recipe: Recipe,
    output: Path,
    ranks: Ranks,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    rows: CorpusRows | None = None,
) -> Start:
    """Check and load everything that a run needs, and connect the ranks.

    Every rank calls this function. Nothing is written to `output`; the tokens go to
    `data.cache_dir`. rows: the rows of the recipe's files, if they have been read already. Raises
    UserError for a setting, a file or a checkpoint that this run cannot use.
    """
    with errors_reach_rank_0():  # all checks that are possible before DeepSpeed starts
        if rows is None:
            recipe = with_class_names(recipe)
        recipe = with_settings_of_path(complete(recipe))
        phases = phases_of(recipe)  # first, so that a wrong name is found before data are read
        check_tracking(recipe)
        for phase in phases:
            check_fused_optimizer(phase.recipe)
            check_engine(phase.recipe, ranks.world)
        rows = rows or CorpusRows.read(recipe)
        phases = [replace(phase, recipe=with_class_weights(phase.recipe, rows)) for phase in phases]
        check_schedules(phases, rows, ranks.world)
        tokenizer = load_tokenizer(recipe.encoder)
        _check_first_token(recipe, tokenizer)
        checkpoints = Checkpoints(output / "checkpoints", recipe, ranks)
        found = checkpoints.find() if resume else None
        changes = {} if found is None else found.changes(recipe)
        refuse(str(found and found.path), changes, accept_changes)
        at = resumed(found, phases)
        model = _checked_models(phases, at.phase)
        if ranks.is_main:
            check_room(output, model.least_saved)
    join(ranks)
    ranks.agree()
    encoder = model.model.encoder
    corpus = ranks.in_turn(lambda: Corpus.load(recipe, tokenizer, encoder.max_length, rows))
    check_token_types([*corpus.train, *corpus.dev], encoder.settings.type_vocab_size)
    digests = corpus.digests(recipe)
    check_same_rows(ranks, digests)
    data_changes = {} if found is None else changed_rows(at.data, digests)
    refuse(str(found and found.path), data_changes, accept_changes)
    at.data = digests
    changes = {**changes, **data_changes}
    jobs = [Job.of(phase, corpus.only(recipe, phase.recipe.task_names), tokenizer, ranks) for phase in phases]
    moved = jobs[at.phase].fit(at)
    notes = resume_notes(changes, recipe) + ([] if moved is None else [moved])
    return Start(recipe, tokenizer, corpus, checkpoints, found, changes, at, model, jobs, notes)


def check_same_rows(ranks: Ranks, digests: dict[str, str]) -> None:
    """Raise UserError on all ranks if their data sets differ."""
    every = ranks.all_gather(digests) if ranks.world > 1 else [digests]
    for name in digests:
        other = next((rank for rank, found in enumerate(every) if found.get(name) != every[0].get(name)), None)
        if other is not None:
            raise UserError(f"the rows of {name} differ between ranks 0 and {other}: give every process the same rows")


def check_run(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    local_rank: int | None = None,
    rows: CorpusRows | None = None,
) -> str | None:
    """Check a run and return lines about what was checked; None on every rank but the first.

    Arguments and errors are those of `train`. Nothing is trained or written to `output`.
    """
    ranks = this_process(local_rank)
    start = prepare(recipe, output, ranks, resume=resume, accept_changes=accept_changes, rows=rows)
    if not ranks.is_main:
        return None
    recipe, data = start.recipe, folder_of(start.recipe)
    files = [dataset for dataset in (*start.corpus.train, *start.corpus.dev) if dataset is not None]
    places = [
        place
        for task in recipe.tasks.values()
        for split in ("train", "dev")
        for place in find_places(task.data.names(split), data.dir or ".", split)
    ]
    note = start.model.model.encoder.note
    skipped = sum(len(dataset.skipped) for dataset in files)
    parts = [
        _counted(len(recipe.tasks), "task"),
        _counted(len(places), "file"),
        _counted(sum(dataset.num_rows for dataset in files), "row")
        + (f" ({_counted(skipped, 'bad one')} skipped)" if skipped else ""),
        f"encoder {recipe.encoder.path}" + (f" ({note.removeprefix('encoder: ')})" if note else ""),
        _counted(ranks.world, "process", "processes"),
    ]
    if start.found is not None:
        parts.append(f"resumed after step {start.at.step}")
    drawn = [
        f"{name} dev: {note}"
        for (name, task), dev in zip(recipe.tasks.items(), start.corpus.dev, strict=True)
        for note in (dev.notes if dev is not None and data.dev_share(task.data) else ())
    ]
    return "\n".join([*drawn, f"checked, nothing was trained: {', '.join(parts)}"])


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _checked_models(phases: list[Phase], first: int) -> PhaseModel:
    """Build the models of all phases, to find their errors now; return that of phase `first`."""
    return [model for model in map(_checked_model, phases) if model.phase.index == first][0]


def _checked_model(phase: Phase) -> PhaseModel:
    model, recipe = PhaseModel(phase), phase.recipe
    encoder = model.model.encoder
    if isinstance(encoder, TransformersEncoder) and recipe.gradient.method != "sum" and not recipe.encoder.freeze:
        check_one_pass(encoder, recipe.gradient.method)
    return model


def _check_first_token(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a task that reads a text's first state if no added token is first."""
    added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    for name, task in recipe.tasks.items() if not added[0] else ():
        pools = task.scores != "tokens" and task.head.name not in RECURRENT
        if task.head.cls or (task.pooling == "cls" and pools):
            key = "head.cls" if task.head.cls else "pooling: cls"
            raise UserError(
                f"tasks.{name}.{key} reads a text's first token, and the tokenizer of {recipe.encoder.path} begins "
                "no text with [CLS]: use pooling: mean or max"
            )
