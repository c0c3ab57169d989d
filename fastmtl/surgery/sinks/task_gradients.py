"""The sink that shared layers write their T task gradients into, during one backward pass.

Shapes: T tasks, P numbers in the dense shared parameters, V x d an embedding table with compact rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, rows_gramian, weighted_table
from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.jacobian.sketch import CountSketch
from fastmtl.surgery.jacobian.tables import Tables, whole_shape
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.ranks.reduce import Alone, Ranks
from fastmtl.surgery.sinks.early_scatter import EarlyScatter
from fastmtl_kernels import combine, gramian
from fastmtl_kernels.cast import cast
from fastmtl_kernels.upload import upload

Mode = Literal["stack", "keep", "gramian", "weighted", "tensor"]
NOT_ARMED = "the sink was armed in forward but not in backward: keep both inside one `armed` block"
# (index of the parameter, its Gramian [T, T]) -> weights [T]
Solve = Callable[[int, Tensor], Tensor]


class TaskGradients:
    """J of the shared parameters, or what surgery needs of it.

    Handed to the layers in forward; nothing is written unless it is armed, and every write adds (a weight used twice,
    accumulation).

    - `stack`: keeps J, dense parameters in a `Jacobian`, embedding rows as (ids, rows) per task.
      Autograd gets no gradient.
    - `keep`: what T gradients are products of is kept (`KeptGradients`). Autograd gets no gradient.
    - `gramian`: adds a layer's share to G as soon as the layer's backward is done, and drops it.
      Autograd gets no gradient.
    - `weighted`: autograd gets `sum_t weights[t] g_t` for shared parameters; nothing is kept. Inputs' gradients stay
      unweighted.
    - `tensor`: as `weighted`, with weights that are found for each parameter as soon as its T gradients are there.

    `anchor` is a zero scalar that requires a gradient; the embedding takes it as an input. Differentiating a loss for
    it runs every layer's backward without asking autograd for any shared parameter, so no hook on one fires.

    parameters: the trainable shared ones. sparse: those among them whose gradient is compact rows (the word
    embeddings). dtype: of J. ranks: which ranks' gradients make up J. sketch_size: buckets of a count-sketch that
    takes the place of J in G, None for the exact one.

    dense: the parameters that are not in `sparse`. stacks: whether J is what it keeps in a step. early: sends J's
    columns to other ranks during backward, where there are any that want them.
    """

    stacks = True

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        *,
        sparse: Sequence[nn.Parameter] = (),
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
        sketch_size: int | None = None,
    ) -> None:
        self.num_tasks = num_tasks
        self.mode: Mode | None = None
        self.weights: Tensor | None = None
        self._parameters = list(parameters)
        self._sparse = {id(parameter) for parameter in sparse}
        self.dense = [parameter for parameter in self._parameters if id(parameter) not in self._sparse]
        self.dtype = dtype
        self.sketches = sketch_size is not None
        self._ranks = Alone() if ranks is None else ranks
        self._sketch_size = sketch_size
        self._index = {id(parameter): k for k, parameter in enumerate(self._parameters)}
        self._stack: Jacobian | None = None
        self.early: EarlyScatter | None = None
        tables = [parameter for parameter in self._parameters if id(parameter) in self._sparse]
        self._tables = Tables(tables, num_tasks, self._ranks)
        self._shards: dict[int, Tensor] = {}
        self._keep = True
        self._counting = False
        self._uses: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}
        self._dropped: dict[int, Tensor] = {}
        self._reached: set[int] = set()
        self._sketch: CountSketch | None = None
        self._solve: Solve | None = None
        self._largest = 0
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def armed(
        self,
        mode: Mode,
        device: torch.device,
        *,
        weights: Tensor | None = None,
        keep: bool = True,
        solve: Solve | None = None,
    ) -> Iterator[None]:
        """Takes writes inside the block.

        weights: [T] for `weighted`. solve: for `tensor`. keep: for `gramian`, whether this rank's share of J adds up
        over several blocks; without it a gradient goes into G and is dropped as soon as every use of its weight in the
        forward has written, so there may be one block, of one forward, until `clear`. Call `forward_done` in it
        between forward and backward.
        """
        self.arm(mode, device)
        self.weights, self._keep, self._solve = weights, keep, solve
        if mode != "stack":
            self._counting = mode == "tensor" or (mode == "gramian" and not keep and self._sketch is None)
        try:
            yield
        finally:
            self.disarm()

    def arm(self, mode: Mode, device: torch.device) -> None:
        """Takes writes from now on, where forward and backward are not in one block (mode `stack`)."""
        if self.anchor.device != device:
            self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.mode = mode
        if mode == "stack" and self._stack is None:
            self._stack = Jacobian(self.dense, self.num_tasks, self.dtype, device)
            if self.dense and self.scatters and not self.sketches:
                self.early = EarlyScatter(self._stack)
        self._counting = mode == "stack" and self.early is not None

    def disarm(self) -> None:
        self.mode = self.weights = self._solve = None
        self._counting = False
        self._uses.clear()

    def start_sketch(self, seed: int, device: torch.device) -> None:
        """For a step, with hashes of its own; nothing where G is exact."""
        if self._sketch_size is not None:
            self._sketch = CountSketch(self.num_tasks, self._sketch_size, seed, device)

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """A forward uses these: as many writes will come."""
        if self._counting:
            for parameter in parameters:
                self._uses[id(parameter)] = self._uses.get(id(parameter), 0) + 1

    def forward_done(self, *, last: bool = False) -> None:
        """What checkpointing runs again in backward is no use of its own. last: the backward to come is the step's
        last: what it completes of J may go to the other ranks (mode `stack`).
        """
        self._counting = False
        if last and self.early is not None:
            self.early.begin(self._uses)

    def written(self, parameter: nn.Parameter) -> None:
        """A use of a dense parameter has written into `stack_of` it."""
        if self.early is None:
            return
        key = id(parameter)
        if self.early.is_sent(key):
            raise RuntimeError("a weight's task gradients went to the other ranks before its last use had written")
        left = self._uses.get(key, 0) - 1
        self._uses[key] = left
        if left == 0:
            self.early.complete(key)

    def wants(self, parameter: nn.Parameter | None) -> bool:
        """Whether a layer should write this parameter's gradient here."""
        return parameter is not None and parameter.requires_grad and id(parameter) in self._index

    def stack_of(self, parameter: nn.Parameter) -> Jacobian:
        """What takes a dense parameter's gradients in mode `stack`."""
        assert self._stack is not None, "stack_of needs mode stack"
        if id(parameter) in self._sparse:
            raise UserError(
                f"sparse: the parameter of shape {tuple(whole_shape(parameter))} is used by an op with a dense "
                "gradient: leave it out of `sparse`, which is for embedding tables alone"
            )
        return self._stack

    def is_sparse(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._sparse

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Adds [T, *shape] task gradients of a dense parameter (mode `gramian`)."""
        gradients = gradients.reshape(self.num_tasks, -1)
        self._largest = max(self._largest, gradients.nbytes)
        key = id(parameter)
        if self._sketch is not None:
            self._sketch.add(self._index[key], gradients)
        elif self._keep:
            share = self._ranks.scatter(gradients).to(torch.float32)
            held = self._shards.get(key)
            self._shards[key] = share if held is None else held.add_(share)
        elif key in self._dropped:
            raise RuntimeError("a weight's task gradients met in the Gramian before its last use had written")
        else:
            complete = self._complete(key, gradients)
            if complete is not None:
                self._dropped[key] = gramian(self._ranks.scatter(complete).to(torch.float32))

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """[T, *shape] float32 task gradients of a dense parameter -> its gradient for autograd, None where the sink
        keeps them. For the operations of fastmtl_kernels.
        """
        if not self.wants(parameter):
            return gradients.sum(0)
        match self.armed_mode():
            case "stack":
                self.stack_of(parameter).add(parameter, gradients)
                self.written(parameter)
            case "gramian":
                self.add(parameter, gradients)
            case "weighted":
                assert self.weights is not None
                return torch.einsum("t,t...->...", self.weights.float(), gradients)
            case "tensor":
                return self.merge(parameter, gradients)
        return None

    def deliver_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """As `deliver`, of an embedding table that gave its rows `ids` [N], which have the gradients `rows` [N, d];
        token_offsets: host, those of the tasks among the N. For autograd in float32 at least.
        """
        shape, mode = whole_shape(table), self.armed_mode()
        pieces = [slice(start, stop) for start, stop in pairwise(token_offsets)]
        if not self.wants(table) or mode == "weighted":
            # One of two token types' rows adds up thousands: in bfloat16 all after the first 256 could be lost.
            rows = cast(rows, torch.promote_types(rows.dtype, torch.float32))
            if self.wants(table):
                assert self.weights is not None
                counts = upload(torch.tensor([piece.stop - piece.start for piece in pieces]), rows.device)
                per_row = self.weights.float().repeat_interleave(counts, output_size=token_offsets[-1])
                rows = rows[: token_offsets[-1]] * per_row[:, None]
                ids = ids[: token_offsets[-1]]
            return torch.ops.aten.embedding_dense_backward(rows, ids, shape[0], -1, False)
        sizes = [piece.stop - piece.start for piece in pieces]
        sizes.append(len(ids) - token_offsets[-1])  # a masked tail
        task_ids, task_rows = ids.split(sizes)[:-1], rows.split(sizes)[:-1]
        if self.is_sparse(table) and mode == "tensor":
            return self.merge_rows(table, list(task_ids), list(task_rows))
        if not self.is_sparse(table) and mode != "stack":

            def dense(ids: Tensor, rows: Tensor) -> Tensor:  # float32: two rows (token types) add up thousands
                zeros = rows.new_zeros(shape, dtype=torch.float32)
                return zeros.index_add_(0, ids, cast(rows, torch.float32))

            return self.deliver(table, torch.stack([dense(*pair) for pair in zip(task_ids, task_rows, strict=True)]))
        for task, pair in enumerate(zip(task_ids, task_rows, strict=True)):
            if self.is_sparse(table):
                self.add_rows(table, task, *pair)
            elif len(pair[0]):
                self.stack_of(table).add_rows(table, task, *pair)
        if not self.is_sparse(table):
            self.written(table)
        return None

    def armed_mode(self) -> Mode:
        """In backward, of a sink that was armed in forward. Raises RuntimeError where it is not armed any more."""
        if self.mode is None:
            raise RuntimeError(NOT_ARMED)
        return self.mode

    def merge(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """[T, *shape] task gradients of a dense parameter -> the merged one for autograd, with the last use of it
        (mode `tensor`).
        """
        assert self._solve is not None
        self._largest = max(self._largest, gradients.nbytes)
        complete = self._complete(id(parameter), gradients)
        if complete is None:
            return None
        share = self._ranks.scatter(complete.reshape(self.num_tasks, -1)).to(torch.float32)
        weights = self._solve(self._index[id(parameter)], self._ranks.total(gramian(share)))
        return combine([[gradient] for gradient in complete.unbind()], weights)[0]

    def merge_rows(self, parameter: nn.Parameter, ids: list[Tensor], rows: list[Tensor]) -> Tensor:
        """T tasks' rows ids [k], rows [k, d] of a table -> the merged dense gradient (mode `tensor`)."""
        assert self._solve is not None
        shape, like = whole_shape(parameter), rows[0]
        parts = [[part] for part in zip(ids, rows, strict=True)]
        (tasks,) = self._ranks.gather_rows([coalesce(parts, shape, like)], [shape])
        weights = self._solve(self._index[id(parameter)], rows_gramian(tasks))
        return weighted_table(shape, parts, weights).to(like.dtype)

    def check_merged(self, names: Mapping[int, str]) -> None:
        """After the backward of mode `tensor`: raises UserError for a parameter of which a use is out of the loss."""
        for key in self._held:
            raise UserError(
                f"scope='tensor': {names[key]} is used more than once and the loss depends on some of the uses only, "
                "so its gradient would be lost; use scope='global'"
            )

    def _complete(self, key: int, gradients: Tensor) -> Tensor | None:
        """The sum over all uses of a weight with the last of them, None before."""
        if key in self._held:
            gradients = gradients + self._held.pop(key)
        self._uses[key] -= 1
        if self._uses[key] > 0:
            self._held[key] = gradients
            return None
        return gradients

    def add_rows(self, parameter: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """Adds gradient rows [k, d] of table rows ids [k] for one task (modes `stack` and `gramian`)."""
        if self._sketch is not None:
            self._sketch.add_rows(self._index[id(parameter)], task, ids, rows)
            if self.mode == "gramian":
                return
        self._tables.add(parameter, task, ids, rows)

    def gramian(self) -> Tensor:
        """G = J J^T of what was written since `clear`, float32 [T, T], over the ranks that make up J."""
        if self._sketch is not None:
            if self._stack is not None:
                for parameter in self.dense:
                    self._sketch.add(self._index[id(parameter)], self._stack.of(parameter).flatten(1))
            self._ranks.total(self._sketch.values)
            return self._sketch.gramian()
        total = torch.zeros(self.num_tasks, self.num_tasks, device=self.anchor.device)
        if self._stack is not None:
            total += gramian(self._stack.complete() if self.early is None else self.early.shares())
        for shard in self._shards.values():
            total += gramian(shard)
        for part in self._dropped.values():
            total += part
        for held in self._held.values():  # a use that the loss does not depend on never writes
            total += gramian(self._ranks.scatter(held).to(torch.float32))
        return self._ranks.total(total) + self._tables.gramian(total.device)

    def combine(self, weights: Tensor, *, narrow: bool = False) -> Merged:
        """sum_t weights[t] g_t for every shared parameter by id(parameter), float32 (mode `stack`). narrow: dense
        parameters' of their dtype, where all have one of 16 bits; what is added up in float32 is rounded once.
        """
        assert self._stack is not None, "combine needs mode stack"
        self._stack.complete()
        dtype = self._stack.narrow if narrow else torch.float32
        merged = self._stack.split(self._stack.merge(weights, dtype))
        merged.update(self._tables.merged(weights))
        return merged

    def unmerged(self, weights: Tensor) -> tuple[dict[int, list[Tensor]], dict[int, Rows]]:
        """For whoever merges on the way, by id: the T gradients of dense parameters, views of J that the next write
        overwrites, and of tables the rows that occur, already merged with `weights` (mode `stack`).
        """
        assert self._stack is not None, "unmerged needs mode stack"
        return self._stack.rows(), self._tables.merged_rows(weights)

    def reach(self, parameter: nn.Parameter) -> None:
        """Says that a loss depends on the parameter, with a gradient of zero that need not be written."""
        self._reached.add(id(parameter))

    def reached(self) -> set[int]:
        """Return ids of the parameters that a loss has reached since `clear`, be it with zeros (mode `stack`)."""
        assert self._stack is not None, "reached needs mode stack"
        return self._reached | self._stack.reached | self._tables.reached()

    @property
    def scatters(self) -> bool:
        """Whether J is a sum over ranks, so that G is made of collectives."""
        return self._ranks.many

    def stacked(self) -> tuple[Jacobian, Tables]:
        """J: of the dense parameters, and rows of the sparse ones (mode `stack`)."""
        assert self._stack is not None, "stacked needs mode stack"
        return self._stack, self._tables

    def clear(self) -> None:
        """Forgets what was written; the buffers stay."""
        if self._stack is not None:
            self._stack.clear()
        if self.early is not None:
            self.early.reset()
        self._tables.clear()
        self._reached.clear()
        self._shards.clear()
        self._dropped.clear()
        self._held.clear()
        self._sketch = None
        self._largest = 0

    def nbytes(self) -> int:
        """Bytes of J, its shards, sketch and compact rows as they are now, and of the largest piece in passing."""
        return self._largest + sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """J, its shards, sketch and compact rows as they are now."""
        tensors = [*self._shards.values(), *self._held.values()]
        tensors += [] if self._stack is None else [self._stack.buffer]
        tensors += [] if self._sketch is None else [self._sketch.values]
        return tensors + self._tables.tensors()
