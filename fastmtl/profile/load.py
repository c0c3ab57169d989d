"""The size of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fastmtl.data.packed_batch import PackedBatch


@dataclass(frozen=True)
class Load:
    """The size of a micro-batch on one rank.

    unique: different tokens per task, summed over tasks. largest_task: tokens of the task with the
    most. longest: tokens of the longest text. units: for each task, the tokens that its head scores
    one by one; () for none. cells: for each task, its examples times the units of the longest.
    """

    tokens: int
    sequences: int
    unique: int
    largest_task: int
    longest: int = 0
    units: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: PackedBatch) -> Load:
        offsets, bounds = batch.host.token_offsets, batch.host.cu_seqlens
        pieces = [batch.input_ids[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]
        return cls(
            tokens=batch.num_tokens,
            sequences=len(bounds) - 1,
            unique=sum(len(piece.unique()) for piece in pieces),
            largest_task=max(len(piece) for piece in pieces),
            longest=max((stop - start for start, stop in zip(bounds, bounds[1:], strict=False)), default=0),
            units=tuple(0 if one is None or one.rows is None else len(one.rows) for one in batch.units),
            cells=tuple(0 if one is None else _cells(one.host) for one in batch.units),
        )


def _cells(offsets: tuple[int, ...]) -> int:
    return (len(offsets) - 1) * max((stop - start for start, stop in pairwise(offsets)), default=0)
