"""The rows of a packed batch that each program of the attention kernels processes.

The plan is made once per batch, on the host.

Sequences of at most 64 tokens share tiles of 64 slots, packed best-fit in decreasing length, since
one sequence of typical 25 tokens uses only 16 % of a tile's scores. A sequence starts at a multiple
of 4 slots: four neighbouring keys share one call of the random number generator, which would
otherwise be most of the kernels' arithmetic. Longer sequences are cut into blocks of 64 queries.
Rows past the last sequence fill empty slots, so that the kernels write their zeros too.

Source: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastmtl_kernels.upload import upload

TILE = 64
GROUP = 4


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The work of one packed batch, made once for all layers and for backward.

    numbers: int32, tile_rows, tile_starts and blocks one after the other, so that one copy moves
    them to a device. num_tiles: the number of tiles. num_rows: N, the rows of qkv.
    """

    numbers: Tensor
    num_tiles: int
    num_rows: int

    @classmethod
    def make(cls, cu_seqlens: Sequence[int], num_rows: int, device: torch.device | str = "cpu") -> AttentionPlan:
        """Plan the sequences `cu_seqlens[b]:cu_seqlens[b + 1]` of qkv's `num_rows` rows.

        Raises:
            ValueError: cu_seqlens does not begin with 0, descends or exceeds num_rows.
        """
        check_cu_seqlens(cu_seqlens, num_rows)
        offsets = np.asarray(cu_seqlens, dtype=np.int64)
        starts, lengths = offsets[:-1], np.diff(offsets)
        fits = (lengths > 0) & (lengths <= TILE)
        rows, first_rows = _tiles(starts[fits], lengths[fits])
        rows, first_rows = _add_tail(rows, first_rows, cu_seqlens[-1], num_rows)
        plan = cls._of(rows, first_rows, _blocks(starts, lengths), num_rows)
        return plan.map(lambda numbers: upload(numbers, device))

    @classmethod
    def _of(cls, rows: np.ndarray, starts: np.ndarray, blocks: np.ndarray, num_rows: int) -> AttentionPlan:
        numbers = np.concatenate([rows, starts, blocks.reshape(-1)], dtype=np.int32, casting="same_kind")
        return cls(torch.from_numpy(numbers), len(rows) // TILE, num_rows)

    @property
    def num_blocks(self) -> int:
        return (len(self.numbers) - 2 * TILE * self.num_tiles) // 3

    @property
    def tile_rows(self) -> Tensor:
        """int32 [tiles, 64], the row in each slot, -1 in an empty slot."""
        return self._tiles[0]

    @property
    def tile_starts(self) -> Tensor:
        """int32 [tiles, 64], the first row of the slot's sequence.

        -1 in an empty slot, and for rows of no sequence.
        """
        return self._tiles[1]

    @cached_property
    def blocks(self) -> Tensor:
        """int32 [blocks, 3], longest sequences first.

        The columns are the sequence's first row, the row past its last, and the block's first row.
        """
        return self.numbers[2 * TILE * self.num_tiles :].view(-1, 3)

    @cached_property
    def _tiles(self) -> tuple[Tensor, ...]:
        return self.numbers[: 2 * TILE * self.num_tiles].view(2, self.num_tiles, TILE).unbind()

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionPlan:
        """Return the plan with function(numbers), the same values in other memory."""
        return replace(self, numbers=function(self.numbers))

    def with_rows(self, num_rows: int) -> AttentionPlan:
        """Return the plan of the same sequences with at least as many rows.

        The result equals that of `make`. For a plan on the CPU.
        """
        numbers, slots = self.numbers.numpy(), TILE * self.num_tiles
        rows, starts = _add_tail(numbers[:slots], numbers[slots : 2 * slots], self.num_rows, num_rows)
        return self._of(rows, starts, numbers[2 * slots :], num_rows)


def needs_plan(device: torch.device) -> bool:
    """Return True if the attention kernels of the device need a plan."""
    return device.type == "cuda"


def check_cu_seqlens(cu_seqlens: Sequence[int], num_rows: int) -> None:
    """Check that the host's offsets are those of sequences within `num_rows` rows.

    Raises:
        ValueError: they are not; the message gives the offsets.
    """
    if not cu_seqlens or cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {list(cu_seqlens[:1])}")
    for b, (start, stop) in enumerate(pairwise(cu_seqlens)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not descend, got {start} then {stop} at sequence {b}")
    if cu_seqlens[-1] > num_rows:
        raise ValueError(f"cu_seqlens must end within the {num_rows} rows of qkv, got {cu_seqlens[-1]}")


def _tiles(first_rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and starts of the slots, flat, for sequences that fit a tile."""
    longest_first = np.argsort(-lengths, kind="stable")
    first_rows, lengths = first_rows[longest_first], lengths[longest_first]
    tiles_by_room: list[list[int]] = [[] for _ in range(TILE + 1)]
    num_tiles = 0
    slots = []
    for size in (-(-lengths // GROUP) * GROUP).tolist():
        room = next((room for room in range(size, TILE + 1, GROUP) if tiles_by_room[room]), TILE)
        if tiles_by_room[room]:
            tile = tiles_by_room[room].pop()
        else:
            tile, num_tiles = num_tiles, num_tiles + 1
        slots.append(tile * TILE + TILE - room)
        tiles_by_room[room - size].append(tile)
    rows = np.full(num_tiles * TILE, -1, dtype=np.int32)
    starts = rows.copy()
    # Position of each token in its sequence, all sequences one after the other.
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    of_tokens = np.repeat(first_rows, lengths)
    filled = np.repeat(np.asarray(slots, dtype=np.int64), lengths) + positions
    rows[filled] = of_tokens + positions
    starts[filled] = of_tokens
    return rows, starts


def _add_tail(rows: np.ndarray, starts: np.ndarray, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Add the rows first:stop, which are of no sequence.

    They fill empty slots first, then further tiles.
    """
    empty = np.count_nonzero(rows < 0)
    further = max(0, -(-(stop - first - empty) // TILE)) * TILE
    blank = np.full(further, -1, dtype=np.int32)
    rows, starts = np.concatenate([rows, blank]), np.concatenate([starts, blank])
    rows[np.flatnonzero(rows < 0)[: stop - first]] = np.arange(first, stop)
    return rows, starts


def _blocks(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the blocks [blocks, 3] of the sequences that fit no tile, the longest first."""
    longest_first = np.argsort(-lengths, kind="stable")
    longest_first = longest_first[lengths[longest_first] > TILE]
    starts, lengths = starts[longest_first], lengths[longest_first]
    number = -(-lengths // TILE)
    of_blocks = np.repeat(starts, number)
    place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    return np.stack([of_blocks, of_blocks + np.repeat(lengths, number), of_blocks + place * TILE], axis=1)
