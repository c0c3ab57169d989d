"""Task gradients of embedding tables, kept only for the table rows in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, rows_gramian, weighted_rows, weighted_table
from fastmtl.surgery.ranks.protocol import Ranks


class TakesTables(Protocol):
    """Receiver of the Gramian [T, T] of each table, by the table's id."""

    def add_table(self, key: int, gram: Tensor) -> None: ...


class TakesRows(Protocol):
    """Receiver of the T gradients of each table, by the table's id: pairs from `coalesce`."""

    def take_table(self, key: int, tasks: Sequence[Rows]) -> None: ...


class Tables:
    """T task gradients of each of `tables` [V, d], each a list of pairs (ids [k], rows [k, d]).

    The pairs of a list add up; an id may repeat. ranks: the ranks whose rows make up the Gramian.
    """

    def __init__(self, tables: Sequence[nn.Parameter], num_tasks: int, ranks: Ranks) -> None:
        self._tables, self._num_tasks, self._ranks = list(tables), num_tasks, ranks
        self._rows: dict[int, list[list[Rows]]] = {}

    def add(self, table: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        per_task = self._rows.setdefault(id(table), [[] for _ in range(self._num_tasks)])
        per_task[task].append((ids, rows))

    def of_task(self, table: nn.Parameter, task: int) -> list[Rows]:
        """Return the pairs of one task's gradient of a table."""
        return self._rows[id(table)][task] if id(table) in self._rows else []

    def gramian(self, device: torch.device, each: TakesTables | None = None, rows: TakesRows | None = None) -> Tensor:
        """Return the sum of all tables' Gramians, float32 [T, T].

        The rows of all `ranks` are gathered before, so each of these ranks returns the same. each:
        receives the Gramian of each table. rows: receives the gathered rows of each table.
        """
        total = torch.zeros(self._num_tasks, self._num_tasks, device=device)
        shapes = [whole_shape(table) for table in self._tables]
        pairs = zip(self.items(), shapes, strict=True)  # every table, even without rows, for the collectives
        compact = [coalesce(per_task, shape, total) for (_, per_task), shape in pairs]
        for table, tasks in zip(self._tables, self._ranks.gather_rows(compact, shapes), strict=True):
            part = rows_gramian(tasks)
            total += part
            if each is not None:
                each.add_table(id(table), part)
            if rows is not None:
                rows.take_table(id(table), tasks)
        return total

    def merged(self, weights: Tensor) -> dict[int, Tensor]:
        """Return sum_t weights[t] g_t of this rank's rows for every table by id, float32 [V, d]."""
        return {id(table): weighted_table(table.shape, per_task, weights) for table, per_task in self.items()}

    def merged_rows(self, weights: Tensor) -> dict[int, Rows]:
        """Return the same gradients as `merged`, each as (ids, rows) of the table rows in use."""
        return {id(table): weighted_rows(per_task, weights, table.shape) for table, per_task in self.items()}

    def reached(self) -> set[int]:
        """Return the ids of the tables that `add` has received since `clear`, even without rows."""
        return set(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def tensors(self) -> list[Tensor]:
        return [part for rows in self._rows.values() for parts in rows for pair in parts for part in pair]

    def items(self) -> Iterator[tuple[nn.Parameter, list[list[Rows]]]]:
        """Yield every table and its T lists of pairs, empty lists for a table without gradients."""
        for table in self._tables:
            yield table, self._rows.get(id(table), [[] for _ in range(self._num_tasks)])


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, even where ZeRO 3 has partitioned it.

    A DTensor's `shape` is that of the whole, too.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def is_sharded(parameter: object) -> bool:
    """Return True for a DTensor, without importing its class, which takes long."""
    return hasattr(parameter, "device_mesh")
