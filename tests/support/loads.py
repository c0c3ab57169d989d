"""Batches of any kind for the tests of surgery, and their gradients by one backward per task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel

# An adapter, and its layer on top of the encoder; tests under ZeRO use the first four, by stage.
ADAPTERS = ["none", "pal+pal", "low_rank+layer", "lora+layer", "pal", "low_rank", "lora"]
# A LoRA instead of an adapter: one for all tasks with a frozen and with a trained encoder, and one
# for each task.
LORAS = ["frozen:shared", "trained:shared", "trained:own"]


@dataclasses.dataclass(frozen=True)
class Load:
    """A step's input. rows: of each task. accumulation: micro-batches that share them."""

    rows: tuple[int, ...]
    adapter: str
    accumulation: int
    seed: int

    @property
    def tasks(self) -> list[str]:
        return [f"task{t}" for t in range(len(self.rows))]

    def counts(self) -> dict[str, int]:
        return dict(zip(self.tasks, self.rows, strict=True))


def make_recipe(load: Load, zero: int = 1) -> Recipe:
    kinds = (
        {"type": "classification", "num_labels": 3},
        {"type": "binary"},
        {"type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean"},
    )
    tasks = {
        name: {**kinds[(t + load.seed) % 3], "data": {"train": "none"}, "head": {"dropout": 0.0}, "weight": 0.5 + t}
        for t, name in enumerate(load.tasks)
    }
    encoder, _, lora = load.adapter.rpartition(":")
    name, _, top = ("none" if encoder else load.adapter).partition("+")
    projections = 1 + load.seed % 3 if name == "pal" else 1
    adapter = {"name": name, "top": top or "none", "size": 4, "heads": 2, "projections": projections}
    values = {
        "encoder": {"freeze": encoder == "frozen"},
        "adapter": adapter,
        "lora": {"rank": 2, "targets": ["query", "value", "output"], "tasks": lora} if encoder else {},
        "tasks": tasks,
        "gradient": {"method": "pcgrad"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup": 0.0},
        "engine": {"zero": zero, "accumulation": load.accumulation, "clip": 0.0},
    }
    return parse_recipe(values, "test")


def make_model(load: Load, zero: int = 1) -> MultiTaskModel:
    torch.manual_seed(load.seed)
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
    model = MultiTaskModel(make_recipe(load, zero), PackedBert(config)).eval()
    for parameter in () if model.lora is None else model.lora.parameters():
        if not parameter.any():  # B, which is zero in a new model
            parameter.data.normal_(std=0.3)
    return model


def make_batches(load: Load, parts: int) -> list[PackedBatch]:
    random = np.random.default_rng(load.seed)
    datasets = []
    for t, rows in enumerate(load.rows):
        kind = (t + load.seed) % 3
        labels: list[np.ndarray] = [
            random.integers(0, 3, rows),
            random.integers(0, 2, rows).astype(np.float32),
            random.uniform(0, 5, rows).astype(np.float32),
        ]
        per_example = 2 if kind == 2 else 1
        lengths = random.choice([1, 1, 2, 3, 9], rows * per_example)
        datasets.append(
            TokenizedDataset(
                tokens=random.integers(0, 30, lengths.sum()).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(lengths)]),
                second_text=(lengths // 2).astype(np.int32),
                sequences_per_example=per_example,
                labels=labels[kind],
                ids=[str(row) for row in range(rows)],
                truncated=0,
                skipped=[],
                path=Path("none"),
            )
        )
    pieces = ([(data, np.arange(part, len(data.ids), parts)) for data in datasets] for part in range(parts))
    return [pack(piece, load.rows) for piece in pieces]


def jacobian(model: MultiTaskModel, load: Load) -> tuple[Tensor, dict[str, Tensor]]:
    """Return [T, P] of the shared parameters, and the sum of the tasks' own gradients.

    In the model's dtype, with one backward per task.
    """
    (joined,) = make_batches(load, 1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shared_ids = {id(p) for p in model.shared_parameters()}
    rows: list[Tensor] = []
    own: dict[str, Tensor] = {}
    for task, count in load.counts().items():
        loss = model.task_weights[task] * model(joined)[task][0] / max(count, 1)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        by_name = dict(zip(trained, found, strict=True))
        rows.append(torch.cat([by_name[n].flatten().double() for n, p in trained.items() if id(p) in shared_ids]))
        for name, parameter in trained.items():
            if id(parameter) not in shared_ids:
                own[name] = own.get(name, torch.zeros(())) + by_name[name].double()
    return torch.stack(rows), own


def merge(rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the update of PCGrad pair by pair, and the weights of its rows."""
    weights = torch.eye(len(rows), dtype=rows.dtype)
    for i in range(len(rows)):
        for j in order[i].tolist():
            dot = weights[i] @ rows @ rows[j]
            if j != i and dot < 0:
                weights[i, j] -= dot / (rows[j] @ rows[j])
    return weights.sum(0) @ rows, weights.sum(0)
