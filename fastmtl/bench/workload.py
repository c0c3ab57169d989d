"""The workload of a benchmark: models of one size, and the same rows both packed and padded.

Weights and tokens are random; neither changes the time of a step. Without dropout (the default) the
packed and the padded model compute the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.bench.configs import CONFIGS
from fastmtl.bench.sizes import PRECISIONS, SEED, Size, lengths_of
from fastmtl.bench.textbook import PaddedBatch, PaddedModel
from fastmtl.config import Recompute, parse_recipe
from fastmtl.cuda_graphs.install import install_cuda_graphs
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.model.encoder.families import FAMILIES
from fastmtl.model.multitask import MultiTaskModel

Model = TypeVar("Model", bound=nn.Module)
# Types and numbers of outputs of tasks 0, 1 and 2; they repeat from task 3 on.
KINDS = (("binary", 1), ("regression", 1), ("classification", 5))


class Workload:
    """The rows of a step and the models that run on them.

    A model is built on first access. The models share the memory of their weights, but no gradient.
    """

    def __init__(self, size: Size) -> None:
        shape, tasks, tokens = size.shape, size.tasks, size.tokens
        self.size, self.shape, self.family, self.tasks = size, shape, size.family, tasks
        self.device, self.dtype = torch.device(size.device), PRECISIONS[size.precision]
        self._kinds = [KINDS[task % len(KINDS)] for task in range(tasks)]
        random = np.random.default_rng(SEED)
        lengths = lengths_of(shape, tasks, tokens)
        rows = [self._rows(task, random.permutation(lengths[task]), random) for task in range(tasks)]
        self.packed_batch: PackedBatch = pack([(dataset, np.arange(len(dataset))) for dataset in rows])
        self.packed_batch = self.packed_batch.to(self.device)
        self.padded_batches = [_pad(dataset).to(self.device) for dataset in rows]

    @cached_property
    def padded(self) -> PaddedModel:
        config = CONFIGS[self.family](self.shape, self.size.dropout)
        torch.manual_seed(SEED)
        model = PaddedModel(config, self._kinds)
        make_conflicts(model.heads, self._kinds)
        return model.to(self.device, self.dtype)

    @property
    def encoder_class(self) -> type[PackedEncoder]:
        return FAMILIES[self.family].encoder

    @cached_property
    def packed(self) -> MultiTaskModel:
        return self.recomputing("none")

    def recomputing(self, recompute: Recompute, *, cuda_graphs: bool = False) -> MultiTaskModel:
        config, weights = self.padded.encoder.config, self.padded.state_dict()
        recipe = {**self.recipe, "encoder": {"recompute": recompute}}
        with torch.device("meta"):
            encoder = self.encoder_class(config, recompute=recompute)
            model = MultiTaskModel(parse_recipe(recipe, "benchmark"), encoder)
        names = {name: self._padded_name(name) for name in model.state_dict()}
        model.load_state_dict({name: weights[there] for name, there in names.items()}, assign=True)
        if cuda_graphs:
            install_cuda_graphs(model)
        return model

    def with_adapter(self, adapter: str, size: int) -> MultiTaskModel:
        """Return a packed model with an adapter that outputs zeros, and with a copy of the weights.

        An adapter that outputs zeros takes as much time as any other.
        """
        recipe = {**self.recipe, "adapter": {"name": adapter, "size": size, "init": "no_influence"}}
        model = MultiTaskModel(parse_recipe(recipe, "benchmark"), self.encoder_class(self.padded.encoder.config))
        weights = self.packed.state_dict()
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert all(name.startswith("adapter.") for name in missing), missing
        return model.to(self.device, self.dtype)

    def with_layers(self, number: int) -> Workload:
        """Return the workload of the same rows for an encoder with another number of layers."""
        return Workload(replace(self.size, shape=replace(self.shape, layers=number)))

    def _padded_name(self, name: str) -> str:
        """Return the name in `padded` of a tensor of `packed`."""
        module, _, rest = name.partition(".")
        return f"encoder.{FAMILIES[self.family].file_name(rest)}" if module == "encoder" else plain_name(name)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the packed model, in the form of a recipe file."""
        sizes: dict[str, dict[str, Any]] = {"regression": {"range": [-2, 2]}, "binary": {}}
        tasks = {}
        for task, (kind, outputs) in enumerate(self._kinds):
            size = sizes.get(kind, {"num_labels": outputs})
            tasks[f"task{task}"] = {"type": kind, "data": {}, "head": {"dropout": 0.0}, **size}
        return {"tasks": tasks}

    @property
    def num_padded(self) -> int:
        """The number of tokens in the padded batches, padding included."""
        return sum(batch.input_ids.numel() for batch in self.padded_batches)

    def _rows(self, task: int, lengths: np.ndarray, random: np.random.Generator) -> TokenizedDataset:
        kind, outputs = self._kinds[task]
        one_type = kind == "classification" or self.family == "roberta"
        labels = labels_of(kind, outputs, len(lengths), random)
        return TokenizedDataset(
            # 0 is [PAD], which no text contains: transformers gives its embedding no gradient.
            tokens=random.integers(1, self.shape.vocabulary, lengths.sum()).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            second_text=(lengths if one_type else lengths // 2).astype(np.int32),
            sequences_per_example=1,
            labels=labels,
            ids=[str(row) for row in range(len(lengths))],
            truncated=0,
            skipped=[],
            path=Path("random"),
        )


def labels_of(kind: str, outputs: int, rows: int, random: np.random.Generator) -> np.ndarray:
    """Return random labels of a task, [rows]: int64 for classes, float32 otherwise."""
    labels: dict[str, np.ndarray] = {
        "classification": random.integers(0, outputs, rows),
        "binary": (random.random(rows) < 0.8).astype(np.float32),
        "regression": random.uniform(-2, 0, rows).astype(np.float32),
    }
    return labels[kind]


def make_conflicts(heads: nn.ModuleList, kinds: Sequence[tuple[str, int]]) -> None:
    """Make some tasks conflict: heads for regression get the first head's weights.

    Equal heads and opposite labels give opposite gradients. The first head has one output, too.
    """
    for head, (kind, _) in zip(heads, kinds, strict=True):
        if kind == "regression":
            head.load_state_dict(heads[0].state_dict())


def twin(model: Model) -> Model:
    """Return a copy of a model that shares the memory of its weights, but no gradient."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def plain_name(name: str) -> str:
    """Return the name in PaddedModel of a parameter of either model.

    Only heads differ: `heads.<task>.dense.weight` of a MultiTaskModel is `heads.<task>.weight`.
    """
    return name.replace(".dense.", ".") if name.startswith("heads.") else name


def _pad(rows: TokenizedDataset) -> PaddedBatch:
    lengths = torch.from_numpy(rows.lengths)
    column = torch.arange(int(lengths.max()))
    real = column < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64)
    ids[real] = torch.from_numpy(rows.tokens.astype(np.int64))
    second: Tensor = (column >= torch.from_numpy(rows.second_text)[:, None]) & real
    assert rows.labels is not None
    return PaddedBatch(ids, real.long(), second.long(), torch.from_numpy(rows.labels))
