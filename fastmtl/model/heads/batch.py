"""Inputs and outputs of the heads: pooled sequences, the rest of a batch, and the examples."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch

# Vectors of the sequences. Key a pooling's name: [B, d], a row for each sequence of the batch. Key
# the index of a task with a recurrent head: [sequences of the task, size].
Vectors = dict[str | int, Tensor]


@dataclass(frozen=True)
class HeadBatch:
    """The part of a batch that heads and losses read besides the vectors; fields of PackedBatch."""

    seq_offsets: tuple[int, ...]
    counts: tuple[int, ...]
    labels: tuple[Tensor | None, ...]
    pairs: tuple[Tensor | None, ...]
    cached: Any = None

    @classmethod
    def of(cls, batch: PackedBatch) -> HeadBatch:
        return cls(batch.host.seq_offsets, batch.counts, batch.labels, batch.pairs, batch.cached)

    @property
    def sizes(self) -> Hashable:
        """A key that is equal for batches with the same numbers, shapes and dtypes."""
        labels = tuple(None if one is None else (one.dtype, one.shape) for one in self.labels)
        return self.seq_offsets, self.counts, labels, tuple(one is not None for one in self.pairs)


@dataclass(frozen=True)
class Examples:
    """Examples of one task in a batch.

    outputs: of the head, float32 [E, num_outputs].
    u, v: the head's inputs [E, d]; v is None where an example is one sequence.
    """

    outputs: Tensor
    u: Tensor
    v: Tensor | None


class RecordedHeads(Protocol):
    """A recording of the forward and backward of all heads and losses."""

    def run(self, vectors: Vectors, batch: HeadBatch) -> list[Tensor] | None:
        """Return the losses of the T tasks, or None where the model has to compute them."""
