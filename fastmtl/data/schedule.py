"""The schedule of an epoch: how many rows of each task its micro-batches have.

The sampler's shares decide it. An epoch is divided into stretches, and each stretch has its own
numbers of rows. The schedule depends only on the data sets' sizes, the recipe, the number of ranks
and the epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmtl.config import Recipe
from fastmtl.data.compromise import drawn_batches, free_shares, loss_divisors
from fastmtl.data.samplers import find_sampler
from fastmtl.errors import UserError, unknown_name

# Samplers whose micro-batches have `sampler.batch_size` rows: `sampler.batch_tokens` cannot apply.
BY_BATCH_SIZE = ("sequential", "joint", "compromise")


@dataclass(frozen=True)
class Stretch:
    """A part of an epoch in which the rows of each task are spread evenly.

    counts: rows of each task over all ranks, int64 [T]. micro_batches: the number of micro-batches,
    a multiple of `engine.accumulation`, so that the stretch has whole optimiser steps.
    """

    counts: np.ndarray
    micro_batches: int


class Schedule:
    """The stretches, steps and loss weights of a run's epochs.

    sizes: rows of each task's training file, in the recipe's order. world: number of processes.
    Raises UserError for settings with unknown task names, for settings that exclude each other, and
    for files with too few rows for one step.
    """

    def __init__(self, sizes: Sequence[int], recipe: Recipe, world: int = 1) -> None:
        self._recipe, self._sampler = recipe, recipe.sampler
        self._share = find_sampler(recipe.sampler.name)
        self._accumulation, self._world, self._epochs = recipe.engine.accumulation, world, recipe.train.epochs
        self.batch_sizes = np.array(list(self._per_task("batch_size", recipe.sampler.batch_size).values()))
        self._check_together()
        self._largest_first = np.argsort(-np.array(sizes), kind="stable")
        self._sizes = self._drawn_from(np.array(sizes))
        for epoch in range(self._epochs) if recipe.sampler.batch_tokens is None else ():
            for stretch in self.stretches(epoch):
                self._check_filled(stretch)

    def steps(self, epoch: int) -> int:
        """Return the number of optimiser steps of an epoch (from 0).

        Only without `batch_tokens`; with it, `BatchStream.steps` counts.
        """
        return sum(stretch.micro_batches for stretch in self.stretches(epoch)) // self._accumulation

    def quotas(self, epoch: int) -> np.ndarray:
        """Return how many rows of each task an epoch has, int64 [T]. epoch: counted from 0."""
        return np.sum([stretch.counts for stretch in self.stretches(epoch)], axis=0)

    @functools.cache  # noqa: B019 - one schedule per run
    def stretches(self, epoch: int) -> tuple[Stretch, ...]:
        """Return the epoch's stretches in order.

        With `batch_tokens` an epoch has one stretch, whose `micro_batches` is 0: the lengths of the
        rows decide how many micro-batches there are.
        """
        sizes = self._sizes * self._phased_in(epoch)
        weights = self._share(self._sizes, self.batch_sizes, epoch, self._epochs) * self._phased_in(epoch)
        shares = weights.astype(np.float64)
        if self._sampler.batch_tokens is not None:
            return (Stretch(_rounded(shares, int(sizes.sum())), 0),)
        rows_per_batch = self.batch_sizes * self._world
        rows_per_step = rows_per_batch * self._accumulation
        fixed = self._sampler.steps_per_epoch
        match self._sampler.name:
            case "sequential":
                quotas = _rounded(shares, int(sizes.sum()))
                each = [
                    Stretch(row, self._batches(row.sum(), rows_per_step[t])) for t, row in enumerate(np.diag(quotas))
                ]
                return tuple(stretch for stretch in each if stretch.micro_batches)
            case "compromise":
                shares = shares / shares.sum()
                number = self._sampler.batches_per_step
                assert number is not None  # checked by _check_together
                expected = (1 + (number - len(shares)) * free_shares(shares, number)) if number > len(shares) else 1
                steps = fixed or -int(-sizes.sum() // (expected * rows_per_batch).sum())
                random = np.random.default_rng([self._recipe.seed, epoch, 0, 1])
                drawn = drawn_batches(shares, number, steps, random)
                return tuple(Stretch(row, self._accumulation) for row in drawn * rows_per_batch)
            case "joint":
                steps = fixed or int(np.max(-(-sizes // rows_per_step)))
            case _:
                steps = fixed or -(-int(sizes.sum()) // int(rows_per_step.sum()))
        by_steps = fixed is not None or self._sampler.name in ("round_robin", "joint")
        rows = steps * int(rows_per_step.sum()) if by_steps else int(sizes.sum())
        return (Stretch(_rounded(shares, rows), steps * self._accumulation),)

    def loss_weights(self, epoch: int, step: int) -> dict[str, float] | None:
        """Return the factor of each task's mean loss in a step, by task name (both from 0).

        None for every sampler except `compromise`: the losses have no factors.
        """
        if self._sampler.name != "compromise":
            return None
        batches = self.stretches(epoch)[step].counts / (self.batch_sizes * self._world)
        weights = batches / loss_divisors(self._sizes, epoch, self._epochs)
        return dict(zip(self._recipe.task_names, weights.tolist(), strict=True))

    def _batches(self, rows: int, rows_per_step: int) -> int:
        return -(-int(rows) // int(rows_per_step)) * self._accumulation

    def _drawn_from(self, sizes: np.ndarray) -> np.ndarray:
        """Return how many rows of each task the sampler uses, int64 [T].

        These are the file's rows `sizes`, limited by `subsample` and multiplied by `oversample`,
        the latter up to the size of the largest file.
        """
        most = self._per_task("subsample", self._sampler.subsample, needs_all=False)
        sizes = np.array(
            [min(size, most.get(name, size)) for name, size in zip(self._recipe.tasks, sizes, strict=True)]
        )
        if self._sampler.oversample == 1:
            return sizes
        return np.minimum(sizes * self._sampler.oversample, sizes.max()).astype(np.int64)

    def _phased_in(self, epoch: int) -> np.ndarray:
        """Return the factors by which the curriculum multiplies the tasks' shares, [T].

        The curriculum adds the tasks one after the other, the largest file first. The largest file
        always has the factor 1. The factor of the k-th largest file (from 0) of T grows from 0 to 1
        between the epochs (k - 1) d and k d, where d = curriculum / (T - 1).
        """
        length = self._sampler.curriculum
        if length is None or len(self._sizes) == 1:
            return np.ones(len(self._sizes), dtype=np.int64)
        rank = np.empty(len(self._sizes))
        rank[self._largest_first] = np.arange(len(self._sizes))
        return np.where(rank == 0, 1.0, np.clip(epoch * (len(rank) - 1) / length - (rank - 1), 0.0, 1.0))

    def _per_task(self, key: str, given: int | dict[str, int], *, needs_all: bool = True) -> dict[str, int]:
        names = self._recipe.task_names
        values = dict.fromkeys(names, given) if isinstance(given, int) else given
        for name in values:
            if name not in names:
                raise unknown_name(f"task in sampler.{key}", name, names)
        missing = [name for name in names if name not in values]
        if missing and needs_all:
            raise UserError(f"sampler.{key} has no number for {', '.join(missing)}")
        for name, number in values.items():
            if number < 1:
                raise UserError(f"sampler.{key} of {name} is {number}: at least 1")
        return {name: values[name] for name in names if name in values}

    def _check_together(self) -> None:
        given, tasks = self._sampler, len(self._recipe.tasks)
        if given.batch_tokens is not None and given.steps_per_epoch is not None:
            raise UserError("sampler.steps_per_epoch goes with sampler.batch_size, not with sampler.batch_tokens")
        if given.batch_tokens is not None and given.name in BY_BATCH_SIZE:
            raise UserError(
                f"sampler.batch_tokens does not go with sampler.name: {given.name}, whose batches are of "
                "sampler.batch_size rows"
            )
        if given.name == "sequential" and given.steps_per_epoch is not None:
            raise UserError("sampler.steps_per_epoch does not go with sampler.name: sequential: every row comes once")
        if given.curriculum is not None and given.name == "compromise":
            raise UserError("sampler.curriculum does not go with sampler.name: compromise: every step has every task")
        if given.curriculum is not None and given.curriculum >= self._epochs:
            raise UserError(
                f"sampler.curriculum: the last task is whole from epoch {given.curriculum:g} (from 0) on, but "
                f"train.epochs is {self._epochs}: lower it"
            )
        if (given.batches_per_step is not None) != (given.name == "compromise"):
            raise UserError(
                "sampler.batches_per_step and sampler.name: compromise go together, neither without the other"
            )
        if given.batches_per_step is not None and given.batches_per_step < tasks:
            raise UserError(
                f"sampler.batches_per_step: {given.batches_per_step}, but a step has a batch of each of {tasks} tasks"
            )

    def _check_filled(self, stretch: Stretch) -> None:
        needed, rows = stretch.micro_batches * self._world, int(stretch.counts.sum())
        if rows < needed:
            raise too_few_rows(rows, self._accumulation * self._world)


def too_few_rows(rows: int, micro_batches: int) -> UserError:
    """Return the error for files whose `rows` rows are fewer than the micro-batches of one step."""
    return UserError(
        f"the training files hold {rows} rows, fewer than the {micro_batches} micro-batches of one step: lower "
        "engine.accumulation or the number of processes"
    )


def _rounded(shares: np.ndarray, rows: int) -> np.ndarray:
    """Return `rows` divided among the tasks by `shares`, int64 [T]. The sum is exactly `rows`."""
    exact = shares / shares.sum() * rows
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    missing = rows - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return quotas
