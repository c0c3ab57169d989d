"""The inputs of exported graphs from packed batches, and a task's outputs in a batch's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.encoder.padding import Padding

# Runs a graph: {input: tensor} -> {output: tensor}.
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def feeds_of(batch: PackedBatch, index: int, inputs: Sequence[str], padding_id: int) -> dict[str, Tensor]:
    """Return {input: int64 tensor} for a batch whose rows all belong to the task `index`.

    inputs: the names that the graph takes, see PaddedModel. padding_id: the token for padding.
    """
    padding = Padding.of(batch)
    pairs = batch.pairs[index]
    values = {
        "input_ids": padding.pad(batch.input_ids, padding_id),
        "attention_mask": padding.mask(),
        "token_type_ids": padding.pad(batch.token_type_ids, 0),
        "pairs": torch.zeros(1, 2, dtype=torch.int64) if pairs is None else pairs.long(),
    }
    return {name: values[name] for name in inputs}


def head_outputs(batch: PackedBatch, index: int, task: TaskConfig, logits: Tensor) -> Tensor:
    """Return the outputs of a task's head as in `Examples.outputs`, [E, C] or [U, C].

    logits: the graph's output "<task>.logits" for `feeds_of`.
    """
    if task.scores != "tokens":
        return logits
    units = batch.units_of(index)
    assert units is not None and units.rows is not None
    return Padding.of(batch).unpad(logits)[units.rows]
