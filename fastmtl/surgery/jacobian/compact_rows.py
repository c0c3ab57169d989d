"""Gradients of an embedding table [V, d] as pairs (ids [k], rows [k, d]) of the table rows in use.

An id may occur several times; the gradient of that table row is the sum of its rows. No tensor here
has a size that depends on the values of the ids, so the host never waits for the device to count
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastmtl_kernels import gramian
from fastmtl_kernels.cast import cast

Rows = tuple[Tensor, Tensor]


def coalesce(tasks: Sequence[Sequence[Rows]], shape: torch.Size, like: Tensor) -> list[Rows]:
    """Sum the rows of T lists over equal ids, each list separately.

    shape: of the table, [V, d]. Returns for each list its k ids in ascending order, with their
    repetitions, and float32 [k, d] on the device of `like`: the sum of an id's rows at the first
    place of the id, zeros at its other places.
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
    return [(ids - t * num_rows, task_sums) for t, (ids, task_sums) in enumerate(pieces)]


def is_first(ids: Tensor) -> Tensor:
    """Return bool [k], True at the first place of each id, which holds the sum.

    ids: [k] from `coalesce`.
    """
    found = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=found[1:])
    return found


def rows_gramian(tasks: Sequence[Rows]) -> Tensor:
    """Return the Gramian of the T task gradients of one table, float32 [T, T].

    tasks: one pair from `coalesce` per task; rows with equal ids are multiplied.
    """
    lower = [[_inner(tasks[i], tasks[j]) for j in range(i)] + [_square(tasks[i][1])] for i in range(len(tasks))]
    entries = [lower[max(i, j)][min(i, j)] for i in range(len(tasks)) for j in range(len(tasks))]
    return torch.stack(entries).view(len(tasks), len(tasks))


def _square(rows: Tensor) -> Tensor:
    return gramian([[rows]])[0, 0]


def _inner(a: Rows, b: Rows) -> Tensor:
    (ids_a, rows_a), (ids_b, rows_b) = a, b
    if not len(ids_a) or not len(ids_b):
        return rows_a.new_zeros(())
    place = torch.searchsorted(ids_b, ids_a).clamp_(max=len(ids_b) - 1)  # the first of equal ids has the sum
    same = ids_b.index_select(0, place) == ids_a
    matching = rows_b.index_select(0, place).mul_(same.unsqueeze(1))
    return gramian([[rows_a], [matching]])[0, 1]


def weighted_rows(tasks: Sequence[Sequence[Rows]], weights: Tensor, shape: torch.Size) -> Rows:
    """Return sum_t weights[t] g_t of a table as one pair like those of `coalesce`.

    tasks: for each task, the pairs that add up to its gradient g_t.
    """
    return coalesce([list(_weighted(tasks, weights))], shape, weights)[0]


def weighted_table(shape: torch.Size, tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Tensor:
    """Return sum_t weights[t] g_t of a table, float32 of `shape`; tasks: as in `weighted_rows`."""
    table = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    _add_at(table, _weighted(tasks, weights))
    return table


def _weighted(tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Iterator[Rows]:
    for weight, task in zip(weights.unbind(), tasks, strict=True):
        for ids, rows in task:
            yield ids, cast(rows, torch.float32) * weight


def _add_at(out: Tensor, parts: Iterable[Rows]) -> None:
    """Add rows [n, d] to the rows `places` [n] of `out`, for each pair in `parts`.

    Equal inputs give equal bits. On a GPU, `index_add_` adds in order of arrival; `index_put_`
    sorts, so all parts take one call. On a CPU, the parts are added one after the other: new memory
    for their concatenation would take as long as the sums.
    """
    if out.device.type == "cpu":
        for places, rows in parts:
            out.index_add_(0, places, cast(rows, torch.float32))
        return
    joined = list(parts)
    if joined:
        places, rows = (torch.cat(tensors) for tensors in zip(*joined, strict=True))
        out.index_put_((places,), cast(rows, torch.float32), accumulate=True)
