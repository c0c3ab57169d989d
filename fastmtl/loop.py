"""The training loop: from a recipe to a model directory.

A run is a sequence of phases, usually only one. In a step, `BatchStream` draws this rank's
micro-batches, `GradientSurgery.run` turns them into one merged gradient inside the DeepSpeed
engine, and `engine.step` applies it. Evaluation, checkpoints and tracking are called from the loop
and do not change its results.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastmtl.config import MLM, Recipe
from fastmtl.data.corpus import Corpus, CorpusRows
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.prefetch import ahead
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks, StopFlag, this_process
from fastmtl.engine.gather import gathered_state_dict
from fastmtl.files.writing import writing
from fastmtl.inference.evaluation import score
from fastmtl.inference.metrics import load_libraries
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import evaluate_scores, mean_score, selected_score
from fastmtl.measure import heap
from fastmtl.measure.ranges import profile_iter, profile_range
from fastmtl.model.saved_model import restore_previous
from fastmtl.report import write_report
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.targets.flat import whole_model
from fastmtl.tracking import Tracker
from fastmtl.training.objectives import Objectives
from fastmtl.training.phase_model import PhaseModel
from fastmtl.training.prepare import prepare
from fastmtl.training.progress import Job, Progress
from fastmtl.training.run_files import RunFiles


@dataclass
class Run:
    """The objects that the phases of a run share."""

    ranks: Ranks
    stop: StopFlag
    checkpoints: Checkpoints
    files: RunFiles
    tracker: Tracker
    at: Progress


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    local_rank: int | None = None,
    rows: CorpusRows | None = None,
) -> None:
    """Train a recipe and write the run's files to `output`. Every rank calls this function.

    The files are config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/ (of the best
    epoch), predictions/ and report.html. After SIGTERM this function trains at most one more step,
    saves a checkpoint and returns.

    resume: continue from the newest checkpoint in `output`. accept_changes: resume even if settings
    or training rows differ from those of the checkpoint. rows: the rows of the recipe's files, if
    they have been read already. Raises UserError for errors that the user can fix.
    """
    if not torch.cuda.is_available():
        heap.map_large_blocks()
    ranks = this_process(local_rank)
    start = prepare(recipe, output, ranks, resume=resume, accept_changes=accept_changes, rows=rows)
    stop = StopFlag()
    if resume and ranks.is_main:
        restore_previous(output / "model")
    recipe, tokenizer, corpus, jobs = start.recipe, start.tokenizer, start.corpus, start.jobs
    checkpoints, found, at, model, notes = start.checkpoints, start.found, start.at, start.model, list(start.notes)
    if jobs[at.phase].is_over(at):
        if jobs[at.phase] is not jobs[-1]:
            at, found = at.next_phase(), None
        else:
            notes.append(
                f"nothing is left to train after step {at.step}: raise train.epochs or train.max_steps to continue"
            )
    load_libraries()
    run: Run | None = None
    for job in jobs[at.phase :]:
        phase = job.phase
        if run is not None or model.phase is not phase:
            model = PhaseModel(phase)
        if phase.index:
            model.take_over(output / "model", ranks)
        objectives = Objectives(phase.recipe, model.trained, job.corpus)
        universal = found is not None and found.universal
        here = at if run is None else run.at
        number = job.last_step(here) - here.first_step
        engine = build_engine(phase.recipe, model.trained, ranks.world, number, universal=universal)
        surgery = build_surgery(phase.recipe, engine, model.trained, phase.loss_names)
        torch.manual_seed(phase.recipe.seed + 1 + ranks.rank)  # different dropout masks on every rank
        if found is not None:
            checkpoints.restore(engine, found)
            tensors = found.tensors()
            surgery.load_state_dict(at.surgery)
            surgery.load_tensors(tensors)
            objectives.load(at.objectives, tensors)
            found = None
        if run is None:
            with writing(output):
                files = RunFiles(output, recipe, tokenizer, corpus, ranks)
                if at.step < job.last_step(at):
                    files.take_back()
                files.record(at.step, start.changes)
                total = job.last_step(at) + sum(later.last_step(Progress()) for later in jobs[phase.index + 1 :])
                tracker = Tracker(
                    output, recipe, total, at.step, within_epoch=at.step_in_epoch > 0, is_main=ranks.is_main
                )
            for note in [*notes, *files.notes()]:
                tracker.message(note)
            run = Run(ranks, stop, checkpoints, files, tracker, at)
        if phase.name is not None:
            run.tracker.begin_phase(phase.name, phase.recipe)
        for note in [*model.notes, *job.stream.notes(phase.recipe.train.epochs)]:
            run.tracker.message(note)
        rest = job.stream.rest(phase.recipe.train.epochs, run.at.epoch, run.at.step_in_epoch)
        with ahead(rest, phase.recipe.data.prefetch, ranks.device) as steps:
            ended = run_phase(run, job, steps, model, engine, surgery, objectives)
        if not ended:
            run.tracker.message(f"stopped at step {run.at.step}; continue with --resume")
            with writing(output):
                run.tracker.close()
            return
        if job is not jobs[-1]:
            run.at = run.at.next_phase()
            engine.destroy()
            # They are in reference cycles, and their CUDA graphs own memory that is freed only now.
            del model, engine, surgery, objectives
            gc.collect()
    assert run is not None
    with writing(output / "report.html", "--resume writes the report again when there is room."):
        results = run.files.results(run.at.step, run.at.seconds)
        if results is not None:
            write_report(output, results)
    if results is not None and results["dev"]:
        run.tracker.scores(results["dev"], results["mean"], "dev scores of the kept model")
    run.tracker.message(f"model: {output / 'model'}\nreport: {output / 'report.html'}")
    with writing(output):
        run.tracker.close()
    stop.release()


def run_phase(
    run: Run,
    job: Job,
    steps: Iterator[list[PackedBatch]],
    model: PhaseModel,
    engine: Any,
    surgery: GradientSurgery,
    objectives: Objectives,
) -> bool:
    """Train from the position of the run to the end of the phase; return True.

    steps: the micro-batches of the remaining steps, on the device. Returns False if the run was
    stopped before; a checkpoint has been saved then.
    """
    phase, recipe, stream = job.phase, job.phase.recipe, job.stream
    ranks, tracker, at = run.ranks, run.tracker, run.at
    last_step = job.last_step(at)

    def loss_fn(batch: PackedBatch, model: Any, task_grads: Sink) -> dict[str, tuple[torch.Tensor, int]]:
        return model(batch, task_grads)

    def save(value: float | None = None) -> None:
        at.surgery, at.objectives = surgery.state_dict(), objectives.state_dict()
        with writing(run.files.output / "metrics.jsonl"):
            tracker.flush()
        advice = "Make room and continue from the last checkpoint with --resume."
        with writing(run.checkpoints.path(at.step), advice):
            tensors = {**objectives.tensors(), **surgery.tensors()}
            run.checkpoints.save(engine, at.step, asdict(at), value, phase.name, tensors)

    begun = time.monotonic() - at.seconds
    while not job.is_over(at):
        engine.train()
        at.epoch_steps = stream.steps(at.epoch)
        left = max(0, min(at.epoch_steps - at.step_in_epoch, last_step - at.step))
        for micro_batches in profile_iter("data", islice(steps, left)):
            micro_batches = objectives.prepare(micro_batches)
            counts = dict(zip(phase.loss_names, micro_batches[0].group_counts or (), strict=True))
            weights = objectives.weights(stream.loss_weights(at.epoch, at.step_in_epoch))
            info = surgery.run(micro_batches, loss_fn, counts, weights, stop=run.stop.requested)
            if info.skipped is None:
                with profile_range("optimiser"):
                    engine.step()
            else:
                tracker.message(f"step {at.step + 1} skipped: the gradient of {info.skipped} is not finite")
            objectives.after_step(info)
            at.step += 1
            at.step_in_epoch += 1
            at.seconds = time.monotonic() - begun
            tokens = ranks.world * sum(batch.num_tokens for batch in micro_batches)
            with writing(run.files.output / "metrics.jsonl"):
                tracker.step(at.step, at.epoch, info, _learning_rates(engine), tokens)
            if ranks.device.type == "cpu":  # batches of different sizes fragment the heap
                heap.trim()
            if at.step == last_step:
                break
            if info.stop:
                save()
                return False
            if recipe.train.checkpoint_every and at.step % recipe.train.checkpoint_every == 0:
                save()
        cut = at.step_in_epoch < at.epoch_steps  # train.max_steps ends the phase within an epoch
        if cut:
            if left:
                save()  # before the evaluation, which a longer run skips here
            with writing(run.files.output / "model"):
                run.files.set_aside()
        at.epoch, at.step_in_epoch = at.epoch + 1, 0
        with objectives.averaged() as averages:
            scored = {} if phase.objective == MLM else evaluate(recipe, engine, job.corpus, ranks)
            dev = {name: evaluate_scores(recipe.tasks[name], s) for name, s in scored.items()}
            value = selected_score(dev, recipe) if dev else None
            if dev:
                with writing(run.files.output / "metrics.jsonl"):
                    tracker.evaluation(at.step, at.epoch - 1, dev, mean_score(dev, recipe))
            for note in objectives.after_epoch(dev, lambda corpus: evaluate(recipe, engine, corpus, ranks)):
                tracker.message(note)
            gained = at.gained(phase, dev, value)
            at.epochs_without_gain = 0 if gained else at.epochs_without_gain + 1
            to_keep = recipe.task_names if phase.keep == "last" else gained
            if to_keep:
                gathered = model.whole(gathered_state_dict(engine, averages))
                with writing(run.files.output / "model"):
                    run.files.keep(phase, scored, gathered, model.model, to_keep)
        if cut:
            break
        patience = recipe.early_stopping.patience
        at.early = patience is not None and at.epochs_without_gain >= patience
        save(value)
        if at.early:
            tracker.message(
                f"{recipe.early_stopping.metric} has not grown for {at.epochs_without_gain} epochs: stopped early"
            )
        if not job.is_over(at) and ranks.any(run.stop.requested):
            return False
    return True


@heap.mapping_small_blocks()
def evaluate(recipe: Recipe, engine: Any, corpus: Corpus, ranks: Ranks) -> dict[str, Scores]:
    """Score the dev rows of every task that has a dev file; return {task: Scores} on all ranks."""
    engine.eval()
    datasets = {name: data for name, data in zip(recipe.task_names, corpus.dev, strict=True) if data is not None}

    def predict(batch: PackedBatch) -> dict[str, torch.Tensor]:
        return whole_model(engine).predict(batch.to(ranks.device))

    return score(predict, recipe, datasets, rank=ranks.rank, world=ranks.world, all_gather=ranks.all_gather)


def _learning_rates(engine: Any) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
