"""Gradients of an embedding table as (ids [k], rows [k, d]): the rows that occur, an id may repeat.

Nothing here has a size that depends on what the ids are, so the host never waits for the device to count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastmtl_kernels import gramian
from fastmtl_kernels.cast import cast

Rows = tuple[Tensor, Tensor]


def coalesce(tasks: Sequence[Sequence[Rows]], shape: torch.Size, like: Tensor) -> list[Rows]:
    """Sum the rows of T lists over equal ids, each list by itself.

    shape: of the table, [V, d]. Returns for each list its k ids in ascending order, and float32 [k, d] on the device of
    `like`: the sum at the first place of its id, zeros at the others.
    """
    num_rows, sizes = shape[0], [sum(len(ids) for ids, _ in task) for task in tasks]
    if not any(sizes):
        return [(like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, shape[1], dtype=torch.float32)) for _ in tasks]
    keys = [ids + t * num_rows for t, task in enumerate(tasks) for ids, _ in task]
    joined = torch.cat(keys)
    ordered = joined.sort().values
    places = torch.searchsorted(ordered, joined).split([len(piece) for piece in keys])
    sums = like.new_zeros(len(joined), shape[1], dtype=torch.float32)
    _add_at(sums, zip(places, (rows for task in tasks for _, rows in task), strict=True))
    pieces = zip(ordered.split(sizes), sums.split(sizes), strict=True)
    return [(ids - t * num_rows, its_sums) for t, (ids, its_sums) in enumerate(pieces)]


def is_first(ids: Tensor) -> Tensor:
    """Bool [k], of ids [k] from `coalesce`: whether a place is the first of its id, so that it has the sum."""
    found = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=found[1:])
    return found


def rows_gramian(tasks: Sequence[Rows]) -> Tensor:
    """Inner products [T, T] float32 of T tables' gradients, each from `coalesce`: rows meet where ids are equal."""
    lower = [[_inner(tasks[i], tasks[j]) for j in range(i)] + [_square(tasks[i][1])] for i in range(len(tasks))]
    both = [lower[max(i, j)][min(i, j)] for i in range(len(tasks)) for j in range(len(tasks))]
    return torch.stack(both).view(len(tasks), len(tasks))


def _square(rows: Tensor) -> Tensor:
    return gramian([[rows]])[0, 0]


def _inner(a: Rows, b: Rows) -> Tensor:
    (ids_a, rows_a), (ids_b, rows_b) = a, b
    if not len(ids_a) or not len(ids_b):
        return rows_a.new_zeros(())
    place = torch.searchsorted(ids_b, ids_a).clamp_(max=len(ids_b) - 1)  # the first of equal ids, which has the sum
    same = ids_b.index_select(0, place) == ids_a
    met = rows_b.index_select(0, place).mul_(same.unsqueeze(1))
    return gramian([[rows_a], [met]])[0, 1]


def weighted_rows(tasks: Sequence[Sequence[Rows]], weights: Tensor, shape: torch.Size) -> Rows:
    """sum_t weights[t] times the rows of T lists of them, as from `coalesce`."""
    return coalesce([list(_weighted(tasks, weights))], shape, weights)[0]


def weighted_table(shape: torch.Size, tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Tensor:
    """sum_t weights[t] times the tables that T lists of rows stand for, float32 of `shape`."""
    table = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    _add_at(table, _weighted(tasks, weights))
    return table


def _weighted(tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Iterator[Rows]:
    for weight, task in zip(weights.unbind(), tasks, strict=True):
        for ids, rows in task:
            yield ids, cast(rows, torch.float32) * weight


def _add_at(out: Tensor, parts: Iterable[Rows]) -> None:
    """Add rows [n, d] to the rows `places` [n] of `out`, for each pair of them. Equal inputs give equal bits: on a GPU
    `index_add_` adds in the order of arrival, and `index_put_` sorts, so once for all. On a CPU one part after the
    other, as fresh memory for all of them would cost as much as their sums.
    """
    if out.device.type == "cpu":
        for places, rows in parts:
            out.index_add_(0, places, cast(rows, torch.float32))
        return
    joined = list(parts)
    if joined:
        places, rows = (torch.cat(same) for same in zip(*joined, strict=True))
        out.index_put_((places,), cast(rows, torch.float32), accumulate=True)
