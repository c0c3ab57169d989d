"""Count-sketch of J: T x m numbers whose inner products estimate those of T x P.

    S[t, h(p)] += s(p) J[t, p]        G[i, j] ~ S[i] . S[j]

h maps columns to m buckets, s is a random sign. The estimate is unbiased, with a variance of at
most (|g_i|^2 |g_j|^2 + (g_i . g_j)^2) / m: the root-mean-square error of a cosine is at most sqrt(2
/ m), 0.8 % for m = 32,768. A sketch is linear, so it adds up over micro-batches and ranks.

Columns come in blocks of at most m. Block b is shifted by a random number of buckets and multiplied
by a random sign; its column q is multiplied by a second sign r(q). So p = (b, q) goes to bucket (q
+ shift(b)) mod m with sign(b) r(q). Two columns of one block never collide. Columns of two blocks
collide with probability 1 / m, which is all that the variance needs.

Sources: Charikar, Chen, Farach-Colton, Finding Frequent Items in Data Streams, 2002; Cormode,
Garofalakis, Sketching Streams Through the Net, 2005 (inner products).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.upload import upload

_MASK = (1 << 31) - 1


class CountSketch:
    """Count-sketch S [T, m] of J, float32; equal seeds give equal hashes in every process."""

    def __init__(self, num_tasks: int, size: int, seed: int, device: torch.device) -> None:
        self.values = torch.zeros(num_tasks, size, device=device)
        self._size = size
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        self._signs = upload(signs.float(), device)
        self._seed = seed

    def add(self, key: int, piece: Tensor) -> None:
        """Add the columns [T, n] of one parameter, of any floating dtype.

        key: the parameter's number. A parameter must have the same `key` and n on every rank and in
        every micro-batch, since both decide its buckets and signs.
        """
        starts = list(range(0, piece.shape[1], self._size))
        shifts, signs = self._hash(key, torch.arange(len(starts)))
        for start, shift, sign in zip(starts, shifts.tolist(), signs.tolist(), strict=True):
            block = piece[:, start : start + self._size].float()
            block = block * (self._signs[: block.shape[1]] * sign)
            before = min(self._size - shift, block.shape[1])
            self.values[:, shift : shift + before] += block[:, :before]
            self.values[:, : block.shape[1] - before] += block[:, before:]

    def add_rows(self, key: int, task: int, ids: Tensor, rows: Tensor) -> None:
        """Add rows [k, d], d <= m, to the table rows ids [k] of one task's gradient of a table.

        Each table row is a block of its own; ids may repeat. key: as in `add`.
        """
        width = rows.shape[1]
        shifts, signs = self._hash(key, ids)
        buckets = (shifts[:, None] + torch.arange(width, device=ids.device)) % self._size
        signed = rows.float() * signs[:, None] * self._signs[:width]
        self.values[task].index_add_(0, buckets.flatten(), signed.flatten())

    def gramian(self) -> Tensor:
        """Return the estimate of G, float32 [T, T]."""
        wide = self.values.double()
        return (wide @ wide.T).float()

    def _hash(self, key: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return shifts int64 [k] and signs float32 [k] of blocks int64 [k].

        Hashes by two rounds of integer mixing.
        """
        value = (blocks * 2_654_435_761 + key * 40_503 + self._seed * 97_531 + 12_345) & _MASK
        for _ in range(2):
            value = ((value >> 15) ^ value) * 0x2C1B3C6D & _MASK
            value = ((value >> 12) ^ value) * 0x297A2D39 & _MASK
        value = (value >> 15) ^ value
        return value % self._size, ((value // self._size) % 2 * 2 - 1).float()
