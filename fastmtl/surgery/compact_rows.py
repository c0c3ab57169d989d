"""Gradients of an embedding table as (ids [k], rows [k, d]): the rows that occur, an id may repeat.

Nothing here has a size that depends on what the ids are, so the host never waits for the device to count them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast

Rows = tuple[Tensor, Tensor]


def coalesce(tasks: Sequence[Sequence[Rows]], shape: torch.Size, like: Tensor) -> list[Rows]:
    """Sum the rows of T lists over equal ids, each list by itself.

    shape: of the table, [V, d]. Returns for each list its k ids in ascending order, and float32 [k, d] on the device of
    `like`: the sum at the first place of its id, zeros at the others.
    """
    num_rows, sizes = shape[0], sizes_of(tasks)
    ids, rows = _joined([[(ids + t * num_rows, rows) for ids, rows in task] for t, task in enumerate(tasks)], like)
    if not len(ids):
        return [(like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, shape[1], dtype=torch.float32)) for _ in tasks]
    ordered = ids.sort().values
    sums = add_at(torch.zeros_like(rows), torch.searchsorted(ordered, ids), rows)
    pieces = zip(ordered.split(sizes), sums.split(sizes), strict=True)
    return [(ids - t * num_rows, sums) for t, (ids, sums) in enumerate(pieces)]


def is_first(ids: Tensor) -> Tensor:
    """Bool [k], of ids [k] from `coalesce`: whether a place is the first of its id, so that it has the sum."""
    found = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=found[1:])
    return found


def sizes_of(tasks: Sequence[Sequence[Rows]]) -> list[int]:
    """Numbers of rows in T lists."""
    return [sum(len(ids) for ids, _ in task) for task in tasks]


def add_at(out: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Add rows [n, d] to the rows `places` [n] of `out`, in place. Equal inputs give equal bits: on a GPU `index_add_`
    adds in the order of arrival, and `index_put_` sorts.
    """
    if out.device.type == "cpu":
        return out.index_add_(0, places, rows)
    return out.index_put_((places,), rows, accumulate=True)


def rows_gramian(tasks: Sequence[Rows]) -> Tensor:
    """Inner products [T, T] float32 of T tables' gradients, each from `coalesce`: rows meet where ids are equal."""
    lower = [[_inner(tasks[i], tasks[j]) for j in range(i)] + [tasks[i][1].square().sum()] for i in range(len(tasks))]
    both = [lower[max(i, j)][min(i, j)] for i in range(len(tasks)) for j in range(len(tasks))]
    return torch.stack(both).view(len(tasks), len(tasks))


def _inner(a: Rows, b: Rows) -> Tensor:
    (ids_a, rows_a), (ids_b, rows_b) = a, b
    if not len(ids_a) or not len(ids_b):
        return rows_a.new_zeros(())
    place = torch.searchsorted(ids_b, ids_a).clamp_(max=len(ids_b) - 1)  # the first of equal ids, which has the sum
    same = ids_b.index_select(0, place) == ids_a
    return rows_b.index_select(0, place).mul_(rows_a).mul_(same.unsqueeze(1)).sum()


def weighted_rows(tasks: Sequence[Sequence[Rows]], weights: Tensor, shape: torch.Size) -> Rows:
    """sum_t weights[t] times the rows of T lists of them, as from `coalesce`."""
    return coalesce([[_weighted(tasks, weights)]], shape, weights)[0]


def weighted_table(shape: torch.Size, tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Tensor:
    """sum_t weights[t] times the tables that T lists of rows stand for, float32 of `shape`."""
    table = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    return add_at(table, *_weighted(tasks, weights)) if any(sizes_of(tasks)) else table


def _weighted(tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Rows:
    """The rows of T lists, float32, each times its list's weight."""
    pairs = zip(weights.unbind(), sizes_of(tasks), strict=True)
    of_rows = torch.cat([weight.expand(size) for weight, size in pairs])
    ids, rows = _joined(tasks, weights)
    return ids, rows * of_rows.unsqueeze(1) if len(rows) else rows


def _joined(tasks: Sequence[Sequence[Rows]], like: Tensor) -> Rows:
    """The rows of all lists one after the other, float32; without any rows empty, on the device of `like`."""
    parts = [part for task in tasks for part in task]
    if not parts:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, 0, dtype=torch.float32)
    ids, rows = parts[0] if len(parts) == 1 else (torch.cat(same) for same in zip(*parts, strict=True))
    return ids, cast(rows, torch.float32)
