"""The rows of a packed batch that each program of the attention kernels processes.

The plan is made once per batch, on the host.

Sequences of at most 64 tokens share tiles of 64 slots, one token per slot. They are packed best-fit
in decreasing length, since a tile with a single sequence of 25 tokens, a typical length, would use
only 16 % of its scores. A sequence starts at a multiple of 4 slots, so that four neighbouring keys
share one call of the random number generator, which would otherwise be most of the kernels'
arithmetic. Longer sequences are cut into blocks of 64 queries. Rows past the last sequence are put
in empty slots, so that the kernels write zeros for them too.

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
    """The division of a packed batch among programs, for forward and backward of all layers.

    numbers: int32; tile_rows, tile_starts and blocks one after the other, so that one copy moves
    all three to a device. num_rows: N, the number of rows of qkv.
    """

    numbers: Tensor
    num_tiles: int
    num_rows: int

    @classmethod
    def make(cls, cu_seqlens: Sequence[int], num_rows: int, device: torch.device | str = "cpu") -> AttentionPlan:
        """Return the plan on `device` of a batch with these sequences and `num_rows` rows of qkv.

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
        """The row of qkv in each slot, int32 [tiles, 64]; -1 for an empty slot."""
        return self._tiles[0]

    @property
    def tile_starts(self) -> Tensor:
        """The first row of the sequence in each slot, int32 [tiles, 64].

        -1 for an empty slot, and for a row that belongs to no sequence.
        """
        return self._tiles[1]

    @cached_property
    def blocks(self) -> Tensor:
        """The blocks of sequences of over 64 tokens, int32 [blocks, 3], longest sequences first.

        The columns are the sequence's first row, the row past its last, and the block's first row.
        """
        return self.numbers[2 * TILE * self.num_tiles :].view(-1, 3)

    @cached_property
    def _tiles(self) -> tuple[Tensor, ...]:
        return self.numbers[: 2 * TILE * self.num_tiles].view(2, self.num_tiles, TILE).unbind()

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionPlan:
        """Return the plan with function(numbers), such as a copy on another device."""
        return replace(self, numbers=function(self.numbers))

    def with_rows(self, num_rows: int) -> AttentionPlan:
        """Return the plan of the same sequences for more rows: the result of `make` for `num_rows`.

        The plan must be on the CPU; num_rows must not be less than before.
        """
        numbers, slots = self.numbers.numpy(), TILE * self.num_tiles
        rows, starts = _add_tail(numbers[:slots], numbers[slots : 2 * slots], self.num_rows, num_rows)
        return self._of(rows, starts, numbers[2 * slots :], num_rows)


def needs_plan(device: torch.device) -> bool:
    """Return True if the attention kernels of the device need a plan."""
    return device.type == "cuda"


def check_cu_seqlens(cu_seqlens: Sequence[int], num_rows: int) -> None:
    """Check offsets of sequences that are integers on the host.

    Raises:
        ValueError: they do not begin with 0, descend or exceed num_rows; the message gives them.
    """
    if not cu_seqlens or cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {list(cu_seqlens[:1])}")
    for b, (start, stop) in enumerate(pairwise(cu_seqlens)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not descend, got {start} then {stop} at sequence {b}")
    if cu_seqlens[-1] > num_rows:
        raise ValueError(f"cu_seqlens must end within the {num_rows} rows of qkv, got {cu_seqlens[-1]}")


def _tiles(first_rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack the sequences that fit a tile; return tile_rows and tile_starts, flattened.

    first_rows, lengths: those of the sequences.
    """
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
    """Put the rows first:stop, which belong to no sequence, into slots; return the new arrays.

    rows, starts: tile_rows and tile_starts, flat. Empty slots are filled first, then new tiles.
    """
    empty = np.count_nonzero(rows < 0)
    further = max(0, -(-(stop - first - empty) // TILE)) * TILE
    blank = np.full(further, -1, dtype=np.int32)
    rows, starts = np.concatenate([rows, blank]), np.concatenate([starts, blank])
    rows[np.flatnonzero(rows < 0)[: stop - first]] = np.arange(first, stop)
    return rows, starts


def _blocks(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return `AttentionPlan.blocks` of the sequences that are too long for a tile.

    starts, lengths: those of all sequences.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    longest_first = longest_first[lengths[longest_first] > TILE]
    starts, lengths = starts[longest_first], lengths[longest_first]
    number = -(-lengths // TILE)
    of_blocks = np.repeat(starts, number)
    place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    return np.stack([of_blocks, of_blocks + np.repeat(lengths, number), of_blocks + place * TILE], axis=1)
