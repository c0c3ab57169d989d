"""The sink that shared layers write their T task gradients into, during one backward pass.

Shapes: T tasks, P numbers in the dense shared parameters, V x d an embedding table with compact rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastmtl_kernels import combine, gramian

Mode = Literal["stack", "gramian", "weighted"]
# Sums a [T, n] piece of J over ranks and returns this rank's share of its columns: all of them for one rank.
Scatter = Callable[[Tensor], Tensor]
# Gathers a task's compact embedding rows (ids [k], rows [k, d]) from all ranks.
GatherRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TaskGradients:
    """J of the shared parameters, or what surgery needs of it.

    Handed to the layers in forward; nothing is written unless it is armed, and every write adds (a weight used twice,
    accumulation).

    - `stack`: keeps J, dense parameters in one [T, P] buffer, embedding rows as (ids, rows) per task.
      Autograd gets no gradient.
    - `gramian`: adds a layer's share to G as soon as the layer's backward is done, and drops it.
      Autograd gets no gradient.
    - `weighted`: autograd gets `sum_t weights[t] g_t` for shared parameters; nothing is kept. Inputs' gradients stay
      unweighted.

    `anchor` is a zero scalar that requires a gradient; the embedding takes it as an input. Differentiating a loss for
    it runs every
    layer's backward without asking autograd for any shared parameter, so no hook on one fires.

    parameters: the trainable shared ones. sparse: those among them whose gradient is compact rows (the word
    embeddings).
    dtype: of J. scatter, gather_rows: see `reduce` of GradientSurgery; the identity for one rank.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        dtype: torch.dtype = torch.float32,
        scatter: Scatter = lambda piece: piece,
        gather_rows: GatherRows = lambda ids, rows: (ids, rows),
    ) -> None:
        self.num_tasks = num_tasks
        self.mode: Mode | None = None
        self.weights: Tensor | None = None
        self._parameters = list(parameters)
        self._sparse = {id(parameter) for parameter in sparse}
        self._dense = [parameter for parameter in self._parameters if id(parameter) not in self._sparse]
        self._dtype = dtype
        self._scatter, self._gather_rows = scatter, gather_rows
        self._known = {id(parameter) for parameter in self._parameters}
        self._stack: Tensor | None = None
        self._views: dict[int, list[Tensor]] = {}
        self._rows: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}
        self._shards: dict[int, Tensor] = {}
        self._keep = True
        self._counting = False
        self._uses: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}
        self._dropped: dict[int, Tensor] = {}
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def armed(
        self, mode: Mode, device: torch.device, *, weights: Tensor | None = None, keep: bool = True
    ) -> Iterator[None]:
        """Takes writes inside the block.

        weights: [T] for `weighted`. keep: for `gramian`, whether this rank's share of J adds up over several blocks;
        without it a gradient goes into G and is dropped as soon as every use of its weight in the forward has written,
        so there may be one block, of one forward, until `clear`. Call `forward_done` in it between forward and
        backward.
        """
        if self.anchor.device != device:
            self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.mode, self.weights, self._keep = mode, weights, keep
        self._counting = mode == "gramian" and not keep
        if mode == "stack" and self._stack is None:
            self._allocate(device)
        try:
            yield
        finally:
            self.mode = self.weights = None
            self._counting = False

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """A forward uses these: as many writes will come."""
        if self._counting:
            for parameter in parameters:
                self._uses[id(parameter)] = self._uses.get(id(parameter), 0) + 1

    def forward_done(self) -> None:
        """What checkpointing runs again in backward is no use of its own."""
        self._counting = False

    def wants(self, parameter: nn.Parameter | None) -> bool:
        """Whether a layer should write this parameter's gradient here."""
        return parameter is not None and parameter.requires_grad and id(parameter) in self._known

    def views(self, parameter: nn.Parameter) -> list[Tensor]:
        """T tensors of the parameter's shape inside J, to be added to (mode `stack`)."""
        return self._views[id(parameter)]

    def is_sparse(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._sparse

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Adds [T, *shape] task gradients of a dense parameter (mode `gramian`)."""
        gradients = gradients.reshape(self.num_tasks, -1)
        key = id(parameter)
        if self._keep:
            share = self._scatter(gradients).to(torch.float32)
            held = self._shards.get(key)
            self._shards[key] = share if held is None else held.add_(share)
            return
        if key in self._dropped:
            raise RuntimeError("a weight's task gradients met in the Gramian before its last use had written")
        if key in self._held:
            gradients = gradients + self._held.pop(key)
        self._uses[key] -= 1
        if self._uses[key] > 0:
            self._held[key] = gradients
        else:
            self._dropped[key] = gramian(self._scatter(gradients).to(torch.float32))

    def add_rows(self, parameter: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """Adds gradient rows [k, d] of table rows ids [k] for one task (modes `stack` and `gramian`)."""
        per_task = self._rows.setdefault(id(parameter), [[] for _ in range(self.num_tasks)])
        per_task[task].append((ids, rows))

    def gramian(self) -> Tensor:
        """G = J J^T over what was written since `clear`, float32 [T, T], this rank's share of it."""
        total = torch.zeros(self.num_tasks, self.num_tasks, device=self.anchor.device)
        if self._stack is not None:
            total += gramian(self._scatter(self._stack))
        for shard in self._shards.values():
            total += gramian(shard)
        for part in self._dropped.values():
            total += part
        for held in self._held.values():  # a use that the loss does not depend on never writes
            total += gramian(self._scatter(held).to(torch.float32))
        return total

    def sparse_gramian(self) -> Tensor:
        """The compact rows' part of G, float32 [T, T], all ranks' rows: equal on every rank, so it is not summed over
        them.
        """
        total = torch.zeros(self.num_tasks, self.num_tasks, device=self.anchor.device)
        for parameter in self._parameters:  # every rank in the same order, with or without rows: it is collective
            if id(parameter) in self._sparse:
                per_task = self._rows.get(id(parameter), [[] for _ in range(self.num_tasks)])
                width = _shape(parameter)[1]
                total += _rows_gramian([self._gather_rows(*_coalesce(parts, width, total)) for parts in per_task])
        return total

    def combine(self, weights: Tensor) -> dict[int, Tensor]:
        """sum_t weights[t] g_t for every shared parameter by id(parameter), float32 (mode `stack`)."""
        assert self._stack is not None, "combine needs mode stack"
        merged = torch.empty(self._stack.shape[1], dtype=torch.float32, device=self._stack.device)
        combine(self._stack, weights, out=merged)
        result, start = {}, 0
        for parameter in self._dense:
            result[id(parameter)] = merged[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        for parameter in self._parameters:
            if id(parameter) in self._sparse:
                table = torch.zeros(parameter.shape, dtype=torch.float32, device=self.anchor.device)
                for task, parts in enumerate(self._rows.get(id(parameter), [])):
                    for ids, rows in parts:
                        table.index_add_(0, ids, rows.float() * weights[task])
                result[id(parameter)] = table
        return result

    def clear(self) -> None:
        """Forgets what was written; the buffers stay."""
        if self._stack is not None:
            self._stack.zero_()
        self._rows.clear()
        self._shards.clear()
        self._dropped.clear()
        self._held.clear()
        self._uses.clear()

    def nbytes(self) -> int:
        """Bytes held now."""
        tensors = [*self._shards.values(), *([] if self._stack is None else [self._stack])]
        tensors += [part for rows in self._rows.values() for parts in rows for pair in parts for part in pair]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _allocate(self, device: torch.device) -> None:
        total = sum(parameter.numel() for parameter in self._dense)
        self._stack = torch.zeros(self.num_tasks, total, dtype=self._dtype, device=device)
        start = 0
        for parameter in self._dense:
            stop = start + parameter.numel()
            self._views[id(parameter)] = [row[start:stop].view(parameter.shape) for row in self._stack]
            start = stop


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO 3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _coalesce(parts: list[tuple[Tensor, Tensor]], width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """One row per id: the sums over equal ids, float32 [k, width] on the device of `like`."""
    if not parts:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, width)
    ids = torch.cat([ids for ids, _ in parts])
    rows = torch.cat([rows for _, rows in parts]).float()
    unique, inverse = torch.unique(ids, return_inverse=True)
    return unique, rows.new_zeros(len(unique), width).index_add_(0, inverse, rows)


def _rows_gramian(tasks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Dot products of compact gradients: rows meet where ids are equal."""
    merged = [_coalesce([task], task[1].shape[1], task[1]) for task in tasks]
    result = torch.zeros(len(tasks), len(tasks), device=merged[0][1].device)
    for i, (ids_i, rows_i) in enumerate(merged):
        for j, (ids_j, rows_j) in enumerate(merged[: i + 1]):
            if len(ids_i) and len(ids_j):
                place = torch.searchsorted(ids_j, ids_i).clamp_(max=len(ids_j) - 1)
                same = (ids_j[place] == ids_i).unsqueeze(1)
                result[i, j] = result[j, i] = (rows_i * rows_j[place] * same).sum()
    return result
