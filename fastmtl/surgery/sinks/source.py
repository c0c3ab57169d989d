"""Base classes of the sinks that compute the Gramian of all task gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.surgery.balance import Balance
from fastmtl.surgery.jacobian.compact_rows import Rows
from fastmtl.surgery.jacobian.sketch import CountSketch
from fastmtl.surgery.jacobian.tables import Tables
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.sinks.layer_gramians import LayerGramians
from fastmtl.surgery.sinks.sink import Sink


class GramianSource(Sink):
    """Sink from which G can be computed after backward.

    ranks: the ranks whose gradients add up to J. sketch_size: buckets of a count-sketch from which
    G is estimated; None for the exact G.

    layers: receives the Gramians of layers from `gramian`, None for a step that measures none.
    balance: receives J's columns from `gramian`, if there is one; G must then be exact.
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
        self.layers: LayerGramians | None = None
        self.balance: Balance | None = None

    @property
    def sketches(self) -> bool:
        return self._sketch_size is not None

    @property
    def scatters(self) -> bool:
        """True if J is a sum over ranks, so that G needs collectives."""
        return self._ranks.many

    def start_sketch(self, seed: int, device: torch.device) -> None:
        """Create the empty sketch of a step, with hashes from `seed`; do nothing if G is exact."""
        if self._sketch_size is not None:
            self._sketch = CountSketch(self.num_tasks, self._sketch_size, seed, device)

    @abstractmethod
    def gramian(self) -> Tensor:
        """Return G = J J^T of the gradients taken since `clear`, float32 [T, T].

        J is the sum over the class's `ranks`, each of which must call this method.
        """

    def sparse_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        for task, pair in enumerate(pairs):
            self.add_rows(table, task, *pair)
        return None

    def add_rows(self, table: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """Take rows [k, d], one task's gradients of the table rows ids [k] of a `sparse` table."""
        if self._sketch is not None:
            self._sketch.add_rows(self._index[id(table)], task, ids, rows)
        self._tables.add(table, task, ids, rows)

    def clear(self) -> None:
        super().clear()
        self._tables.clear()
        self._sketch = None

    def tensors(self) -> list[Tensor]:
        return [*([] if self._sketch is None else [self._sketch.values]), *self._tables.tensors()]

    def _add_part(self, total: Tensor, key: int, part: Tensor) -> None:
        """Add the Gramian of this rank's share of a dense parameter to `total` and to its layer."""
        total += part
        if self.layers is not None:
            self.layers.add(key, part)

    def _of_all_ranks(self, total: Tensor) -> Tensor:
        """Return G of all ranks and tables, and finish `layers`.

        total: Gramian of this rank's share of the dense parameters.
        """
        found = self._ranks.total(total) + self._tables.gramian(total.device, self.layers, self.balance)
        if self.layers is not None:
            self.layers.finish(self._ranks)
        return found

    def _sketched_gramian(self, sketch: CountSketch) -> Tensor:
        self._ranks.total(sketch.values)
        return sketch.gramian()


class MergingSink(GramianSource):
    """Sink that keeps task gradients after backward, and merges them once the weights are known."""

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
        """Return sum_t weights[t] g_t of every shared parameter by id.

        narrow: if True, and if all dense parameters have the same 16-bit dtype, the result has this
        dtype, else float32. Sums are float32 and rounded once.
        """

    @abstractmethod
    def task_gradient(self, parameter: nn.Parameter, task: int) -> Tensor | None:
        """Return one task's gradient of a dense parameter, None if no backward has delivered one.

        It is this rank's, of all micro-batches since `clear`.
        """

    def task_rows(self, table: nn.Parameter, task: int) -> list[Rows]:
        """Return one task's gradient of a `sparse` table: pairs (ids, rows) that add up."""
        return self._tables.of_task(table, task)

    def reach(self, parameter: nn.Parameter) -> None:
        """Record that a loss depends on the parameter, although its zero gradient is not added."""
        self._reached.add(id(parameter))

    def reached(self) -> set[int]:
        """Return ids of the parameters that any loss since `clear` depends on, even with zeros."""
        return self._reached | self._tables.reached()

    def clear(self) -> None:
        super().clear()
        self._reached.clear()
