"""Packed sequences of the size of a training step, and random tensors for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastmtl.bench.ops.layout import Padded
from fastmtl.bench.sizes import PRECISIONS, SEED, Size, lengths_of


class Rows:
    """The sequences of a step, sorted by task; each token is one row.

    lengths: tokens of each sequence. cu_seqlens: int32 [B + 1], the offsets of the sequences.
    task_rows, task_sequences: T + 1 offsets of each task's rows and sequences. seed: int64 [1], for
    dropout.
    """

    def __init__(self, size: Size, by_task: Sequence[Sequence[int]] | None = None) -> None:
        """Make the sequences. by_task: the lengths for each task; None for those of a step."""
        self.size, self.device, self.dtype = size, torch.device(size.device), PRECISIONS[size.precision]
        random = np.random.default_rng(SEED)
        if by_task is None:
            of_step = lengths_of(size.shape, size.tasks, size.tokens)
            by_task = [random.permutation(lengths).tolist() for lengths in of_step]
        self.lengths: list[int] = [length for lengths in by_task for length in lengths]
        self.task_rows = (0, *accumulate(sum(lengths) for lengths in by_task))
        self.task_sequences = (0, *accumulate(len(lengths) for lengths in by_task))
        self.offsets = [0, *accumulate(self.lengths)]
        self.cu_seqlens = torch.tensor(self.offsets, dtype=torch.int32, device=self.device)
        self.seed = torch.tensor([SEED << 20], device=self.device)
        self._generator = torch.Generator(self.device).manual_seed(SEED)

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def about(self) -> str:
        return f"{self.tokens:,} tokens in {len(self.lengths)} sequences"

    @property
    def token_offsets(self) -> TaskOffsets:
        return TaskOffsets(self.task_rows, self.device)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self._generator, device=self.device)).to(self.dtype)

    def ids(self, limit: int) -> Tensor:
        return torch.randint(limit, (self.tokens,), generator=self._generator, device=self.device)

    def padded(self, names: Collection[str]) -> Padded:
        return Padded(self.lengths, self.device, names)


class TaskOffsets:
    """The offsets of the tasks' rows on the device and on the host, as a packed batch has them."""

    def __init__(self, host: tuple[int, ...], device: torch.device) -> None:
        self.host, self.offsets = host, torch.tensor(host, dtype=torch.int32, device=device)
