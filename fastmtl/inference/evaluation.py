"""Scores of a model for every row of a data set; the ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.stream import evaluation_batches
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.inference.scores import Scores

# A function that runs the model on a batch in evaluation mode; it returns {task: scores [E_t, ...]}
# or [U_t, ...] for the E_t examples of each task t in the batch, or their units.
Predict = Callable[[PackedBatch], dict[str, torch.Tensor]]
Gather = Callable[[object], list]


def score(
    predict: Predict,
    recipe: Recipe,
    datasets: dict[str, TokenizedDataset],
    *,
    rank: int = 0,
    world: int = 1,
    all_gather: Gather = lambda value: [value],
) -> dict[str, Scores]:
    """Score every example of the data sets; return {task: Scores}, complete on every rank.

    predict: runs the model on a batch; each rank calls it for its share of the rows. all_gather:
    returns the objects of all ranks in rank order. Every rank runs the same number of batches per
    task, since ZeRO 3 gathers parameters collectively. A rank with fewer batches repeats one and
    drops its result.
    """
    result = {}
    for name, dataset in datasets.items():
        index = recipe.task_names.index(name)
        shards = [
            list(evaluation_batches(dataset, index, len(recipe.tasks), recipe.train.eval_tokens, r, world))
            for r in sorted({rank, 0})
        ]
        batches, spare = shards[-1], shards[0][0]
        longest = max(all_gather(len(batches)))
        rows, outputs = [], []
        for step in range(longest):
            batch = batches[step] if step < len(batches) else spare
            with torch.no_grad():
                output = predict(batch)[name]
            if step < len(batches):
                rows.append(batch.example_ids[index].cpu().numpy())
                outputs.append(output.float().cpu().numpy())
        gathered = all_gather((rows, outputs))
        all_rows = [part for rank_rows, _ in gathered for part in rank_rows]
        all_outputs = [part for _, rank_outputs in gathered for part in rank_outputs]
        result[name] = Scores(dataset, in_order(dataset, all_rows, all_outputs))
    return result


def in_order(dataset: TokenizedDataset, rows: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the outputs of all batches in the order of the data set.

    rows: the numbers of the examples of each batch. outputs: one per example or unit of them.
    """
    numbers, found = np.concatenate(rows), np.concatenate(outputs)
    if dataset.units is not None:
        numbers = dataset.units.positions(numbers)
    ordered = np.empty_like(found)
    ordered[numbers] = found
    return ordered
