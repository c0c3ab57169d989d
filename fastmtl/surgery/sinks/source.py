"""Sinks from which the Gramian of all task gradients comes: the parts that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.sketch import CountSketch
from fastmtl.surgery.jacobian.tables import Tables
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.sinks.sink import Sink


class GramianSource(Sink):
    """A sink with `gramian()`.

    ranks: those whose gradients make up J. sketch_size: buckets of a count-sketch that takes the place of J in G,
    None for the exact G.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        ranks: Ranks | None = None,
        sketch_size: int | None = None,
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse)
        self._ranks = Alone() if ranks is None else ranks
        self._tables = Tables(self._tables_of, num_tasks, self._ranks)
        self._sketch_size = sketch_size
        self._sketch: CountSketch | None = None

    @property
    def sketches(self) -> bool:
        return self._sketch_size is not None

    @property
    def scatters(self) -> bool:
        """Whether J is a sum over ranks, so that G is made of collectives."""
        return self._ranks.many

    def start_sketch(self, seed: int, device: torch.device) -> None:
        """Begin a step's sketch with hashes of its own; do nothing where G is exact."""
        if self._sketch_size is not None:
            self._sketch = CountSketch(self.num_tasks, self._sketch_size, seed, device)

    @abstractmethod
    def gramian(self) -> Tensor:
        """Return G = J J^T of what was taken since `clear`, float32 [T, T], over the ranks that make up J."""

    def sparse_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        for task, pair in enumerate(pairs):
            self.add_rows(table, task, *pair)
        return None

    def add_rows(self, table: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """Add gradient rows [k, d] of table rows ids [k] for one task."""
        if self._sketch is not None:
            self._sketch.add_rows(self._index[id(table)], task, ids, rows)
        self._tables.add(table, task, ids, rows)

    def clear(self) -> None:
        super().clear()
        self._tables.clear()
        self._sketch = None

    def tensors(self) -> list[Tensor]:
        return [*([] if self._sketch is None else [self._sketch.values]), *self._tables.tensors()]

    def _sketched_gramian(self, sketch: CountSketch) -> Tensor:
        self._ranks.total(sketch.values)
        return sketch.gramian()


class MergingSink(GramianSource):
    """A source whose task gradients outlive backward, so that they can be merged with the weights."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        ranks: Ranks | None = None,
        sketch_size: int | None = None,
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        self._reached: set[int] = set()

    @abstractmethod
    def combine(self, weights: Tensor, *, narrow: bool = False) -> Merged:
        """Return sum_t weights[t] g_t of every shared parameter by its id.

        narrow: in the dtype of the dense parameters, where all have one of 16 bits, else in float32. What is added up
        in float32 is rounded once.
        """

    def reach(self, parameter: nn.Parameter) -> None:
        """Note that a loss depends on the parameter, with a gradient of zero that need not be written."""
        self._reached.add(id(parameter))

    def reached(self) -> set[int]:
        """Return ids of the parameters that a loss has reached since `clear`, be it with zeros."""
        return self._reached | self._tables.reached()

    def clear(self) -> None:
        super().clear()
        self._reached.clear()
