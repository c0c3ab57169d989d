"""The training loop: from a recipe to a model directory.

Order of a step: `BatchStream` draws this rank's micro-batches, `GradientSurgery.run` turns them into one merged
gradient inside the
DeepSpeed engine, `engine.step` applies it. Evaluation, checkpoints and tracking hang off that loop and change nothing
in it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmtl.config import Recipe
from fastmtl.data.corpus import Corpus
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.stream import BatchStream
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks, StopFlag, start
from fastmtl.engine.fused_optimizers import check_fused_optimizer
from fastmtl.engine.gather import gathered_state_dict
from fastmtl.evaluation import Scores, score
from fastmtl.metrics import check_metrics, evaluate_predictions, mean_score, selected_score
from fastmtl.model.add_task import complete
from fastmtl.model.cached_pairs import cache_pairs
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.pretrained import load_encoder, load_tokenizer
from fastmtl.ranges import each, named
from fastmtl.run_files import RunFiles
from fastmtl.surgery.methods import find_method
from fastmtl.surgery.task_gradients import TaskGradients
from fastmtl.tracking import Tracker


@dataclass
class Progress:
    """Where a run is; kept in every checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # the epoch that goes on, from 0
    step_in_epoch: int = 0
    best: float | None = None  # value of early_stopping.metric
    epochs_without_gain: int = 0
    seconds: float = 0.0
    surgery: dict[str, Any] = field(default_factory=dict)


def train(recipe: Recipe, output: Path, *, resume: bool = False, local_rank: int | None = None) -> None:
    """Runs a recipe; every rank calls it.

    Leaves config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/ (of the best epoch), predictions/ and
    report.html in `output`.
    Raises UserError for what the user can mend. SIGTERM ends the current step, saves, and returns.
    """
    recipe = complete(recipe)
    check_metrics(recipe)
    find_method(recipe.gradient.method, options=recipe.gradient.options)  # a wrong name costs no waiting for data
    check_fused_optimizer(recipe)
    ranks = start(local_rank)
    stop = StopFlag()
    tokenizer = load_tokenizer(recipe.encoder)
    torch.manual_seed(recipe.seed)  # the same new heads and adapters on every rank
    model = MultiTaskModel(recipe, load_encoder(recipe.encoder))
    corpus = ranks.in_turn(lambda: Corpus.load(recipe, tokenizer, model.encoder.max_length))
    stream = BatchStream(corpus.train, recipe, ranks.rank, ranks.world)
    epochs = recipe.train.epochs
    total_steps = sum(stream.steps(epoch) for epoch in range(epochs))
    total_steps = min(total_steps, recipe.train.max_steps or total_steps)
    checkpoints = Checkpoints(output / "checkpoints", recipe, ranks)
    found = checkpoints.find() if resume else None
    engine = build_engine(recipe, model, ranks.world, total_steps, universal=found is not None and found.universal)
    surgery = build_surgery(recipe, engine, model)
    torch.manual_seed(recipe.seed + 1 + ranks.rank)  # other dropout masks on every rank
    at = Progress(**checkpoints.restore(engine, found)) if found else Progress()
    if at.surgery:
        surgery.load_state_dict(at.surgery)
    files = RunFiles(output, recipe, tokenizer, corpus, ranks, resume=resume)
    tracker = Tracker(output, recipe, total_steps, at.step, is_main=ranks.is_main)
    for note in files.notes():
        tracker.message(note)

    def loss_fn(batch: PackedBatch, model: Any, task_grads: TaskGradients) -> dict[str, tuple[torch.Tensor, int]]:
        return model(batch, task_grads)

    def save(value: float | None = None) -> None:
        at.surgery = surgery.state_dict()
        checkpoints.save(engine, at.step, asdict(at), value)

    def stopped() -> bool:
        if not ranks.any(stop.up):
            return False
        save()
        tracker.message(f"stopped at step {at.step}; go on with --resume")
        return True

    begun = time.monotonic() - at.seconds
    while at.epoch < epochs and at.step < total_steps:
        engine.train()
        for micro_batches in each("data", stream.epoch(at.epoch, at.step_in_epoch)):
            with named("data"):
                micro_batches = [batch.to(ranks.device) for batch in micro_batches]
            micro_batches = cache_pairs(engine.module, micro_batches)
            counts = dict(zip(recipe.task_names, micro_batches[0].group_counts or (), strict=True))
            weights = stream.loss_weights(at.epoch, at.step_in_epoch)
            info = surgery.run(micro_batches, loss_fn, counts, weights)
            if info.skipped is None:
                with named("optimiser"):
                    engine.step()
            else:
                tracker.message(f"step {at.step + 1} skipped: the gradient of {info.skipped} is not finite")
            at.step += 1
            at.step_in_epoch += 1
            at.seconds = time.monotonic() - begun
            tokens = ranks.world * sum(batch.num_tokens for batch in micro_batches)
            tracker.step(at.step, at.epoch, info, _learning_rates(engine), tokens)
            if at.step == total_steps:
                break
            if stopped():
                tracker.close()
                return
            if recipe.train.checkpoint_every and at.step % recipe.train.checkpoint_every == 0:
                save()
        at.epoch, at.step_in_epoch = at.epoch + 1, 0
        scored = evaluate(recipe, engine, corpus, ranks)
        dev = {name: evaluate_predictions(recipe.tasks[name], s.scores, s.labels) for name, s in scored.items()}
        value = selected_score(dev, recipe) if dev else None
        if dev:
            tracker.evaluation(at.step, at.epoch - 1, dev, mean_score(dev, recipe))
        if value is None or at.best is None or value > at.best:
            at.best, at.epochs_without_gain = value, 0
            files.keep(scored, gathered_state_dict(engine), model)
        else:
            at.epochs_without_gain += 1
        save(value)
        if recipe.early_stopping.patience and at.epochs_without_gain >= recipe.early_stopping.patience:
            tracker.message(
                f"{recipe.early_stopping.metric} has not grown for {at.epochs_without_gain} epochs: stopped early"
            )
            break
        if at.epoch < epochs and ranks.any(stop.up):
            tracker.message(f"stopped at step {at.step}; go on with --resume")
            tracker.close()
            return
    kept = files.finish(at.step, at.seconds)
    if kept is not None and kept["dev"]:
        tracker.scores(kept["dev"], kept["mean"], "dev scores of the kept model")
    tracker.message(f"model: {output / 'model'}\nreport: {output / 'report.html'}")
    tracker.close()
    stop.release()


def evaluate(recipe: Recipe, engine: Any, corpus: Corpus, ranks: Ranks) -> dict[str, Scores]:
    """Scores of every task that has a dev file, the same on every rank."""
    engine.eval()
    datasets = {name: data for name, data in zip(recipe.task_names, corpus.dev, strict=True) if data is not None}

    def predict(batch: PackedBatch) -> dict[str, torch.Tensor]:
        return engine.module.predict(batch.to(ranks.device))

    return score(predict, recipe, datasets, rank=ranks.rank, world=ranks.world, all_gather=ranks.all_gather)


def _learning_rates(engine: Any) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
