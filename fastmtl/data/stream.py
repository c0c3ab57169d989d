"""The batches of a run: which rows, in which order, on which rank.

Everything is a pure function of (seed, epoch, step), so every rank draws the same without talking, and resuming needs
no state but
those numbers. An epoch is one interleaved sequence of rows of all tasks, in which every stretch holds the sampler's
shares; it is cut into
micro-batches, and each micro-batch is dealt to the ranks.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.schedule import Schedule
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError

# Rows of one micro-batch: (task [n], row [n]).
Draw = tuple[np.ndarray, np.ndarray]


class BatchStream:
    """Micro-batches for training.

    datasets: one per task of the recipe, in its order. rank, world: this process and their number.
    Raises UserError for batch sizes that name no task, or that the data cannot fill.
    """

    def __init__(self, datasets: Sequence[TokenizedDataset], recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self._datasets = datasets
        self._recipe = recipe
        self._rank, self._world = rank, world
        self._lengths = [dataset.lengths for dataset in datasets]
        self._accumulation = recipe.engine.accumulation
        if recipe.sampler.batch_tokens is not None:
            self._check_budget(recipe.sampler.batch_tokens)
        self._schedule = Schedule([len(dataset) for dataset in datasets], recipe, world)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of the first epoch; with batch_tokens other epochs differ a little."""
        return self.steps(0)

    def steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch (from 0)."""
        if self._recipe.sampler.batch_tokens is None:
            return self._schedule.steps(epoch)
        return len(self._token_plan(epoch)) // self._accumulation

    def loss_weights(self, epoch: int, step: int) -> dict[str, float] | None:
        """Of a step of an epoch (both from 0); see `Schedule.loss_weights`."""
        return self._schedule.loss_weights(epoch, step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[PackedBatch]]:
        """For every optimiser step from `start_step` on, this rank's `engine.accumulation` micro-batches."""
        for _, group in self._groups(epoch, start_step):
            all_tasks = np.concatenate([tasks for shares in group for tasks, _ in shares])
            counts = np.bincount(all_tasks, minlength=len(self._datasets)).tolist()
            yield [self._pack(shares[self._rank], counts) for shares in group]

    def rest(self, epochs: int, epoch: int, start_step: int) -> Iterator[list[PackedBatch]]:
        """What `epoch` gives, from a step of an epoch on to the end of the last of `epochs`."""
        for number in range(epoch, epochs):
            yield from self.epoch(number, start_step if number == epoch else 0)

    def _groups(self, epoch: int, start_step: int) -> Iterator[tuple[int, list[list[Draw]]]]:
        """Every step from `start_step` on: its number, and its micro-batches as the ranks' shares."""
        micro_batches = self._micro_batches(epoch)
        for step in range(start_step, self.steps(epoch)):
            yield step, micro_batches[step * self._accumulation : (step + 1) * self._accumulation]

    def _pack(self, draw: Draw, group_counts: Sequence[int]) -> PackedBatch:
        tasks, rows = draw
        return pack([(dataset, rows[tasks == t]) for t, dataset in enumerate(self._datasets)], group_counts)

    def _micro_batches(self, epoch: int) -> list[list[Draw]]:
        """All micro-batches of an epoch, each as its ranks' shares."""
        tasks, rows = self._sequence(epoch)
        lengths = self._row_lengths(tasks, rows)
        if self._recipe.sampler.batch_tokens is not None:
            return [[(tasks[part], rows[part]) for part in parts] for parts in self._token_plan(epoch)]
        cuts = [0]
        for stretch in self._schedule.stretches(epoch):
            rows_here, number, begin = int(stretch.counts.sum()), stretch.micro_batches, cuts[-1]
            cuts += [begin + rows_here * (m + 1) // number for m in range(number)]
        result = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            order = start + np.argsort(-lengths[start:stop], kind="stable")  # the longest first: ranks get equal work
            parts = [np.sort(order[rank :: self._world]) for rank in range(self._world)]
            result.append([(tasks[part], rows[part]) for part in parts])
        return result

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one stream per run
    def _token_plan(self, epoch: int) -> list[list[np.ndarray]]:
        """Micro-batches filled up to `batch_tokens` per rank, each row to the rank with the least so far."""
        budget = self._recipe.sampler.batch_tokens
        assert budget is not None
        lengths = self._row_lengths(*self._sequence(epoch)).tolist()
        plan: list[list[list[int]]] = []
        loads: list[tuple[int, int]] = []
        for index, length in enumerate(lengths):
            if not loads or loads[0][0] + length > budget:
                plan.append([[] for _ in range(self._world)])
                loads = [(0, rank) for rank in range(self._world)]
            load, rank = heapq.heappop(loads)
            plan[-1][rank].append(index)
            heapq.heappush(loads, (load + length, rank))
        while plan and not all(plan[-1]):  # the end of the epoch may leave a rank without a row
            plan.pop()
        if len(plan) < self._accumulation:
            raise UserError(
                f"the training files fill {len(plan)} micro-batches of sampler.batch_tokens={budget} on "
                f"{self._world} ranks, engine.accumulation={self._accumulation} needs more: lower one of them"
            )
        return [[np.array(part) for part in parts] for parts in plan]

    def _sequence(self, epoch: int) -> Draw:
        """The epoch's rows in order: in each stretch, task t's j-th row of Q_t stands at (j + 1/2) / Q_t of the way."""
        stretches = self._schedule.stretches(epoch)
        totals = self._schedule.quotas(epoch)
        source = [self._rows(t, epoch, int(quota)) for t, quota in enumerate(totals)]
        taken = np.zeros_like(totals)
        tasks, rows = [], []
        for stretch in stretches:
            place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in stretch.counts])
            order = np.argsort(place, kind="stable")
            tasks.append(np.repeat(np.arange(len(totals)), stretch.counts)[order])
            upcoming = [source[t][taken[t] : taken[t] + count] for t, count in enumerate(stretch.counts)]
            rows.append(np.concatenate(upcoming)[order])
            taken += stretch.counts
        return np.concatenate(tasks), np.concatenate(rows)

    def _rows(self, task: int, epoch: int, quota: int) -> np.ndarray:
        """The next `quota` rows of a task, from permutations that follow each other over all epochs."""
        size = len(self._datasets[task])
        start = sum(int(self._schedule.quotas(earlier)[task]) for earlier in range(epoch))
        first, last = start // size, (start + max(quota, 1) - 1) // size
        permutations = [
            np.random.default_rng([self._recipe.seed, task, wrap]).permutation(size) for wrap in range(first, last + 1)
        ]
        return np.concatenate(permutations)[start - first * size :][:quota]

    def _row_lengths(self, tasks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(rows), dtype=np.int64)
        for t, of_task in enumerate(self._lengths):
            lengths[tasks == t] = of_task[rows[tasks == t]]
        return lengths

    def _check_budget(self, budget: int) -> None:
        for name, dataset, lengths in zip(self._recipe.task_names, self._datasets, self._lengths, strict=True):
            if lengths.max() > budget:
                row = int(lengths.argmax())
                raise UserError(
                    f"sampler.batch_tokens={budget} is less than the {lengths.max()} tokens of row "
                    f"{dataset.ids[row]} of {name} "
                    f"({dataset.path}): raise it, or set encoder.max_length"
                )


def evaluation_batches(
    dataset: TokenizedDataset, task_index: int, num_tasks: int, max_tokens: int, rank: int = 0, world: int = 1
) -> Iterator[PackedBatch]:
    """Every row of a data set once over all ranks, in batches of at most `max_tokens` tokens (one row where a row is
    longer).

    The batches hold rows of like length; `example_ids` say which. The other num_tasks - 1 tasks are empty.
    """
    order = np.argsort(-dataset.lengths, kind="stable")
    batches: list[list[int]] = []
    tokens = max_tokens + 1
    for row, length in zip(order.tolist(), dataset.lengths[order].tolist(), strict=True):
        if tokens + length > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += length
    nothing: tuple[TokenizedDataset | None, np.ndarray] = (None, np.zeros(0, np.int64))
    for rows in batches[rank::world]:
        yield pack([(dataset, np.array(rows)) if t == task_index else nothing for t in range(num_tasks)])
