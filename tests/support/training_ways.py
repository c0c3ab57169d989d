"""Two hundred seeded steps of a small model in several configurations, for test_200_steps.py.

Usage: training_ways.py DIRECTORY saves the losses of the ways under DeepSpeed as
DIRECTORY/RANKS.npz.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from op_recorder import OpRecorder
from ranks import run_ranks
from torch import Tensor, nn
from transformers import BertConfig

from fastmtl.bench.textbook import pcgrad
from fastmtl.config import Recipe, Recompute, parse_recipe
from fastmtl.cuda_graphs.install import install_cuda_graphs, not_recorded
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.prefetch import ahead
from fastmtl.data.stream import BatchStream
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.engine.build import build_engine, build_optimizer, build_surgery, lr_factor
from fastmtl.engine.distributed import start
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery, SurgeryAdamW
from fastmtl.surgery.methods.order import draw_order
from fastmtl_kernels import dispatch
from fastmtl_kernels.varlen_attention import reference as varlen_attention_reference
from fastmtl_kernels.varlen_attention.reference import keep_mask

STEPS, TASKS, CLIP = 200, ("kind", "same", "degree"), 1.0
ROWS, VOCABULARY, POSITIONS, DROPOUT = 48, 64, 32, 0.1
# Mean loss of each task, and the share of conflicting pairs of tasks.
Step = Callable[[list[PackedBatch]], tuple[list[float], float]]


@dataclass(frozen=True)
class Way:
    """The configuration of a step; the default is the plain one.

    kernels: "fast" is the choice of impl="auto" here. gradients: "separate", one backward per task
    and PCGrad pair by pair; "separate into J", the same backwards and PCGrad by their Gramian; "one
    pass", where the layers write J. zero: DeepSpeed's stage instead of the torch loop; flat: its
    parameters. ranks: that share a step's rows; their masks differ, so such a way has no dropout.
    recorded: layers and heads, without an adapter, and merging use recorders of operators instead
    of CUDA graphs. weight: of the task `same`. dtype: of all computations.
    """

    kernels: Literal["reference", "fast"] = "reference"
    recompute: Recompute = "none"
    prefetch: int = 0
    gradients: Literal["separate", "separate into J", "one pass"] = "separate"
    storage: Literal["stacked", "kept", "replay"] = "stacked"
    optimizer: Literal["plain", "fused", "SurgeryAdamW"] = "plain"
    zero: int | None = None
    flat: bool = False
    ranks: int = 1
    dropout: float = DROPOUT
    adapter: bool = True
    recorded: bool = False
    weight: float = 2.0
    dtype: torch.dtype = torch.float32


PLAIN, FAST = Way(), Way(kernels="fast")
ONE_PASS = replace(FAST, gradients="one pass")
RECORDED = replace(ONE_PASS, recorded=True, adapter=False, dropout=0.0)
KERNELS = "kernels"
# One option each, on the fast kernels: the oracles would take most of the time.
ALONE = {
    KERNELS: FAST,
    "recompute: cheap": replace(FAST, recompute="cheap"),
    "recompute: full": replace(FAST, recompute="full"),
    "prefetch": replace(FAST, prefetch=2),
    "one backward pass": ONE_PASS,
    "kept": replace(ONE_PASS, storage="kept"),
    "replay": replace(ONE_PASS, storage="replay"),
    "fused AdamW": replace(FAST, optimizer="fused"),
    "recorded layers": RECORDED,
    "SurgeryAdamW": replace(FAST, gradients="separate into J", optimizer="SurgeryAdamW"),
    "ZeRO 1": replace(FAST, gradients="separate into J", zero=1),
    "flat parameters": replace(FAST, gradients="separate into J", zero=1, flat=True),
}
TOGETHER = {
    "all in a torch loop": replace(ONE_PASS, recompute="cheap", prefetch=2, optimizer="SurgeryAdamW"),
    "all under ZeRO 1": replace(ONE_PASS, recompute="cheap", prefetch=2, zero=1, flat=True),
    # J's columns are sent to the other rank while backward runs.
    "all on two ranks": replace(RECORDED, prefetch=2, zero=2, flat=True, ranks=2),
}
WAYS = {**ALONE, **TOGETHER}
UNDER_DEEPSPEED = [name for name, way in WAYS.items() if way.zero is not None]


class Run(NamedTuple):
    """The result of all steps.

    The tasks' mean losses float64 [STEPS, T], and the share of conflicting pairs float64 [STEPS].
    """

    losses: np.ndarray
    conflicts: np.ndarray


def train(way: Way) -> Run:
    recipe = make_recipe(way)
    with ExitStack() as stack:
        if way.kernels == "reference":
            stack.enter_context(reference_kernels())
        model = make_model(way, recipe)
        step = make_step(way, recipe, model)
        torch.manual_seed(5)
        stream = (of_rank(batches, way.ranks) for batches in BatchStream(DATA, recipe).rest(1, 0, 0))
        batches = stack.enter_context(ahead(stream, way.prefetch, torch.device("cpu")))
        losses, conflicts = zip(*map(step, batches), strict=True)
    assert not way.recorded or not not_recorded(model)
    return Run(np.array(losses), np.array(conflicts))


def of_rank(micro_batches: list[PackedBatch], ranks: int) -> list[PackedBatch]:
    """Return this rank's share of the rows."""
    if ranks == 1:
        return micro_batches
    rank = int(os.environ["RANK"])
    return [
        pack(
            [(data, ids.numpy()[rank::ranks]) for data, ids in zip(DATA, batch.example_ids, strict=True)],
            batch.group_counts,
        )
        for batch in micro_batches
    ]


def make_step(way: Way, recipe: Recipe, model: MultiTaskModel) -> Step:
    if way.zero is not None:
        engine = build_engine(recipe, model, way.ranks, STEPS)
        engine.train()
        return surgery_step(recording(way, build_surgery(recipe, engine, model)), engine.step, way)
    optimizer = make_optimizer(way, recipe, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe, STEPS))

    def update() -> None:
        if not isinstance(optimizer, SurgeryAdamW):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    if way.gradients == "separate":
        return plain_step(model, recipe, update)
    surgery = GradientSurgery(
        optimizer,
        tasks=TASKS,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        storage=way.storage,
        task_weights=model.task_weights,
        seed=recipe.seed,
    )
    return surgery_step(recording(way, surgery), update, way, model)


def recording(way: Way, surgery: GradientSurgery) -> GradientSurgery:
    if way.recorded:
        surgery.record_with(partial(record_merging, recorder=OpRecorder()))
    return surgery


def plain_step(model: MultiTaskModel, recipe: Recipe, update: Callable[[], None]) -> Step:
    """Run one backward per task, flat gradients, and projections pair by pair."""
    shared, parts, done = model.shared_parameters(), model.task_parameters(), 0
    own = [*parts["adapters"], *parts["heads"]]

    def step(micro_batches: list[PackedBatch]) -> tuple[list[float], float]:
        nonlocal done
        done += 1
        (batch,) = micro_batches
        losses, rows = model(batch), []
        for name, (total, count) in losses.items():
            loss = model.task_weights[name] * total / count
            found = torch.autograd.grad(loss, [*shared, *own], retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found[: len(shared)]]))
            for parameter, gradient in zip(own, found[len(shared) :], strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        merged = pcgrad(rows, draw_order(len(TASKS), recipe.seed, done))
        for parameter, gradient in zip(shared, merged.split([p.numel() for p in shared]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        update()
        conflicts = [float(one @ other) < 0 for one, other in combinations(rows, 2)]
        return [total.item() / count for total, count in losses.values()], float(np.mean(conflicts))

    return step


def surgery_step(
    surgery: GradientSurgery, update: Callable[[], None], way: Way, own_model: MultiTaskModel | None = None
) -> Step:
    """Run a step by surgery. own_model: None for the engine's model."""

    def one_pass(batch: PackedBatch, model: Any, task_grads: Any) -> Any:
        return (own_model or model)(batch, task_grads)

    def one_by_one(batch: PackedBatch, model: Any) -> Any:
        return (own_model or model)(batch)

    def step(micro_batches: list[PackedBatch]) -> tuple[list[float], float]:
        counts = dict(zip(TASKS, micro_batches[0].group_counts or (), strict=True))
        info = surgery.run(micro_batches, one_pass if way.gradients == "one pass" else one_by_one, counts)
        assert info.skipped is None
        update()
        assert info.conflict_rate is not None
        return [info.losses[name] for name in TASKS], info.conflict_rate

    return step


def make_optimizer(way: Way, recipe: Recipe, model: MultiTaskModel) -> torch.optim.Optimizer:
    if way.optimizer == "fused":
        return build_optimizer(recipe, model.parameter_groups(recipe.optimizer))
    groups = model.parameter_groups(recipe.optimizer)
    if way.optimizer == "SurgeryAdamW":
        return SurgeryAdamW(groups, max_norm=CLIP)
    return torch.optim.AdamW(groups, foreach=True)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Make `impl="auto"` choose the oracles."""
    oracles = {operation: candidates[-1:] for operation, candidates in dispatch.OPERATIONS.items()}
    assert all(candidate.impl == "reference" for (candidate,) in oracles.values())
    with (
        mock.patch.dict(dispatch.OPERATIONS, oracles),
        mock.patch.object(varlen_attention_reference, "keep_mask", _keep_mask),
    ):
        yield


def _keep_mask(seed: Tensor, *place: Any) -> Tensor:
    """Return the oracle's mask, drawn once for all runs: it takes most of a step's time."""
    key = int(seed), *place
    if key not in _MASKS:
        _MASKS[key] = keep_mask(seed, *place)
    return _MASKS[key]


_MASKS: dict[tuple[Any, ...], Tensor] = {}


def make_recipe(way: Way) -> Recipe:
    task = {"data": {"train": "none"}, "head": {"dropout": way.dropout}}
    values = {
        "seed": 3,
        "encoder": {"recompute": way.recompute},
        "adapter": {"name": "low_rank", "size": 4, "dropout": way.dropout} if way.adapter else {"name": "none"},
        "tasks": {
            "kind": {**task, "type": "classification", "num_labels": 3},
            "same": {**task, "type": "binary", "weight": way.weight},
            "degree": {**task, "type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean"},
        },
        "sampler": {"batch_size": {"kind": 2, "same": 2, "degree": 1}, "steps_per_epoch": STEPS},
        "gradient": {"method": "pcgrad", "storage": way.storage},
        "optimizer": {"lr": 2e-3},
        "engine": {"zero": way.zero or 0, "clip": CLIP, "flat_parameters": way.flat},
    }
    return parse_recipe(values, "test")


def make_model(way: Way, recipe: Recipe) -> MultiTaskModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=way.dropout,
        attention_probs_dropout_prob=way.dropout,
        initializer_range=0.1,
    )
    encoder = PackedBert(config, recompute=way.recompute)
    model = MultiTaskModel(recipe, encoder).to(way.dtype).train()
    if way.recorded:
        install_cuda_graphs(model, OpRecorder())
    return model


def make_data() -> list[TokenizedDataset]:
    """Return random words with some of the tasks' own, on which `kind` and `degree` conflict."""
    draw, datasets = np.random.default_rng(0), []
    for name in TASKS:
        texts: list[Any] = []
        seconds: list[Any] = []
        labels: list[Any] = []
        for row in range(ROWS):
            sizes = draw.integers(3, POSITIONS // 2, 2)
            one, two = (draw.integers(10, VOCABULARY, size) for size in sizes)
            if name == "kind":
                label = row % 3
                one[::3] = 3 + label
                texts, seconds = [*texts, one], [*seconds, len(one)]
            elif name == "same":
                label = row % 2
                two[::2] = 6 + label
                texts, seconds = [*texts, np.concatenate([one, two])], [*seconds, len(one)]
            else:
                label = row % 6
                for text in (one, two):
                    text[draw.random(len(text)) < label / 5] = 5
                texts, seconds = [*texts, one, two], [*seconds, len(one), len(two)]
            labels.append(label)
        datasets.append(
            TokenizedDataset(
                tokens=np.concatenate(texts).astype(np.int32),
                offsets=np.cumsum([0, *map(len, texts)]),
                second_text=np.array(seconds, dtype=np.int32),
                sequences_per_example=2 if name == "degree" else 1,
                labels=np.array(labels, dtype=np.int64 if name == "kind" else np.float32),
                ids=[str(row) for row in range(ROWS)],
                truncated=0,
                skipped=[],
                path=Path("none"),
            )
        )
    return datasets


DATA = make_data()


def keep_losses(file: str, names: list[str]) -> None:
    """Keep the losses of ways with as many ranks as there are in a numpy file."""
    ranks = start()
    losses = {name: train(WAYS[name]).losses for name in names}
    if ranks.is_main:
        np.savez(file, **losses)  # type: ignore[arg-type]


if __name__ == "__main__":
    for world in (2, 1):
        names = [name for name in UNDER_DEEPSPEED if WAYS[name].ranks == world]
        run_ranks(world, keep_losses, f"{sys.argv[1]}/{world}.npz", names)
