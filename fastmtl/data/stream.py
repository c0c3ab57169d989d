"""The batches of a run: the rows of every micro-batch, their order, and the rows of each rank.

All of this depends only on (seed, epoch, step). So all ranks draw the same rows without
communication, and a resumed run needs no other state. An epoch is one sequence of rows of all
tasks, interleaved by the shares of the sampler (see fastmtl.data.schedule). The sequence is cut
into micro-batches, and the rows of each micro-batch are divided among the ranks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastmtl.config import Recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.schedule import Schedule, too_few_rows
from fastmtl.data.token_cache import free_pages
from fastmtl.data.token_plan import filled, whole_steps
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError

# n rows of a micro-batch: (index of the task [n], number of the row in the task's data set [n]).
Draw = tuple[np.ndarray, np.ndarray]


class BatchStream:
    """The micro-batches of one process for training.

    datasets: one per task, in the recipe's order. rank: the number of this process. world: the
    number of processes. Raises UserError where `Schedule` raises it, and for a `batch_tokens` that
    is less than the longest row.
    """

    def __init__(self, datasets: Sequence[TokenizedDataset], recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self._datasets = datasets
        self._recipe = recipe
        self._rank, self._world = rank, world
        self._lengths = [_lengths(dataset) for dataset in datasets]
        self._accumulation = recipe.engine.accumulation
        self._ends = [np.zeros(len(datasets), dtype=np.int64)]  # cached results of _left_out, beginning with epoch -1
        if recipe.sampler.batch_tokens is not None:
            self._check_budget(recipe.sampler.batch_tokens)
        self._schedule = Schedule([len(dataset) for dataset in datasets], recipe, world)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimiser steps of the first epoch.

        With `batch_tokens` the numbers of later epochs differ slightly.
        """
        return self.steps(0)

    def steps(self, epoch: int) -> int:
        """Return the number of optimiser steps of an epoch (from 0)."""
        if self._recipe.sampler.batch_tokens is None:
            return self._schedule.steps(epoch)
        return len(self._token_plan(epoch)) // self._accumulation

    def notes(self, epochs: int) -> list[str]:
        """Return a message for the user about rows that a run of `epochs` epochs never uses.

        The list has one message, or none if there are no such rows.
        """
        rows = int(self._left_out(epochs - 1).sum())
        if not rows:
            return []
        given = f"sampler.batch_tokens={self._recipe.sampler.batch_tokens}"
        micro_batches = self._accumulation * self._world
        return [
            f"the last epoch leaves out {rows} rows: with {given} they are too few for a step of {micro_batches} "
            "micro-batches"
        ]

    def loss_weights(self, epoch: int, step: int) -> dict[str, float] | None:
        """Return the factor of each task's mean loss in a step (see `Schedule.loss_weights`)."""
        return self._schedule.loss_weights(epoch, step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield one list per step from `start_step`: the micro-batches of this rank in that step.

        A step has `engine.accumulation` micro-batches. epoch, start_step: counted from 0.
        """
        for _, group in self._groups(epoch, start_step):
            counts = self._terms(*map(np.concatenate, zip(*(draw for shares in group for draw in shares), strict=True)))
            yield [self._pack(shares[self._rank], counts) for shares in group]

    def rest(self, epochs: int, epoch: int, start_step: int) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of every step from `start_step` of `epoch` to the end of the run.

        epochs: the number of epochs of the run. The lists are those of `epoch`.
        """
        for number in range(epoch, epochs):
            yield from self.epoch(number, start_step if number == epoch else 0)

    def _groups(self, epoch: int, start_step: int) -> Iterator[tuple[int, list[list[Draw]]]]:
        """Yield (number, micro-batches) of each step from `start_step`.

        A micro-batch is a list with the rows of each rank.
        """
        micro_batches = self._micro_batches(epoch)
        for step in range(start_step, self.steps(epoch)):
            begin = step * self._accumulation
            yield step, [micro_batches(number) for number in range(begin, begin + self._accumulation)]

    def _pack(self, draw: Draw, group_counts: Sequence[int]) -> PackedBatch:
        tasks, rows = draw
        return pack([(dataset, rows[tasks == t]) for t, dataset in enumerate(self._datasets)], group_counts)

    def _terms(self, tasks: np.ndarray, rows: np.ndarray) -> list[int]:
        """Return the number of loss terms of each task in the given rows of the tasks."""
        counts = np.bincount(tasks, minlength=len(self._datasets)).tolist()
        for t, dataset in enumerate(self._datasets):
            if dataset.loss_terms is not None:
                counts[t] = int(dataset.loss_terms[rows[tasks == t]].sum())
        return counts

    def _micro_batches(self, epoch: int) -> Callable[[int], list[Draw]]:
        """Return a function that takes the number of a micro-batch of an epoch, from 0.

        It returns a list with the rows of each rank. Micro-batches are made when they are needed,
        since all of them together need far more memory than the sequence.
        """
        tasks, rows = self._sequence(epoch)
        if self._recipe.sampler.batch_tokens is not None:
            plan = self._token_plan(epoch)
            return lambda number: [(tasks[part].astype(np.int64), rows[part]) for part in plan[number]]
        cuts = [0]
        for stretch in self._schedule.stretches(epoch):
            rows_here, number, begin = int(stretch.counts.sum()), stretch.micro_batches, cuts[-1]
            cuts += [begin + rows_here * (m + 1) // number for m in range(number)]

        def divided(number: int) -> list[Draw]:
            part = slice(cuts[number], cuts[number + 1])
            here, drawn = tasks[part].astype(np.int64), rows[part]
            order = np.argsort(-self._row_lengths(here, drawn), kind="stable")  # longest first, for equal work per rank
            shares = [np.sort(order[rank :: self._world]) for rank in range(self._world)]
            return [(here[share], drawn[share]) for share in shares]

        return divided

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one stream per run
    def _token_plan(self, epoch: int) -> list[list[np.ndarray]]:
        """Return the micro-batches of an epoch if they are filled by `batch_tokens`.

        A micro-batch is a list with one array per rank, indices into the result of `_sequence`.
        """
        budget = self._recipe.sampler.batch_tokens
        assert budget is not None
        tasks, rows = self._sequence(epoch)
        lengths = self._row_lengths(tasks, rows).tolist()
        plan = whole_steps(filled(lengths, budget, self._world), lengths, self._accumulation, self._world)
        if not plan:
            raise too_few_rows(len(rows), self._accumulation * self._world)
        return [[np.array(part) for part in parts] for parts in plan]

    def _left_out(self, epoch: int) -> np.ndarray:
        """Return how many rows of each task no step of this epoch uses, int64 [T].

        The next epoch begins with these rows. 0 without `batch_tokens`.
        """
        if self._recipe.sampler.batch_tokens is None:
            return np.zeros(len(self._datasets), dtype=np.int64)
        while (
            len(self._ends) <= epoch + 1
        ):  # in order, since an epoch begins with the rows that the previous one left out
            here = len(self._ends) - 1
            tasks, _ = self._sequence(here)
            planned = sum(len(part) for parts in self._token_plan(here) for part in parts)
            self._ends.append(np.bincount(tasks[planned:], minlength=len(self._datasets)))
        return self._ends[epoch + 1]

    def _sequence(self, epoch: int) -> Draw:
        """Return the rows of an epoch in order: tasks, int16 [n], and rows, int64 [n].

        Rows that the previous epoch left out come in the first stretch. In a stretch with Q_t rows
        of task t, the j-th of these rows (from 0) is placed at the fraction (j + 1/2) / Q_t of the
        stretch, so that the tasks are mixed evenly.
        """
        left_out = self._left_out(epoch - 1)
        stretches = [stretch.counts for stretch in self._schedule.stretches(epoch)]
        stretches[0] = stretches[0] + left_out
        totals = np.sum(stretches, axis=0)
        begin = sum((self._schedule.quotas(earlier) for earlier in range(epoch)), -left_out)
        source = [self._rows(t, int(begin[t]), int(quota)) for t, quota in enumerate(totals)]
        taken = np.zeros_like(totals)
        tasks, rows = [], []
        for counts in stretches:
            own = np.repeat(np.arange(len(totals), dtype=np.int16), counts)
            upcoming = _joined([source[t][taken[t] : taken[t] + count] for t, count in enumerate(counts)])
            if np.count_nonzero(counts) > 1:
                place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
                order = np.argsort(place, kind="stable")
                del place
                own, upcoming = own[order], upcoming[order]
            tasks.append(own)
            rows.append(upcoming)
            taken += counts
        return _joined(tasks), _joined(rows)

    def _rows(self, task: int, start: int, quota: int) -> np.ndarray:
        """Return the numbers of the next `quota` rows of a task if `start` rows are used already.

        The order is an endless sequence of permutations of the task's rows. It does not restart
        with an epoch, so every row is used once before any row repeats.
        """
        size = len(self._datasets[task])
        first, last = start // size, (start + max(quota, 1) - 1) // size
        parts = []
        for wrap in range(first, last + 1):
            begin, end = (max(0, min(size, edge - wrap * size)) for edge in (start, start + quota))
            parts.append(np.random.default_rng([self._recipe.seed, task, wrap]).permutation(size)[begin:end])
        return _joined(parts)

    def _row_lengths(self, tasks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(rows), dtype=np.int32)
        for t, of_task in enumerate(self._lengths):
            lengths[tasks == t] = of_task[rows[tasks == t]]
        return lengths

    def _check_budget(self, budget: int) -> None:
        for name, dataset, lengths in zip(self._recipe.task_names, self._datasets, self._lengths, strict=True):
            if lengths.max() > budget:
                row = int(lengths.argmax())
                texts = len(dataset.sequences(np.array([row])))
                parts = f" with its {texts} texts" if dataset.example_offsets is not None else ""
                raise UserError(
                    f"sampler.batch_tokens={budget} is less than the {lengths.max()} tokens of row "
                    f"{dataset.ids[row]} of {name}{parts} "
                    f"({dataset.path}): raise it, or set encoder.max_length"
                )


def evaluation_batches(
    dataset: TokenizedDataset, task_index: int, num_tasks: int, max_tokens: int, rank: int = 0, world: int = 1
) -> Iterator[PackedBatch]:
    """Yield the batches of this rank for evaluating one data set.

    All ranks together yield every row once. A batch has rows of similar length, with at most
    `max_tokens` tokens in all; a row that is longer is a batch of its own. Its `example_ids` are
    the row numbers in the data set. Task `task_index` of num_tasks has the rows; the others are
    empty.
    """
    lengths = dataset.lengths
    order = np.argsort(-lengths, kind="stable")
    bounds: list[int] = []
    tokens = max_tokens + 1
    for place, length in enumerate(lengths[order].tolist()):
        if tokens + length > max_tokens:
            bounds.append(place)
            tokens = 0
        tokens += length
    bounds.append(len(order))
    batches = list(itertools.pairwise(bounds))
    nothing: tuple[TokenizedDataset | None, np.ndarray] = (None, np.zeros(0, np.int64))
    for begin, end in batches[rank::world]:
        yield pack([(dataset, order[begin:end]) if t == task_index else nothing for t in range(num_tasks)])


def _lengths(dataset: TokenizedDataset) -> np.ndarray:
    """Return the number of tokens of each example, int32 [n]."""
    lengths = dataset.lengths.astype(np.int32)
    free_pages(dataset.offsets)
    return lengths


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return one array of all parts, the part itself if the others are empty."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else np.concatenate(filled or parts)
