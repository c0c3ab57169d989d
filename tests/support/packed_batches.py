"""Random packed batches and models small enough for float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmtl.config import EncoderConfig, Recipe
from fastmtl.data.packed_batch import HostOffsets, PackedBatch
from fastmtl.model.encoder.pretrained import load_encoder
from fastmtl.model.multitask import MultiTaskModel

TASKS = {
    "sst": {"type": "classification", "num_labels": 5, "data": {}},
    "para": {"type": "binary", "data": {}, "pooling": "mean", "head": {"name": "mlp", "hidden": [8]}},
    "sts": {"type": "regression", "range": [0, 5], "pairs": "bi", "pooling": "mean", "data": {}},
}


def build_batch(lengths: Sequence[Sequence[int]], *, pairs: Sequence[bool] | None = None, seed: int = 0) -> PackedBatch:
    """Build a batch.

    lengths: tokens of every sequence, per task; pairs: the tasks whose sequences are consecutive
    pairs. A task's tokens and labels depend only on its own lengths, its position and the seed.
    """
    pairs = pairs or [False] * len(lengths)
    flat = [length for task in lengths for length in task]
    ids, types, labels, example_ids, pair_rows = [], [], [], [], []
    sequences = 0
    for task, (own, paired) in enumerate(zip(lengths, pairs, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + task)
        ids += [torch.randint(5, 90, (length,), generator=generator) for length in own]
        types += [(torch.arange(length) >= length // 2).long() for length in own]
        count = len(own) // 2 if paired else len(own)
        made = [
            torch.randint(0, 5, (count,), generator=generator),
            torch.randint(0, 2, (count,), generator=generator).float(),
            5 * torch.rand(count, generator=generator),
        ]
        labels.append(made[task % 3])
        example_ids.append(torch.arange(count))
        first = sequences + 2 * torch.arange(count)
        pair_rows.append(torch.stack([first, first + 1], dim=1) if paired else None)
        sequences += len(own)

    def offsets(counts: Sequence[int]) -> tuple[int, ...]:
        return (0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist())

    host = HostOffsets(offsets(flat), offsets([len(task) for task in lengths]), offsets([sum(t) for t in lengths]))
    empty = [torch.zeros(0, dtype=torch.int64)]
    return PackedBatch(
        input_ids=torch.cat(ids + empty),
        position_ids=torch.cat([torch.arange(length) for length in flat] + empty),
        token_type_ids=torch.cat(types + empty),
        cu_seqlens=torch.tensor(host.cu_seqlens, dtype=torch.int32),
        seq_offsets=torch.tensor(host.seq_offsets, dtype=torch.int32),
        token_offsets=torch.tensor(host.token_offsets, dtype=torch.int32),
        labels=tuple(labels),
        example_ids=tuple(example_ids),
        pairs=tuple(pair_rows),
        host=host,
    )


def build_model(encoder_folder: Path, **sections: dict) -> MultiTaskModel:
    """Build a model; sections: those of its recipe. Its tasks are by default the three above."""
    encoder = {"path": str(encoder_folder), **sections.pop("encoder", {})}
    recipe = Recipe.model_validate({"tasks": TASKS, **sections, "encoder": encoder})
    torch.manual_seed(3)
    return MultiTaskModel(recipe, load_encoder(EncoderConfig(**encoder)))
