"""Gradients of an embedding table as (ids [k], rows [k, d]): the rows that occur, an id may repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def coalesce(parts: Sequence[Rows], width: int, like: Tensor) -> Rows:
    """One row per id: the sums over equal ids, float32 [k, width] on the device of `like`."""
    if not parts:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, width, dtype=torch.float32)
    ids = torch.cat([ids for ids, _ in parts])
    rows = torch.cat([rows for _, rows in parts]).float()
    unique, inverse = torch.unique(ids, return_inverse=True)
    return unique, rows.new_zeros(len(unique), width).index_add_(0, inverse, rows)


def rows_gramian(tasks: Sequence[Rows]) -> Tensor:
    """Inner products [T, T] float32 of T tables' gradients: rows meet where ids are equal."""
    merged = [coalesce([task], task[1].shape[1], task[1]) for task in tasks]
    result = torch.zeros(len(tasks), len(tasks), device=merged[0][1].device)
    for i, (ids_i, rows_i) in enumerate(merged):
        for j, (ids_j, rows_j) in enumerate(merged[: i + 1]):
            if len(ids_i) and len(ids_j):
                place = torch.searchsorted(ids_j, ids_i).clamp_(max=len(ids_j) - 1)
                same = (ids_j[place] == ids_i).unsqueeze(1)
                result[i, j] = result[j, i] = (rows_i * rows_j[place] * same).sum()
    return result


def weighted_table(shape: torch.Size, tasks: Sequence[Sequence[Rows]], weights: Tensor) -> Tensor:
    """sum_t weights[t] times the tables that T lists of rows stand for, float32 of `shape`."""
    table = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    for weight, parts in zip(weights.unbind(), tasks, strict=True):
        for ids, rows in parts:
            table.index_add_(0, ids, rows.float() * weight)
    return table
