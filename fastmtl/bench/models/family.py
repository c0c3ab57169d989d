"""The description of a model: what a file of this folder defines, and batches of rows for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.bench.sizes import Shape

# Keyword arguments of a model's forward. Dimension 0 of each tensor counts the rows.
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    shapes: sizes by name, the default first. trunk: makes the model, whose output has a
    `last_hidden_state` [B, L, hidden]. position: the token that the heads read. inputs(shape,
    tasks, random): returns random rows for each task. tokens: returns the number of tokens of a
    batch, without and with padding.
    """

    shapes: Mapping[str, Shape]
    trunk: Callable[[Shape], nn.Module]
    position: int
    inputs: Callable[[Shape, int, np.random.Generator], list[Inputs]]
    tokens: Callable[[Shape, Inputs], tuple[int, int]]


def texts(lengths: np.ndarray, vocabulary: int, random: np.random.Generator) -> Inputs:
    """Return B random texts, padded to the L tokens of the longest.

    lengths: tokens of each text, int64 [B]. input_ids, attention_mask: int64 [B, L]; 0 is the token
    of padding, which no text contains.
    """
    real = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64)
    ids[real] = torch.from_numpy(random.integers(1, vocabulary, int(lengths.sum())))
    return {"input_ids": ids, "attention_mask": real.long()}


def text_tokens(shape: Shape, inputs: Inputs) -> tuple[int, int]:
    """Return the tokens of padded texts, without and with padding."""
    mask = inputs["attention_mask"]
    return int(mask.sum()), mask.numel()


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the rows of all parts as one batch; texts are padded to the longest of all."""
    longest = max(value.shape[1] for part in parts for value in part.values())
    found = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if values[0].dim() == 2:
            values = [functional.pad(value, (0, longest - value.shape[1])) for value in values]
        found[key] = torch.cat(values)
    return found
