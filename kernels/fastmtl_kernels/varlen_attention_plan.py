"""Which rows of a packed batch each program of the attention kernels works on, decided once per batch on the host.

Sequences of at most 64 tokens share tiles of 64 slots, packed best-fit in decreasing length, since a tile of one
sequence of the usual 25 tokens would be 84 % waste. A sequence starts at a multiple of 4 slots: four neighbouring keys
share one call of the random number generator, which would otherwise be most of the kernels' arithmetic. Longer
sequences are cut into blocks of 64 queries. Rows past the last sequence fill empty slots, so that the kernels write
their zeros too.

Source: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TILE = 64
GROUP = 4


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The work of one packed batch; make it once, use it for every layer and in backward.

    tile_rows: int32 [tiles, 64], the row in each slot, -1 in an empty slot.
    tile_starts: int32 [tiles, 64], the first row of the slot's sequence, -1 in an empty slot and for rows of none.
    blocks: int32 [blocks, 3], longest sequences first: the first row of the sequence, the row past its last, and the
        first of the block's 64 rows.
    num_rows: N, the rows of qkv.
    """

    tile_rows: Tensor
    tile_starts: Tensor
    blocks: Tensor
    num_rows: int

    @classmethod
    def make(cls, cu_seqlens: Sequence[int], num_rows: int, device: torch.device | str = "cpu") -> AttentionPlan:
        """The plan of the sequences `cu_seqlens[b]:cu_seqlens[b + 1]` of the `num_rows` rows of qkv, on `device`.

        Raises:
            ValueError: cu_seqlens does not begin with 0, descends or passes num_rows.
        """
        check_cu_seqlens(cu_seqlens, num_rows)
        sequences = [(start, stop - start) for start, stop in pairwise(cu_seqlens)]
        rows, starts = _tiles([(start, length) for start, length in sequences if 0 < length <= TILE])
        rows, starts = _add_tail(rows, starts, cu_seqlens[-1], num_rows)
        longest_first = sorted((s for s in sequences if s[1] > TILE), key=lambda s: -s[1])
        blocks = [
            (start, start + length, first)
            for start, length in longest_first
            for first in range(start, start + length, TILE)
        ]
        flat = torch.cat([rows, starts, torch.tensor(blocks, dtype=torch.int32).view(-1)]).to(device)
        tile_rows, tile_starts, flat_blocks = flat.split([len(rows), len(starts), 3 * len(blocks)])
        return cls(tile_rows.view(-1, TILE), tile_starts.view(-1, TILE), flat_blocks.view(-1, 3), num_rows)


def check_cu_seqlens(cu_seqlens: Sequence[int], num_rows: int) -> None:
    """Raises a ValueError where the host's offsets are not those of sequences within `num_rows` rows."""
    if not cu_seqlens or cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {list(cu_seqlens[:1])}")
    for b, (start, stop) in enumerate(pairwise(cu_seqlens)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not descend, got {start} then {stop} at sequence {b}")
    if cu_seqlens[-1] > num_rows:
        raise ValueError(f"cu_seqlens must end within the {num_rows} rows of qkv, got {cu_seqlens[-1]}")


def _tiles(sequences: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows and starts of the slots, flat, for sequences (first row, length) that fit a tile."""
    tiles_by_room: list[list[int]] = [[] for _ in range(TILE + 1)]
    num_tiles = 0
    slots = []
    sequences = sorted(sequences, key=lambda sequence: -sequence[1])
    for _, length in sequences:
        size = -(-length // GROUP) * GROUP
        room = next((room for room in range(size, TILE + 1, GROUP) if tiles_by_room[room]), TILE)
        if tiles_by_room[room]:
            tile = tiles_by_room[room].pop()
        else:
            tile, num_tiles = num_tiles, num_tiles + 1
        slots.append(tile * TILE + TILE - room)
        tiles_by_room[room - size].append(tile)
    rows = torch.full((num_tiles * TILE,), -1, dtype=torch.int32)
    starts = torch.full_like(rows, -1)
    lengths = torch.tensor([length for _, length in sequences], dtype=torch.int64)
    # Position of each token in its sequence, all sequences one after the other.
    positions = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    first_rows = torch.tensor([start for start, _ in sequences], dtype=torch.int32).repeat_interleave(lengths)
    filled = torch.tensor(slots, dtype=torch.int64).repeat_interleave(lengths) + positions
    rows[filled] = first_rows + positions.int()
    starts[filled] = first_rows
    return rows, starts


def _add_tail(rows: Tensor, starts: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """With the rows first:stop, which are of no sequence, in empty slots and in as many further tiles as they need."""
    empty = int((rows < 0).sum())
    further = max(0, -(-(stop - first - empty) // TILE)) * TILE
    blank = torch.full((further,), -1, dtype=torch.int32)
    rows, starts = torch.cat([rows, blank]), torch.cat([starts, blank])
    rows[(rows < 0).nonzero()[: stop - first, 0]] = torch.arange(first, stop, dtype=torch.int32)
    return rows, starts
