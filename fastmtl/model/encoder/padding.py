"""Padded rows of a packed batch, for modules that take `[B, L]` and a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl_kernels.upload import upload


@dataclass(frozen=True, eq=False)
class Padding:
    """Places of the N tokens of B packed sequences in padded rows of L tokens, the longest length.

    places: int64 [N], the index of each token among the B * L of the padded rows.
    """

    rows: int
    length: int
    places: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> Padding:
        """Compute the places on the host, from the batch's offsets; no operation waits."""
        bounds = np.asarray(batch.host.cu_seqlens, dtype=np.int64)
        lengths = np.diff(bounds)
        rows, length = len(lengths), int(lengths.max(initial=0))
        shifts = np.arange(rows, dtype=np.int64) * length - bounds[:-1]
        places = np.arange(bounds[-1], dtype=np.int64) + np.repeat(shifts, lengths)
        return cls(rows, length, upload(torch.from_numpy(places), batch.input_ids.device))

    def pad(self, x: Tensor, value: int) -> Tensor:
        """Return x [N] as [B, L], with `value` after the end of each sequence."""
        padded = torch.full((self.rows * self.length,), value, dtype=x.dtype, device=x.device)
        return padded.index_copy_(0, self.places, x).view(self.rows, self.length)

    def mask(self) -> Tensor:
        """Return int64 [B, L], 1 for a token and 0 for padding."""
        return self.pad(torch.ones_like(self.places), 0)

    def unpad(self, hidden: Tensor) -> Tensor:
        """Return the rows [N, d] of the tokens in padded hidden states [B, L, d].

        fastmtl_kernels.texts.to_rows would compute the places once more, on the device.
        """
        return hidden.flatten(0, 1).index_select(0, self.places)
