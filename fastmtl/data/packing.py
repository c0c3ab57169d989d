"""Packing of rows of several tasks into one PackedBatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastmtl.data.packed_batch import HostOffsets, PackedBatch
from fastmtl.data.tokenized import TokenizedDataset


def pack(
    parts: Sequence[tuple[TokenizedDataset | None, np.ndarray]], group_counts: Sequence[int] | None = None
) -> PackedBatch:
    """Return a batch on the CPU with the given rows of each task.

    parts: T tuples, a task's data set and the numbers of its rows in this batch, int [E_t] (empty
    for an absent task). group_counts: T integers, the rows of each task in the whole optimiser
    step.
    """
    ids, positions, types, lengths, seq_counts, token_counts = [], [], [], [], [], []
    labels: list[torch.Tensor | None] = []
    example_ids: list[torch.Tensor] = []
    pairs: list[torch.Tensor | None] = []
    sequences_so_far = 0
    for dataset, rows in parts:
        rows = np.asarray(rows, dtype=np.int64)
        example_ids.append(torch.from_numpy(rows))
        if dataset is None:
            assert len(rows) == 0, "rows without a data set"
            labels.append(None)
            pairs.append(None)
            seq_counts.append(0)
            token_counts.append(0)
            continue
        per_example = dataset.sequences_per_example
        sequences = (rows[:, None] * per_example + np.arange(per_example)).reshape(-1)
        starts = dataset.offsets[sequences]
        sizes = dataset.offsets[sequences + 1] - starts
        total = int(sizes.sum())
        position = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids.append(dataset.tokens[np.repeat(starts, sizes) + position].astype(np.int64))
        positions.append(position)
        types.append((position >= np.repeat(dataset.second_text[sequences], sizes)).astype(np.int64))
        lengths.append(sizes)
        seq_counts.append(len(sequences))
        token_counts.append(total)
        labels.append(None if dataset.labels is None else torch.from_numpy(dataset.labels[rows]))
        first = sequences_so_far + np.arange(len(rows), dtype=np.int64) * 2
        pairs.append(torch.from_numpy(np.stack([first, first + 1], axis=1)) if per_example == 2 else None)
        sequences_so_far += len(sequences)

    host = HostOffsets(
        cu_seqlens=_offsets(np.concatenate(lengths) if lengths else np.zeros(0, np.int64)),
        seq_offsets=_offsets(seq_counts),
        token_offsets=_offsets(token_counts),
    )
    return PackedBatch(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        token_type_ids=_joined(types),
        cu_seqlens=torch.tensor(host.cu_seqlens, dtype=torch.int32),
        seq_offsets=torch.tensor(host.seq_offsets, dtype=torch.int32),
        token_offsets=torch.tensor(host.token_offsets, dtype=torch.int32),
        labels=tuple(labels),
        example_ids=tuple(example_ids),
        pairs=tuple(pairs),
        host=host,
        group_counts=None if group_counts is None else tuple(int(count) for count in group_counts),
    )


def _offsets(counts: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    return (0, *np.cumsum(counts, dtype=np.int64).tolist())


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
