"""`storage: replay`, first pass: the sink that adds task gradients to G and drops them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl.surgery.sinks.source import GramianSource
from fastmtl_kernels import gramian


class GramianSink(GramianSource):
    """Sink that computes G of a step without storing J.

    accumulates: True if a step has several micro-batches. Their task gradients add up before G, so
    this rank keeps its share of J's columns until `clear`. With `balance` it always does. If False,
    a weight's task gradients go into G and are dropped as soon as the last use of the weight has
    delivered. There must then be only one forward until `clear`, and `forward_done` between it and
    its backward.
    tasks_of_pass: numbers of the tasks to which the gradients of a backward belong; None: all. Only
    these are sent to other ranks. Needs `accumulates`.
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
        super().__init__(parameters, num_tasks, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        self.accumulates = True
        self.tasks_of_pass: list[int] | None = None
        self._shares: dict[int, Tensor] = {}
        self._parts: dict[int, Tensor] = {}
        self._largest = 0

    @contextmanager
    def armed(self, device: torch.device, *, accumulates: bool = True) -> Iterator[None]:
        self.accumulates = accumulates or self.balance is not None
        self._uses.counting = not self.accumulates and self._sketch is None
        with super().armed(device):
            yield

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        gradients, key = gradients.reshape(self.num_tasks, -1), id(parameter)
        self._largest = max(self._largest, gradients.nbytes)
        if self._sketch is not None:
            self._sketch.add(self._index[key], gradients)
        elif self.accumulates:
            tasks, before = self.tasks_of_pass, self._shares.get(key)
            share = self._ranks.scatter(gradients if tasks is None else gradients[tasks]).to(torch.float32)
            if tasks is not None and before is None:
                before = self._shares[key] = share.new_zeros(self.num_tasks, share.shape[1])
            if tasks is not None and before is not None:
                before[tasks] += share
            else:
                self._shares[key] = share if before is None else before.add_(share)
        elif key in self._parts:
            raise RuntimeError("a weight's task gradients were added to the Gramian before its last use had written")
        else:
            complete = self._uses.complete(key, gradients)
            if complete is not None:
                self._parts[key] = gramian(self._ranks.scatter(complete).to(torch.float32))
        return None

    def add_rows(self, table: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        if self._sketch is not None:  # no pass of this sink needs the rows again
            self._sketch.add_rows(self._index[id(table)], task, ids, rows)
        else:
            self._tables.add(table, task, ids, rows)

    def gramian(self) -> Tensor:
        if self._sketch is not None:
            return self._sketched_gramian(self._sketch)
        total = torch.zeros(self.num_tasks, self.num_tasks, device=self.anchor.device)
        for key, share in self._shares.items():
            self._add_part(total, key, gramian(share))
            if self.balance is not None:
                self.balance.take((key,), share)
        for key, part in self._parts.items():
            self._add_part(total, key, part)
        for key, held in self._uses.held.items():  # other uses never deliver: no loss depends on them
            self._add_part(total, key, gramian(self._ranks.scatter(held).to(torch.float32)))
        return self._of_all_ranks(total)

    def clear(self) -> None:
        super().clear()
        self._shares.clear()
        self._parts.clear()
        self._largest = 0

    def nbytes(self) -> int:
        return self._largest + super().nbytes()

    def tensors(self) -> list[Tensor]:
        return [*self._shares.values(), *self._uses.held.values(), *super().tensors()]
