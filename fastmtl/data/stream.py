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
from fastmtl.data.samplers import find_sampler
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError, unknown_name

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
        self._sampler = find_sampler(recipe.sampler.name)
        self._sizes = np.array([len(dataset) for dataset in datasets])
        self._lengths = [dataset.lengths for dataset in datasets]
        self._batch_sizes = self._sizes_per_task()
        self._accumulation = recipe.engine.accumulation
        rows_per_step = int(self._batch_sizes.sum()) * world * self._accumulation
        fixed = recipe.sampler.steps_per_epoch
        if recipe.sampler.batch_tokens is not None:
            if fixed is not None:
                raise UserError("sampler.steps_per_epoch goes with sampler.batch_size, not with sampler.batch_tokens")
            self._check_budget(recipe.sampler.batch_tokens)
            self._rows_per_epoch = int(self._sizes.sum())
        else:
            steps = fixed or -(-int(self._sizes.sum()) // rows_per_step)
            exact = fixed is not None or recipe.sampler.name == "round_robin"
            self._rows_per_epoch = steps * rows_per_step if exact else int(self._sizes.sum())
            if self._rows_per_epoch < steps * self._accumulation * world:
                raise UserError(
                    f"the training files hold {self._rows_per_epoch} rows, fewer than the {self._accumulation * world} "
                    "micro-batches of one step: lower engine.accumulation or the number of processes"
                )
            self._steps = steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of the first epoch; with batch_tokens other epochs differ a little."""
        return self.steps(0)

    def steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch (from 0)."""
        if self._recipe.sampler.batch_tokens is None:
            return self._steps
        return len(self._token_plan(epoch)) // self._accumulation

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[PackedBatch]]:
        """For every optimiser step from `start_step` on, this rank's `engine.accumulation` micro-batches."""
        micro_batches = self._micro_batches(epoch)
        for step in range(start_step, self.steps(epoch)):
            group = micro_batches[step * self._accumulation : (step + 1) * self._accumulation]
            all_tasks = np.concatenate([tasks for shares in group for tasks, _ in shares])
            counts = np.bincount(all_tasks, minlength=len(self._sizes)).tolist()
            yield [self._pack(shares[self._rank], counts) for shares in group]

    def _pack(self, draw: Draw, group_counts: list[int]) -> PackedBatch:
        tasks, rows = draw
        return pack([(dataset, rows[tasks == t]) for t, dataset in enumerate(self._datasets)], group_counts)

    def _micro_batches(self, epoch: int) -> list[list[Draw]]:
        """All micro-batches of an epoch, each as its ranks' shares."""
        tasks, rows = self._sequence(epoch)
        lengths = self._row_lengths(tasks, rows)
        if self._recipe.sampler.batch_tokens is not None:
            return [[(tasks[part], rows[part]) for part in parts] for parts in self._token_plan(epoch)]
        number = self._steps * self._accumulation
        cuts = [len(tasks) * m // number for m in range(number + 1)]
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
        """The epoch's rows in order: task t's j-th row stands at (j + 1/2) / Q_t of the way."""
        quotas = self._quotas(epoch)
        tasks = np.repeat(np.arange(len(quotas)), quotas)
        place = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
        rows = np.concatenate([self._rows(t, epoch, int(quota)) for t, quota in enumerate(quotas)])
        order = np.argsort(place, kind="stable")
        return tasks[order], rows[order]

    def _quotas(self, epoch: int) -> np.ndarray:
        """Rows of each task in an epoch: the sampler's shares, rounded so that they add up."""
        weights = self._sampler(self._sizes, self._batch_sizes, epoch, self._recipe.train.epochs).astype(np.float64)
        exact = weights / weights.sum() * self._rows_per_epoch
        quotas = np.floor(exact + 1e-9).astype(np.int64)
        missing = self._rows_per_epoch - int(quotas.sum())
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
        return quotas

    def _rows(self, task: int, epoch: int, quota: int) -> np.ndarray:
        """The next `quota` rows of a task, from permutations that follow each other over all epochs."""
        size = int(self._sizes[task])
        start = sum(int(self._quotas(earlier)[task]) for earlier in range(epoch))
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

    def _sizes_per_task(self) -> np.ndarray:
        size = self._recipe.sampler.batch_size
        names = self._recipe.task_names
        if isinstance(size, int):
            size = dict.fromkeys(names, size)
        for name in size:
            if name not in names:
                raise unknown_name("task in sampler.batch_size", name, names)
        missing = [name for name in names if name not in size]
        if missing:
            raise UserError(f"sampler.batch_size has no number for {', '.join(missing)}")
        for name, number in size.items():
            if number < 1:
                raise UserError(f"sampler.batch_size of {name} is {number}: at least 1")
        return np.array([size[name] for name in names])

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
