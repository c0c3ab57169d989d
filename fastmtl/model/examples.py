"""Types of the heads' inputs and outputs, and the protocol of recorded heads."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch, Units

# Vectors of the sequences, one per row. A key is a pooling's name, with the pooled sequences of the
# whole batch [B, d], or the index of a task: with a recurrent head, that task's sequences
# [sequences of the task, size]; with a head that scores tokens, the hidden states of its units
# [U, d].
Vectors = dict[str | int, Tensor]


@dataclass(frozen=True)
class HeadBatch:
    """Data of a batch that heads and losses read, apart from the vectors.

    The fields are explained in PackedBatch; seq_offsets are here Python integers.
    """

    seq_offsets: tuple[int, ...]
    counts: tuple[int, ...]
    labels: tuple[Tensor | None, ...]
    pairs: tuple[Tensor | None, ...]
    cached: Any = None
    units: tuple[Units | None, ...] = ()
    terms: tuple[int, ...] | None = None

    @classmethod
    def of(cls, batch: PackedBatch) -> HeadBatch:
        return cls(
            batch.host.seq_offsets, batch.counts, batch.labels, batch.pairs, batch.cached, batch.units, batch.terms
        )

    @property
    def loss_terms(self) -> tuple[int, ...]:
        return self.counts if self.terms is None else self.terms

    @property
    def sizes(self) -> Hashable:
        """A value that is equal for batches which can use the same recording of the heads."""
        labels = tuple(None if one is None else (one.dtype, one.shape) for one in self.labels)
        return self.seq_offsets, self.counts, labels, tuple(one is not None for one in self.pairs)


@dataclass(frozen=True)
class Examples:
    """Examples of one task in a batch.

    outputs: result of the head, float32 or wider: [E, num_outputs] (outputs.py), or for a head that
    scores the U units of the examples [U, num_outputs].
    u, v: inputs of the head [E, d] or [U, d], the vectors of the examples' first and second
    sequences. v is None if an example is a single sequence.
    units: the units of the examples; None if the head gives one output per example.
    """

    outputs: Tensor
    u: Tensor
    v: Tensor | None
    units: Units | None = None


class RecordedHeads(Protocol):
    """Object that records and replays the forward and backward of all heads and losses."""

    def run(self, vectors: Vectors, batch: HeadBatch) -> list[Tensor] | None:
        """Return the T tasks' losses, each summed over its examples, 0-dim.

        Return None if there is no recording for this batch: the model then computes the losses.
        """
