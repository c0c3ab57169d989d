"""Packing of rows of several tasks into one PackedBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fastmtl.data.packed_batch import HostOffsets, PackedBatch, Units
from fastmtl.data.tokenized import TokenizedDataset


def pack(
    parts: Sequence[tuple[TokenizedDataset | None, np.ndarray]], group_counts: Sequence[int] | None = None
) -> PackedBatch:
    """Return a batch on the CPU with the given rows of each task.

    parts: T tuples, a task's data set and the numbers of its rows in this batch, int [E_t] (empty
    for an absent task). group_counts: T integers, the loss terms of each task in the whole
    optimiser step.
    """
    ids, positions, types, lengths, seq_counts, token_counts = [], [], [], [], [], []
    labels: list[torch.Tensor | None] = []
    example_ids: list[torch.Tensor] = []
    pairs: list[torch.Tensor | None] = []
    units: list[Units | None] = []
    terms: list[int] = []
    sequences_so_far = tokens_so_far = 0
    for dataset, rows in parts:
        rows = np.asarray(rows, dtype=np.int64)
        example_ids.append(torch.from_numpy(rows))
        if dataset is None:
            assert len(rows) == 0, "rows without a data set"
            labels.append(None)
            pairs.append(None)
            units.append(None)
            terms.append(0)
            seq_counts.append(0)
            token_counts.append(0)
            continue
        sequences = dataset.sequences(rows)
        starts = dataset.offsets[sequences]
        sizes = dataset.offsets[sequences + 1] - starts
        total = int(sizes.sum())
        begins = np.cumsum(sizes) - sizes
        position = np.arange(total) - np.repeat(begins, sizes)
        ids.append(dataset.tokens[np.repeat(starts, sizes) + position].astype(np.int64))
        positions.append(position)
        types.append((position >= np.repeat(dataset.second_text[sequences], sizes)).astype(np.int64))
        lengths.append(sizes)
        seq_counts.append(len(sequences))
        token_counts.append(total)
        found = dataset.labels_of(rows)
        labels.append(None if found is None else torch.from_numpy(np.ascontiguousarray(found)))
        units.append(_units(dataset, rows, tokens_so_far + begins))
        pairs.append(_pairs(dataset, len(rows), units[-1], sequences_so_far))
        terms.append(len(rows) if dataset.loss_terms is None else int(dataset.loss_terms[rows].sum()))
        sequences_so_far += len(sequences)
        tokens_so_far += total

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
        units=tuple(units),
        terms=tuple(terms),
    )


def pack_tasks(names: Sequence[str], parts: Mapping[str, tuple[TokenizedDataset, np.ndarray]]) -> PackedBatch:
    """Return a batch with the given rows of some tasks; the other tasks are absent.

    names: all tasks, in the order of the recipe. parts: {task: (data set, numbers of its rows)}.
    """
    return pack([parts.get(name, (None, np.zeros(0, np.int64))) for name in names])


def _units(dataset: TokenizedDataset, rows: np.ndarray, starts: np.ndarray) -> Units | None:
    """Return the units of the examples `rows`. starts: the first row of each sequence."""
    table = dataset.units
    if table is None:
        return None
    counts = table.offsets[rows + 1] - table.offsets[rows]
    of_tokens = None
    if table.places is not None:
        of_tokens = torch.from_numpy(table.places[table.positions(rows)] + np.repeat(starts, counts))
    host = _offsets(counts)
    example = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
    return Units(example, torch.tensor(host, dtype=torch.int64), of_tokens, host)


def _pairs(dataset: TokenizedDataset, examples: int, units: Units | None, first: int) -> torch.Tensor | None:
    """Return the indices of the two sequences of each pair, int64 [pairs, 2], or None.

    first: the index of the task's first sequence.
    """
    if units is not None and dataset.units is not None and dataset.units.query_first:
        queries = first + units.offsets[:-1] + torch.arange(examples)
        each = torch.arange(len(units.example)) + units.example + 1
        return torch.stack([queries[units.example], first + each], dim=1)
    if dataset.sequences_per_example == 1 or units is not None:
        return None
    one = first + torch.arange(examples) * 2
    return torch.stack([one, one + 1], dim=1)


def _offsets(counts: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    return (0, *np.cumsum(counts, dtype=np.int64).tolist())


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
