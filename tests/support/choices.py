"""Tasks of every pooling, head and loss in one small model, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset, UnitTable
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel

_CLASSES = {"type": "classification", "num_labels": 3}
_SCORE = {"type": "regression", "range": [0, 5]}
_PAIRS = {"pairs": "bi", "pooling": "mean"}
TASKS: dict[str, dict[str, Any]] = {
    "max": {**_CLASSES, "pooling": "max"},
    "pooler": {"type": "binary", "pooling": "pooler", "head": {"name": "mlp"}},
    "adjusted": {**_CLASSES, "pooling": "pooler", "head": {"adjustment": True}},
    "ordinal": {**_CLASSES, "loss": "mse", "head": {"name": "rnn", "size": 4}},
    "bins": {**_SCORE, "pairs": "bi", "loss": "cross_entropy", "head": {"name": "lstm", "size": 4, "cls": True}},
    "relu": {**_SCORE, **_PAIRS, "head": {"name": "cosine", "squash": "relu", "projection": 4}},
    "sigmoid": {**_SCORE, **_PAIRS, "head": {"name": "cosine", "squash": "sigmoid"}},
    "squashed": {**_SCORE, "head": {"squash": "sigmoid"}},
    "plus_cosine": {
        "type": "binary",
        **_PAIRS,
        "head": {"name": "linear_cosine", "features": ["u", "v", "product"], "projection": 5},
    },
    "ranked": {
        "type": "binary",
        **_PAIRS,
        "loss": "mnr",
        "mnr": {"scale": 5.0},
        "head": {"name": "cosine", "projection": 4},
    },
    "embedded": {"type": "binary", **_PAIRS, "loss": {"cosine_embedding": 1.0, "bce": 0.5}, "margin": -0.5},
    "which": {"type": "choice", "head": {"name": "rnn", "size": 4}},
    "listed": {"type": "ranking", "pooling": "max", "loss": ["listwise", "pairwise"], "head": {"name": "mlp"}},
    "hard": {
        "type": "ranking",
        **_PAIRS,
        "loss": {"triplet": 1.0, "listwise": 0.5},
        "ranking": {"margin": 1.0},
        "head": {"name": "linear_cosine", "projection": 4},
    },
    "both": {**_SCORE, **_PAIRS, "loss": {"mse": 1.0, "mnr": 0.5}, "mnr": {"scale": 3.0, "similar": 0.4}},
}
ROWS = 4  # rows of each task in a step
STEPS = 2


def make_recipe(
    method: str = "pcgrad", zero: int = 1, accumulation: int = 1, *, cached: bool = False, **sections: Any
) -> Recipe:
    """Return the recipe. cached: negatives of the whole step, not per micro-batch."""
    tasks = {}
    for name, task in TASKS.items():
        tasks[name] = {**task, "data": {"train": "none"}, "head": {"dropout": 0.0, **task.get("head", {})}}
        if "mnr" in task.get("loss", ""):
            tasks[name]["mnr"] = {**task.get("mnr", {}), "cached": cached}
    smart = {
        "strength": {"max": 1.0, "bins": 0.5, "relu": 2.0, "hard": 1.0},
        "proximal": {"max": 0.5, "ordinal": 2.0, "ranked": 1.0},
        "momentum": 0.5,
        "noise": 0.05,
        "epsilon": 0.3,
        "step_size": 0.28,
    }
    values = {
        "adapter": {"name": "low_rank", "size": 3},
        "weighting": {"name": "uncertainty"},
        "smart": smart if zero < 3 else {},
        "tasks": tasks,
        "gradient": {"method": method},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup": 0.0},
        "engine": {"zero": zero, "accumulation": accumulation, "clip": 0.0},
        **sections,
    }
    return parse_recipe(values, "test")


def make_model(recipe: Recipe) -> MultiTaskModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    encoder = PackedBert(config)
    encoder.reserve_pooler()
    assert encoder.pooler is not None
    for weight in encoder.pooler.buffers():
        torch.nn.init.normal_(weight, std=0.3)
    model = MultiTaskModel(recipe, encoder).train()
    with torch.no_grad():
        head: Any
        for index, head in enumerate(model.heads):
            head.uncertainty.log_variance_bias += 0.2 * (index % 5) - 0.5
    if model.smart is not None:
        model.smart.start_teacher(model)
        assert model.smart.teacher is not None
        for parameter in model.smart.teacher.parameters():
            parameter *= 0.9  # type: ignore[misc]
        model.smart.noise = _noise  # type: ignore[method-assign]
    return model


def _noise(batch: PackedBatch, device: torch.device, size: int) -> Tensor:
    """Replace random numbers, which differ between ways of distributing rows."""
    tokens = 7 * batch.input_ids + batch.position_ids
    return 0.05 * torch.sin(tokens[:, None] * torch.arange(1, size + 1)).to(device)


def make_data(recipe: Recipe, seed: int = 0) -> list[TokenizedDataset]:
    random = np.random.default_rng(seed)
    datasets = []
    for task in recipe.tasks.values():
        rows, per_example = STEPS * ROWS, 2 if task.pairs == "bi" else 1
        counts = 2 + np.arange(rows) % 3  # candidates of each row
        units = UnitTable(
            np.concatenate([[0], np.cumsum(counts)]), None, labelled=task.type == "ranking", query_first=per_example > 1
        )
        offsets = None
        if task.scores == "sequences":
            offsets = units.offsets + (np.arange(rows + 1) if task.pairs == "bi" else 0)
        sequences = rows * per_example if offsets is None else offsets[-1]
        lengths = random.choice([1, 2, 3, 7], sequences)
        labels = {
            "choice": random.integers(0, counts),
            "ranking": random.integers(0, 3, counts.sum()).astype(np.float32),
            "classification": random.integers(0, 3, rows),
            "binary": (np.arange(rows) % 4 != 1).astype(np.float32),
            "regression": random.uniform(0, 5, rows).astype(np.float32),
        }
        datasets.append(
            TokenizedDataset(
                tokens=random.integers(0, 30, lengths.sum()).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(lengths)]),
                second_text=(lengths // 2).astype(np.int32),
                sequences_per_example=per_example,
                labels=labels[task.type],
                ids=[str(row) for row in range(rows)],
                truncated=0,
                skipped=[],
                path=Path("none"),
                example_offsets=offsets,
                units=None if offsets is None else units,
            )
        )
    return datasets


def make_batches(recipe: Recipe, step: int, parts: int) -> list[PackedBatch]:
    """Return a step's rows in pieces. Every second task has rows in the first piece alone."""
    rows = np.arange(step * ROWS, (step + 1) * ROWS)
    data = make_data(recipe)
    pieces = []
    for part in range(parts):
        own = [rows[part::parts] if t % 2 == 0 else rows[: 3 if part == 0 else 0] for t in range(len(data))]
        pieces.append(pack(list(zip(data, own, strict=True)), [ROWS if t % 2 == 0 else 3 for t in range(len(data))]))
    return pieces


def counts(recipe: Recipe) -> dict[str, int]:
    return {name: ROWS if t % 2 == 0 else 3 for t, name in enumerate(recipe.task_names)}


def jacobian(model: MultiTaskModel, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return [T, P] of the shared parameters by T backwards, and the others' summed gradients."""
    shared_ids = {id(p) for p in model.shared_parameters()}
    rows, losses = [], model(batch)
    own: dict[str, Tensor] = {}
    for name, count in counts(model.recipe).items():
        loss, parameters = losses[name][0] / count, list(model.parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        pairs = list(zip(model.named_parameters(), found, strict=True))
        rows.append(torch.cat([grad.flatten().double() for (_, p), grad in pairs if id(p) in shared_ids]))
        for (key, p), grad in pairs:
            if id(p) not in shared_ids:
                own[key] = own.get(key, torch.zeros(())) + grad.double()
    return torch.stack(rows), own
