"""What is measured on: sizes of encoders, lengths of texts, and the same rows packed and padded.

Weights and tokens are random: neither changes the time of a step. Without dropout, the default, packed and padded
models compute the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from fastmtl.bench.textbook import PaddedBatch, PaddedModel
from fastmtl.config import parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.model.encoder import PackedBert
from fastmtl.model.multitask import MultiTaskModel

SEED = 1

# Type and number of outputs of tasks 0, 1, 2, 3 = 0, ...
KINDS = (("binary", 1), ("regression", 1), ("classification", 5))
# Tokens of their texts with [CLS] and [SEP], at these quantiles: pairs of questions, pairs of sentences, sentences of
# reviews. Means 30, 28 and 25, the longest of 32 texts two to three times as long.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
LENGTHS = ((10, 16, 21, 27, 35, 46, 60, 96), (9, 14, 18, 24, 33, 46, 62, 100), (4, 9, 16, 23, 33, 40, 48, 64))


@dataclass(frozen=True)
class Shape:
    """An encoder's size, and the sequences of each task in a step."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    rows: int
    vocabulary: int = 30522
    positions: int = 512


SHAPES = {
    "minilm": Shape("minilm", hidden=384, layers=6, heads=12, intermediate=1536, rows=32),
    "bert-base": Shape("bert-base", hidden=768, layers=12, heads=12, intermediate=3072, rows=8),
}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """What a workload is made from.

    tokens: of the whole step, an equal part for each task; None: each task has the shape's rows. device: "cpu" or
    "cuda". precision: of weights and activations, a key of PRECISIONS. dropout: of hidden states and of attention's
    probabilities.
    """

    shape: Shape
    tasks: int = 3
    tokens: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    dropout: float = 0.0


class Workload:
    """A step's rows and the models that run on them.

    The models are made when they are asked for and share their weights' memory; no gradient is shared.
    """

    def __init__(self, size: Size) -> None:
        shape, tasks, tokens = size.shape, size.tasks, size.tokens
        self.shape, self.tasks, self._dropout = shape, tasks, size.dropout
        self.device, self.dtype = torch.device(size.device), PRECISIONS[size.precision]
        self._kinds = [KINDS[task % len(KINDS)] for task in range(tasks)]
        random = np.random.default_rng(SEED)
        lengths = [
            _lengths(task, shape.rows)
            if tokens is None
            else _lengths_of_tokens(task, tokens // tasks + (task < tokens % tasks))
            for task in range(tasks)
        ]
        rows = [self._rows(task, random.permutation(lengths[task]), random) for task in range(tasks)]
        self.packed_batch: PackedBatch = pack([(dataset, np.arange(len(dataset))) for dataset in rows])
        self.packed_batch = self.packed_batch.to(self.device)
        self.padded_batches = [_pad(dataset).to(self.device) for dataset in rows]

    @cached_property
    def padded(self) -> PaddedModel:
        config = BertConfig(
            vocab_size=self.shape.vocabulary,
            hidden_size=self.shape.hidden,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            intermediate_size=self.shape.intermediate,
            max_position_embeddings=self.shape.positions,
            hidden_dropout_prob=self._dropout,
            attention_probs_dropout_prob=self._dropout,
        )
        torch.manual_seed(SEED)
        model = PaddedModel(config, self._kinds)
        for head, (kind, _) in zip(model.heads, self._kinds, strict=True):
            if kind == "regression":  # equal heads and opposite labels: some of the tasks conflict
                head.load_state_dict(model.heads[0].state_dict())
        return model.to(self.device, self.dtype)

    @cached_property
    def packed(self) -> MultiTaskModel:
        sizes: dict[str, dict[str, Any]] = {"regression": {"range": [-2, 2]}, "binary": {}}
        tasks = {}
        for task, (kind, outputs) in enumerate(self._kinds):
            size = sizes.get(kind, {"num_labels": outputs})
            tasks[f"task{task}"] = {"type": kind, "data": {}, "head": {"dropout": 0.0}, **size}
        recipe = parse_recipe({"tasks": tasks}, "benchmark")
        config, weights = self.padded.encoder.config, self.padded.state_dict()
        with torch.device("meta"):
            model = MultiTaskModel(recipe, PackedBert(config))
        model.load_state_dict({name: weights[plain_name(name)] for name in model.state_dict()}, assign=True)
        return model

    @property
    def num_padded(self) -> int:
        """Tokens of the padded batches."""
        return sum(batch.input_ids.numel() for batch in self.padded_batches)

    def _rows(self, task: int, lengths: np.ndarray, random: np.random.Generator) -> TokenizedDataset:
        kind, outputs = self._kinds[task]
        labels: dict[str, np.ndarray] = {
            "classification": random.integers(0, outputs, len(lengths)),
            "binary": (random.random(len(lengths)) < 0.8).astype(np.float32),
            "regression": random.uniform(-2, 0, len(lengths)).astype(np.float32),
        }
        return TokenizedDataset(
            # 0 is [PAD], which no text holds: BertModel gives its embedding no gradient.
            tokens=random.integers(1, self.shape.vocabulary, lengths.sum()).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            second_text=(lengths if kind == "classification" else lengths // 2).astype(np.int32),
            sequences_per_example=1,
            labels=labels[kind],
            ids=[str(row) for row in range(len(lengths))],
            truncated=0,
            skipped=[],
            path=Path("random"),
        )


def plain_name(name: str) -> str:
    """A parameter's name in PaddedModel, from that in either model: `heads.<task>.dense` is a MultiTaskModel's."""
    return name.replace(".dense.", ".") if name.startswith("heads.") else name


def _lengths(task: int, rows: int) -> np.ndarray:
    """int64 [rows], evenly over the quantiles: a few texts have the mean and the tail of many."""
    found = np.interp((np.arange(rows) + 0.5) / rows, QUANTILES, LENGTHS[task % len(LENGTHS)])
    return np.rint(found).astype(np.int64)


def _lengths_of_tokens(task: int, tokens: int) -> np.ndarray:
    """As many texts as fit, each a little longer or shorter, so that they have `tokens` tokens in all."""
    mean = _lengths(task, 1000).mean()
    lengths = _lengths(task, max(round(tokens / mean), 1))
    missing = tokens - int(lengths.sum())
    lengths += missing // len(lengths)
    lengths[: missing % len(lengths)] += 1
    return lengths


def _pad(rows: TokenizedDataset) -> PaddedBatch:
    lengths = torch.from_numpy(rows.lengths)
    column = torch.arange(int(lengths.max()))
    real = column < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64)
    ids[real] = torch.from_numpy(rows.tokens.astype(np.int64))
    second: Tensor = (column >= torch.from_numpy(rows.second_text)[:, None]) & real
    assert rows.labels is not None
    return PaddedBatch(ids, real.long(), second.long(), torch.from_numpy(rows.labels))
