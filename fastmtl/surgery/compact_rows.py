"""Gradients of an embedding table as (ids [k], rows [k, d]): the rows that occur, an id may repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast

Rows = tuple[Tensor, Tensor]


def coalesce(parts: Sequence[Rows], width: int, like: Tensor) -> Rows:
    """One row per id: the sums over equal ids, float32 [k, width] on the device of `like`."""
    if not parts:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, width, dtype=torch.float32)
    ids, rows = parts[0] if len(parts) == 1 else (torch.cat(same) for same in zip(*parts, strict=True))
    rows = cast(rows, torch.float32)
    unique, inverse = torch.unique(ids, return_inverse=True)
    return unique, rows.new_zeros(len(unique), width).index_add_(0, inverse, rows)


def rows_gramian(tasks: Sequence[Rows]) -> Tensor:
    """Inner products [T, T] float32 of T tables' gradients, each from `coalesce`: rows meet where ids are equal."""
    lower = [[_inner(tasks[i], tasks[j]) for j in range(i)] + [tasks[i][1].square().sum()] for i in range(len(tasks))]
    both = [lower[max(i, j)][min(i, j)] for i in range(len(tasks)) for j in range(len(tasks))]
    return torch.stack(both).view(len(tasks), len(tasks))


def _inner(a: Rows, b: Rows) -> Tensor:
    (ids_a, rows_a), (ids_b, rows_b) = a, b
    if not len(ids_a) or not len(ids_b):
        return rows_a.new_zeros(())
    place = torch.searchsorted(ids_b, ids_a).clamp_(max=len(ids_b) - 1)
    same = ids_b[place] == ids_a
    return (rows_a * rows_b[place]).mul_(same.unsqueeze(1)).sum()


def weighted_rows(tasks: Sequence[Sequence[Rows]], weights: Tensor, width: int) -> Rows:
    """sum_t weights[t] times the rows of T lists of them, one row per id."""
    pairs = zip(weights.unbind(), tasks, strict=True)
    parts = [(ids, cast(rows, torch.float32) * weight) for weight, task in pairs for ids, rows in task]
    return coalesce(parts, width, weights)


def weighted_table(shape: torch.Size, tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Tensor:
    """sum_t weights[t] times the tables that T lists of rows stand for, float32 of `shape`."""
    table = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    for weight, parts in zip(weights.unbind(), tasks, strict=True):
        for ids, rows in parts:
            table.index_add_(0, ids, cast(rows, torch.float32) * weight)
    return table
