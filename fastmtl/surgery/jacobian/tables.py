"""Task gradients of embedding tables, kept as the rows that occur."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, rows_gramian, weighted_rows, weighted_table
from fastmtl.surgery.ranks.protocol import Ranks


class Tables:
    """T task gradients of each of `tables` [V, d], as (ids [k], rows [k, d]) lists per task.

    An id may repeat. ranks: the ranks whose rows make up the Gramian.
    """

    def __init__(self, tables: Sequence[nn.Parameter], num_tasks: int, ranks: Ranks) -> None:
        self._tables, self._num_tasks, self._ranks = list(tables), num_tasks, ranks
        self._rows: dict[int, list[list[Rows]]] = {}

    def add(self, table: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        per_task = self._rows.setdefault(id(table), [[] for _ in range(self._num_tasks)])
        per_task[task].append((ids, rows))

    def gramian(self, device: torch.device) -> Tensor:
        """Return float32 [T, T] of the gathered rows, equal on every rank."""
        total = torch.zeros(self._num_tasks, self._num_tasks, device=device)
        shapes = [whole_shape(table) for table in self._tables]
        pairs = zip(self.items(), shapes, strict=True)  # every table, even without rows, for the collectives
        compact = [coalesce(per_task, shape, total) for (_, per_task), shape in pairs]
        for tasks in self._ranks.gather_rows(compact, shapes):
            total += rows_gramian(tasks)
        return total

    def merged(self, weights: Tensor) -> dict[int, Tensor]:
        """Return sum_t weights[t] g_t of every table by id, float32 [V, d]."""
        return {id(table): weighted_table(table.shape, per_task, weights) for table, per_task in self.items()}

    def merged_rows(self, weights: Tensor) -> dict[int, Rows]:
        """Return sum_t weights[t] g_t of every table by id, as the rows that occur."""
        return {id(table): weighted_rows(per_task, weights, table.shape) for table, per_task in self.items()}

    def reached(self) -> set[int]:
        """Return the ids of the tables that have entries since `clear`, even without rows."""
        return set(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def tensors(self) -> list[Tensor]:
        return [part for rows in self._rows.values() for parts in rows for pair in parts for part in pair]

    def items(self) -> Iterator[tuple[nn.Parameter, list[list[Rows]]]]:
        """Yield every table, with or without rows, and its T lists."""
        for table in self._tables:
            yield table, self._rows.get(id(table), [[] for _ in range(self._num_tasks)])


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, even where ZeRO 3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)
